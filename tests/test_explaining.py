"""Tests what a step of descent is said to do against what it does."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxgrad
from jaxgrad import EntryStep, LeafStep, StepExplanation, explain_step


def kinds(step):
    return {finding.kind for finding in step.findings}


def shown(step):
    """What is printed, on one line; checks its width, and that JSON takes the facts."""
    text = str(step)
    assert max(map(len, text.splitlines())) <= 80
    json.dumps(step.to_dict(), allow_nan=False)
    assert step._repr_html_()
    return " ".join(text.split())


# (learning rate, loss after it, decrease, prediction after it): the lesson's own rate,
# and the one that its printed numbers belong to.
@pytest.mark.parametrize(
    ("rate", "loss", "decrease", "prediction"),
    [(0.01, 3.0625, 3.1875, 3.25), (0.002, 5.5225, 0.7275, 2.65)],
)
def test_the_lessons_neuron(neuron, rate, loss, decrease, prediction):
    params, x, y = neuron
    step = explain_step(jaxgrad.linear_loss, params, x, y, learning_rate=rate)
    assert isinstance(step, StepExplanation)
    assert step.ok
    assert bool(step)
    assert (step.learning_rate, step.loss) == (rate, 6.25)
    near = dict(rel=1e-5)
    assert step.loss_after == pytest.approx(loss, **near)
    assert step.decrease == pytest.approx(decrease, **near)
    assert step.predicted_decrease == pytest.approx(375 * rate, **near)
    assert step.curvature == pytest.approx(30, **near)
    assert step.quadratic_limit == pytest.approx(2 / 30, **near)
    assert step.best_rate == pytest.approx(1 / 30, rel=1e-4)
    assert step.first_rise == pytest.approx(2 / 30, **near)
    assert step.predictions == pytest.approx((2.5, prediction), **near)
    assert step.sharpness is None
    assert step.findings == ()
    text = shown(step)
    assert f"the loss falls from 6.25 to {loss}: {decrease} of the" in text
    assert f"from 2.5 to {prediction}" in text
    assert "lowest at 1/30 and rises from 2/30" in text


def test_the_neurons_leaves_and_entries(neuron):
    params, x, y = neuron
    step = explain_step(jaxgrad.linear_loss, params, x, y, learning_rate=0.01)
    weight, bias = step.leaves
    assert isinstance(weight, LeafStep)
    assert (weight.path, weight.shape) == ("weight", (1, 3))
    assert weight.dtype == str(params.weight.dtype)
    assert weight.gradient_norm == pytest.approx(350**0.5)
    assert "93.3 %" in shown(step)
    assert (weight.rank, bias.rank) == (1, 2)
    assert weight.relative_step == pytest.approx(0.01 * (350 / 0.5) ** 0.5)
    # The bias is 0.3, which is less than the root mean square of all four.
    mean = (0.59 / 4) ** 0.5
    assert bias.relative_step == pytest.approx(0.05 / mean)
    first = weight.entries[0]
    assert first.after == pytest.approx(0.55)
    assert first == EntryStep(
        (0, 0), 0.5, -5.0, "increase: the loss falls", first.after, 3, -5.0, 1.0
    )
    assert [e.rank for e in (*weight.entries, *bias.entries)] == [3, 2, 1, 3]
    for entry in (*weight.entries, *bias.entries):
        assert entry.signal * entry.input == entry.gradient


def test_the_step_is_that_of_sgd_update(neuron):
    params, x, y = neuron
    gradient = jaxgrad.grad(jaxgrad.linear_loss)(params, x, y)
    state = jaxgrad.init_sgd(params)
    new, _ = jaxgrad.sgd_update(params, grads=gradient, state=state, learning_rate=0.07)
    step = explain_step(jaxgrad.linear_loss, params, x, y, learning_rate=0.07)
    after = [e.after for leaf in step.leaves for e in leaf.entries]
    np.testing.assert_array_equal(after, np.concatenate([*new.weight, new.bias]))
    assert step.loss_after == pytest.approx(
        float(jaxgrad.linear_loss(new, x, y)), rel=1e-6
    )


def quadratic(params, matrix, target):
    """Half of r'Ar, with r = params - target, over two leaves."""
    residual = jnp.concatenate([params["a"], params["b"]]) - target
    return residual @ matrix @ residual / 2


