"""More non-finite values in models and training: traps, saturation, bad data."""

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import optax
from corpus.case import draw
from flax import nnx
from jax import lax

from faults.case import Nonfinite, Problem, nonfinite

CASES: list[Nonfinite] = []


# Equinox


@nonfinite(CASES, "norm at zero", phase="backward", index=(1,))
def equinox_speed_at_rest():
    class Field(eqx.Module):
        mlp: eqx.nn.MLP

        def speed(self, x):
            velocity = self.mlp(x)
            return jnp.linalg.norm(velocity)  # blame

    def loss(field, x, y):
        speeds = jax.vmap(field.speed)(x)
        return optax.huber_loss(speeds, y).mean()

    key = jax.random.key(0)
    mlp = eqx.nn.MLP(
        2, 2, 4, 1, jnp.tanh, use_bias=False, use_final_bias=False, key=key
    )
    x = draw(0, 3, 2).at[1].set(0.0)
    return Problem(loss, Field(mlp), (x, jnp.ones(3)))


@nonfinite(CASES, "log of zero", phase="forward", index=(2,))
def equinox_mixture_density():
    class Mixture(eqx.Module):
        means: eqx.nn.Linear
        weights: eqx.nn.Linear

        def __call__(self, x):
            return self.means(x), jax.nn.softmax(self.weights(x))

    def log_likelihood(model, x, y):
        means, weights = model(x)
        density = jnp.sum(weights * jnp.exp(-0.5 * (y - means) ** 2))
        return jnp.log(density)  # blame

    def loss(model, x, y):
        return -jnp.mean(jax.vmap(log_likelihood, (None, 0, 0))(model, x, y))

    one, two = jax.random.split(jax.random.key(1))
    model = Mixture(eqx.nn.Linear(2, 3, key=one), eqx.nn.Linear(2, 3, key=two))
    return Problem(loss, model, (draw(1, 3, 2), jnp.array([0.1, 0.5, 40.0])))


@nonfinite(CASES, "log of zero", index=(1,))
def equinox_flow_with_a_zero_scale():
    class Affine(eqx.Module):
        scale: jax.Array
        shift: jax.Array

        def __call__(self, x):
            log_volume = jnp.log(jnp.abs(self.scale))  # blame
            return x * self.scale + self.shift, jnp.sum(log_volume)

    def loss(layers, x):
        total = 0.0
        for layer in layers:
            x, log_volume = layer(x)
            total = total + log_volume
        return jnp.mean(x**2) - total

    scale = jnp.array([1.0, 0.0])
    layers = [Affine(jnp.ones(2), jnp.zeros(2)), Affine(scale, jnp.ones(2))]
    return Problem(loss, layers, (draw(2, 4, 2),))


@nonfinite(CASES, "overflow", phase="forward", iteration=2)
def equinox_exploding_recurrence():
    class Net(eqx.Module):
        linear: eqx.nn.Linear

        def __call__(self, xs):
            def step(h, x):
                h = self.linear(h) + x
                h = jnp.exp(h)  # blame
                return h, h.sum()

            _, sums = lax.scan(step, jnp.zeros(2), xs)
            return sums[-1]

    def loss(model, batch):
        return jnp.mean(jax.vmap(model)(batch))

    linear = eqx.nn.Linear(2, 2, use_bias=False, key=jax.random.key(2))
    model = Net(eqx.tree_at(lambda m: m.weight, linear, jnp.eye(2)))
    batch = jnp.zeros((2, 4, 2)).at[0, 0].set(1.6)
    return Problem(loss, model, (batch,))


@nonfinite(CASES, "domain", phase="forward", branch=0)
def equinox_branch_of_a_model():
    class Net(eqx.Module):
        inner: eqx.nn.Linear
        outer: eqx.nn.Linear

        def __call__(self, x, hot):
            def cold(h):
                return jnp.sqrt(h - 5)  # blame

            h = jnp.tanh(self.inner(x))
            h = lax.cond(hot, jnp.exp, cold, h)
            return self.outer(h)

    def loss(model, x, hot):
        return jnp.sum(model(x, hot) ** 2)

    one, two = jax.random.split(jax.random.key(3))
    model = Net(eqx.nn.Linear(2, 3, key=one), eqx.nn.Linear(3, 1, key=two))
    return Problem(loss, model, (draw(3, 2), jnp.asarray(False)))


