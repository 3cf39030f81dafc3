"""Gradients that are all zero in models of Equinox and Flax, and with optax."""

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import optax
from corpus.case import draw
from flax import nnx
from jax import lax

from faults.case import NEVER_USED, Problem, Zero, zero

CASES: list[Zero] = []


# Equinox


@zero(CASES, {"encoder.weight": ("stop_gradient",), "encoder.bias": ("stop_gradient",)})
def equinox_frozen_encoder():
    class Probe(eqx.Module):
        encoder: eqx.nn.Linear
        head: eqx.nn.Linear

        def __call__(self, x):
            features = jax.nn.gelu(self.encoder(x))
            features = lax.stop_gradient(features)  # blame
            return self.head(features)

    def loss(model, x, y):
        logits = jax.vmap(model)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    one, two = jax.random.split(jax.random.key(0))
    model = Probe(eqx.nn.Linear(3, 4, key=one), eqx.nn.Linear(4, 2, key=two))
    return Problem(loss, model, (draw(0, 4, 3), jnp.array([0, 1, 1, 0])))


@zero(CASES, {"a": ("zero factor",)})
def equinox_lora():
    class Lora(eqx.Module):
        base: eqx.nn.Linear
        a: jax.Array
        b: jax.Array

        def __call__(self, x):
            low = self.a @ x
            return self.base(x) + self.b @ low  # blame

    def loss(model, x, y):
        return optax.l2_loss(jax.vmap(model)(x), y).mean()

    base = eqx.nn.Linear(4, 3, key=jax.random.key(1))
    model = Lora(base, draw(1, 2, 4), jnp.zeros((3, 2)))
    return Problem(loss, model, (draw(2, 5, 4), draw(3, 5, 3)))


@zero(CASES, {"linear.weight": ("zero factor",), "linear.bias": ("zero factor",)})
def equinox_rezero_scanned():
    """Stacked residual blocks whose gates all start at zero."""

    class Block(eqx.Module):
        linear: eqx.nn.Linear
        alpha: jax.Array

        def __call__(self, h):
            update = jnp.tanh(self.linear(h))
            return h + self.alpha * update  # blame

    def loss(blocks, x, y):
        arrays, static = eqx.partition(blocks, eqx.is_array)

        def step(h, part):
            block = eqx.combine(part, static)
            return jax.vmap(block)(h), None

        h, _ = lax.scan(step, x, arrays)
        return jnp.mean((h - y) ** 2)

    @eqx.filter_vmap
    def make(key):
        return Block(eqx.nn.Linear(3, 3, key=key), jnp.float32(0.0))

    blocks = make(jax.random.split(jax.random.key(2), 3))
    return Problem(loss, blocks, (draw(4, 4, 3), draw(5, 4, 3)))


@zero(CASES, {"encoder.weight": ("argmax",), "encoder.bias": ("argmax",)})
def equinox_vector_quantiser():
    """A VQ-VAE without its straight-through estimator."""

    class Quantiser(eqx.Module):
        encoder: eqx.nn.Linear
        codebook: jax.Array
        decoder: eqx.nn.Linear

        def __call__(self, x):
            z = self.encoder(x)
            distances = jnp.sum((self.codebook - z) ** 2, -1)
            nearest = jnp.argmin(distances)  # blame
            return self.decoder(self.codebook[nearest])

    def loss(model, x):
        return jnp.mean((jax.vmap(model)(x) - x) ** 2)

    one, two = jax.random.split(jax.random.key(3))
    encoder = eqx.nn.Linear(3, 2, key=one)
    model = Quantiser(encoder, draw(6, 4, 2), eqx.nn.Linear(2, 3, key=two))
    return Problem(loss, model, (draw(7, 5, 3),))


@zero(CASES, {"gate.weight": ("saturation",), "gate.bias": ("saturation",)})
def equinox_saturated_gate():
    class Gated(eqx.Module):
        gate: eqx.nn.Linear
        value: eqx.nn.Linear

        def __call__(self, x):
            gate = self.gate(x)
            gate = jax.nn.sigmoid(gate)  # blame
            return gate * self.value(x)

    def loss(model, x, y):
        return jnp.mean((jax.vmap(model)(x) - y) ** 2)

    one, two = jax.random.split(jax.random.key(4))
    model = Gated(eqx.nn.Linear(3, 2, key=one), eqx.nn.Linear(3, 2, key=two))
    model = eqx.tree_at(lambda m: m.gate.bias, model, jnp.full(2, 60.0))
    return Problem(loss, model, (draw(8, 4, 3), draw(9, 4, 2)))


