"""What `trace_gradient` once got wrong: each case that ever failed, and stays right."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from jaxgrad import trace_gradient

P = {"w": jnp.float32(2.0), "b": jnp.float32(0.5)}
X = jnp.array([1.0, -1.0, 3.0])


def params(w, b=1.0):
    return {"w": jnp.asarray(w, jnp.float32), "b": jnp.float32(b)}


def vanishing(p):
    h = p["w"]
    for _ in range(600):
        h = jnp.sin(h) + p["b"]
    return h


def dropped_carry(p, xs):
    def step(carry, x):
        return (carry[0] + p["b"] * x, carry[1] + p["w"] * x), None

    return lax.scan(step, (0.0, 0.0), xs)[0][0] ** 2


def overwritten_carry(p, xs):
    return lax.scan(lambda h, x: (jnp.tanh(x * p["b"]), None), p["w"], xs)[0] ** 2


def dead_at_a_late_row(p, xs):
    def step(h, x):
        h = jax.nn.relu(h * p["b"] + x)
        return h, h

    return lax.scan(step, p["w"], xs)[1][-1] ** 2


def batch_of_branches(p, x, which):
    branches = [lambda x: x * p["w"], lambda x: x * p["b"]]
    return jnp.sum(jax.vmap(lambda x, i: lax.switch(i, branches, x))(x, which) ** 2)


def experts(p, x, gates):
    outputs = jnp.stack([x * p["b"], x * p["w"]], 1)
    return jnp.mean(jnp.einsum("be,bed->bd", gates, outputs) ** 2)


def residual(p):
    return X * p["w"] - 2 * X


ZEROS = {
    "a batch of padding only": (
        lambda p, m: jnp.sum(((X * p["w"] - 1) * m) ** 2) + p["b"] ** 2,
        (P, jnp.zeros(3)),
        "zero factor",
    ),
    "a margin that is met": (
        lambda p: jnp.sum(jax.nn.relu(1 - jnp.abs(X) * p["w"]) ** 2) + p["b"] ** 2,
        (params(50.0),),
        "flat",
    ),
    "a saddle": (
        lambda p: jnp.mean(((X * p["w"]) ** 2 + p["b"] - 9) ** 2),
        (params(0.0, 0.2),),
        "stationary",
    ),
    "a maximum": (
        lambda p: jnp.cos(p["w"]) + p["b"] ** 2,
        (params(0.0),),
        "stationary",
    ),
    "an inflection": (
        lambda p: p["w"] ** 3 + p["b"] ** 2,
        (params(0.0),),
        "stationary",
    ),
    "a chain that vanishes": (vanishing, (params(0.7, 0.2),), "underflow"),
    "a carry that is dropped": (dropped_carry, (P, X), "discarded"),
    "a carry that is overwritten": (overwritten_carry, (P, X), "discarded"),
    "dead at row 300": (
        dead_at_a_late_row,
        (params(1.0, 0.99), jnp.full(400, 0.01).at[300].set(-1e4)),
        "flat",
    ),
    "a batch of branches": (
        batch_of_branches,
        (P, X, jnp.ones(3, int)),
        "branch not taken",
    ),
    "where, then a square": (
        lambda p, m: jnp.sum(jnp.where(m, X * p["w"] - 1, 0.0) ** 2) + p["b"] ** 2,
        (P, jnp.zeros(3, bool)),
        "branch not taken",
    ),
    "an expert that is not chosen": (
        experts,
        (P, jnp.ones((4, 2)), jnp.array([[1.0, 0.0]] * 4)),
        "zero factor",
    ),
    "a product of small numbers": (
        lambda p: jnp.prod(p["w"] * jnp.full(20, 1e-3)) + p["b"] ** 2,
        (P,),
        "underflow",
    ),
    "a reciprocal far away": (
        lambda p: 1 / p["w"] + p["b"] ** 2,
        (params(1e25),),
        "underflow",
    ),
    "not among the top": (
        lambda p: jnp.sum(
            lax.top_k(jnp.concatenate([X * p["b"], X * p["w"]]), 1)[0] ** 2
        ),
        (params(0.1, 9.0),),
        "maximum's loser",
    ),
    "bits": (
        lambda p: (lax.bitcast_convert_type(p["w"], jnp.int32) >> 23) * p["b"] ** 2,
        (P,),
        "integer cast",
    ),
}


@pytest.mark.parametrize("name", ZEROS)
def test_what_stops_it(name):
    loss, operands, reason = ZEROS[name]
    trace = trace_gradient(loss, *operands)
    assert {block.reason for block in trace.blocked["w"]} == {reason}
    assert not trace


def test_late_rows_have_their_iteration():
    loss, operands, _ = ZEROS["dead at row 300"]
    assert trace_gradient(loss, *operands).blocked["w"][0].iteration == 300


@pytest.mark.parametrize(
    "loss",
    [
        lambda p: optax.huber_loss(X * p["w"], 2 * X).sum() + p["b"] ** 2,
        lambda p: optax.log_cosh(X * p["w"], 2 * X).sum() + p["b"] ** 2,
        lambda p: residual(p) @ jnp.eye(3) @ residual(p) + p["b"] ** 2,
        lambda p: jnp.sum(residual(p) * jnp.abs(X) * residual(p)) + p["b"] ** 2,
        lambda p: jnp.sum(jnp.abs(residual(p)) ** 3) + p["b"] ** 2,
    ],
    ids=["huber", "log_cosh", "form", "weighted", "cube"],
)
def test_a_fit_that_has_converged_is_at_a_minimum(loss):
    trace = trace_gradient(loss, params(2.0))
    assert {block.reason for block in trace.blocked["w"]} == {"at a minimum"}
    assert trace


def test_odd_leaves():
    assert trace_gradient(
        lambda p: jnp.sum(p["e"]) + p["b"] ** 2, {"e": jnp.zeros(0), "b": jnp.ones(())}
    )
    small = {"w": jnp.ones(30, jnp.float8_e4m3fn)}
    trace = trace_gradient(lambda p: jnp.sum(p["w"].astype(jnp.float32)), small)
    assert "float" not in str(trace)
    chart = trace_gradient(lambda p: p["nan"] ** 2, {"nan": jnp.float32(2)})
    assert '(["nan<br/>gradient 4"]):::leaf' in chart.to_mermaid()


# A NaN: its line, and code that mends it


def inverted(p):
    return jnp.sum(jnp.where(p == 0, 0.0, p * jnp.log(p)))


def mixed(p):
    return jnp.sum(jnp.where(p > 0, jnp.sqrt(jnp.abs(p)), p))


def cube_root(p):
    return jnp.sum(p ** (1 / 3))


def angle(p):
    return jnp.sum(jnp.arccos(p + 1))


def quotient(p):
    return jnp.sum((p + 1) / p)


@pytest.mark.parametrize(
    ("loss", "code"),
    [
        (inverted, ("jnp.where(~(p == 0), p, 1.0)", "jnp.log(safe)")),
        (mixed, ("jnp.where(p > 0, jnp.abs(p), 1.0)", "jnp.sqrt(safe)")),
        (cube_root, ("jnp.where(p > 0, p, 1.0)", "safe ** (1 / 3)")),
        (angle, ("jnp.where(jnp.abs(p + 1) < 1, p + 1, 0.0)", "jnp.arccos(safe)")),
        (quotient, ("jnp.where(p != 0, p, 1.0)", "(p + 1) / safe")),
    ],
    ids=["inverted", "mixed", "power", "angle", "quotient"],
)
def test_the_repair_mends(loss, code):
    point = jnp.array([0.0, -0.5 if loss is angle else 0.5])
    origin = trace_gradient(loss, point).first_nonfinite
    assert all(part in origin.repair for part in code)
    first, second = (line.strip() for line in origin.repair.splitlines()[1:])

    def mended(p):
        scope = {"jnp": jnp, "p": p}
        exec(first, scope)
        return jnp.sum(eval(second, scope))

    assert np.isfinite(jax.grad(mended)(point)).all()


def test_several_calls_on_a_line_get_no_code_of_one():
    def loss(u):
        return jnp.sum(-jnp.log(-jnp.log(u)))

    origin = trace_gradient(loss, jnp.array([1.0, 0.5])).first_nonfinite
    assert "jnp.where(ok, x, 1.0)" in origin.repair


def test_a_root_under_a_quotient_is_mended_under_the_root():
    def loss(x):
        return jnp.sum((x - x.mean()) / x.std())

    origin = trace_gradient(loss, jnp.ones(3)).first_nonfinite
    assert "under the root" in origin.repair


def test_a_log_before_softmax_is_the_logs():
    def loss(w):
        logits = jnp.log(w)
        return jnp.sum(jax.nn.softmax(logits) ** 2)

    origin = trace_gradient(loss, jnp.zeros(3)).first_nonfinite
    assert (origin.kind, origin.text) == ("log of zero", "logits = jnp.log(w)")


@pytest.mark.parametrize("cast", [bool, jnp.float32])
def test_a_nan_that_xla_folds_away_is_named_all_the_same(cast):
    """Compiled, 0 times infinity is 0 here; without `jit` JAX's gradient is NaN."""
    mask = jnp.arange(3) > 0

    def loss(w):
        return jnp.sum(jnp.sqrt(w * mask.astype(cast)))

    assert np.isnan(jax.grad(loss)(jnp.ones(3))).any()
    trace = trace_gradient(loss, jnp.ones(3))
    assert trace.first_nonfinite.kind == "infinite slope"
    assert trace.first_nonfinite.harmless == np.isfinite(trace.gradient).all()


