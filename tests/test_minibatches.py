"""Tests `train` on minibatches: of arrays, shuffled or not, and of iterables."""

import _thread
import itertools
import threading

import chex
import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxgrad

RNG = np.random.default_rng(0)
X = RNG.normal(size=(50, 4)).astype(np.float32)
Y = RNG.normal(size=(50, 2)).astype(np.float32)
PARAMS = jaxgrad.init_linear(jax.random.key(0), 4, 2)
KEY = jax.random.key(7)


def run(*args, loss=jaxgrad.linear_loss, params=PARAMS, **options):
    rule = {} if "optimizer" in options else {"learning_rate": 0.1}
    return jaxgrad.train(loss, params, *args, **rule | options)


def rows_seen(count, batch_size, steps, **options):
    """Which rows each step takes: the loss is their numbers' sum, in base 2."""

    def loss(w, row):
        return jnp.sum(2.0**row) + 0 * w

    row = jnp.arange(count, dtype=jnp.float32)
    result = run(
        row, loss=loss, params=0.0, batch_size=batch_size, steps=steps, **options
    )
    bits = [np.binary_repr(int(value), count)[::-1] for value in result.losses]
    return [{i for i, bit in enumerate(text) if bit == "1"} for text in bits]


# Which rows


def test_in_order_with_a_short_last_batch():
    seen = rows_seen(10, 4, 6)
    assert seen[:3] == [{0, 1, 2, 3}, {4, 5, 6, 7}, {8, 9}]
    assert seen[3:] == seen[:3]