QUADRATICS = st.tuples(st.integers(0, 10**6), st.floats(-3, 3), st.floats(-3, 3))


def a_quadratic(seed, spread, scale, signs=(1.0,)):
    """A random matrix, its eigenvalues over 10**spread, and a point."""
    rng = np.random.default_rng(seed)
    base, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    values = 10 ** (scale + spread * rng.uniform(size=5)) * rng.choice(signs, 5)
    matrix = base * values @ base.T
    point = rng.normal(size=5)
    params = {"a": jnp.asarray(point[:2]), "b": jnp.asarray(point[2:])}
    return params, jnp.asarray((matrix + matrix.T) / 2), jnp.asarray(rng.normal(size=5))


@settings(max_examples=8, deadline=None)
@given(QUADRATICS)
def test_on_a_quadratic_the_model_is_the_loss(drawn):
    with jax.enable_x64(True):
        params, matrix, target = a_quadratic(*drawn)
        r = np.concatenate([params["a"], params["b"]]) - target
        g = matrix @ r
        k = float(g @ matrix @ g / (g @ g))
        step = explain_step(quadratic, params, matrix, target, learning_rate=1.5 / k)
    assert step.ok
    assert step.curvature == pytest.approx(k, rel=1e-10)
    assert step.quadratic_limit == pytest.approx(2 / k, rel=1e-10)
    assert step.first_rise == pytest.approx(2 / k, rel=1e-6)
    assert step.best_rate == pytest.approx(1 / k, rel=1e-5)
    falls = step.predicted_decrease / 4  # 1 - learning_rate * curvature / 2
    assert step.decrease == pytest.approx(falls, rel=1e-6)


@settings(max_examples=8, deadline=None)
@given(QUADRATICS, st.sampled_from([(1.0,), (-1.0,), (-1.0, 1.0)]))
def test_sharpness_is_the_largest_eigenvalue(drawn, signs):
    with jax.enable_x64(True):
        params, matrix, target = a_quadratic(*drawn, signs)
        step = explain_step(
            quadratic, params, matrix, target, learning_rate=0.1, sharpness=True
        )
        values = np.linalg.eigvalsh(matrix)
    assert step.sharpness == pytest.approx(values[-1], abs=2e-8 * np.abs(values).max())


def test_sharpness_of_an_mlp():
    model = eqx.nn.MLP(3, 1, 4, 1, activation=jnp.tanh, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (16, 3))
    y = jnp.sum(x, axis=1, keepdims=True)

    def loss(model, x, y):
        return jaxgrad.mean_squared_error(jax.vmap(model)(x), y)

    step = explain_step(loss, model, x, y, learning_rate=0.05, sharpness=True)
    trained, rest = eqx.partition(model, eqx.is_inexact_array)
    flat, back = jax.flatten_util.ravel_pytree(trained)
    flat_loss = jax.jit(lambda p: loss(eqx.combine(back(p), rest), x, y))
    hessian = jax.jit(jax.hessian(flat_loss))(flat)
    assert step.sharpness == pytest.approx(
        np.linalg.eigvalsh(np.asarray(hessian))[-1], rel=1e-4
    )
    g = jax.grad(flat_loss)(flat)
    assert step.curvature == pytest.approx(float(g @ hessian @ g / (g @ g)), rel=1e-4)
    assert step.gradient_norm == pytest.approx(float(jnp.linalg.norm(g)), rel=1e-5)
    assert step.ok
    # It isn't a quadratic, and the loss itself is what counts.
    at = lambda t: float(flat_loss(flat - t * g))  # noqa: E731
    assert at(0.99 * step.first_rise) < step.loss < at(1.01 * step.first_rise)
    for t in (0.9, 1.1):
        assert at(t * step.best_rate) > at(step.best_rate)
    names = [leaf.path for leaf in step.leaves]
    assert names[:2] == ["layers[0].weight", "layers[0].bias"]
    assert [len(leaf.entries) for leaf in step.leaves] == [0, 4, 4, 1]
    assert "layers[0].weight" in shown(step)


