"""Products in fewer digits than float32's are named, and excuse nothing else."""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import lax
from jax.experimental import pallas as pl
from jax.lax import DotAlgorithm, DotAlgorithmPreset, Precision

import jaxgrad
from jaxgrad.precision import (
    Backend,
    at_highest,
    backend_of,
    gradient_of,
    in_force,
    products,
)

CPU, TPU = Backend("cpu"), Backend("tpu")
V100, A100, H100 = (Backend("gpu", c) for c in [(7, 0), (8, 0), (9, 0)])
AMD = Backend("gpu")
LEVELS = {level: (level, level) for level in Precision}
# The only algorithm of fewer digits that JAX's CPU backend computes for float32.
HALF = "F16_F16_F16"
BF16, F32 = np.dtype(jnp.bfloat16), np.dtype(np.float32)


@pytest.mark.parametrize(
    ("precision", "backend", "expected"),
    [
        (None, CPU, None),
        (LEVELS[Precision.DEFAULT], CPU, None),
        (None, V100, None),
        (None, AMD, None),
        (None, A100, "TF32"),
        (None, H100, "TF32"),
        (LEVELS[Precision.DEFAULT], H100, "TF32"),
        (LEVELS[Precision.HIGH], H100, "TF32"),
        (LEVELS[Precision.HIGHEST], H100, None),
        ((Precision.HIGHEST, Precision.DEFAULT), A100, "TF32"),
        (None, TPU, "bfloat16"),
        (LEVELS[Precision.DEFAULT], TPU, "bfloat16"),
        (LEVELS[Precision.HIGH], TPU, "three passes of bfloat16"),
        (LEVELS[Precision.HIGHEST], TPU, None),
        (DotAlgorithmPreset.DEFAULT, A100, "TF32"),
        (DotAlgorithmPreset.DEFAULT, CPU, None),
        (DotAlgorithmPreset.TF32_TF32_F32, A100, "TF32 (TF32_TF32_F32)"),
        (DotAlgorithmPreset.TF32_TF32_F32_X3, A100, None),
        (DotAlgorithmPreset.F32_F32_F32, H100, None),
        (DotAlgorithmPreset.BF16_BF16_F32, H100, "bfloat16 (BF16_BF16_F32)"),
        (DotAlgorithmPreset.BF16_BF16_F32_X3, TPU, "bfloat16 (BF16_BF16_F32_X3)"),
        (DotAlgorithmPreset.BF16_BF16_F32_X6, TPU, None),
        (DotAlgorithmPreset.BF16_BF16_F32_X9, H100, None),
        (DotAlgorithmPreset.F16_F16_F16, CPU, "float16 (F16_F16_F16)"),
        (DotAlgorithm(BF16, BF16, F32), H100, "bfloat16 (a DotAlgorithm)"),
        (DotAlgorithm(BF16, BF16, F32, 3, 3, 6), H100, None),
        (DotAlgorithm(F32, F32, F32), H100, None),
    ],
)
def test_what_float32_is_multiplied_in(precision, backend, expected):
    found = in_force("dot_general", precision, F32, backend)
    assert (found and found[0]) == expected


def test_a_convolution_takes_an_algorithm_for_the_default():
    algorithm = DotAlgorithmPreset.F32_F32_F32
    convolution = functools.partial(in_force, "conv_general_dilated", algorithm, F32)
    assert [convolution(b) for b in (CPU, A100)] == [None, ("TF32", 11)]


def test_float64_is_only_lowered_by_an_algorithm():
    wide = np.dtype(np.float64)
    for backend in (CPU, A100, TPU):
        assert in_force("dot_general", None, wide, backend) is None
        half = in_force("dot_general", DotAlgorithmPreset.F32_F32_F32, wide, backend)
        assert half == ("float32 (F32_F32_F32)", 24)