@zero(
    CASES,
    {
        "target.layers[0].weight": ("stop_gradient",),
        "target.layers[0].bias": ("stop_gradient",),
        "target.layers[1].weight": ("stop_gradient",),
        "target.layers[1].bias": ("stop_gradient",),
    },
)
def equinox_q_learning():
    class Agent(eqx.Module):
        online: eqx.nn.MLP
        target: eqx.nn.MLP

    def loss(agent, batch):
        q = jax.vmap(agent.online)(batch["state"])
        q = jnp.take_along_axis(q, batch["action"][:, None], 1)[:, 0]
        q_next = jax.vmap(agent.target)(batch["next"]).max(-1)
        goal = batch["reward"] + 0.9 * q_next
        goal = lax.stop_gradient(goal)  # blame
        return optax.huber_loss(q, goal).mean()

    one, two = jax.random.split(jax.random.key(5))
    agent = Agent(eqx.nn.MLP(3, 2, 4, 1, key=one), eqx.nn.MLP(3, 2, 4, 1, key=two))
    batch = {"state": draw(10, 4, 3), "next": draw(11, 4, 3), "reward": draw(12, 4)}
    return Problem(loss, agent, (batch | {"action": jnp.array([0, 1, 1, 0])},))


@zero(CASES, {"skip.weight": NEVER_USED, "skip.bias": NEVER_USED})
def equinox_forgotten_layer():
    class Net(eqx.Module):
        layers: list
        skip: eqx.nn.Linear

        def __call__(self, x):
            for layer in self.layers:
                x = jnp.tanh(layer(x))
            return x

    def loss(model, x, y):
        return jnp.mean((jax.vmap(model)(x) - y) ** 2)

    keys = jax.random.split(jax.random.key(6), 3)
    layers = [eqx.nn.Linear(3, 3, key=key) for key in keys[:2]]
    model = Net(layers, eqx.nn.Linear(3, 3, key=keys[2]))
    return Problem(loss, model, (draw(13, 4, 3), draw(14, 4, 3)))


# Flax


@zero(
    CASES,
    {
        "params.Dense_0.kernel": ("flat",),
        "params.Dense_0.bias": ("flat",),
        "params.Dense_1.kernel": ("zero factor", "flat"),
    },
)
def linen_dead_relu():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            low = linen.initializers.constant(-30.0)
            h = linen.Dense(4, bias_init=low)(x)
            h = linen.relu(h)  # blame: params.Dense_0.kernel, params.Dense_0.bias
            return linen.Dense(2)(h)  # blame: params.Dense_1.kernel

    model, x = Net(), draw(15, 5, 3)

    def loss(variables, x, y):
        return optax.l2_loss(model.apply(variables, x), y).mean()

    return Problem(loss, model.init(jax.random.key(7), x), (x, draw(16, 5, 2)))


@zero(CASES, {"auxiliary.kernel": ("discarded",), "auxiliary.bias": ("discarded",)})
def linen_head_that_is_dropped():
    class Net(linen.Module):
        def setup(self):
            self.main = linen.Dense(2)
            self.auxiliary = linen.Dense(3)

        def __call__(self, x):
            out = self.main(x)
            self.auxiliary(x)  # blame
            return out

    model, x = Net(), draw(17, 4, 3)

    def loss(params, x, y):
        return jnp.mean((model.apply({"params": params}, x) - y) ** 2)

    params = model.init(jax.random.key(8), x)["params"]
    return Problem(loss, params, (x, draw(18, 4, 2)))


@zero(CASES, {"router.kernel": ("argmax",)})
def linen_top_one_router():
    class Mixture(linen.Module):
        def setup(self):
            self.router = linen.Dense(3, use_bias=False)
            self.experts = [linen.Dense(2) for _ in range(3)]

        def __call__(self, x):
            logits = self.router(x)
            chosen = jnp.argmax(logits, -1)  # blame
            mask = jax.nn.one_hot(chosen, 3)
            outs = jnp.stack([expert(x) for expert in self.experts], 1)
            return jnp.einsum("be,bed->bd", mask, outs)

    model, x = Mixture(), 3 * jnp.concatenate([jnp.eye(3), -jnp.eye(3)])

    def loss(params, x, y):
        return jnp.mean((model.apply({"params": params}, x) - y) ** 2)

    params = model.init(jax.random.key(9), x)["params"]
    params["router"]["kernel"] = jnp.eye(3)
    return Problem(loss, params, (x, draw(19, 6, 2)))


@zero(CASES, {"block.kernel": ("branch not taken",)})
def linen_stochastic_depth():
    class Net(linen.Module):
        def setup(self):
            self.stem = linen.Dense(3)
            self.block = linen.Dense(3, use_bias=False)

        def __call__(self, x, keep):
            h = self.stem(x)
            update = jnp.tanh(self.block(h))
            return jnp.where(keep, h + update, h)  # blame

    model, x = Net(), draw(20, 4, 3)
    variables = model.init(jax.random.key(10), x, True)

    def loss(params, x, keep):
        return jnp.mean(model.apply({"params": params}, x, keep) ** 2)

    return Problem(loss, variables["params"], (x, jnp.asarray(False)))


