"""Tests `trace_gradient`: its steps, their numbers and lines, their inside, its print.

Where a gradient goes bad or dies is in test_faults.py, on a corpus of its own.
"""

import json
import linecache
import os
import re

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from corpus import CASES
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import jaxgrad
from jaxgrad import trace_gradient

# Every fourth one, to keep the suite short; `make corpus-test` takes them all.
SOME = CASES if os.environ.get("JAXGRAD_WHOLE_CORPUS") else CASES[::4]


def neuron(params, x, y):
    prediction = params["w"] * x + params["b"]
    error = prediction - y
    return error**2


NEURON = ({"w": jnp.array(0.5), "b": jnp.array(0.3)}, 2.0, 5.0)


def by_operation(trace, name):
    return [step for step in trace.steps if step.operation == name]


# The gradient is JAX's


@pytest.mark.parametrize("case", SOME, ids=[case.name for case in SOME])
def test_gradient_is_that_of_jax(case):
    problem = case.build()
    operands = problem.params, *problem.args
    with jax.enable_x64(case.x64):
        trace = trace_gradient(problem.loss, *operands)
        if trace.not_differentiable:  # `grad` refuses them
            return
        value, gradient = jaxgrad.value_and_grad(problem.loss)(*operands)
    chex.assert_trees_all_equal_structs(trace.gradient, gradient)
    assert trace.loss == pytest.approx(float(value), rel=1e-5)
    for ours, right in zip(
        jax.tree.leaves(trace.gradient), jax.tree.leaves(gradient), strict=True
    ):
        assert ours.dtype == right.dtype
        # Both are compiled, and fused otherwise: a few roundings apart.
        eps = float(jnp.finfo(right.dtype).eps) ** 0.75
        ours, right = (np.asarray(x, np.float64) for x in (ours, right))
        assert np.linalg.norm(ours - right) <= eps * np.linalg.norm(right)


@jax.custom_jvp
def straight_through(x):
    return jnp.round(x)


straight_through.defjvp(lambda primals, tangents: (jnp.round(*primals), *tangents))


@pytest.mark.parametrize(
    ("loss", "point", "right"),
    [
        (jax.nn.relu, 0.0, 0.0),
        (lambda x: 2 * straight_through(x), 1.3, 2.0),
        (lambda x: jnp.maximum(x, 0.0), 0.0, 0.5),
        (lambda x: jnp.linalg.eigvalsh(x * jnp.eye(3)).sum() * 2, 1.0, 6.0),
        (lambda x: -0.0 * x, 2.0, -0.0),
    ],
    ids=["relu", "straight_through", "maximum", "eigvalsh", "negative_zero"],
)
def test_rules_are_kept(loss, point, right):
    """Each equation differentiated by itself gives 0.5 for relu, NaN for eigvalsh."""
    trace = trace_gradient(loss, point)
    assert float(trace.gradient) == float(jax.grad(loss)(point)) == right
    assert np.signbit(trace.gradient) == np.signbit(right)


def test_compiled_or_not_it_is_the_same():
    with jax.disable_jit():
        plain = trace_gradient(neuron, *NEURON)
    traced = trace_gradient(jax.jit(neuron), *NEURON)
    chex.assert_trees_all_equal(plain.gradient, traced.gradient)
    assert [s.operation for s in plain.steps] == [s.operation for s in traced.steps]
    assert [s.line for s in plain.steps] == [s.line for s in traced.steps]


# Steps


def test_steps_of_the_neuron():
    trace = trace_gradient(neuron, *NEURON)
    first = neuron.__code__.co_firstlineno
    told = [
        (s.operation, s.line - first, s.inputs, s.value, s.cotangent)
        for s in trace.steps
    ]
    assert [t[:3] for t in told] == [
        ("mul", 1, ("w", "args[0]")),
        ("add", 1, ("#0", "b")),
        ("sub", 2, ("#1", "args[1]")),
        ("integer_pow", 3, ("#2",)),
    ] or [t[:2] for t in told] == [
        ("mul", 1),
        ("add", 1),
        ("sub", 2),
        ("integer_pow", 3),
    ]
    np.testing.assert_allclose([t[3] for t in told], [1, 1.3, -3.7, 13.69], rtol=1e-6)
    np.testing.assert_allclose([t[4] for t in told], [-7.4, -7.4, -7.4, 1], rtol=1e-6)
    step = trace.steps[2]
    assert step.text == "error = prediction - y"
    assert step.function == "neuron"
    assert step.file == __file__
    assert (step.shape, step.dtype, step.phase) == ((), "float32", "forward")
    assert step.stack[-1].function
    assert any(place.file == __file__ for place in step.stack)


