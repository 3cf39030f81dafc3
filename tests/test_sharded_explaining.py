"""Tests `explain_step` on arrays that are spread over a mesh of 8 devices."""

import functools

import jax
import jax.numpy as jnp
import pytest
from meshes import SOME, batch_norm_loss, mlp_params, spread, watch_gathers

import jaxgrad
from jaxgrad import explain_step

# The whole reductions are done in another order: some roundings of float32. Where the
# loss begins to rise is known to the rounding of its values, over its slope there.
NEAR, RISE = dict(rel=1e-5), dict(rel=1e-3)


@functools.cache
def on_one_device():
    return explain_step(
        batch_norm_loss, *mlp_params(), learning_rate=0.5, sharpness=True
    )


@pytest.mark.parametrize(("layout", "kind"), SOME)
def test_batch_norm_is_that_of_one_device(layout, kind, monkeypatch):
    there = spread(layout, kind, *mlp_params())
    sharpness = (layout, kind) in (("2x4", "auto"), ("fsdp", "explicit"))
    taken = watch_gathers(monkeypatch)
    step = explain_step(batch_norm_loss, *there, learning_rate=0.5, sharpness=sharpness)
    assert str(step)
    # Only the entries that are shown are taken, of the one small leaf.
    assert all(size <= 8 for size in taken)
    alone = on_one_device()
    for name in ("loss", "gradient_norm", "loss_after", "decrease", "curvature"):
        assert getattr(step, name) == pytest.approx(getattr(alone, name), **NEAR)
    for name in ("best_rate", "first_rise", *(["sharpness"] if sharpness else [])):
        assert getattr(step, name) == pytest.approx(getattr(alone, name), **RISE)
    for leaf, right in zip(step.leaves, alone.leaves, strict=True):
        assert (leaf.path, leaf.rank, leaf.warning) == (
            right.path,
            right.rank,
            right.warning,
        )
        assert leaf.gradient_norm == pytest.approx(right.gradient_norm, **NEAR)
        assert [e.after for e in leaf.entries] == pytest.approx(
            [e.after for e in right.entries], **NEAR
        )
    assert len(step.leaves[-2].entries) == 8


@jax.custom_vjp
def squared(x):
    return x * x


@jax.custom_vjp
def doubled(x):
    return 2 * x


doubled.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))
squared.defvjp(lambda x: (x * x, x), lambda x, g: (g * doubled(x),))


def test_differences_where_there_is_no_forward_mode():
    params, x, y = mlp_params()

    def loss(params, x, y):
        h = squared(x @ params["in"]) @ params["out"] * params["scale"]
        return jnp.mean((h + params["shift"][:8] - y) ** 2)

    there = explain_step(loss, *spread("2x4", "auto", params, x, y), learning_rate=0.1)
    alone = explain_step(loss, params, x, y, learning_rate=0.1)
    assert {f.kind for f in there.findings} == {"curvature"}
    # Differences err by cbrt(eps)**2, 3e-5, of the curvature's size, and some more.
    assert there.curvature == pytest.approx(alone.curvature, rel=2e-3)


@pytest.mark.bad_input
def test_arrays_on_different_devices_are_named(neuron):
    params, x, y = neuron
    params, y = spread("data", "auto", params)[0], jax.device_put(y, jax.devices()[1])
    with pytest.raises(ValueError, match=r"`weight` is on 8 .* `args\[1\]` is on 1"):
        explain_step(jaxgrad.linear_loss, params, x, y, learning_rate=0.1)
