"""Tests the update rule: bit for bit with optax's, within rounding of PyTorch's."""

import itertools

import chex
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxgrad

STEPS = 50


def update(**options):
    """`sgd_update` with its options, compiled."""
    return jax.jit(
        lambda params, grads, state: jaxgrad.sgd_update(
            params, grads=grads, state=state, **options
        )
    )


def like(tree, seed, dtype):
    """A tree of random numbers, of another tree's shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: np.asarray(rng.normal(size=a.shape), dtype), tree)


def trees():
    """Pytrees of zeros: nested tuples, lists and dicts of arrays of any shape."""
    array = hnp.array_shapes(min_dims=0, max_dims=3, max_side=5).map(np.zeros)
    return st.recursive(
        array,
        lambda inner: (
            st.lists(inner, min_size=1, max_size=3)
            | st.tuples(inner, inner)
            | st.dictionaries(st.sampled_from("abc"), inner, min_size=1)
            | st.builds(jaxgrad.LinearParams, inner, inner)
        ),
        max_leaves=5,
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@settings(deadline=None, max_examples=12)
@given(
    tree=trees(),
    rate=st.floats(0, 1),
    schedule=st.booleans(),
    momentum=st.just(0.0) | st.floats(0.01, 1),
    weight_decay=st.just(0.0) | st.floats(0.001, 1),
    nesterov=st.booleans(),
)
def test_bit_for_bit_with_optax(
    dtype, tree, rate, schedule, momentum, weight_decay, nesterov
):
    rate = optax.exponential_decay(rate, 7, 0.5) if schedule else rate
    nesterov = nesterov and momentum > 0
    transform = optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.sgd(rate, momentum or None, nesterov),
    )

    @jax.jit
    def by_optax(params, grads, state):
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    by_hand = update(
        learning_rate=rate,
        momentum=momentum,
        weight_decay=weight_decay,
        nesterov=nesterov,
    )
    with jax.enable_x64(dtype == "float64"):
        ours = theirs = like(tree, 0, dtype)
        state, optax_state = jaxgrad.init_sgd(ours), transform.init(theirs)
        for step in range(STEPS):
            grads = like(tree, step + 1, dtype)
            ours, state = by_hand(ours, grads, state)
            theirs, optax_state = by_optax(theirs, grads, optax_state)
            chex.assert_trees_all_equal(ours, theirs, strict=True)
    assert state.step == STEPS


def ulps(ours, theirs):
    """The largest difference, in units of the last place of the largest number."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.dtype == theirs.dtype
    return np.max(np.abs(ours - theirs)) / np.spacing(np.max(np.abs(theirs)))


# All combinations that PyTorch takes.
TORCHS_OPTIONS = [
    {
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": weight_decay,
        "nesterov": nesterov,
    }
    for momentum, dampening, weight_decay, nesterov in itertools.product(
        (0.0, 0.9), (0.0, 0.3), (0.0, 0.1), (False, True)
    )
    if not nesterov or (momentum and not dampening)
]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("schedule", [False, True])
@pytest.mark.parametrize("options", TORCHS_OPTIONS, ids=str)
def test_within_rounding_of_torch(options, schedule, dtype):
    def rate(step):
        return 0.1 / (1 + step) if schedule else 0.1

    # Several entries each: a lone number may cancel to near 0, where its own last
    # place says nothing of the rounding.
    tree = {"weight": np.zeros((7, 5)), "bias": np.zeros(16)}
    step_by_hand = update(learning_rate=rate if schedule else 0.1, **options)
    with jax.enable_x64(dtype == "float64"):
        ours = like(tree, 0, dtype)
        state = jaxgrad.init_sgd(ours)
        theirs = jax.tree.map(torch.tensor, ours)
        optimizer = torch.optim.SGD(list(theirs.values()), lr=0.1, **options)
        buffers = state.momentum_buffers
        for step in range(STEPS):
            grads = like(tree, step + 1, dtype)
            before = jax.tree.map(lambda t: t.numpy().copy(), theirs)
            optimizer.param_groups[0]["lr"] = rate(step)
            for name, leaf in theirs.items():
                leaf.grad = torch.tensor(grads[name])
            optimizer.step()

            step_alone, state_alone = step_by_hand(
                before, grads, jaxgrad.SGDState(jnp.int32(step), buffers)
            )
            ours, state = step_by_hand(ours, grads, state)
            for name, leaf in theirs.items():
                assert ulps(step_alone[name], leaf) <= 2
                assert ulps(ours[name], leaf) <= 8
            if options["momentum"]:
                buffers = {
                    name: optimizer.state[leaf]["momentum_buffer"].numpy().copy()
                    for name, leaf in theirs.items()
                }
                for name, buffer in buffers.items():
                    assert ulps(state_alone.momentum_buffers[name], buffer) <= 2
                    assert ulps(state.momentum_buffers[name], buffer) <= 8


class Compiled(chex.TestCase):
    """The same function compiled and not."""

    @chex.variants(with_jit=True, without_jit=True)
    def test_the_rule(self):
        params = {"w": jnp.array([0.5, 0.4])}
        grads = {"w": jnp.array([-5.0, -10.0])}
        rule = jax.tree.map(lambda p, g: p - 0.01 * g, params, grads)
        state = self.variant(jaxgrad.init_sgd)(params)
        step = self.variant(
            lambda p, g, s: jaxgrad.sgd_update(p, grads=g, state=s, learning_rate=0.01)
        )
        new, state = step(params, grads, state)
        chex.assert_trees_all_close(new, rule, rtol=1e-6)
        assert state.step == 1
        assert jax.tree.structure(state.momentum_buffers) == jax.tree.structure(params)


