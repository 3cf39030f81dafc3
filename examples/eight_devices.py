"""The same compiled gradient on eight devices: the batch is split, the loss isn't."""

import os

# Eight devices simulated on the CPU. JAX reads this once, when it is imported.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxgrad

batch, features = 8000, 5
keys = jax.random.split(jax.random.key(0), 3)
params = jaxgrad.init_linear(keys[0], features, 1)
x = jax.random.normal(keys[1], (batch, features))
y = x.sum(axis=1, keepdims=True) + jax.random.normal(keys[2], (batch, 1))

# A sum in another order rounds differently: n errors of up to eps, which go up and
# down as a random walk does.
rounding = float(np.finfo(np.float32).eps) * batch**0.5

gradient = jaxgrad.value_and_grad(jaxgrad.linear_loss)
one_loss, one = gradient(params, x, y)

mesh = Mesh(np.array(jax.devices()), ("batch",))
split = NamedSharding(mesh, P("batch"))  # each device has its own rows
whole = NamedSharding(mesh, P())  # each device has a copy
everywhere = jax.device_put(params, whole)
shared_x, shared_y = jax.device_put((x, y), split)
# The loss is still that of the whole batch, and the compiler adds up what the devices
# hold. Averaging the gradients of the parts by hand would be right only for equal
# parts and for a loss that is a plain mean.
eight_loss, eight = gradient(everywhere, shared_x, shared_y)

print(f"devices            {len(jax.devices())}, {batch} rows in all")
print(f"rows on the first  {shared_x.addressable_shards[0].data.shape[0]}")
print(f"loss               {one_loss:.6f} on one, {eight_loss:.6f} on eight")
assert len(jax.devices()) == len(eight.weight.devices()) == 8
assert shared_x.addressable_shards[0].data.shape == (batch // 8, features)
np.testing.assert_allclose(eight_loss, one_loss, rtol=rounding)

for name, a, b in zip(one._fields, one, eight, strict=True):
    differs = float(jnp.max(jnp.abs(a - np.asarray(b))) / jnp.max(jnp.abs(a)))
    print(f"{name:19}differs by {differs:.1e} of its largest entry")
    assert differs < rounding
    assert b.sharding.is_fully_replicated