def test_drop_last_leaves_it_out():
    seen = rows_seen(10, 4, 4, drop_last=True)
    assert seen == [{0, 1, 2, 3}, {4, 5, 6, 7}] * 2


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 20), st.integers(1, 24), st.integers(0, 9))
def test_each_epoch_takes_each_row_once(count, batch_size, seed):
    per_epoch = -(-count // batch_size)
    seen = rows_seen(count, batch_size, 3 * per_epoch, shuffle_key=jax.random.key(seed))
    for epoch in range(3):
        batches = seen[epoch * per_epoch :][:per_epoch]
        assert sum(map(len, batches)) == count
        assert set.union(*batches) == set(range(count))


def test_each_epoch_has_an_order_of_its_own():
    seen = rows_seen(20, 5, 12, shuffle_key=KEY)
    epochs = [tuple(map(frozenset, seen[k : k + 4])) for k in (0, 4, 8)]
    assert len(set(epochs)) == 3
    assert rows_seen(20, 5, 12, shuffle_key=jax.random.key(8)) != seen


@pytest.mark.parametrize(("count", "draws"), [(5, 24_000), (100, 6000)])
def test_every_order_is_as_likely(count, draws):
    # Chi-square of each row's place over many keys; 5 standard deviations.
    from jaxgrad.training.rows import shuffled

    places = jnp.arange(count, dtype=jnp.uint32)
    orders = jax.jit(jax.vmap(lambda key: shuffled(places, key, count)))(
        jax.random.split(KEY, draws)
    )
    orders = np.asarray(orders, int)
    first, second = orders[:, 0], orders[:, count // 2]
    steps = (second - first) % count - 1  # a uniform number below count - 1
    for numbers, values in ((first, count), (second, count), (steps, count - 1)):
        seen = np.bincount(numbers, minlength=values)
        expected = draws / values
        chi2 = float(np.sum((seen - expected) ** 2 / expected))
        assert abs(chi2 - (values - 1)) < 5 * np.sqrt(2 * (values - 1)), chi2


# Each step


@pytest.mark.parametrize("shuffle_key", [None, KEY])
@pytest.mark.parametrize("optimizer", [None, optax.adam(0.01)])
def test_same_steps_as_a_loop_by_hand(shuffle_key, optimizer):
    options = {} if optimizer is None else {"optimizer": optimizer}
    result = run(X, Y, batch_size=16, steps=8, shuffle_key=shuffle_key, **options)
    params, losses = PARAMS, []
    transform = optimizer or optax.sgd(0.1)
    state = transform.init(params)
    order = run(
        jnp.arange(50.0),
        loss=lambda w, i: w * 0 + i.sum(),
        params=0.0,
        steps=100,
        batch_size=1,
        shuffle_key=shuffle_key,
    ).losses.astype(int)
    for epoch in (order[:50], order[50:]):
        for start in range(0, 50, 16):
            some = epoch[start : start + 16]
            value, grads = jaxgrad.value_and_grad(jaxgrad.linear_loss)(
                params, X[some], Y[some]
            )
            losses.append(value)
            updates, state = transform.update(grads, state, params)
            params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(result.losses, losses, rtol=1e-5)


def test_batches_give_the_same_bits_as_rows_of_arrays():
    cut = [(X[k : k + 16], Y[k : k + 16]) for k in range(0, 50, 16)]
    stream = run(batches=cut, steps=4)
    arrays = run(X, Y, batch_size=16, steps=4)
    chex.assert_trees_all_equal(stream.params, arrays.params)
    np.testing.assert_array_equal(stream.losses, arrays.losses)
    np.testing.assert_array_equal(stream.gradient_norms, arrays.gradient_norms)


def test_what_has_no_rows():
    def loss(w, x, scale, y):
        return jnp.mean((x["x"] @ w * scale - y) ** 2)

    data = ({"x": X.T[:, None]}, jnp.ones(2), Y)

    def rows_last(w, x, scale, y):
        return loss(w, {"x": x["x"][:, 0].T}, scale, y)

    w = jnp.ones((4, 2))
    axes = ({"x": -1}, None, 0)
    one = run(*data, loss=rows_last, params=w, batch_size=16, batch_axes=axes, steps=5)
    two = run(
        {"x": X},
        jnp.ones(2),
        Y,
        loss=loss,
        params=w,
        steps=5,
        batch_size=16,
        batch_axes=[0, None, 0],
    )
    np.testing.assert_allclose(one.losses, two.losses, rtol=1e-5)


def test_step_key_is_folded_with_the_step():
    def loss(w, key):
        return jax.random.normal(key) + 0 * w

    result = run(loss=loss, params=0.0, steps=4, step_key=KEY)
    draws = [jax.random.normal(jax.random.fold_in(KEY, k)) for k in range(4)]
    np.testing.assert_array_equal(result.losses, draws)
    more = run(loss=loss, params=0.0, steps=2, step_key=KEY, state=result.state)
    raw = jax.random.PRNGKey(3)
    draws = [jax.random.normal(jax.random.fold_in(KEY, k)) for k in (4, 5)]
    np.testing.assert_array_equal(more.losses, draws)
    assert run(loss=loss, params=0.0, steps=1, step_key=raw).losses[0] == (
        jax.random.normal(jax.random.fold_in(raw, 0))
    )


def test_dropout_in_minibatches_and_batches():
    def loss(params, x, y, *, key):
        keep = jax.random.bernoulli(key, 0.5, x.shape)
        return jaxgrad.linear_loss(params, jnp.where(keep, 2 * x, 0), y)

    options = {"loss": loss, "step_key": KEY}
    arrays = run(X, Y, batch_size=25, steps=2, **options)
    stream = run(batches=[(X[:25], Y[:25]), (X[25:], Y[25:])], **options)
    chex.assert_trees_all_equal(stream.params, arrays.params)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 11), st.integers(0, 11), st.booleans())
def test_n_steps_then_m_more_are_n_plus_m(n, m, shuffle):
    def loss(params, x, y, key):
        return jaxgrad.linear_loss(params, x + jax.random.normal(key, x.shape), y)

    options = {"loss": loss, "batch_size": 16, "step_key": jax.random.key(1)}
    options |= {"shuffle_key": KEY} if shuffle else {}
    first = run(X, Y, steps=n, **options)
    saved = jax.tree.map(np.asarray, first.state)
    both = run(X, Y, steps=m, state=saved, **options)
    whole = run(X, Y, steps=n + m, **options)
    chex.assert_trees_all_equal(both.state, whole.state)
    np.testing.assert_array_equal(
        np.concatenate([first.losses, both.losses]), whole.losses
    )


def test_one_loop_is_compiled_for_many_runs():
    traced = []

    def loss(params, x, y):
        traced.append(x.shape)
        return jaxgrad.linear_loss(params, x, y)

    state = None
    for _ in range(5):
        result = run(
            X, Y, loss=loss, batch_size=16, shuffle_key=KEY, steps=3, state=state
        )
        state = result.state
    assert sorted(set(traced)) == [(2, 4), (16, 4)]
    assert len(traced) == 2