@nonfinite(
    CASES, "non-finite input", phase="forward", origin="args[0]", index=(1, 0, 2)
)
def equinox_nan_pixel():
    class Net(eqx.Module):
        conv: eqx.nn.Conv1d
        head: eqx.nn.Linear

        def __call__(self, x):
            h = jax.nn.relu(self.conv(x))  # blame
            return self.head(h.reshape(-1))

    def loss(model, x, y):
        logits = jax.vmap(model)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    one, two = jax.random.split(jax.random.key(4))
    model = Net(eqx.nn.Conv1d(1, 2, 3, key=one), eqx.nn.Linear(8, 2, key=two))
    x = draw(4, 3, 1, 6).at[1, 0, 2].set(jnp.nan)
    return Problem(loss, model, (x, jnp.array([0, 1, 0])))


@nonfinite(
    CASES, "non-finite input", phase="forward", origin="outer.weight", index=(0, 1)
)
def equinox_spoiled_weight():
    """As an earlier bad step of training leaves it."""

    class Net(eqx.Module):
        inner: eqx.nn.Linear
        outer: eqx.nn.Linear

        def __call__(self, x):
            h = jax.nn.gelu(self.inner(x))
            return self.outer(h)  # blame

    def loss(model, x, y):
        return optax.l2_loss(jax.vmap(model)(x), y).mean()

    one, two = jax.random.split(jax.random.key(5))
    model = Net(eqx.nn.Linear(2, 3, key=one), eqx.nn.Linear(3, 1, key=two))
    weight = model.outer.weight.at[0, 1].set(jnp.nan)
    model = eqx.tree_at(lambda m: m.outer.weight, model, weight)
    return Problem(loss, model, (draw(5, 4, 2), draw(6, 4, 1)))


@nonfinite(CASES, "division by zero", phase="forward")
def equinox_batch_of_one():
    class Net(eqx.Module):
        linear: eqx.nn.Linear

        def __call__(self, x):
            h = self.linear(x)
            mean = lax.pmean(h, "batch")
            variance = lax.pmean((h - mean) ** 2, "batch")
            return (h - mean) / jnp.sqrt(variance)  # blame

    def loss(model, x):
        return jnp.sum(jax.vmap(model, axis_name="batch")(x) ** 2)

    return Problem(
        loss, Net(eqx.nn.Linear(2, 3, key=jax.random.key(6))), (draw(7, 1, 2),)
    )


# Flax


@nonfinite(CASES, "division by zero", phase="forward")
def linen_rms_norm_of_zeros():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            h = linen.Dense(3, use_bias=False)(x)
            h = linen.RMSNorm(epsilon=0.0)(h)  # blame
            return linen.Dense(1)(h)

    model, x = Net(), draw(8, 3, 2)
    variables = model.init(jax.random.key(7), x)

    def loss(variables, x):
        return jnp.mean(model.apply(variables, x) ** 2)

    return Problem(loss, variables, (x.at[1].set(0.0),))


@nonfinite(CASES, "infinite slope", phase="backward", index=(1,))
def linen_signed_root_activation():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            h = linen.Dense(3)(x)
            h = jnp.where(h < 0, h, jnp.sqrt(jnp.abs(h)))  # blame
            return linen.Dense(1)(h)[:, 0]

    model, x = Net(), draw(9, 3, 2).at[1].set(0.0)

    def loss(variables, x, y):
        return optax.l2_loss(model.apply(variables, x), y).mean()

    return Problem(loss, model.init(jax.random.key(8), x), (x, draw(10, 3)))


