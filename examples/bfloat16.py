"""bfloat16: the digits that a gradient keeps, and the updates that are lost in it."""

import functools

import jax
import jax.numpy as jnp

import jaxgrad

bf16, f32 = jnp.bfloat16, jnp.float32
keys = jax.random.split(jax.random.key(0), 3)
x = jax.random.normal(keys[0], (64, 8, 8))  # 64 batches
y = jnp.sin(x.sum(axis=2, keepdims=True))
start = {
    "hidden": jax.random.normal(keys[1], (8, 32)) / 3,
    "output": jax.random.normal(keys[2], (32, 1)) / 6,
}


def cast(params, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


# The products' operands have the parameters' dtype, and their results that of `sums`:
# so has what is summed over the batches, of the loss and of the gradient.
def loss(params, x, y, sums=f32):
    dtype = params["hidden"].dtype
    wide = cast(params, sums)

    def dense(x, w):
        return jnp.dot(x.astype(dtype), w.astype(dtype), preferred_element_type=sums)

    def add(total, batch):
        x, y = batch
        prediction = dense(jnp.tanh(dense(x, wide["hidden"])), wide["output"])
        return total + jnp.sum((prediction - y.astype(sums)) ** 2), None

    return jax.lax.scan(add, jnp.zeros((), sums), (x, y))[0] / y.size


all_in_bf16 = functools.partial(loss, sums=bf16)


# The same numbers in the products, but the parameters keep all of their digits.
def master_loss(params, x, y):
    return loss(cast(params, bf16), x, y)


print("Decimal digits of the gradient, as jaxgrad.check_gradient counts them\n")
print("parameters  sums and loss   hidden  output")
digits = {}
for parameters, sums, function in [
    (f32, f32, loss),
    (bf16, f32, loss),
    (bf16, bf16, all_in_bf16),
]:
    report = jaxgrad.check_gradient(function, cast(start, parameters), x, y)
    assert report  # the rule is right, in however few digits it's computed
    found = digits[parameters, sums] = [leaf.digits for leaf in report.leaves]
    names = f"{parameters.__name__:<12}{sums.__name__:<16}"
    print(f"{names}{'  '.join(f'{d:6.1f}' for d in found)}")
assert min(digits[f32, f32]) > 5.5
# One rounding to bfloat16's 8 bits leaves some 2.8 digits. With float32 sums there is
# about one; a sum over 64 batches in bfloat16 has 64, here five times the error. The
# assertions leave room for another backend's order of sums.
assert min(digits[bf16, f32]) > 2
assert min(digits[bf16, f32]) > max(digits[bf16, bf16]) + 0.3

print("\nThe loss after 2000 steps of gradient descent, at a learning rate of 0.001\n")
print("parameters            first    last   entries that never moved")
runs = {}
for name, function, params in [
    ("float32", loss, start),
    ("bfloat16", loss, cast(start, bf16)),
    ("float32, cast inside", master_loss, cast(cast(start, bf16), f32)),
]:
    run = jaxgrad.train(function, params, x, y, steps=2000, learning_rate=0.001)
    same = jax.tree.map(lambda a, b: jnp.mean(a == b), run.params, params)
    stuck = sum(map(float, jax.tree.leaves(same))) / len(same)
    runs[name] = run.losses[-1], stuck
    print(f"{name:<20}{run.losses[0]:>7.3f}{run.losses[-1]:>8.3f}{stuck:>13.0%}")

# Next to 0.25 the spacing of bfloat16 is 0.001 to 0.002. An update of less than half of
# it rounds to nothing, as often as it is made; in float32 the updates add up, and what
# is rounded in the products, to 0.4 %, is noise.
(full, _), (lost, stuck), (kept, moved) = runs.values()
assert stuck > 0.5
assert moved < 0.01
assert lost > 1.2 * full
assert abs(kept - full) < 0.01 * full

step = jaxgrad.explain_step(loss, cast(start, bf16), x, y, learning_rate=1e-6)
print(f"\nexplain_step says so of a step: {[leaf.warning for leaf in step.leaves]}")
assert {leaf.warning for leaf in step.leaves} == {"lost"}