@given(w=st.floats(-3, 3), b=st.floats(-3, 3))
@settings(max_examples=8, deadline=None)
def test_chain_rule_is_a_product(w, b):
    """Along a chain of scalars: cotangent of an input = cotangent times local slope."""
    params = {"w": jnp.float32(w), "b": jnp.float32(b)}
    trace = trace_gradient(neuron, params, 2.0, 5.0)
    product = 1.0
    for step in reversed(trace.steps):
        np.testing.assert_allclose(step.cotangent, product, rtol=1e-6)
        product *= step.local_derivatives[0]
    np.testing.assert_allclose(trace.gradient["w"], product, rtol=1e-6)


def test_large_arrays_are_summed_up_when_asked():
    x = jnp.array([[1.0, -2.0, 0.0, jnp.inf, jnp.nan] * 4])
    trace = trace_gradient(lambda w, x: jnp.nansum(w * x), 2.0, x)
    summary = by_operation(trace, "mul")[0].value
    assert (summary.size, summary.zeros, summary.nonfinite, summary.nan) == (
        20,
        4,
        8,
        4,
    )
    assert (summary.min, summary.max) == (-4.0, 2.0)
    assert summary.mean == pytest.approx(-2 / 3)
    assert summary.norm == pytest.approx(np.sqrt(4 * (4 + 16)))
    small = trace_gradient(lambda w: jnp.sum(w**2), jnp.arange(3.0))
    np.testing.assert_array_equal(small.steps[0].value, [0, 1, 4])


def test_scope_of_modules_and_names():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)

    def loss(params, graph, x):
        with jax.named_scope("outer"), jax.named_scope("inner"):
            x = jnp.sin(x * params["kernel"][...].sum())
        return jnp.sum(nnx.merge(graph, params)(x) ** 2)

    trace = trace_gradient(loss, params, graph, jnp.ones((4, 2)))
    assert by_operation(trace, "sin")[0].scope == "outer/inner"
    mlp = eqx.nn.MLP(2, 1, 3, 1, key=jax.random.key(0))
    trace = trace_gradient(lambda m, x: jax.vmap(m)(x).sum(), mlp, jnp.ones((4, 2)))
    scopes = {step.scope for step in trace.steps}
    assert "eqx.nn.MLP/eqx.nn.Linear" in scopes
    assert all(step.file == __file__ for step in trace.steps)


def test_library_loss_has_its_own_line():
    params = jaxgrad.init_linear(jax.random.key(0), 3, 1)
    trace = trace_gradient(
        jaxgrad.linear_loss, params, jnp.ones((4, 3)), jnp.ones((4, 1))
    )
    assert trace.ok
    files = {jaxgrad.model.__file__, jaxgrad.losses.__file__}
    assert {step.file for step in trace.steps} == files


def test_lines_that_are_not_on_disk():
    code = "import jax.numpy as jnp\ndef loss(w):\n    return jnp.sin(w) * 2\n"
    name = "<a notebook's cell>"
    linecache.cache[name] = (len(code), None, code.splitlines(True), name)
    scope = {}
    exec(compile(code, name, "exec"), scope)
    trace = trace_gradient(scope["loss"], 1.0)
    assert (trace.steps[0].file, trace.steps[0].line) == (name, 3)
    assert trace.steps[0].text == "return jnp.sin(w) * 2"
    exec(compile(code, "<nowhere>", "exec"), scope)
    trace = trace_gradient(scope["loss"], 1.0)
    assert (trace.steps[0].line, trace.steps[0].text) == (3, "")