def test_a_flax_nnx_state():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(3, 8, rngs=rngs)
            self.dropout = nnx.Dropout(0.1, rngs=rngs)
            self.last = nnx.Linear(8, 1, rngs=rngs)

        def __call__(self, x):
            return self.last(self.dropout(nnx.relu(self.first(x))))

    x = jax.random.normal(jax.random.key(1), (16, 3))

    def loss(params, graph, rest, x):
        model = nnx.merge(graph, params, rest)
        return jnp.mean(model(x) ** 2), nnx.split(model, nnx.Param, ...)[2]

    graph, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
    step = explain_step(
        loss, params, graph, rest, x, learning_rate=0.01, has_aux=True, sharpness=True
    )
    assert step.ok
    assert any(leaf.path.startswith("first.kernel") for leaf in step.leaves)

    model = Net(nnx.Rngs(0))  # as a whole, with its keys and counts

    def whole_loss(model, x):
        return jnp.mean(model(x) ** 2)

    whole = explain_step(whole_loss, model, x, learning_rate=0.01)
    assert whole.loss == pytest.approx(step.loss, rel=1e-6)
    assert whole.curvature == pytest.approx(step.curvature, rel=1e-3)
    shown(whole)


def test_other_leaves_are_held_and_integers_passed_over():
    params = {
        "w": np.array([1.0, 2.0]),
        "n": np.arange(3),
        "key": jax.random.key(0),
        "act": jnp.tanh,
        "none": None,
        "flag": True,
    }

    def loss(params, scale):
        assert params["flag"] is True
        noise = jax.random.normal(params["key"], (2,))
        return scale * jnp.sum(params["act"](params["w"] - params["n"][:2] + noise))

    step = explain_step(loss, params, 2.0, learning_rate=0.1)
    assert step.ok
    assert [(leaf.path, leaf.warning) for leaf in step.leaves] == [
        ("w", ""),
        ("n", "not_differentiable"),
    ]
    assert step.leaves[1].gradient_norm is None
    assert "not differentiable" in shown(step)


def test_a_float_alone():
    step = explain_step(lambda w: w**2, 3.0, learning_rate=0.1)
    assert (step.loss, step.leaves[0].path) == (9.0, "params")
    (entry,) = step.leaves[0].entries
    assert (entry.index, entry.value, entry.gradient) == ((), 3.0, 6.0)
    assert entry.says == "decrease: the loss falls"
    assert step.first_rise == pytest.approx(1, rel=1e-5)
    assert "params" in shown(step)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes(dtype):
    w = jnp.array([1.0, -2.0, 0.5], dtype)
    step = explain_step(lambda w: jnp.sum(w**2), w, learning_rate=0.1, sharpness=True)
    assert step.ok
    assert step.leaves[0].dtype == dtype
    assert step.curvature == pytest.approx(2, rel=0.02)
    assert step.sharpness == pytest.approx(2, rel=0.02)
    assert step.best_rate == pytest.approx(0.5, rel=0.1)
    assert step.first_rise == pytest.approx(1, rel=0.1)
    shown(step)


def test_mixed_dtypes():
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(3), "c": jnp.float16(2)}
    loss = lambda p: sum(jnp.sum(x.astype(float) ** 2) for x in p.values())  # noqa: E731
    step = explain_step(loss, params, learning_rate=0.1, sharpness=True)
    assert step.curvature == pytest.approx(2, rel=0.02)
    assert step.sharpness == pytest.approx(2, rel=0.02)
    assert step.first_rise == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("wide", [False, True])
def test_the_configuration_is_left_as_found(wide):
    with jax.enable_x64(wide):
        before = dict(jax.config.values)
        step = explain_step(lambda w: jnp.exp(w), 1.0, learning_rate=0.1)
        assert dict(jax.config.values) == before
        assert step.leaves[0].dtype == ("float64" if wide else "float32")


def test_negative_curvature_sets_no_limit():
    step = explain_step(lambda w: -(w**2), 1.0, learning_rate=0.1)
    assert step.curvature == pytest.approx(-2)
    assert step.ok
    assert step.decrease > step.predicted_decrease
    assert step.quadratic_limit is None
    assert step.best_rate is None
    assert step.first_rise is None
    text = shown(step)
    assert "where the gradient predicts a fall by 0.4" in text
    assert "sets no limit" in text
    assert f"none up to {jaxgrad.tables.number(step.largest_rate, 3)}" in text


