"""Three ways to lay parameters and data over 8 devices, for tests of sharding."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
# Not all six pairs, which would take twice as long.
SOME = [("data", "auto"), ("fsdp", "explicit"), ("2x4", "auto")]


def spread(layout, kind, params, *data):
    """The leaves and the data, laid over a mesh: the same numbers.

    `data`: rows of the data are spread, and leaves copied. `fsdp`: leaves are spread
    too, along their last axis but one. `2x4`: rows along one axis, columns of the
    leaves along the other.
    """
    shape, names = (
        ((2, 4), ("rows", "columns")) if layout == "2x4" else ((8,), ("all",))
    )
    mesh = jax.make_mesh(shape, names, axis_types=(KINDS[kind],) * len(names))

    def lay(leaf):
        spec = P()
        if layout == "2x4":
            spec = P(*[None] * (leaf.ndim - 1), "columns")
        elif layout == "fsdp" and leaf.ndim > 1:
            spec = P(*[None] * (leaf.ndim - 2), "all")
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    rows = NamedSharding(mesh, P(names[0]))
    return jax.tree.map(lay, params), *(jax.device_put(x, rows) for x in data)


def mlp_params():
    """Two layers of 8 and 16 units, and the data: 32 rows."""
    draw = jax.random.normal
    params = {
        "in": 0.3 * draw(jax.random.key(0), (8, 16)),
        "shift": 0.1 * draw(jax.random.key(1), (16,)),
        "out": 0.3 * draw(jax.random.key(2), (16, 8)),
        "scale": jnp.linspace(0.5, 1.5, 8),
    }
    return params, draw(jax.random.key(3), (32, 8)), draw(jax.random.key(4), (32, 8))


def batch_norm_loss(params, x, y):
    """Its statistics are of the whole batch: the mean of parts' gradients is wrong."""
    hidden = x @ params["in"]
    hidden = (hidden - hidden.mean(0)) / jnp.sqrt(hidden.var(0) + 1e-5)
    hidden = hidden + params["shift"]
    return jnp.mean((jax.nn.relu(hidden) @ params["out"] * params["scale"] - y) ** 2)


def watch_gathers(monkeypatch):
    """The sizes of spread arrays whose numbers have been taken to the host as a whole.

    All ways there (`float`, `np.asarray`, `jax.device_get`) go through one property.
    """
    kind, sizes = type(jnp.zeros(())), []
    taken = kind._value

    def value(array):
        if not array.is_fully_replicated:
            sizes.append(array.size)
        return taken.__get__(array)

    monkeypatch.setattr(kind, "_value", property(value))
    return sizes