# Iterables


def test_a_torch_loader():
    data = torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y))
    loader = torch.utils.data.DataLoader(data, batch_size=16)
    result = run(batches=loader)
    assert (result.steps, result.stopped) == (4, None)
    chex.assert_trees_all_equal(result.params, run(X, Y, batch_size=16, steps=4).params)
    epochs = itertools.chain.from_iterable(itertools.repeat(loader, 3))
    assert run(batches=epochs).steps == 12


def test_a_generator_is_asked_for_no_more_than_is_used():
    asked = []

    def endless():
        for k in itertools.count():
            asked.append(k)
            yield X, Y

    source = endless()
    first = run(batches=source, steps=3)
    more = run(batches=source, steps=4, state=first.state)
    assert asked == list(range(7))
    chex.assert_trees_all_equal(more.params, run(X, Y, steps=7).params)


def test_args_come_before_a_batch():
    def loss(params, scale, x, y):
        return scale * jaxgrad.linear_loss(params, x, y)

    result = run(2.0, loss=loss, batches=[(X, Y)])
    assert result.losses[0] == 2 * run(X, Y, steps=1).losses[0]


def test_batches_without_losses_recorded_and_a_short_one_dropped():
    cut = [(X[k : k + 16], Y[k : k + 16]) for k in range(0, 50, 16)]
    every = run(batches=cut, drop_last=True)
    assert every.steps == 3
    some = run(batches=cut, drop_last=True, record_every=2)
    np.testing.assert_array_equal(some.losses, every.losses[::2])


def test_the_next_batch_is_asked_for_before_the_last_one_is_done():
    done = threading.Event()

    def batches():
        yield X, Y
        # The first step waits for this; were it waited for, this would never come.
        done.set()
        yield X, Y

    def loss(params, x, y):
        waited = jax.experimental.io_callback(
            lambda: np.float32(done.wait(10)), jax.ShapeDtypeStruct((), jnp.float32)
        )
        return jaxgrad.linear_loss(params, x, y) + 0 * waited

    assert run(batches=batches(), loss=loss).steps == 2
    assert done.is_set()


def test_divergence_keeps_the_last_finite_parameters():
    def loss(w, x):
        return jnp.sum(x * w**2)

    batches = ((jnp.float32(x),) for x in (1, 1, jnp.nan, 1, 1))
    result = run(loss=loss, params=1.0, batches=batches)
    assert result.stopped == "non-finite loss before update 2"
    assert (result.steps, result.losses.size) == (2, 3)
    assert jnp.isfinite(result.params)
    good = run(loss=loss, params=1.0, batches=[(jnp.float32(1),)] * 2)
    assert result.params == good.params


def test_a_tolerance_and_ctrl_c_in_batches():
    result = run(batches=itertools.repeat((X, Y)), tolerance=1e9)
    assert result.stopped.startswith("tolerance")
    assert result.steps == 0

    def interrupted():
        yield X, Y
        yield X, Y
        raise KeyboardInterrupt

    result = run(batches=interrupted(), steps=5)
    assert result.stopped == "interrupted before update 2"
    assert result.steps == 2


# What is wrong


def bad_batches(*bad):
    return itertools.chain([(X, Y)] * 3, bad)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (X, r"batches\[3\] is a ndarray; a tuple"),
        ((X,), r"batches\[3\] isn't like batches\[0\]: leaf `args\[1\]` is absent"),
        ((X, Y, Y), r"leaf `args\[2\]` is an array .* and was absent"),
        ((X, Y[:, 0]), r"leaf `args\[1\]` is an array of float32 with 1 axes, and was"),
        ((X.astype(int), Y), r"leaf `args\[0\]` is an array of int"),
        ((X[:, :3], Y), r"fails on batches\[3\], in which leaf `args\[0\]` has shape"),
        ((X, "y"), r"leaf `args\[1\]` is a str"),
    ],
)
def test_another_structure_names_batch_and_leaf(bad, words):
    with pytest.raises(jaxgrad.BatchError, match=words) as caught:
        run(batches=bad_batches(bad, (X, Y)), steps=9)
    result = caught.value.result
    assert result.steps == result.losses.size == 3
    assert result.stopped.startswith("batches: ")
    chex.assert_trees_all_equal(result.params, run(X, Y, steps=3).params)


