"""Non-finite values in models of Equinox."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from corpus.case import draw
from jax import lax

from faults.case import Nonfinite, Problem, nonfinite

CASES: list[Nonfinite] = []


@nonfinite(CASES, "infinite slope", "norm at zero", phase="backward")
def equinox_spread_head():
    """The variance is squared into place, and is exactly 0 at the start."""

    class Gaussian(eqx.Module):
        body: eqx.nn.Linear
        spread: eqx.nn.Linear

        def __call__(self, x):
            h = jnp.tanh(self.body(x))
            variance = jnp.square(self.spread(h))
            sigma = jnp.sqrt(variance)  # blame
            return h.sum(), sigma.sum()

    def loss(model, x, y):
        mean, sigma = jax.vmap(model)(x)
        return jnp.mean((mean - y) ** 2 + sigma)

    one, two = jax.random.split(jax.random.key(0))
    model = Gaussian(eqx.nn.Linear(3, 4, key=one), eqx.nn.Linear(4, 1, key=two))
    spread = jax.tree.map(jnp.zeros_like, model.spread)
    model = eqx.tree_at(lambda m: m.spread, model, spread)
    return Problem(loss, model, (draw(0, 5, 3), draw(1, 5)))


@nonfinite(CASES, "empty softmax", index=(1,))
def equinox_attention_over_padding():
    """The second sequence of the batch is nothing but padding."""

    class Pool(eqx.Module):
        score: eqx.nn.Linear
        value: eqx.nn.Linear

        def __call__(self, tokens, mask):
            scores = jax.vmap(self.score)(tokens)[:, 0]
            scores = jnp.where(mask, scores, -jnp.inf)
            attention = jax.nn.softmax(scores)  # blame
            return attention @ jax.vmap(self.value)(tokens)

    def loss(model, batch):
        pooled = jax.vmap(model)(batch["tokens"], batch["mask"])
        return jnp.mean((pooled - batch["target"]) ** 2)

    one, two = jax.random.split(jax.random.key(1))
    model = Pool(eqx.nn.Linear(3, 1, key=one), eqx.nn.Linear(3, 2, key=two))
    mask = jnp.array([[True, True, False], [False, False, False]])
    batch = {"tokens": draw(2, 2, 3, 3), "mask": mask, "target": draw(3, 2, 2)}
    return Problem(loss, model, (batch,))


@nonfinite(CASES, "division by zero", phase="forward", index=(2,))
def equinox_contrastive():
    """An input of zeros, no bias: an embedding of length zero."""

    class Encoder(eqx.Module):
        layers: list

        def __call__(self, x):
            for layer in self.layers[:-1]:
                x = jax.nn.relu(layer(x))
            z = self.layers[-1](x)
            return z / jnp.linalg.norm(z)  # blame

    def loss(model, x):
        z = jax.vmap(model)(x)
        logits = z @ z.T / 0.5
        labels = jnp.array([1, 0, 3, 2])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    one, two = jax.random.split(jax.random.key(2))
    layers = [
        eqx.nn.Linear(3, 8, use_bias=False, key=one),
        eqx.nn.Linear(8, 4, use_bias=False, key=two),
    ]
    return Problem(loss, Encoder(layers), (draw(4, 4, 3).at[2].set(0.0),))


@nonfinite(CASES, "overflow", phase="forward", index=(1,))
def equinox_vae():
    class Encoder(eqx.Module):
        mean: eqx.nn.Linear
        log_variance: eqx.nn.Linear

        def __call__(self, x):
            return self.mean(x), self.log_variance(x)

    def kl(mean, log_variance):
        variance = jnp.exp(log_variance)  # blame
        return 0.5 * jnp.sum(mean**2 + variance - log_variance - 1, -1)

    def loss(model, x):
        mean, log_variance = jax.vmap(model)(x)
        return jnp.mean(kl(mean, log_variance))

    one, two = jax.random.split(jax.random.key(3))
    model = Encoder(eqx.nn.Linear(2, 1, key=one), eqx.nn.Linear(2, 1, key=two))
    model = eqx.tree_at(lambda m: m.log_variance.weight, model, jnp.ones((1, 2)))
    x = jnp.array([[0.1, -0.2], [60.0, 60.0], [1.0, 0.3]])
    return Problem(loss, model, (x,))


@nonfinite(CASES, "log of zero", phase="forward", iteration=2)
def equinox_recurrent_intensity():
    """A point process: the intensity is 0 once the input is very negative."""

    class Process(eqx.Module):
        cell: eqx.nn.GRUCell
        rate: eqx.nn.Linear

        def __call__(self, events):
            def step(h, x):
                h = self.cell(x, h)
                intensity = jax.nn.softplus(self.rate(h)[0] + 200 * x[0])
                log_rate = jnp.log(intensity)  # blame
                return h, log_rate - intensity

            _, terms = lax.scan(step, jnp.zeros(4), events)
            return -jnp.sum(terms)

    def loss(model, batch):
        return jnp.mean(jax.vmap(model)(batch))

    one, two = jax.random.split(jax.random.key(4))
    model = Process(eqx.nn.GRUCell(1, 4, key=one), eqx.nn.Linear(4, 1, key=two))
    batch = jnp.array([[0.1, 0.0, 0.2, 0.1], [0.0, 0.1, -1.0, 0.0]])[..., None]
    return Problem(loss, model, (batch,))


@nonfinite(CASES, "division by zero", phase="forward", iteration=1)
def equinox_scan_over_layers():
    """Stacked layers; the second one's weights are zero, and so is what it gives."""

    class Layer(eqx.Module):
        linear: eqx.nn.Linear

        def __call__(self, h):
            h = self.linear(h)
            scale = jnp.sqrt(jnp.mean(h**2))
            return h / scale  # blame

    def loss(layers, x):
        arrays, static = eqx.partition(layers, eqx.is_array)

        def step(h, part):
            return eqx.combine(part, static)(h), None

        h, _ = lax.scan(step, x, arrays)
        return jnp.sum(h)

    @eqx.filter_vmap
    def make(key):
        return Layer(eqx.nn.Linear(3, 3, use_bias=False, key=key))

    layers = make(jax.random.split(jax.random.key(5), 3))
    weight = layers.linear.weight.at[1].set(0.0)
    layers = eqx.tree_at(lambda m: m.linear.weight, layers, weight)
    return Problem(loss, layers, (draw(5, 3),))