def test_what_is_returned_has_public_types():
    trace = trace_gradient(lambda w: jnp.sum(jnp.sqrt(w)), jnp.zeros(9))
    assert isinstance(trace, jaxgrad.GradientTrace)
    assert isinstance(trace.steps[0], jaxgrad.Step)
    assert isinstance(trace.steps[0].outputs[0], jaxgrad.Output)
    assert isinstance(trace.steps[0].value, jaxgrad.Summary)
    assert isinstance(trace.first_nonfinite, jaxgrad.Origin)
    trace = trace_gradient(lambda w: jnp.round(w[0]) + w[1] * 0, jnp.ones(3))
    assert isinstance(trace.blocked["params"][0], jaxgrad.Block)
    trace = trace_gradient(lambda w: w[0] ** 2, jnp.ones(3))
    dead = trace.dead_entries["params"]
    assert isinstance(dead, jaxgrad.DeadEntries)
    assert (dead.entries, dead.size, dead.slices) == (2, 3, ((1, 2),))


# What is inside of a step


def test_iterations_of_a_scan_add_up():
    xs = jnp.arange(1.0, 6.0)

    def loss(w, xs):
        def body(h, x):
            new = jnp.sin(w * h + x)
            return new, new * x

        h, ys = lax.scan(body, jnp.float32(0.1), xs)
        return h + jnp.sum(ys)

    trace = trace_gradient(loss, 0.7, xs)
    (scan,) = by_operation(trace, "scan")
    h, total = 0.1, 0.0
    for row, x in enumerate(np.asarray(xs)):
        inside = scan.inside(row)
        (product,) = [s for s in inside if s.operation == "mul" and "h" not in s.text][
            :1
        ] or [inside[0]]
        (sine,) = [s for s in inside if s.operation == "sin"]
        h = np.sin(0.7 * h + x)
        assert float(sine.value) == pytest.approx(h, rel=1e-5)
        first = inside[0]
        assert product is not None
        assert first.inputs[0] == "params"
        total += float(first.cotangent) * float(first.local_derivatives[0])
    assert total == pytest.approx(float(trace.gradient), rel=1e-5)
    with pytest.raises(IndexError, match="a scan of 5 iterations; iteration 5 was"):
        scan.inside(5)


def test_inside_a_reversed_scan_a_branch_and_a_while_loop():
    def loss(w, xs):
        def body(h, x):
            return lax.cond(x > 2, lambda h: h * w, lambda h: h + w, h), None

        h, _ = lax.scan(body, w, xs, reverse=True)
        steps = lax.while_loop(lambda n: n < 3.5, lambda n: n + 1, jnp.float32(0))
        return h * steps

    trace = trace_gradient(loss, 1.5, jnp.array([1.0, 3.0, 2.0]))
    (scan,) = by_operation(trace, "scan")
    taken = [by_name(scan.inside(row), "cond").inside()[0] for row in range(3)]
    assert [step.operation for step in taken] == ["add", "mul", "add"]
    # Row 2 comes first: 1.5 + 1.5 = 3, 3 * 1.5 = 4.5, 4.5 + 1.5 = 6.
    assert [float(step.value) for step in taken] == [6.0, 4.5, 3.0]
    assert [float(step.cotangent) for step in taken] == [4.0, 4.0, 6.0]
    (loop,) = by_operation(trace, "while")
    assert [float(loop.inside(i)[0].value) for i in range(4)] == [1, 2, 3, 4]
    assert loop.inside(0)[0].cotangent is None
    with pytest.raises(IndexError, match="a while loop of 4 iterations"):
        loop.inside(4)


def by_name(steps, name):
    (step,) = [step for step in steps if step.operation == name]
    return step


@jax.custom_vjp
def scaled(x):
    return x * 3


def scaled_backward(x, g):
    slope = jnp.cos(x)
    return (slope * g,)


scaled.defvjp(lambda x: (x * 3, x), scaled_backward)


