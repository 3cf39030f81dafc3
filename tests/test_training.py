"""Tests `train`: each step by hand, when it stops, and how it goes on."""

import dataclasses
import signal
import threading

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxgrad

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(32, 4)), jnp.float32)
Y = jnp.asarray(RNG.normal(size=(32, 2)), jnp.float32)
PARAMS = jaxgrad.init_linear(jax.random.key(0), 4, 2)
RULES = {
    "by hand": {"learning_rate": 0.1},
    "array": {"learning_rate": jnp.float32(0.1)},
    "schedule": {"learning_rate": optax.exponential_decay(0.1, 10, 0.5)},
    "adam": {"optimizer": optax.adam(0.01)},
    "lbfgs": {"optimizer": optax.lbfgs()},
}


def run(steps=20, rule="by hand", loss=jaxgrad.linear_loss, **options):
    return jaxgrad.train(loss, PARAMS, X, Y, steps=steps, **RULES[rule] | options)


def bowl(params):
    return jnp.sum(params["w"] ** 2)


# Each step


@pytest.mark.parametrize("rule", ["by hand", "array", "schedule", "adam"])
def test_same_bits_as_a_loop_by_hand(rule):
    options = RULES[rule]

    @jax.jit
    def step(params, state):
        value, grads = jaxgrad.value_and_grad(jaxgrad.linear_loss)(params, X, Y)
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in grads))
        if rule == "adam":
            updates, state = options["optimizer"].update(grads, state, params)
            return optax.apply_updates(params, updates), state, value, norm
        new = jaxgrad.sgd_update(params, grads=grads, state=state, **options)
        return *new, value, norm

    params, losses, norms = PARAMS, [], []
    start = options["optimizer"].init if rule == "adam" else jaxgrad.init_sgd
    state = start(params)
    for _ in range(60):
        params, state, value, norm = step(params, state)
        losses.append(value)
        norms.append(norm)

    result = run(60, rule)
    chex.assert_trees_all_equal(result.params, params, strict=True)
    chex.assert_trees_all_equal(result.state.optimizer, state)
    np.testing.assert_array_equal(result.losses, losses)
    np.testing.assert_allclose(result.gradient_norms, norms, rtol=1e-6)
    assert (result.steps, result.stopped, result.state.step) == (60, None, 60)


def test_the_lessons_steps(neuron):
    result = jaxgrad.train(
        jaxgrad.linear_loss, *neuron, steps=100, learning_rate=0.01, tolerance=1e-6
    )
    # Along this gradient each step leaves 0.7 of the error: 6.25 * 0.49**k.
    np.testing.assert_allclose(result.losses[:3], [6.25, 3.0625, 1.500625], rtol=1e-5)
    assert result.steps == np.ceil(np.log(1e-6 / 6.25) / np.log(0.49))


@pytest.mark.parametrize("every", [2, 7, 100])
def test_losses_are_recorded_every_so_many_steps(every):
    all_of_them, some = run(50), run(50, record_every=every)
    np.testing.assert_array_equal(some.losses, all_of_them.losses[::every])
    np.testing.assert_array_equal(
        some.gradient_norms, all_of_them.gradient_norms[::every]
    )
    chex.assert_trees_all_equal(some.params, all_of_them.params)


def test_any_number_of_records():
    # More than are kept on the device at once.
    steps = 300_000
    many = jaxgrad.train(bowl, {"w": jnp.ones(1)}, steps=steps, learning_rate=1e-6)
    few = jaxgrad.train(
        bowl, {"w": jnp.ones(1)}, steps=steps, learning_rate=1e-6, record_every=1000
    )
    assert many.losses.shape == many.gradient_norms.shape == (steps,)
    np.testing.assert_array_equal(many.losses[::1000], few.losses)
    chex.assert_trees_all_equal(many.params, few.params)


def test_no_steps():
    result = run(0)
    chex.assert_trees_all_equal(result.params, PARAMS)
    assert (result.steps, result.stopped, result.losses.size) == (0, None, 0)
    chex.assert_trees_all_equal(run(5, state=result.state).params, run(5).params)


def test_aux_is_dropped():
    def with_aux(params, x, y):
        return jaxgrad.linear_loss(params, x, y), {"seen": x}

    result = run(loss=with_aux, has_aux=True)
    chex.assert_trees_all_equal(result.params, run().params)