def test_the_loss_may_rise_though_the_model_only_falls():
    # Negative curvature at 1, and walls beyond: a minimum at 2 and a rise after it.
    loss = lambda w: w**4 / 4 - 5 * w**2 / 2 + 2 * w  # noqa: E731
    step = explain_step(loss, 0.1, learning_rate=0.1)
    assert step.curvature < 0
    assert step.quadratic_limit is None
    roots = np.roots([1, 0, -5, 2])  # where the slope is zero
    lowest = min(roots.real)
    g = float(jax.grad(loss)(0.1))
    assert step.best_rate == pytest.approx((0.1 - lowest) / g, rel=1e-3)
    assert step.first_rise > step.best_rate


def test_a_rise_between_two_falls_is_found():
    step = explain_step(lambda w: jnp.sin(w), 1.0, learning_rate=0.1)
    g = np.cos(1)
    assert step.best_rate == pytest.approx((1 + np.pi / 2) / g, rel=1e-3)
    assert step.first_rise == pytest.approx((2 + np.pi) / g, rel=1e-4)


def test_no_curvature():
    step = explain_step(lambda w: jnp.abs(w), 1.0, learning_rate=0.1)
    assert step.curvature == 0
    assert step.best_rate == pytest.approx(1, rel=0.02)
    assert step.first_rise == pytest.approx(2, rel=1e-5)
    assert step.rounding < 1e-5
    flat = explain_step(lambda w: jnp.maximum(w, 0.0), 1.0, learning_rate=0.1)
    assert flat.first_rise is None
    assert flat.best_rate == pytest.approx(1, rel=0.02)


def test_a_step_that_overshoots(neuron):
    step = explain_step(jaxgrad.linear_loss, *neuron, learning_rate=0.1, sharpness=True)
    assert not step.ok
    assert step.decrease == pytest.approx(-18.75, rel=1e-5)
    assert step.sharpness == pytest.approx(30, rel=1e-5)
    assert [leaf.warning for leaf in step.leaves] == ["exploding"] * 2
    text = shown(step)
    assert "rises from 6.25 to 25, where the gradient predicts a fall by 37.5" in text
    assert "what the leaf held is gone" in text


@pytest.mark.bad_input
@pytest.mark.parametrize("rate", [1e10, 1e30])
def test_a_step_that_ends_in_infinity(rate):
    loss = lambda w: jnp.sum(jnp.exp(w**2))  # noqa: E731
    step = explain_step(loss, jnp.ones(2), learning_rate=rate)
    assert not step.ok
    assert step.decrease is None
    assert 0 < step.best_rate < step.first_rise < 10
    assert "rises from 5.43656 to inf" in shown(step)


@pytest.mark.bad_input
def test_the_edge_of_a_domain():
    # log(w) falls to minus infinity at w = 0, and is NaN beyond.
    step = explain_step(lambda w: jnp.log(w), 1.0, learning_rate=0.1)
    assert step.ok
    assert step.first_rise == pytest.approx(1, rel=1e-6)
    assert "nonfinite_ahead" in kinds(step)
    shown(step)


@pytest.mark.bad_input
def test_nothing_is_made_up_where_the_loss_is_not_finite():
    step = explain_step(
        lambda w: jnp.sum(jnp.log(w)), jnp.array([-1.0, 1.0]), learning_rate=0.1
    )
    assert not step.ok
    assert (step.loss_after, step.predicted_decrease, step.decrease) == (None,) * 3
    assert (step.curvature, step.best_rate, step.first_rise) == (None,) * 3
    text = shown(step)
    assert "The loss is nan: there is no step to explain" in text
    assert "jaxgrad.trace_gradient" in text


@pytest.mark.bad_input
def test_a_gradient_that_is_not_finite():
    params = {"good": jnp.array(2.0), "bad": jnp.zeros(3)}
    loss = lambda p: p["good"] ** 2 + jnp.linalg.norm(p["bad"])  # noqa: E731
    step = explain_step(loss, params, learning_rate=0.1, sharpness=True)
    assert (step.ok, step.loss, step.loss_after) == (False, 4.0, None)
    bad, good = step.leaves
    assert (bad.warning, good.warning) == ("nonfinite", "")
    assert good.gradient_norm == 4.0
    assert good.rank is None
    assert step.to_dict()["leaves"][0]["gradient_norm"] == "nan"
    assert "The gradient isn't finite" in shown(step)