def test_inside_of_a_rule_is_the_rule():
    """Not the derivative of its forward part, which would be 3."""
    trace = trace_gradient(lambda x: scaled(x) ** 2, 0.5)
    step = trace.steps[0]
    assert step.operation == "scaled"
    inside = {s.operation: s for s in step.inside()}
    cosine, last = inside["cos"], step.inside()[-1]
    assert cosine.function == "scaled_backward"
    assert cosine.text == "slope = jnp.cos(x)"
    assert cosine.phase == "backward"
    assert (
        float(last.value)
        == float(trace.gradient)
        == pytest.approx(np.cos(0.5) * 2 * 1.5)
    )


def test_inside_of_any_step_is_its_backward_pass():
    trace = trace_gradient(lambda x: jnp.sqrt(x), 4.0)
    assert float(trace.steps[0].inside()[-1].value) == 0.25
    trace = trace_gradient(lambda x: lax.stop_gradient(x) + x, 4.0)
    with pytest.raises(ValueError, match="no gradient flows through it"):
        trace.steps[0].inside()


# The verdict and the print


def test_ok():
    assert trace_gradient(neuron, *NEURON)
    assert not trace_gradient(jnp.sqrt, 0.0)
    assert not trace_gradient(jnp.log, 0.0)
    assert not trace_gradient(
        lambda p: p["a"] ** 2, {"a": 1.0 * jnp.ones(()), "b": jnp.ones(2)}
    )
    assert not trace_gradient(lambda w: jnp.round(w), 1.2)
    assert trace_gradient(lambda w: (w - 3) ** 2, 3.0)  # at a minimum
    harmless = trace_gradient(
        lambda w, x: jnp.sum(w * jnp.where(x > 0, jnp.sqrt(x), 0)), 2.0,
        jnp.array([1.0, -1.0]),
    )  # fmt: skip
    assert harmless
    assert harmless.first_nonfinite.harmless


def check_texts(trace):
    printed = str(trace)
    assert max(map(len, printed.splitlines())) <= 80
    assert "\x1b" not in printed
    json.dumps(trace.to_dict(), allow_nan=False)
    page = trace._repr_html_()
    assert "http" not in page
    assert page.count("<details>") == page.count("</details>") > 0
    chart = trace.to_mermaid()
    assert chart.startswith("flowchart TD\n")
    boxes = re.findall(r"^  (\w+)\S.*:::", chart, re.MULTILINE)
    assert len(boxes) == len(set(boxes))
    for start, end in re.findall(
        r"^  (\w+) -->(?:\|[^|]*\|)? (\w+)$", chart, re.MULTILINE
    ):
        assert {start, end} <= set(boxes)
    return printed, chart


def test_print_of_a_nan_names_its_line():
    def loss(w):
        safe = w > 0
        return jnp.sum(jnp.where(safe, jnp.sqrt(w), 0.0))

    printed, _ = check_texts(trace_gradient(loss, jnp.array([1.0, 0.0])))
    assert printed.startswith("The gradient is not finite in `params`\n")
    assert "return jnp.sum(jnp.where(safe, jnp.sqrt(w), 0.0))" in printed
    assert "safe = jnp.where(safe, w, 1.0)" in printed


def test_print_of_a_zero_names_its_line():
    def loss(params, x):
        h = lax.stop_gradient(x * params["w"])
        return jnp.sum((h - params["b"]) ** 2)

    params = {"w": jnp.ones(3), "b": jnp.ones(3), "unused": jnp.ones(2)}
    printed, _ = check_texts(trace_gradient(loss, params, jnp.arange(3.0)))
    assert "zero in `unused`, `w`" in printed
    assert "`stop_gradient` lets no gradient through" in printed
    assert "The loss never uses `unused`." in printed


def test_print_of_a_long_loss_is_short():
    def loss(w):
        lines = "\n".join(f"    w = jnp.sin(w) * {i}.5" for i in range(1, 80))
        return w, lines

    code = (
        "import jax.numpy as jnp\ndef loss(w):\n"
        + loss(0)[1]
        + "\n    return w.sum()\n"
    )
    name = "long.py"
    linecache.cache[name] = (len(code), None, code.splitlines(True), name)
    scope = {}
    exec(compile(code, name, "exec"), scope)
    trace = trace_gradient(scope["loss"], jnp.ones((3, 4)))
    assert len(trace.steps) == 159
    printed, chart = check_texts(trace)
    assert len(printed.splitlines()) < 60
    assert "40 more rows have a smaller flow of gradient" in printed
    assert chart.count(":::step") <= 40