@nonfinite(CASES, "division by zero", phase="forward")
def equinox_layer_norm_without_epsilon():
    class Block(eqx.Module):
        norm: eqx.nn.LayerNorm
        linear: eqx.nn.Linear

        def __call__(self, x):
            h = self.norm(x)  # blame
            return self.linear(h)

    def loss(model, x):
        return jnp.mean(jax.vmap(model)(x) ** 2)

    linear = eqx.nn.Linear(3, 2, key=jax.random.key(6))
    model = Block(eqx.nn.LayerNorm(3, eps=0.0), linear)
    return Problem(loss, model, (jnp.array([[1.0, 2.0, 3.0], [2.0, 2.0, 2.0]]),))


@nonfinite(CASES, "norm at zero", phase="backward", index=(1,))
def equinox_gradient_penalty():
    """A critic that is flat at the second point: the slope's norm is zero there."""

    class Critic(eqx.Module):
        hidden: eqx.nn.Linear
        out: eqx.nn.Linear

        def __call__(self, x):
            return self.out(jnp.tanh(self.hidden(x)) ** 2)

    def loss(critic, x):
        slopes = jax.vmap(jax.grad(critic))(x)
        norms = jnp.linalg.norm(slopes, axis=-1)  # blame
        return jnp.mean((norms - 1) ** 2)

    one, two = jax.random.split(jax.random.key(7))
    hidden = eqx.nn.Linear(2, 4, use_bias=False, key=one)
    critic = Critic(hidden, eqx.nn.Linear(4, "scalar", key=two))
    return Problem(loss, critic, (draw(6, 3, 2).at[1].set(0.0),))