@pytest.mark.bad_input
def test_a_zero_gradient():
    step = explain_step(lambda w: jnp.sum(w**2), jnp.zeros(3), learning_rate=0.1)
    assert (step.ok, step.loss_after, step.decrease) == (False, 0.0, 0.0)
    assert (step.curvature, step.first_rise, step.largest_rate) == (None,) * 3
    assert step.leaves[0].warning == "zero"
    assert "The gradient is zero: the step does nothing" in shown(step)


def test_a_minimum_as_far_as_the_dtype_can_tell():
    x = jax.random.normal(jax.random.key(0), (64, 3))
    y = x @ jnp.array([1.0, -2.0, 3.0]) + jax.random.normal(jax.random.key(1), (64,))
    best = jnp.linalg.lstsq(x, y)[0]
    loss = lambda w, x, y: jnp.mean((x @ w - y) ** 2)  # noqa: E731
    step = explain_step(loss, best, x, y, learning_rate=0.1)
    assert "minimum" in kinds(step)
    assert step.best_rate is None
    shown(step)


def test_a_gradient_that_is_no_slope():
    @jax.custom_vjp
    def square(w):
        return w**2

    square.defvjp(lambda w: (square(w), w), lambda w, ct: (-2 * w * ct,))
    step = explain_step(lambda w: square(w), jnp.array(3.0), learning_rate=0.1)
    assert not step.ok
    assert kinds(step) == {"no_descent"}
    assert step.curvature == pytest.approx(-2)
    assert "jaxgrad.check_gradient" in shown(step)


def test_a_kink_that_nothing_lowers():
    w = jnp.array([1.0, 1 - 1e-7, 0.5], jnp.float32)
    step = explain_step(lambda w: jnp.max(w), w, learning_rate=0.1)
    assert kinds(step) == {"no_descent"}
    assert step.best_rate is None
    assert "falls up to" not in shown(step)


@pytest.mark.parametrize("offset", [1e6, 1e9])
def test_a_rise_must_be_more_than_rounding(offset):
    loss = lambda w: offset + jnp.sum(w**2)  # noqa: E731
    step = explain_step(loss, jnp.ones(3, jnp.float32), learning_rate=0.1)
    assert step.rounding > 1e-7 * offset
    if step.best_rate is None:
        assert kinds(step) == {"minimum"}
    else:
        assert step.first_rise == pytest.approx(1, rel=0.2)


def test_a_hessian_product_where_there_is_no_forward_mode():
    @jax.custom_vjp
    def double(w):
        return 2 * w

    double.defvjp(lambda w: (2 * w, None), lambda _, ct: (2 * ct,))

    @jax.custom_vjp
    def square(w):
        return jnp.sum(w**2)

    # In its backward rule there is no forward mode.
    square.defvjp(lambda w: (jnp.sum(w**2), w), lambda w, ct: (ct * double(w),))
    w = jnp.array([1.0, 2.0, -1.0])
    step = explain_step(lambda w: square(w), w, learning_rate=0.1, sharpness=True)
    (finding,) = step.findings
    assert (finding.kind, finding.leaf) == ("curvature", "")
    assert "differences" in finding.text
    assert step.curvature == pytest.approx(2, rel=1e-2)
    assert step.sharpness == pytest.approx(2, rel=1e-2)


def test_a_hessian_product_through_a_callback():
    def host(w):
        return np.asarray(2 * w)

    def double(w):
        return jax.pure_callback(host, jax.ShapeDtypeStruct(w.shape, w.dtype), w)

    @jax.custom_vjp
    def square(w):
        return jnp.sum(w**2)

    square.defvjp(lambda w: (square(w), w), lambda w, ct: (ct * double(w),))
    w = jnp.array([1.0, 2.0, -1.0])
    step = explain_step(lambda w: square(w), w, learning_rate=0.1, sharpness=True)
    (finding,) = step.findings
    assert (finding.kind, finding.leaf) == ("curvature", "")
    assert "differences" in finding.text
    assert step.curvature == pytest.approx(2, rel=1e-2)
    assert step.first_rise == pytest.approx(1, rel=1e-5)


