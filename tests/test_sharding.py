"""Tests that gradients and training on many devices are those of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxgrad

RNG = np.random.default_rng(0)
X = RNG.normal(size=(96, 16)).astype(np.float32)
Y = RNG.normal(size=(96, 8)).astype(np.float32)
W = {
    "in": RNG.normal(size=(16, 32)).astype(np.float32) / 4,
    "out": RNG.normal(size=(32, 8)).astype(np.float32) / 4,
}
LAYOUTS = {
    "data parallel": ({"rows": 8}, P("rows"), P()),
    "fully sharded": ({"rows": 8}, P("rows"), P("rows")),
    "2 x 4": ({"rows": 2, "columns": 4}, P("rows"), P(None, "columns")),
}
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_kind = pytest.mark.parametrize("kind", KINDS)


def normed_loss(w, x, y):
    """Batch norm: a mean of the gradients of parts of the batch would be wrong."""
    h = x @ w["in"]
    h = (h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-5)
    return jnp.mean((jnp.tanh(h) @ w["out"] - y) ** 2)


def spread(layout, kind="auto"):
    axes, rows, columns = LAYOUTS[layout]
    kinds = (KINDS[kind],) * len(axes)
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)
    data = jax.device_put((X, Y), NamedSharding(mesh, rows))
    return jax.device_put(W, NamedSharding(mesh, columns)), *data


def assert_laid_alike(tree, like):
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (a.sharding, b.sharding)


def assert_close(tree, like):
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True):
        # Sums of 96 rows in another order, a few steps on.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@every_kind
@every_layout
def test_a_gradient_is_that_of_one_device_in_the_parameters_layout(layout, kind):
    w, x, y = spread(layout, kind)
    value, gradient = jaxgrad.value_and_grad(normed_loss)(w, x, y)
    assert_close(gradient, jaxgrad.grad(normed_loss)(W, X, Y))
    assert_laid_alike(gradient, w)
    np.testing.assert_allclose(value, normed_loss(W, X, Y), rtol=1e-5)
    assert_laid_alike(jaxgrad.grad(normed_loss)(w, x, y), w)


@functools.cache
def alone(batch_size, steps):
    options = {} if batch_size is None else {"batch_size": batch_size}
    options |= {"shuffle_key": jax.random.key(3)} if batch_size else {}
    optimizer = optax.adam(1e-2)
    return jaxgrad.train(
        normed_loss, W, X, Y, steps=steps, optimizer=optimizer, **options
    )


@every_kind
@every_layout
@pytest.mark.parametrize("batch_size", [None, 40])
def test_training_is_that_of_one_device(layout, kind, batch_size):
    w, x, y = spread(layout, kind)
    options = {"optimizer": optax.adam(1e-2)}
    if batch_size:
        # A last batch of 16 rows, which divide over the devices too.
        options |= {"batch_size": batch_size, "shuffle_key": jax.random.key(3)}
    result = jaxgrad.train(normed_loss, w, x, y, steps=5, **options)
    one = alone(batch_size, 5)
    np.testing.assert_allclose(result.losses, one.losses, rtol=1e-4)
    assert_close(result.params, one.params)
    assert_laid_alike(result.params, w)
    assert_laid_alike(result.state.optimizer[0].mu, w)
    more = jaxgrad.train(normed_loss, w, x, y, steps=2, state=result.state, **options)
    assert_close(more.params, alone(batch_size, 7).params)


def test_a_second_run_compiles_nothing():
    w, x, y = spread("fully sharded")
    traced = []

    def loss(w, x, y):
        traced.append(1)
        return normed_loss(w, x, y)

    result = jaxgrad.train(loss, w, x, y, steps=30, learning_rate=0.1)
    begun = len(traced)  # once more to see if it writes one entry: `writes_one`
    jaxgrad.train(loss, w, x, y, steps=3, learning_rate=0.1, state=result.state)
    assert len(traced) == begun <= 2


@every_layout
def test_rows_of_a_spread_array_are_gathered_alone(layout):
    # No collective carries more than the batch.
    from jaxgrad.training.rows import Rows

    _, x, _ = spread(layout)
    rows = Rows(96, 8, False, (0,), (x.sharding,))
    text = (
        jax.jit(lambda x, step: rows.batch((x,), step, 8, jax.random.key(0))[0].args)
        .lower(x, jnp.int32(0))
        .compile()
        .as_text()
    )
    moved = [line for line in text.splitlines() if "all-gather(" in line]
    assert not any("f32[96" in line for line in moved)


def linear_loss(w, x, y):
    return jnp.mean((jnp.tanh(x @ w["in"]) @ w["out"] - y) ** 2)


@every_kind
def test_uneven_rows_are_weighted_if_the_loss_is_a_mean(kind):
    w, x, y = spread("data parallel", kind)
    options = {"steps": 9, "learning_rate": 0.1, "batch_size": 20}
    weighted = jaxgrad.train(linear_loss, w, x, y, reduction="mean", **options)
    one = jaxgrad.train(linear_loss, W, X, Y, **options)
    np.testing.assert_allclose(weighted.losses, one.losses, rtol=1e-5)
    assert_close(weighted.params, one.params)


@pytest.mark.bad_input
def test_uneven_rows_say_what_to_do():
    w, x, y = spread("data parallel")
    options = {"steps": 1, "learning_rate": 0.1}
    for size, words in (
        (20, "20 rows.* 8 devices.*Make it 16 or 24 rows"),
        (4, "4 rows.*Make it 8 rows"),
    ):
        with pytest.raises(ValueError, match=words):
            jaxgrad.train(linear_loss, w, x, y, batch_size=size, **options)
    options |= {"batch_size": 16, "batch_sharding": x.sharding}
    with pytest.raises(ValueError, match=r"last batch of an epoch.*drop_last"):
        jaxgrad.train(linear_loss, w, X[:90], Y[:90], **options)
    result = jaxgrad.train(linear_loss, w, X[:90], Y[:90], drop_last=True, **options)
    assert result.steps == 1


@every_kind
def test_batches_are_laid_by_their_sharding(kind):
    w, x, _ = spread("data parallel", kind)
    cut = [(X[k : k + 32], Y[k : k + 32]) for k in range(0, 96, 32)]
    one = jaxgrad.train(linear_loss, W, learning_rate=0.1, batches=cut)
    seen = []

    def loss(w, x, y):
        seen.append(x.shape)
        return linear_loss(w, x, y)

    options = {"learning_rate": 0.1, "batch_sharding": x.sharding}
    many = jaxgrad.train(loss, w, batches=cut, **options)
    np.testing.assert_allclose(many.losses, one.losses, rtol=1e-5)
    assert_laid_alike(many.params, w)
    assert set(seen) == {(32, 16)}
    odd = [*cut[:2], (X[64:85], Y[64:85])]
    with pytest.raises(jaxgrad.BatchError, match=r"batches\[2\] has 21 rows") as caught:
        jaxgrad.train(loss, w, batches=odd, **options)
    assert caught.value.result.steps == 2
    assert jaxgrad.train(loss, w, batches=odd, drop_last=True, **options).steps == 2
    weighted = jaxgrad.train(loss, w, batches=odd, reduction="mean", **options)
    one = jaxgrad.train(linear_loss, W, learning_rate=0.1, batches=odd)
    np.testing.assert_allclose(weighted.losses, one.losses, rtol=1e-5)


def test_parameters_on_one_device_go_where_the_data_are():
    _, x, y = spread("data parallel")
    result = jaxgrad.train(linear_loss, W, x, y, steps=3, learning_rate=0.1)
    one = jaxgrad.train(linear_loss, W, X, Y, steps=3, learning_rate=0.1)
    assert_close(result.params, one.params)
    assert result.params["in"].sharding.is_fully_replicated


def padded_loss(w, x, y):
    """Row 3 is held at zero, as an embedding's padding is."""
    return jnp.mean((x @ w["in"].at[3].set(0.0) @ w["out"] - y) ** 2)