def test_inputs_are_not_changed():
    params = jax.tree.map(np.array, PARAMS)
    jaxgrad.train(jaxgrad.linear_loss, params, X, Y, steps=5, learning_rate=0.1)
    chex.assert_trees_all_equal(params, jax.tree.map(np.array, PARAMS))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_dtypes_are_kept(dtype):
    with jax.enable_x64(dtype == "float64"):
        for rule in "by hand", "schedule", "adam":
            result = jaxgrad.train(
                bowl, {"w": jnp.ones(3, dtype)}, steps=9, **RULES[rule]
            )
            assert result.params["w"].dtype == dtype
            assert result.losses[-1] < result.losses[0] == 3


def test_a_schedule_may_be_any_callable():
    @dataclasses.dataclass  # with `==`, so without a hash
    class Constant:
        rate: float

        def __call__(self, step):
            return self.rate

    chex.assert_trees_all_equal(run(learning_rate=Constant(0.1)).params, run().params)


def test_a_state_survives_being_saved_as_plain_arrays():
    whole, half = run(20), run(8)
    saved = jax.tree.map(np.asarray, half.state)
    restored = jaxgrad.TrainState(*saved)
    rest = run(12, state=restored)
    chex.assert_trees_all_equal(rest.state, whole.state)
    assert isinstance(rest, jaxgrad.TrainResult)
    with pytest.raises(dataclasses.FrozenInstanceError):
        rest.steps = 0


def test_a_number_alone_is_the_parameter():
    result = jaxgrad.train(lambda w: w**2, 3.0, steps=1, learning_rate=1 / 6)
    np.testing.assert_allclose(result.params, 2.0, rtol=1e-6)


@pytest.mark.parametrize("rule", ["schedule", "lbfgs"])
def test_least_squares_are_found(rule):
    inputs = np.column_stack([X, np.ones(len(X))])
    solution = np.linalg.lstsq(inputs, Y)[0].T
    params = run(500, rule, learning_rate=0.1, optimizer=None).params
    if rule == "lbfgs":
        params = run(30, rule).params
    ours = np.column_stack([params.weight, params.bias])
    np.testing.assert_allclose(ours, solution, rtol=1e-3, atol=1e-4)


# Models as they are


def test_an_equinox_mlp_through_adamw():
    model = eqx.nn.MLP(4, 2, 8, 2, key=jax.random.key(0))

    def loss(model, x, y):
        return jnp.mean((jax.vmap(model)(x) - y) ** 2)

    result = jaxgrad.train(loss, model, X, Y, steps=50, optimizer=optax.adamw(0.01))
    assert result.losses[-1] < 0.9 * result.losses[0]
    assert result.params.activation is model.activation
    assert jax.tree.structure(result.params) == jax.tree.structure(model)
    assert loss(result.params, X, Y) < result.losses[-1]


def test_a_flax_nnx_module():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(4, 8, rngs=rngs)
            self.dropout = nnx.Dropout(0.1, rngs=rngs)
            self.last = nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x):
            return self.last(self.dropout(nnx.relu(self.first(x))))

    def loss(model, x, y):
        return jnp.mean((model(x) - y) ** 2)

    model = Net(nnx.Rngs(0))
    before = nnx.state(model)
    result = jaxgrad.train(loss, model, X, Y, steps=50, learning_rate=0.1)
    assert result.losses[-1] < 0.9 * result.losses[0]
    assert result.params(X).shape == Y.shape
    chex.assert_trees_all_equal(nnx.state(model), before)


def test_static_leaves_and_flags():
    def loss(params, x, square):
        errors = params["w"] - x
        return jnp.mean(errors**2 if square else abs(errors)) * params["scale"]

    params = {"w": jnp.zeros(3), "scale": 2, "key": jax.random.key(0), "off": None}
    result = jaxgrad.train(loss, params, jnp.ones(3), True, steps=1, learning_rate=0.75)
    np.testing.assert_allclose(result.params.pop("w"), 1.0, rtol=1e-6)
    assert result.params == {name: params[name] for name in result.params}


# When it stops