def test_vanishing_exploding_and_lost_leaves():
    scales = {"one": 1.0, "small": 1e-6, "large": 1e3, "tiny": 1e-20}
    params = {name: jnp.ones(12) for name in scales}
    loss = lambda p: sum(s * jnp.sum(p[n] ** 2) for n, s in scales.items())  # noqa: E731
    step = explain_step(loss, params, learning_rate=0.1)
    assert {leaf.path: leaf.warning for leaf in step.leaves} == {
        "one": "",
        "small": "vanishing",
        "large": "exploding",
        "tiny": "lost",
    }
    tiny = next(leaf for leaf in step.leaves if leaf.path == "tiny")
    assert tiny.gradient_norm == pytest.approx(2e-20 * 12**0.5)
    assert all(leaf.entries == () for leaf in step.leaves)
    shown(step)


def test_gradients_beyond_the_square_root_of_a_dtypes_range():
    loss = lambda w, scale: scale * jnp.sum(w**2)  # noqa: E731
    for scale in (1e-25, 1e25):
        rate = 0.1 / scale
        step = explain_step(loss, jnp.ones(2), jnp.float32(scale), learning_rate=rate)
        assert step.gradient_norm == pytest.approx(8**0.5 * scale, rel=1e-5)
        assert step.curvature == pytest.approx(2 * scale, rel=1e-5)
        assert step.ok


def test_a_signal_is_claimed_only_where_it_is_true():
    key = jax.random.key(0)
    params = jaxgrad.init_linear(key, 3, 2)
    x, y = jax.random.normal(key, (8, 3)), jax.random.normal(key, (8, 2))

    def decayed(params, x, y):
        return jaxgrad.linear_loss(params, x, y) + jnp.sum(params.weight**2)

    def signals(loss, rows):
        step = explain_step(loss, params, x[:rows], y[:rows], learning_rate=0.01)
        assert step.predictions is None  # of two outputs
        return [e.signal for leaf in step.leaves for e in leaf.entries]

    one = signals(jaxgrad.linear_loss, 1)
    assert one[:6] == [one[6]] * 3 + [one[7]] * 3
    assert signals(jaxgrad.linear_loss, 8) == signals(decayed, 1) == [None] * 8

    wide = jaxgrad.init_linear(key, 12, 1)  # its weight's entries aren't listed
    x, y = jnp.ones((1, 12)), jnp.ones((1, 1))
    step = explain_step(jaxgrad.linear_loss, wide, x, y, learning_rate=0.01)
    assert step.predictions is None
    assert [e.signal for leaf in step.leaves for e in leaf.entries] == [None]


def test_many_leaves_and_entries_fit_the_page():
    params = {f"layer_number_{i}_of_the_network": {"w": jnp.ones(5)} for i in range(40)}
    loss = lambda p: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p))  # noqa: E731
    step = explain_step(loss, params, learning_rate=0.1)
    assert len(step.leaves) == 40
    text = shown(step)
    assert "and 20 more" in text
    assert "And 176 more entries" in text


def test_it_compiles_once():
    traced = []

    def loss(w, x):
        traced.append(1)
        return jnp.sum((w - x) ** 2)

    steps = []
    for rate in (0.1, 0.2):
        steps.append(explain_step(loss, jnp.ones(3), jnp.zeros(3), learning_rate=rate))
        count = len(traced) if rate == 0.1 else count
    assert len(traced) == count
    assert steps[0].decrease != steps[1].decrease


@pytest.mark.bad_input
@pytest.mark.parametrize("rate", [0.0, -0.1, 1e40, float("nan"), float("inf")])
def test_a_learning_rate_must_be_a_number_above_zero(rate):
    with pytest.raises(ValueError, match="learning_rate must be one finite number ab"):
        explain_step(lambda w: w**2, 3.0, learning_rate=rate)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("loss", "params", "error", "words"),
    [
        (jnp.sum, {"w": np.arange(3)}, TypeError, "no array of floats"),
        (jnp.sum, jnp.ones(2, complex), TypeError, "complex"),
        (jnp.square, jnp.ones(2), ValueError, "scalar"),
        (jnp.square, 3, TypeError, "Python number 3"),
    ],
)
def test_losses_and_parameters_that_are_refused(loss, params, error, words):
    with pytest.raises(error, match=words):
        explain_step(loss, params, learning_rate=0.1)
