"""The update rule by hand and optax's: the same bits after 50 compiled steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxgrad

STEPS = 50
key, *keys = jax.random.split(jax.random.key(0), 4)
start = {
    "hidden": jaxgrad.init_linear(keys[0], 5, 4),
    "output": jaxgrad.init_linear(keys[1], 4, 1),
}
x = jax.random.normal(keys[2], (20, 5))
y = jnp.sin(x.sum(axis=1, keepdims=True))


def loss(params, x, y):
    hidden = jnp.tanh(jaxgrad.linear(params["hidden"], x))
    return jaxgrad.linear_loss(params["output"], hidden, y)


# Compiled alike: both loops are the same program but for the rule, so that the compiler
# fuses and rounds the gradient in the same way.
def run(initial_state, rule):
    @jax.jit
    def loop(params):
        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, x, y)
            return rule(params, grads, state), value

        return jax.lax.scan(step, (params, initial_state), length=STEPS)

    (params, _), losses = loop(start)
    return params, losses


def by_hand(options):
    def rule(params, grads, state):
        return jaxgrad.sgd_update(params, grads=grads, state=state, **options)

    return run(jaxgrad.init_sgd(start), rule)


def by_optax(options):
    transform = optax.sgd(**options)

    def rule(params, grads, state):
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return run(transform.init(start), rule)


print(f"{STEPS} steps             first loss   last loss   entries that differ")
for name, options in {
    "plain": {"learning_rate": 0.1},
    "momentum": {"learning_rate": 0.1, "momentum": 0.9},
    "nesterov": {"learning_rate": 0.1, "momentum": 0.9, "nesterov": True},
    "a schedule": {"learning_rate": optax.cosine_decay_schedule(0.1, STEPS)},
}.items():
    ours, losses = by_hand(options)
    theirs, their_losses = by_optax(options)
    differ = sum(
        int(np.sum(np.asarray(a) != np.asarray(b)))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    )
    print(f"{name:18}  {losses[0]:12.6f}{losses[-1]:12.6f}{differ:12d}")
    assert differ == 0
    np.testing.assert_array_equal(losses, their_losses)
    assert losses[-1] < losses[0]