def test_a_masked_softmax_that_is_dropped_is_harmless():
    def loss(w, mask):
        p = jax.nn.softmax(jnp.where(mask, w, -jnp.inf))
        return jnp.sum(w**2) + jnp.sum(jnp.where(mask, lax.stop_gradient(p), 0.0))

    origin = trace_gradient(loss, jnp.ones(3), jnp.zeros(3, bool)).first_nonfinite
    assert (origin.kind, origin.harmless) == ("empty softmax", True)


def test_a_library_s_own_literal():
    def loss(w):
        return jnp.sum(jax.ops.segment_max(w, jnp.array([0, 0, 2]), 3))

    origin = trace_gradient(loss, jnp.ones(3)).first_nonfinite
    assert "which a library starts from, is left" in origin.reason
    assert "jnp.isfinite" in origin.repair


def test_a_nan_of_a_hand_written_rule_is_the_rule_s():
    @jax.custom_vjp
    def double(x):
        return 2 * x

    def backward(_, g):
        return (g * jnp.nan,)

    double.defvjp(lambda x: (2 * x, None), backward)
    origin = trace_gradient(lambda x: double(x) ** 2, 1.0).first_nonfinite
    assert (origin.kind, origin.phase) == ("custom rule", "backward")
    assert origin.text == "return (g * jnp.nan,)"


def test_a_where_that_drops_nothing_is_not_blamed():
    def loss(w, m):
        kept = jnp.where(w > -1, jnp.sqrt(w * 1.0), 0.0)
        return jnp.sum(kept * m)

    origin = trace_gradient(loss, jnp.array([0.0, 1.0]), jnp.array([0.0, 1.0]))
    assert "`where`" not in origin.first_nonfinite.reason


def test_a_derivative_inside_of_the_loss():
    def loss(w):
        return jax.grad(lambda x: jnp.sqrt(x) * w)(0.0)

    origin = trace_gradient(loss, 2.0).first_nonfinite
    assert "a derivative that the loss itself takes" in origin.reason


def test_drawing_of_scalars_that_have_no_derivative():
    def loss(w, n):
        steps = lax.while_loop(lambda s: s < n, lambda s: s + 1.0, 0.0)
        return w * steps * jnp.nextafter(lax.stop_gradient(w), 9.0)

    trace = trace_gradient(loss, 2.0, 3.0)
    assert trace.to_mermaid()
    assert all(isinstance(step.local_derivatives, tuple) for step in trace.steps)