def test_tolerance():
    whole = run(50)
    tolerance = float(whole.losses[10:12].mean())
    result = run(50, tolerance=tolerance)
    assert result.stopped.startswith("tolerance: ")
    assert result.stopped.endswith("before update 11")
    assert result.steps == result.state.step == 11
    np.testing.assert_array_equal(result.losses, whole.losses[:12])
    chex.assert_trees_all_equal(result.params, run(11).params)


def test_a_tolerance_met_at_once_leaves_the_parameters():
    result = run(50, tolerance=1e6)
    assert (result.steps, result.losses.size) == (0, 1)
    chex.assert_trees_all_equal(result.params, PARAMS)


def root(params):
    return jnp.sum(jnp.sqrt(params["b"])) + 0 * jnp.sum(params["a"])


def slope(params):
    return 0 * jnp.sum(params["a"]) + jnp.sum(params["b"])


@pytest.mark.bad_input
@pytest.mark.parametrize("record_every", [1, 3])
@pytest.mark.parametrize(
    ("loss", "b", "rate", "steps", "reason"),
    [
        # 1, 0.75, 0.46, 0.09: the next is below zero.
        (root, [1.0], 0.5, 4, "non-finite loss before update 4"),
        (root, [0.0, 1.0], 0.5, 0, "non-finite gradient of leaf `b` before update 0"),
        # Each update takes 1e38 off; the largest float32 is 3.4e38.
        (slope, [0.0], 1e38, 3, "non-finite parameter: update 3 would spoil leaf `b`"),
    ],
    ids=["loss", "gradient", "parameter"],
)
def test_what_is_not_finite_stops_the_run(loss, b, rate, steps, reason, record_every):
    params = {"a": jnp.ones(2), "b": jnp.array(b)}
    for rule in {"learning_rate": rate}, {"optimizer": optax.sgd(rate)}:
        result = jaxgrad.train(
            loss, params, steps=100, record_every=record_every, **rule
        )
        assert result.stopped == reason
        assert result.steps == result.state.step == steps
        chex.assert_tree_all_finite(result.params)
        before = jaxgrad.train(loss, params, steps=steps, **rule)
        chex.assert_trees_all_equal(result.params, before.params)


@pytest.mark.bad_input
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_parameters_make_no_step(value):
    result = jaxgrad.train(
        bowl, {"w": jnp.array([1.0, value])}, steps=9, learning_rate=0.1
    )
    assert (result.steps, result.stopped) == (0, "non-finite loss before update 0")