@zero(
    CASES, {"encoder.kernel.value": ("rounding",), "encoder.bias.value": ("rounding",)}
)
def nnx_finite_scalar_quantiser():
    class Quantiser(nnx.Module):
        def __init__(self, rngs):
            self.encoder = nnx.Linear(3, 2, rngs=rngs)
            self.decoder = nnx.Linear(2, 3, rngs=rngs)

        def __call__(self, x):
            z = 3 * nnx.tanh(self.encoder(x))
            codes = jnp.round(z)  # blame
            return self.decoder(codes)

    graph, params = nnx.split(Quantiser(nnx.Rngs(0)), nnx.Param)

    def loss(params, x):
        return optax.l2_loss(nnx.merge(graph, params)(x), x).mean()

    return Problem(loss, params, (draw(21, 5, 3),))


@zero(CASES, {"position.kernel.value": ("integer cast",)})
def nnx_lookup_of_a_position():
    class Sampler(nnx.Module):
        def __init__(self, rngs):
            self.position = nnx.Linear(2, 1, use_bias=False, rngs=rngs)
            self.table = nnx.Embed(8, 3, rngs=rngs)

        def __call__(self, x):
            place = 8 * nnx.sigmoid(self.position(x)[:, 0])
            cell = place.astype(jnp.int32)  # blame
            return self.table(cell)

    graph, params = nnx.split(Sampler(nnx.Rngs(1)), nnx.Param)

    def loss(params, x, y):
        return jnp.mean((nnx.merge(graph, params)(x) - y) ** 2)

    return Problem(loss, params, (draw(22, 5, 2), draw(23, 5, 3)))


@zero(CASES, {"spare.kernel.value": NEVER_USED, "spare.bias.value": NEVER_USED})
def nnx_forgotten_layer():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.main = nnx.Linear(2, 2, rngs=rngs)
            self.spare = nnx.Linear(2, 2, rngs=rngs)

        def __call__(self, x):
            return nnx.silu(self.main(x))

    graph, params = nnx.split(Net(nnx.Rngs(2)), nnx.Param)

    def loss(params, x):
        return jnp.mean(nnx.merge(graph, params)(x) ** 2)

    return Problem(loss, params, (draw(24, 4, 2),))


# optax


@zero(CASES, {"b": ("flat", "maximum's loser"), "w": ("flat", "maximum's loser")})
def optax_hinge_beyond_the_margin():
    def loss(params, x, signs):
        scores = x @ params["w"] + params["b"]
        return optax.hinge_loss(scores, signs).mean()  # blame

    params = {"b": jnp.float32(0.0), "w": jnp.array([5.0, -5.0])}
    x = jnp.array([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]])
    return Problem(loss, params, (x, jnp.array([1.0, -1.0, 1.0])))


@zero(CASES, {"bias": ("at a minimum",), "weight": ("at a minimum",)})
def optax_perfect_fit():
    def loss(model, x, y):
        prediction = jax.vmap(model)(x)
        losses = optax.l2_loss(prediction, y)  # blame
        return losses.mean()

    model = eqx.nn.Linear(2, 1, key=jax.random.key(11))
    model = eqx.tree_at(lambda m: m.weight, model, jnp.array([[1.0, 2.0]]))
    model = eqx.tree_at(lambda m: m.bias, model, jnp.array([0.5]))
    x = jnp.array([[1.0, 1.0], [2.0, 0.0]])
    return Problem(loss, model, (x, jnp.array([[3.5], [2.5]])))


@zero(CASES, {"w": ("saturation", "underflow")})
def optax_saturated_cross_entropy():
    def loss(params, x, y):
        logits = x @ params["w"]
        losses = optax.sigmoid_binary_cross_entropy(logits, y)  # blame
        return losses.mean() + (params["temperature"] - 1) ** 2

    params = {"temperature": jnp.float32(0.5), "w": jnp.array([200.0, -300.0])}
    x = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    return Problem(loss, params, (x, jnp.array([1.0, 0.0])))


@zero(CASES, {"weight": ("zero factor",), "bias": ("zero factor",)})
def optax_masked_batch():
    """Every label is padding; the division by the count is made safe."""

    def loss(model, x, y):
        logits = jax.vmap(model)(x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        mask = (y != 0).astype(losses.dtype)
        total = jnp.sum(losses * mask)  # blame
        return total / jnp.maximum(mask.sum(), 1.0)

    model = eqx.nn.Linear(2, 3, key=jax.random.key(12))
    return Problem(loss, model, (draw(25, 4, 2), jnp.zeros(4, int)))