@pytest.mark.parametrize("layout", ["fully sharded", "2 x 4"])
def test_one_row_that_is_written_stays_one(layout):
    # XLA would overwrite a row on every device: see `placing.writes_one`.
    w, x, y = spread(layout)
    one = jaxgrad.grad(padded_loss)(W, X, Y)
    assert_close(jaxgrad.grad(padded_loss)(w, x, y), one)
    assert_close(jaxgrad.trace_gradient(padded_loss, w, x, y).gradient, one)
    assert jaxgrad.check_gradient(padded_loss, w, x, y)
    options = {"steps": 3, "learning_rate": 0.1}
    many = jaxgrad.train(padded_loss, w, x, y, **options)
    assert_close(many.params, jaxgrad.train(padded_loss, W, X, Y, **options).params)
    alone = jaxgrad.explain_step(padded_loss, W, X, Y, learning_rate=0.1)
    step = jaxgrad.explain_step(padded_loss, w, x, y, learning_rate=0.1)
    np.testing.assert_allclose(step.gradient_norm, alone.gradient_norm, rtol=1e-5)
    np.testing.assert_allclose(step.curvature, alone.curvature, rtol=1e-4)


@pytest.mark.parametrize("saved", ["numpy", "one device"])
def test_a_saved_state_is_laid_as_the_parameters(saved):
    w, x, y = spread("fully sharded")
    options = {"optimizer": optax.adam(1e-2)}
    first = jaxgrad.train(linear_loss, W, X, Y, steps=2, **options).state
    state = jax.tree.map(np.asarray, first) if saved == "numpy" else first
    result = jaxgrad.train(linear_loss, w, x, y, steps=3, state=state, **options)
    assert_laid_alike(result.params, w)
    assert_laid_alike(result.state.optimizer[0].mu, w)
    assert_close(
        result.params, jaxgrad.train(linear_loss, W, X, Y, steps=5, **options).params
    )


@pytest.mark.bad_input
def test_batches_on_different_devices():
    batches = [jax.device_put((X, Y), jax.devices()[k]) for k in (2, 2, 3)]
    words = r"batches\[2\]: `args\[0\] of batches\[0\]` is on 1 device \(cpu 2\)"
    with pytest.raises(jaxgrad.BatchError, match=words) as caught:
        jaxgrad.train(linear_loss, W, batches=batches, learning_rate=0.1)
    assert caught.value.result.steps == 2
    with pytest.raises(TypeError, match=r"must be a jax\.sharding\.NamedSharding"):
        jaxgrad.train(
            linear_loss,
            W,
            X,
            Y,
            steps=1,
            learning_rate=0.1,
            batch_size=8,
            batch_sharding=P("rows"),
        )
