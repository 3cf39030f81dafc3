"""Tests `trace_gradient` on arrays that are spread over a mesh of 8 devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from meshes import SOME, batch_norm_loss, mlp_params, spread, watch_gathers

from jaxgrad import trace_gradient

# The whole reductions are done in another order: some roundings of float32.
NEAR = dict(rtol=1e-5, atol=1e-6)
TWO = [("fsdp", "auto"), ("2x4", "explicit")]


def told(trace):
    """What a trace says, without its numbers."""
    return [
        (step.operation, step.line, step.inputs, step.shape, step.dtype)
        for step in trace.steps
    ]


def norm(value):
    return np.linalg.norm(value) if isinstance(value, np.ndarray) else value.norm


def same_origin(one, other):
    names = "kind", "line", "operation", "index", "iteration", "phase", "reason", "name"
    for name in names:
        assert getattr(one, name) == getattr(other, name), name


@functools.cache
def on_one_device():
    return trace_gradient(batch_norm_loss, *mlp_params())


@pytest.mark.parametrize(("layout", "kind"), SOME)
def test_batch_norm_is_that_of_one_device(layout, kind, monkeypatch):
    params, *data = spread(layout, kind, *mlp_params())
    taken = watch_gathers(monkeypatch)
    trace = trace_gradient(batch_norm_loss, params, *data)
    text = str(trace)
    assert trace.ok
    assert trace.findings == ()
    # At most what is shown: 8 numbers or fewer.
    assert all(size <= 8 for size in taken)
    alone = on_one_device()
    assert told(trace) == told(alone)
    for name, leaf in trace.gradient.items():
        assert leaf.sharding.is_equivalent_to(params[name].sharding, leaf.ndim)
        np.testing.assert_allclose(leaf, alone.gradient[name], **NEAR)
    assert text.splitlines()[0] == str(alone).splitlines()[0]
    for step, right in zip(trace.steps, alone.steps, strict=True):
        near = pytest.approx(norm(right.value), rel=1e-5, nan_ok=True)  # var's literal
        assert norm(step.value) == near


def layers_loss(params, x, y):
    def layer(h, params):
        return jnp.tanh(h @ params["w"] + params["b"]), None

    h, _ = lax.scan(layer, x, params)
    return jnp.mean((h - y) ** 2)


def layers():
    draw = jax.random.normal
    return {"w": 0.5 * draw(jax.random.key(0), (8, 8, 8)), "b": jnp.ones((8, 8)) / 9}


# On one mesh the rows that the scan goes through are themselves on different devices.
@pytest.mark.parametrize(("layout", "kind"), [("fsdp", "auto"), ("data", "explicit")])
def test_iterations_of_a_scan(layout, kind):
    _, x, y = mlp_params()
    params, *data = spread(layout, kind, layers(), x, y)
    trace = trace_gradient(layers_loss, params, *data)
    alone = trace_gradient(layers_loss, layers(), x, y)
    for row in (7, 0):
        pairs = [
            next(s for s in t.steps if s.operation == "scan").inside(row)
            for t in (trace, alone)
        ]
        for step, right in zip(*pairs, strict=True):
            assert step.line == right.line
            assert norm(step.value) == pytest.approx(norm(right.value), rel=1e-5)
            near = pytest.approx(norm(right.cotangent), rel=1e-4)
            assert norm(step.cotangent) == near


def where_loss(params, x, y):
    h = x @ params["in"]
    h = jnp.where(x[:, :1] * 0 + h > 0, jnp.sqrt(h), 0.0)
    return jnp.mean(h @ params["out"]) + jnp.sum(params["shift"]) + jnp.mean(y)


@pytest.mark.parametrize(("layout", "kind"), TWO)
def test_a_nan_born_in_a_where(layout, kind, monkeypatch):
    params, x, y = mlp_params()
    # Of row 19 and unit 5 the root is at 0, where its slope is infinite.
    params["in"] = jnp.abs(params["in"]).at[:, 5].set(0)
    x = jnp.abs(x) + 0.1
    alone = trace_gradient(where_loss, params, x, y).first_nonfinite
    operands = spread(layout, kind, params, x, y)
    taken = watch_gathers(monkeypatch)
    trace = trace_gradient(where_loss, *operands)
    found = trace.first_nonfinite
    same_origin(found, alone)
    assert (found.kind, found.operation) == ("infinite slope", "sqrt")
    assert found.index == (0, 5)
    assert "where" in str(trace)
    # And which of a leaf's 16 columns are dead.
    assert all(size <= 16 for size in taken)


def product_loss(params, x, y):
    h = jnp.exp(30 * (x @ params["in"]))
    h = h @ params["out"]
    return jnp.mean(h - y)


def test_what_takes_several_numbers_to_be_bad():
    """The sum of inf and -inf in a row of a product: traced to one of them."""
    params, x, y = mlp_params()
    x = x.at[11].set(20 * jnp.sign(params["in"][:, 3]))
    alone = trace_gradient(product_loss, params, x, y).first_nonfinite
    operands = spread("2x4", "auto", params, x, y)
    same_origin(trace_gradient(product_loss, *operands).first_nonfinite, alone)
    assert alone.kind == "overflow"


def dead_loss(params, x, y):
    h = jax.nn.relu(x @ params["in"] + params["shift"])
    h = h @ params["out"] * lax.stop_gradient(params["scale"])
    return jnp.mean((h - lax.stop_gradient(h)) ** 2) + jnp.mean(params["shift"][:8])


@pytest.mark.parametrize(("layout", "kind"), TWO)
def test_dead_leaves_and_entries(layout, kind, monkeypatch):
    params, x, y = mlp_params()
    alone = trace_gradient(dead_loss, params, x, y)
    operands = spread(layout, kind, params, x, y)
    taken = watch_gathers(monkeypatch)
    trace = trace_gradient(dead_loss, *operands)
    reasons = [
        {n: [(b.line, b.reason) for b in blocks] for n, blocks in t.blocked.items()}
        for t in (trace, alone)
    ]
    assert reasons[0] == reasons[1]
    assert set(reasons[0]) == {"in", "out", "scale"}
    assert trace.dead_entries == alone.dead_entries
    assert trace.dead_entries["shift"].slices == (tuple(range(8, 16)),)
    assert str(trace)
    # And one number per place along an axis, in which slices are dead.
    assert all(size <= 16 for size in taken)


def test_a_minimum_on_a_mesh():
    def loss(params, x, y):
        return jnp.sum(params["in"] ** 2) + 0 * jnp.mean(x * y)

    params, x, y = mlp_params()
    params = {"in": jnp.zeros_like(params["in"])}
    trace = trace_gradient(loss, *spread("fsdp", "auto", params, x, y))
    assert [b.reason for b in trace.blocked["in"]] == ["at a minimum"]
    assert trace.ok


@pytest.mark.bad_input
def test_arrays_on_different_devices_are_named():
    params, x, y = mlp_params()
    params, x = spread("data", "auto", params, x)
    y = jax.device_put(y, jax.devices()[2])
    with pytest.raises(ValueError, match="Put them on one mesh") as e:
        trace_gradient(batch_norm_loss, params, x, y)
    text = str(e.value)
    assert "`in` is on 8 devices (cpu 0, 1, 2, 3, 4, 5, 6, 7)" in text
    assert "`args[1]` is on 1 device (cpu 2)" in text
    # NumPy arrays, and those that no one has put anywhere, go with the others.
    free = trace_gradient(batch_norm_loss, params, x, np.asarray(y))
    assert free.ok