@pytest.mark.bad_input
def test_batches_that_end_early_or_raise():
    with pytest.raises(jaxgrad.BatchError, match="ended after 3 of 5 steps") as caught:
        run(batches=bad_batches(), steps=5)
    state = caught.value.result.state
    more = run(batches=[(X, Y)] * 2, steps=2, state=state)
    chex.assert_trees_all_equal(more.params, run(X, Y, steps=5).params)

    def broken():
        yield X, Y
        raise OSError("the disk has gone")

    with pytest.raises(jaxgrad.BatchError, match=r"OSError where batches\[1\]") as e:
        run(batches=broken(), steps=5)
    assert isinstance(e.value.__cause__, OSError)
    assert e.value.result.steps == 1


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("error", "options", "words"),
    [
        (TypeError, {}, "train needs steps"),
        (TypeError, {"batches": [], "batch_size": 3}, "give one of the two"),
        (TypeError, {"steps": 1, "shuffle_key": KEY}, "needs batch_size"),
        (TypeError, {"steps": 1, "drop_last": True}, "needs batch_size or batches"),
        (TypeError, {"steps": 1, "step_key": KEY}, "`linear_loss`.*has no argument"),
        (
            TypeError,
            {"steps": 1, "batch_size": 2, "shuffle_key": jnp.ones(2)},
            "one random key",
        ),
        (ValueError, {"steps": 1, "batch_size": 0}, "batch_size must be 1 or more"),
        (ValueError, {"steps": 1, "reduction": "sum"}, "no mean over rows"),
        (
            ValueError,
            {"steps": 1, "batch_size": 64, "drop_last": True},
            "more than the 50 rows",
        ),
        (
            ValueError,
            {"steps": 1, "batch_size": 2, "batch_axes": (0, 1)},
            r"`args\[0\]` has 50, `args\[1\]` has 2",
        ),
        (
            ValueError,
            {"steps": 1, "batch_size": 2, "batch_axes": (0, 2)},
            r"`args\[1\]` has shape \(50, 2\), and so no axis 2",
        ),
        (
            ValueError,
            {"steps": 1, "batch_size": 2, "batch_axes": (0, 0, 0)},
            "batch_axes isn't a prefix",
        ),
        (
            ValueError,
            {"steps": 1, "batch_size": 2, "batch_axes": None},
            "there are none",
        ),
    ],
)
def test_options_that_do_not_go_together(error, options, words):
    with pytest.raises(error, match=words):
        run(X, Y, **options)


@pytest.mark.bad_input
def test_a_state_of_other_batches():
    options = {"batch_size": 16, "shuffle_key": KEY}
    state = run(X, Y, steps=3, **options).state
    for other, words in (
        ({"batch_size": 10}, "batch_size 16, and this one has 10"),
        ({"shuffle_key": jax.random.key(8)}, "shuffle_key"),
        ({"drop_last": True}, "drop_last 0, and this one has 1"),
    ):
        with pytest.raises(ValueError, match=words):
            run(X, Y, steps=3, state=state, **options | other)
    with pytest.raises(ValueError, match="rows 50, and this one has 40"):
        run(X[:40], Y[:40], steps=3, state=state, **options)
    with pytest.raises(ValueError, match="of a run with other options of batches"):
        run(X, Y, steps=3, state=state)


# Found by a reader who tried what a user would


def slowly(w, x):
    return jnp.sum(jax.lax.fori_loop(0, 300, lambda _, x: jnp.sin(x), x) * w)


@pytest.mark.parametrize("delay", [0.1, 0.15])
def test_ctrl_c_while_a_step_is_waited_for_keeps_every_loss_in_its_place(delay):
    blocks = [(np.full((150, 150), k, np.float32),) for k in range(1000)]
    some = run(loss=slowly, params=1.0, batches=blocks[:3])  # compiles
    timer = threading.Timer(delay, _thread.interrupt_main)
    timer.start()
    result = run(loss=slowly, params=1.0, batches=blocks)
    timer.join()
    assert result.stopped.startswith("interrupted")
    assert result.steps == result.losses.size == result.gradient_norms.size < 1000
    whole = run(loss=slowly, params=1.0, batches=blocks[: result.steps])
    np.testing.assert_array_equal(result.losses, whole.losses)
    np.testing.assert_array_equal(result.losses[:3], some.losses[: result.steps])