def test_mermaid_has_values_gradients_and_slopes():
    chart = trace_gradient(neuron, *NEURON).to_mermaid()
    assert '"#2 sub<br/>value -3.7<br/>gradient -7.4"' in chart
    assert "s2 -->|-7.4| s3" in chart
    assert 'i0(["w<br/>gradient -14.8"]):::leaf' in chart
    odd = trace_gradient(lambda p: p['a"<b>`'] ** 2, {'a"<b>`': jnp.ones(())})
    assert (
        "[&#39;a#quot;#lt;b#gt;#96;" in odd.to_mermaid()
        or "#quot;#lt;b#gt;#96;" in (odd.to_mermaid())
    )


def test_texts_of_several_kinds_of_loss():
    key = jax.random.key(0)

    def loss(params, key, flag):
        noise = jax.random.normal(key, (3,))
        spectrum = jnp.fft.fft(params["w"] + noise)
        order = jnp.argsort(params["w"])
        half = params["h"].astype(jnp.float32)
        assert flag
        return jnp.sum(jnp.abs(spectrum) ** 2) + params["w"][order[0]] + half.sum()

    params = {"w": jnp.ones(3), "h": jnp.ones(9, jnp.bfloat16), "n": jnp.arange(2)}
    trace = trace_gradient(loss, params, key, True)
    check_texts(trace)
    assert trace.not_differentiable == ("n",)
    assert trace.gradient["n"] is None
    assert trace.ok


def test_aux_is_left_aside():
    trace = trace_gradient(lambda w: (w**2, {"seen": w}), 3.0, has_aux=True)
    assert (trace.loss, float(trace.gradient)) == (9.0, 6.0)


def test_printing_inside_a_loss_is_fine(capsys):
    def loss(w):
        jax.debug.print("w is {}", w)
        return w**2

    assert trace_gradient(loss, 3.0).ok
    capsys.readouterr()


# Broken inputs


def on_host(w):
    return w * float(w)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "needs",
    [on_host, lambda w: w.item() * w, lambda w: w if w > 0 else -w,
     lambda w: w * np.asarray(w), lambda w: w * range(5)[w.astype(int)]],
    ids=["float", "item", "if", "numpy", "index"],
)  # fmt: skip
def test_a_loss_that_needs_the_host(needs):
    with pytest.raises(TypeError, match="needs the value of an array on the host") as e:
        trace_gradient(needs, 3.0)
    assert "test_tracing.py, line" in str(e.value)


@pytest.mark.bad_input
def test_a_loss_that_is_not_a_scalar():
    with pytest.raises(ValueError, match=r"shape \(3,\); a scalar, of shape \(\), was"):
        trace_gradient(lambda w: w**2, jnp.ones(3))
    with pytest.raises(TypeError, match="Is its `return` missing"):
        trace_gradient(lambda w: None, jnp.ones(3))
    with pytest.raises(TypeError, match="pass has_aux=True"):
        trace_gradient(lambda w: (w, w), 2.0)


@pytest.mark.bad_input
def test_a_loss_that_raises_says_which():
    def broken(w):
        raise RuntimeError("out of cheese")

    with pytest.raises(RuntimeError, match="out of cheese") as error:
        trace_gradient(broken, 2.0)
    assert "while tracing the loss `" in error.value.__notes__[-1]


@pytest.mark.bad_input
def test_a_callback_on_parameters():
    def loss(w):
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return jax.pure_callback(lambda x: np.float32(x), shape, w)

    with pytest.raises(ValueError, match="callback"):
        trace_gradient(loss, 2.0)


@pytest.mark.bad_input
def test_nothing_to_differentiate():
    with pytest.raises(TypeError, match="nothing to differentiate"):
        trace_gradient(lambda p: 1.0, {"a": "text"})
    with pytest.raises(TypeError, match="complex"):
        trace_gradient(lambda p: jnp.abs(p), jnp.complex64(1j))