@nonfinite(CASES, "infinite slope", phase="backward", index=(0,))
def linen_focal_loss():
    """The sigmoid is exactly 1, and the power's slope at 0 infinite."""

    model, x = linen.Dense(1), jnp.array([[40.0, 0.0], [0.0, 1.0]])
    variables = model.init(jax.random.key(9), x)
    variables["params"]["kernel"] = jnp.ones((2, 1))

    def focal(p, y):
        missed = 1 - jnp.where(y > 0, p, 1 - p)
        weight = missed**0.5  # blame
        return weight * (p - y) ** 2

    def loss(variables, x, y):
        p = linen.sigmoid(model.apply(variables, x)[:, 0])
        return jnp.mean(focal(p, y))

    return Problem(loss, variables, (x, jnp.array([1.0, 0.0])))


@nonfinite(CASES, "infinite slope", phase="backward", index=(0, 0))
def linen_angular_margin():
    """ArcFace: an embedding that lies exactly on its class."""

    class Head(linen.Module):
        @linen.compact
        def __call__(self, x):
            classes = self.param("classes", linen.initializers.ones, (3, 2))
            classes = classes / jnp.linalg.norm(classes, axis=1, keepdims=True)
            x = x / jnp.linalg.norm(x, axis=1, keepdims=True)
            angle = jnp.arccos(x @ classes.T)  # blame
            return 8 * jnp.cos(angle + 0.1)

    def loss(variables, x, y):
        logits = Head().apply(variables, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    classes = jnp.array([[2.0, 0.0], [1.0, 3.0], [-1.0, 1.0]])
    x = jnp.array([[4.0, 0.0], [0.3, 0.5]])
    return Problem(loss, {"params": {"classes": classes}}, (x, jnp.array([0, 1])))


@nonfinite(CASES, "division by zero", phase="forward", index=(1,))
def nnx_mean_pool_over_padding():
    class Pool(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(6, 3, rngs=rngs)
            self.head = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, tokens):
            kept = (tokens != 0)[..., None].astype(jnp.float32)
            total = jnp.sum(self.embed(tokens) * kept, 1)
            pooled = total / kept.sum(1)  # blame
            return self.head(pooled)

    graph, params = nnx.split(Pool(nnx.Rngs(10)), nnx.Param)

    def loss(params, tokens, y):
        logits = nnx.merge(graph, params)(tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    tokens = jnp.array([[1, 2, 0], [0, 0, 0], [5, 0, 0]])
    return Problem(loss, params, (tokens, jnp.array([0, 1, 1])))


@nonfinite(CASES, "division by zero", phase="forward")
def nnx_temperature_of_zero():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(2, 3, rngs=rngs)
            self.temperature = nnx.Param(jnp.zeros(()))

        def __call__(self, x):
            logits = self.linear(x)
            return logits / self.temperature[...]  # blame

    graph, params = nnx.split(Net(nnx.Rngs(11)), nnx.Param)

    def loss(params, x, y):
        logits = nnx.merge(graph, params)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return Problem(loss, params, (draw(11, 3, 2), jnp.array([0, 1, 2])))


# optax


@nonfinite(
    CASES, "norm at zero", "infinite slope", "division by zero", phase="backward"
)
def optax_differentiated_clipping():
    """The step of a frozen task: its gradient is zero, and so is the norm."""

    def loss(start, x, weight):
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))

        def inner_loss(w):
            return weight * jnp.sum((w - x) ** 2)

        gradient = jax.grad(inner_loss)(start)
        updates, _ = optimizer.update(gradient, optimizer.init(start))  # blame
        return jnp.sum(optax.apply_updates(start, updates) ** 2)

    return Problem(loss, draw(12, 3), (draw(13, 3), jnp.float32(0.0)))


@nonfinite(CASES, "log of zero", phase="forward", index=(0, 1))
def optax_divergence_from_hard_targets():
    def loss(model, x, targets):
        log_p = jax.nn.log_softmax(jax.vmap(model)(x))
        log_q = jnp.log(targets)  # blame
        return optax.losses.kl_divergence_with_log_targets(log_p, log_q).mean()

    model = eqx.nn.Linear(2, 3, key=jax.random.key(12))
    targets = jnp.array([[1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
    return Problem(loss, model, (draw(14, 2, 2), targets))