@pytest.fixture
def ctrl_c():
    """A function that sends Ctrl-C after so many seconds."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    timers = []

    def send(after):
        timers.append(threading.Timer(after, signal.raise_signal, [signal.SIGINT]))
        timers[-1].start()

    yield send
    for timer in timers:
        timer.cancel()
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("rule", ["by hand", "adam"])
def test_ctrl_c_returns_what_is_done(ctrl_c, rule):
    run(1, rule, record_every=1000)  # compiled before the signal comes
    ctrl_c(0.5)
    result = run(2**31 - 1, rule, record_every=1000)
    assert 0 < result.steps < 2**31 - 1
    assert result.stopped == f"interrupted before update {result.steps}"
    again = run(result.steps, rule, record_every=1000)
    chex.assert_trees_all_equal(result.state, again.state)
    np.testing.assert_array_equal(result.losses, again.losses)
    np.testing.assert_array_equal(result.gradient_norms, again.gradient_norms)


def test_ctrl_c_before_the_first_step(ctrl_c):
    def slow_to_trace(params, x, y):
        signal.raise_signal(signal.SIGINT)
        return jaxgrad.linear_loss(params, x, y)

    result = run(loss=slow_to_trace)
    assert result.stopped == "interrupted before update 0"
    assert (result.steps, result.losses.size) == (0, 0)
    chex.assert_trees_all_equal(result.params, PARAMS)


# How it goes on


@pytest.mark.parametrize("rule", RULES)
@settings(deadline=None, max_examples=15)
@given(n=st.integers(0, 40), m=st.integers(0, 40))
def test_n_steps_then_m_more_are_n_plus_m(rule, n, m):
    whole, first = run(n + m, rule), run(n, rule)
    second = run(m, rule, state=first.state)
    chex.assert_trees_all_equal(second.params, whole.params, strict=True)
    chex.assert_trees_all_equal(second.state, whole.state, strict=True)
    losses = np.concatenate([first.losses, second.losses])
    np.testing.assert_array_equal(losses, whole.losses)
    assert (first.steps, second.steps, second.state.step) == (n, m, n + m)


def test_a_state_may_have_been_saved_as_numpy():
    saved = jax.tree.map(np.asarray, run(7, "adam").state)
    chex.assert_trees_all_equal(
        run(5, "adam", state=saved).params, run(12, "adam").params
    )


def test_the_same_call_in_a_loop_is_traced_once():
    traces = 0

    def loss(params, x, y):
        nonlocal traces
        traces += 1
        return jaxgrad.linear_loss(params, x, y)

    for rule in RULES:
        run(5, rule, loss)
        first = traces
        for steps in 5, 50:
            result = run(steps, rule, loss, tolerance=-1.0, record_every=2)
            run(steps, rule, loss, state=result.state)
        if rule == "by hand":
            run(5, loss=loss, learning_rate=0.2)
        assert traces == first


# What it shows


def test_progress_goes_to_stderr_in_plain_text(capfd, monkeypatch):
    for name in "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE":
        monkeypatch.delenv(name, raising=False)
    run(20)
    assert capfd.readouterr() == ("", "")
    run(20, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "training" in err
    assert "20/20" in err
    assert "\x1b" not in err
    run(20, progress=False)
    assert capfd.readouterr() == ("", "")


# What it refuses


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("error", "options", "words"),
    [
        (TypeError, {"learning_rate": None}, "learning_rate .*optimizer.*neither"),
        (TypeError, {"optimizer": optax.sgd(0.1)}, "learning_rate .*optimizer.*both"),
        (
            TypeError,
            {"learning_rate": None, "optimizer": 0.1},
            r"optax.GradientTransformation.*is a float",
        ),
        (
            TypeError,
            {"learning_rate": None, "optimizer": optax.adam},
            r"optax.GradientTransformation.*is a function",
        ),
        (ValueError, {"learning_rate": -0.1}, "learning_rate must be finite.*-0.1"),
        (ValueError, {"learning_rate": float("nan")}, "learning_rate must be finite"),
        (ValueError, {"learning_rate": float("inf")}, "learning_rate must be finite"),
        (ValueError, {"steps": -1}, "steps must be 0 or more.*-1"),
        (ValueError, {"steps": 2**31}, "2147483648 steps are more than an int32"),
        (ValueError, {"record_every": 0}, "record_every must be 1 or more.*0"),
    ],
)
def test_bad_arguments(error, options, words):
    with pytest.raises(error, match=words):
        run(**options)


@pytest.mark.bad_input
def test_a_state_of_another_run():
    other = jaxgrad.train(bowl, {"w": jnp.ones(3)}, steps=1, learning_rate=0.1).state
    with pytest.raises(ValueError, match=r"`state.params.weight` should be float32 of"):
        run(state=other)
    with pytest.raises(ValueError, match=r"`state.optimizer.*same arguments"):
        run(state=run(1, "adam").state)
    wider = jaxgrad.init_linear(jax.random.key(0), 5, 2)
    state = jaxgrad.train(
        jaxgrad.linear_loss, wider, jnp.ones((1, 5)), Y[:1], steps=1, learning_rate=0.1
    ).state
    with pytest.raises(ValueError, match=r"weight` .*shape \(2, 4\).*shape \(2, 5\)"):
        run(state=state)


@pytest.mark.bad_input
def test_losses_and_parameters_as_value_and_grad_refuses_them():
    for loss, params, error, words in (
        (bowl, {"w": jnp.arange(3)}, TypeError, "`w` .*int32.*split it off"),
        (bowl, {"w": 1.0}, TypeError, "Python number 1.0"),
        (lambda p: p["w"], {"w": jnp.ones(1)}, ValueError, r"`loss.squeeze\(\)`"),
        (lambda p: None, {"w": jnp.ones(1)}, TypeError, "returned None"),
        (lambda p: (bowl(p), 1), {"w": jnp.ones(1)}, TypeError, "has_aux=True"),
        (3, {"w": jnp.ones(1)}, TypeError, "loss must be a function|parameter 'loss'"),
    ):
        with pytest.raises(error, match=words):
            jaxgrad.train(loss, params, steps=1, learning_rate=0.1)