OPERATIONS = {
    "dot_general": lambda x, y, p: lax.dot(x, y, precision=p),
    "ragged_dot_general": lambda x, y, p: lax.ragged_dot(
        x, y[None], jnp.array([len(x)]), precision=p
    ),
    "conv_general_dilated": lambda x, y, p: lax.conv_general_dilated(
        x[None, None], y[None, None, :3, :3], (1, 1), "SAME", precision=p
    ),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_it_is_what_the_cpu_really_computes(operation, dtype):
    """Whatever rounds its operands is off by half a unit of them, about."""
    product, dtype = OPERATIONS[operation], np.dtype(dtype)
    x, y = np.random.default_rng(0).normal(size=(2, 32, 32)).astype(dtype)
    names = ["BF16_BF16_F32", "BF16_BF16_F32_X3", "F32_F32_F32", "F64_F64_F64", HALF]
    with jax.enable_x64(True):
        right = product(jnp.asarray(x, np.float64), jnp.asarray(y, np.float64), None)
        right = np.asarray(right)
        for precision in [*LEVELS.values(), *(DotAlgorithmPreset[n] for n in names)]:
            out = np.asarray(product(jnp.asarray(x), jnp.asarray(y), precision))
            off = np.linalg.norm(out - right) / np.linalg.norm(right)
            found = in_force(operation, precision, dtype, CPU)
            # A sum of 32 rounded products, with room on both sides; in X3 the CPU
            # computes float32, with more bits than the 16 that the algorithm has.
            bits = found[1] if found else jnp.finfo(dtype).nmant + 1
            assert off < 2.0 ** (1 - bits), precision
            if found and not str(precision).endswith("X3"):
                assert off > 2.0 ** (-3 - bits), precision


def test_where_a_program_runs():
    def array(platform, committed, **device):
        device = SimpleNamespace(platform=platform, **device)
        return SimpleNamespace(committed=committed, devices=lambda: [device])

    gpu = array("gpu", True, compute_capability="9.0")
    amd = array("gpu", True, compute_capability="gfx942")
    assert backend_of([np.ones(3), array("cpu", False), gpu]) == H100
    assert backend_of([array("tpu", True), gpu]) == TPU
    assert backend_of([amd]) == AMD
    assert backend_of([jnp.ones(3)]) == backend_of([]) == CPU


def draw(key, *shape):
    return jax.random.normal(jax.random.key(key), shape)


X = draw(1, 32, 8)


def loss(params, x, precision=None):
    h = jnp.tanh(jnp.dot(x, params["first"], precision=precision))
    return jnp.mean(jnp.dot(h, params["last"], precision=precision) ** 2)


LINE = loss.__code__.co_firstlineno + 1
LOW = functools.partial(loss, precision=HALF)
PARAMS = {"first": draw(2, 8, 16), "last": draw(3, 16, 4)}


def cancelling(params, x, precision=HALF):
    """What float32 loses more than half of its digits in, beside the products."""
    large = 1e6 + params["last"]
    return loss(params, x, precision) + jnp.mean((large - jnp.mean(large)) ** 2)


def module_of(params):
    """The same in PyTorch."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, leaf in params.items():
                tensor = torch.from_numpy(np.array(leaf))
                self.register_parameter(name, torch.nn.Parameter(tensor))

        def forward(self, x):
            return torch.tanh(x @ self.first) @ self.last

    return Model()


def check(loss):
    return jaxgrad.check_gradient(loss, PARAMS, X)


def square(module, x):
    return (module(x) ** 2).mean()


def compare(loss, torch_loss=square):
    module = module_of(PARAMS)
    return jaxgrad.compare_with_torch(
        loss, PARAMS, X, module=module, torch_loss=torch_loss
    )


INSTRUMENTS = {
    "check": check,
    "trace": lambda loss: jaxgrad.trace_gradient(loss, PARAMS, X),
    "explain": lambda loss: jaxgrad.explain_step(loss, PARAMS, X, learning_rate=0.1),
    "compare": compare,
}


def said(report):
    return [f.text for f in report.findings if f.kind == "matmul_precision"]


@jax.custom_vjp
def dense(weight, x):
    return x @ weight


def backward(residuals, g):
    weight, x = residuals
    return lax.dot(x.T, g, precision=HALF), g @ weight.T


dense.defvjp(lambda weight, x: (x @ weight, (weight, x)), backward)


def low_backward(params, x):
    return jnp.mean((jnp.tanh(dense(params["first"], x)) @ params["last"]) ** 2)


@pytest.mark.parametrize("instrument", INSTRUMENTS)
def test_each_instrument_says_which_precision_is_in_force_and_where(instrument):
    report = INSTRUMENTS[instrument](LOW)
    (text,) = said(report)
    assert "float32 matrices are multiplied in float16 (F16_F16_F16)" in text
    assert f"first in `loss` (test_precision.py, line {LINE})" in text
    assert '`precision="highest"` there' in text
    assert "matmul precision" in str(report)
    assert report.to_dict()["findings"][0]["kind"] == "matmul_precision"
    assert len(said(INSTRUMENTS[instrument](low_backward))) == 1
    assert said(INSTRUMENTS[instrument](loss)) == []


def test_the_backends_default_is_named(monkeypatch):
    monkeypatch.setattr("jaxgrad.precision.backend_of", lambda arrays: A100)
    for instrument in ("check", "trace", "explain"):
        (text,) = said(INSTRUMENTS[instrument](loss))
        assert "are multiplied in TF32" in text
        assert f"line {LINE}), by this backend's default" in text
        assert 'with `jax.default_matmul_precision("highest")` around' in text


def test_an_imprecise_gradient_has_its_cause():
    report = check(LOW)
    assert report.ok
    imprecise = [leaf for leaf in report.leaves if leaf.verdict == "imprecise"]
    assert imprecise
    for leaf in imprecise:
        assert leaf.digits < 3.5
        assert leaf.cause.kind == "matmul_precision"
        assert "decimal digits are left in float32, since float32" in leaf.cause.text
        digits = re.search(r"It has (\d\.\d) digits with", leaf.cause.text)
        assert float(digits[1]) > 6
    assert leaf.cause.text in " ".join(str(report).split())


def test_a_precision_around_the_call_is_found_too():
    with jax.default_matmul_precision(HALF):
        report = check(loss)
    causes = {leaf.cause.kind for leaf in report.leaves if leaf.cause}
    assert causes == {"matmul_precision"}
    assert report.evaluations == check(loss).evaluations  # nothing is measured twice


def overflowing(array):
    """Its gradient is 90,000, beyond float16."""
    return jnp.sum(jnp.dot(array, 9e4 * jnp.eye(4), precision=HALF))


def test_a_gradient_that_overflows_in_float16_has_its_cause():
    report = check(lambda p, x: LOW(p, x) + overflowing(p["last"]))
    leaf = next(leaf for leaf in report.leaves if leaf.path == "last")
    assert (leaf.verdict, leaf.cause.kind) == ("nonfinite", "matmul_precision")


def wrong_backward(residuals, g):
    weight, x = residuals
    return 1.01 * lax.dot(x.T, g, precision=HALF), g @ weight.T


def test_a_wrong_rule_is_not_excused():
    @jax.custom_vjp
    def dense(weight, x):
        return x @ weight

    dense.defvjp(lambda weight, x: (x @ weight, (weight, x)), wrong_backward)

    def wrong(params, x):
        h = jnp.tanh(dense(params["first"], x)) @ params["last"]
        return jnp.mean(h**2) + overflowing(params["last"])

    report = check(wrong)
    first = next(leaf for leaf in report.leaves if leaf.path == "first")
    assert (first.verdict, first.cause.kind) == ("wrong", "factor")
    assert len(said(report)) == 1
    assert not report
    # Nor is another leaf, though the highest precision would do for it.
    last = next(leaf for leaf in report.leaves if leaf.path == "last")
    assert (last.verdict, last.cause) == ("nonfinite", None)


def test_digits_that_are_lost_elsewhere_are_not_excused():
    last = next(leaf for leaf in check(cancelling).leaves if leaf.path == "last")
    assert (last.verdict, last.cause) == ("imprecise", None)
    assert "most are lost by" in last.text


def squared_by_a_kernel(slope):
    """A square as a kernel, which can't be evaluated in float64, and its rule."""

    def kernel(x_ref, out_ref):
        out_ref[:] = x_ref[:] ** 2

    @jax.custom_vjp
    def square(x):
        return pl.pallas_call(kernel, x, interpret=True)(x)

    square.defvjp(lambda x: (square(x), x), lambda x, ct: (slope * x * ct,))
    return square


@pytest.mark.parametrize(("slope", "right"), [(2.0, True), (2.01, False)])
def test_where_nothing_is_wider_the_highest_precision_decides(slope, right):
    def kernel_loss(params, x, precision=HALF):
        h = jnp.dot(x, params["first"], precision=precision)
        square = squared_by_a_kernel(slope) if precision else jnp.square
        return jnp.mean(square(h))

    params = {"first": PARAMS["first"]}
    report = jaxgrad.check_gradient(
        kernel_loss, params, X, reference=functools.partial(kernel_loss, precision=None)
    )
    (leaf,) = report.leaves
    assert report.ok == right
    assert leaf.verdict == ("imprecise" if right else "wrong")
    assert (leaf.cause.kind == "matmul_precision") == right


def test_a_port_that_multiplies_in_fewer_digits():
    report = compare(LOW)
    assert not report
    assert [cause.kind for cause in report.causes] == ["matmul_precision"]
    assert f"line {LINE}" in report.causes[0].text
    differing = [p for p in report.parameters if p.verdict == "differs"]
    assert differing
    assert {p.cause.kind for p in differing} == {"matmul_precision"}


def test_a_wrong_port_is_not_excused():
    report = compare(LOW, lambda module, x: 2 * square(module, x))
    assert not report
    assert [cause.kind for cause in report.causes] == ["factor"]


def test_a_port_that_loses_digits_elsewhere_too_has_no_such_cause():
    def torch_loss(module, x):
        return square(module, x) + module.last.var(unbiased=False)

    report = compare(cancelling, torch_loss)
    assert {p.verdict for p in report.parameters} == {"rounding"}
    assert max(p.relative_error for p in report.parameters) > 3e-4
    assert report.causes == ()
    assert len(said(report)) == 1


def in_a_scan(w, x):
    return lax.scan(lambda h, _: (dot(h, w), None), x, length=3)[0]


def in_a_branch(w, x):
    return lax.cond(w[0, 0] > 9, jnp.sin, lambda h: dot(h, w), x)


def in_a_while_loop(w, x):
    def body(state):
        return state[0] + 1, dot(state[1], lax.stop_gradient(w))

    start = 0, lax.stop_gradient(x)
    return x * w * lax.while_loop(lambda state: state[0] < 3, body, start)[1]


def in_a_linear_solve(w, x):
    matrix = jnp.eye(8) + 0.1 * w
    return lax.custom_linear_solve(
        lambda v: dot(matrix, v), x.T, lambda _, b: jnp.linalg.solve(matrix, b),
        lambda _, b: jnp.linalg.solve(matrix.T, b),
    )  # fmt: skip


def dot(x, w):
    return lax.dot(x, w, precision=HALF)


@pytest.mark.parametrize(
    "function",
    [
        jax.jit(lambda w, x: dot(x, w)),
        jax.checkpoint(lambda w, x: jnp.sin(dot(x, w))),
        jax.vmap(lambda w, x: dot(x[None], w), in_axes=(None, 0)),
        in_a_scan,
        in_a_branch,
        in_a_while_loop,
        in_a_linear_solve,
    ],
)
def test_at_the_highest_precision_nothing_is_lowered(function):
    w, x = 0.3 * draw(4, 8, 8), draw(5, 8, 8)
    closed = jax.make_jaxpr(lambda w, x: jnp.sum(jnp.tanh(function(w, x))))(w, x)
    gradient = gradient_of(closed, 2)
    highest = at_highest(gradient)
    found = products(gradient, CPU)
    assert found
    assert {product.place.function for product in found} <= {"dot", "in_a_linear_solve"}
    assert products(highest, CPU) == []
    low, full = (jax.core.eval_jaxpr(c.jaxpr, c.consts, w, x)[0] for c in
                 (gradient, highest))  # fmt: skip
    off = float(jnp.linalg.norm(low - full) / jnp.linalg.norm(full))
    # float16 rounds to 5e-4; three products in a row enlarge it, to less than tenfold.
    assert 1e-5 < off < 1e-2