def test_a_reader_may_fill_the_same_buffer_again():
    rng = np.random.default_rng(1)
    blocks = [rng.normal(size=(300, 300)).astype(np.float32) for _ in range(4)]

    def reader():
        buffer = np.empty((300, 300), np.float32)
        for block in blocks:
            buffer[:] = block
            yield (buffer,)

    once = run(loss=slowly, params=1.0, batches=reader())
    anew = run(loss=slowly, params=1.0, batches=[(block,) for block in blocks])
    np.testing.assert_array_equal(once.losses, anew.losses)


def test_static_arguments_stay_static():
    def loss(params, name, function, x, y):
        assert name == "relu"
        return jaxgrad.linear_loss(params, function(x), y)

    options = {"loss": loss, "steps": 2}
    one = run("relu", jax.nn.relu, X, Y, batch_size=25, **options)
    two = run(
        "relu", jax.nn.relu, batches=[(X[:25], Y[:25]), (X[25:], Y[25:])], **options
    )
    three = run(batches=[("relu", jax.nn.relu, X, Y)], loss=loss)
    np.testing.assert_array_equal(one.losses, two.losses)
    assert three.steps == 1


def test_numpy_rows_without_jit():
    jitted = run(X, Y, batch_size=16, steps=2, shuffle_key=KEY)
    with jax.disable_jit():
        plain = run(X, Y, batch_size=16, steps=2, shuffle_key=KEY)
    np.testing.assert_allclose(plain.losses, jitted.losses, rtol=1e-6)


def test_a_prefix_may_have_lists():
    def loss(w, data):
        return jnp.mean((data["x"] @ w - data["y"][0]) ** 2)

    data, w = {"x": X, "y": [Y]}, jnp.ones((4, 2))
    axes = ({"x": 0, "y": [0]},)
    one = run(data, loss=loss, params=w, batch_size=16, batch_axes=axes, steps=3)
    two = run(data, loss=loss, params=w, batch_size=16, steps=3)
    np.testing.assert_array_equal(one.losses, two.losses)


def test_no_steps_of_batches():
    result = run(batches=[(X, Y)], steps=0)
    assert (result.steps, result.losses.dtype) == (0, run(X, Y, steps=0).losses.dtype)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "options", [{"steps": 31.25}, {"steps": 2, "record_every": 3.0}]
)
def test_numbers_that_should_be_whole(options):
    with pytest.raises(TypeError, match=r"must be an integer|Type-check"):
        run(X, Y, **options)


@pytest.mark.bad_input
def test_more_that_is_wrong():
    with pytest.raises(ValueError, match="they have no rows"):
        run(X[:0], Y[:0], batch_size=4, steps=1)
    with pytest.raises(TypeError, match=r"a torch\.Tensor"):
        run(torch.tensor(X), torch.tensor(Y), batch_size=4, steps=1)
    keys = jax.random.split(jax.random.PRNGKey(0))
    with pytest.raises(TypeError, match="must be one random key"):
        run(X, Y, batch_size=4, steps=1, shuffle_key=keys)
    with pytest.raises(TypeError, match="by position"):
        run(X, loss=lambda w, key, x: w * x.sum(), params=1.0, steps=1, step_key=KEY)
    result = run(X, Y, steps=1)
    with pytest.raises(TypeError, match=r"Give its `state`|Type-check"):
        run(X, Y, steps=1, state=result)
    with pytest.raises(jaxgrad.BatchError, match="bfloat16"):
        run(batches=[(torch.tensor(X, dtype=torch.bfloat16), Y)])
    with pytest.raises(TypeError, match="contract") as caught:
        run(batches=[(X[:, :3], Y)], loss=lambda p, x, y: jnp.sum(x @ p.weight.T))
    assert "batches[0]" in caught.value.__notes__[-1]