def one_step(params, grads, **options):
    options.setdefault("state", jaxgrad.init_sgd(params))
    options.setdefault("learning_rate", 0.1)
    return jaxgrad.sgd_update(params, grads=grads, **options)


def test_the_first_step_of_a_schedule_is_0():
    params, state, seen = jnp.zeros(()), jaxgrad.init_sgd(jnp.zeros(())), []
    for _ in range(3):
        params, state = one_step(
            params, jnp.ones(()), state=state, learning_rate=lambda step: 10.0**step
        )
        seen.append(float(params))
    assert seen == [-1.0, -11.0, -111.0]


def test_the_learning_rate_may_be_an_array():
    params, grads = jnp.array([1.0, 2.0]), jnp.array([0.3, -0.7])
    for rate in np.float32(0.1), np.float64(0.1), jnp.asarray(0.1):
        chex.assert_trees_all_equal(
            one_step(params, grads, learning_rate=rate), one_step(params, grads)
        )


def test_leaves_without_a_gradient_stay():
    params = {
        "w": jnp.array([1.0]),
        "frozen": jnp.array([2.0]),
        "name": "ridge",
        "count": 3,
        "key": jax.random.key(0),
        "off": None,
    }
    grads = dict.fromkeys(params) | {"w": jnp.array([1.0])}
    new, state = one_step(params, grads, momentum=0.9, weight_decay=0.1)
    assert new["w"][0] != 1.0
    for name in set(params) - {"w"}:
        assert new[name] is params[name]
    chex.assert_trees_all_equal(state.momentum_buffers["frozen"], jnp.zeros(1))
    assert [state.momentum_buffers[k] for k in ("name", "count", "key", "off")] == [
        None
    ] * 4


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes_are_kept(dtype):
    params = {"w": jnp.ones(3, dtype)}
    for rate in 0.1, jnp.asarray(0.1), lambda step: 0.1 * (step + 1.0):
        chex.assert_type(
            jax.tree.leaves(one_step(params, params, learning_rate=rate)[0]), dtype
        )
    state = one_step(params, params, momentum=0.9, weight_decay=0.1)[1]
    chex.assert_type(jax.tree.leaves(state.momentum_buffers), dtype)


def test_inputs_are_not_changed():
    params, grads = {"w": np.array([1.0, 2.0])}, {"w": np.array([3.0, 4.0])}
    state = jaxgrad.SGDState(jnp.int32(3), {"w": np.array([5.0, 6.0])})
    before = jax.tree.map(np.copy, (params, grads, state))
    one_step(params, grads, state=state, momentum=0.9, weight_decay=0.1)
    chex.assert_trees_all_equal((params, grads, state), before)


def test_a_number_alone_is_a_parameter():
    new, state = one_step(3.0, jaxgrad.grad(lambda w: w**2)(3.0))
    np.testing.assert_allclose(new, 2.4, rtol=1e-6)
    assert state.momentum_buffers.shape == ()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("params", "grads", "words"),
    [
        ({"w": np.ones(2)}, {"v": np.ones(2)}, r"grads .*structure.*'w'.*'v'"),
        ([np.ones(2)], [np.ones(2)] * 2, r"grads .*structure of params"),
        (
            {"layers": [{"w": np.ones((2, 3))}]},
            {"layers": [{"w": np.ones((3, 2))}]},
            r"`layers\[0\].w` has shape \(2, 3\) in params and \(3, 2\) in grads",
        ),
        (
            jaxgrad.LinearParams(np.ones((1, 2)), np.ones(1)),
            jaxgrad.LinearParams(np.ones((1, 2)), np.ones(())),
            r"`bias` has shape \(1,\) in params and \(\) in grads",
        ),
        (
            {"w": np.ones(2), "rate": 0.5},
            {"w": np.ones(2), "rate": 0.1},
            "`rate` is static.*None was expected",
        ),
    ],
)
def test_trees_that_do_not_match(params, grads, words):
    with pytest.raises(ValueError, match=words):
        one_step(params, grads)


@pytest.mark.bad_input
def test_a_state_of_other_parameters():
    params, grads = {"w": np.ones(2)}, {"w": np.ones(2)}
    with pytest.raises(ValueError, match=r"state.momentum_buffers .*structure"):
        one_step(params, grads, state=jaxgrad.init_sgd([np.ones(2)]))
    with pytest.raises(ValueError, match=r"`w`.* \(2,\) .* \(3,\) in state.momentum_b"):
        one_step(params, grads, state=jaxgrad.init_sgd({"w": np.ones(3)}))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": -0.1},
        {"learning_rate": float("nan")},
        {"learning_rate": float("inf")},
        {"learning_rate": np.float32(-0.1)},
        {"learning_rate": jnp.asarray(jnp.inf)},
        {"momentum": -0.9},
        {"momentum": float("nan")},
        {"weight_decay": -0.1},
        {"weight_decay": float("inf")},
    ],
    ids=str,
)
def test_numbers_must_be_finite_and_not_negative(options):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"{name} must be finite.* {value}"):
        one_step(np.ones(2), np.ones(2), **options)


@pytest.mark.bad_input
def test_a_schedule_must_give_good_rates():
    with pytest.raises(ValueError, match=r"learning_rate must be finite.*-1"):
        one_step(np.ones(2), np.ones(2), learning_rate=lambda step: step - 1.0)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9, "dampening": 0.1}, {"dampening": 0.1}], ids=str
)
def test_nesterov_needs_momentum_and_no_dampening(options):
    with pytest.raises(
        ValueError, match="nesterov needs a momentum above 0 and a damp"
    ):
        one_step(np.ones(2), np.ones(2), nesterov=True, **options)
