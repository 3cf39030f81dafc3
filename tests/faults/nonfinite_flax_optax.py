"""Non-finite values in models of Flax, and in training code with optax."""

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import optax
from corpus.case import draw
from flax import nnx

from faults.case import Nonfinite, Problem, nonfinite

CASES: list[Nonfinite] = []


# Flax Linen


@nonfinite(CASES, "log of zero", phase="forward", index=(1,))
def linen_binary_classifier():
    class Classifier(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.relu(linen.Dense(4)(x))
            return linen.sigmoid(linen.Dense(1)(x)[:, 0])

    model, x = Classifier(), draw(7, 3, 2).at[1].set(jnp.array([300.0, 300.0]))

    def cross_entropy(p, y):
        p = jnp.clip(p, 1e-12, 1 - 1e-12)  # 1 - 1e-12 is 1 in float32
        miss = (1 - y) * jnp.log(1 - p)  # blame
        return -jnp.mean(y * jnp.log(p) + miss)

    def loss(variables, x, y):
        return cross_entropy(model.apply(variables, x), y)

    variables = jax.tree.map(jnp.abs, model.init(jax.random.key(8), x))
    return Problem(loss, variables, (x, jnp.array([0.0, 0.0, 1.0])))


@nonfinite(CASES, "division by zero", phase="forward")
def linen_batch_norm_of_a_constant_feature():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            norm = linen.BatchNorm(use_running_average=False, epsilon=0.0)
            x = norm(x)  # blame
            x = linen.relu(linen.Dense(4)(x))
            return linen.Dense(1)(x)

    model, x = Net(), draw(8, 4, 3).at[:, 2].set(1.0)
    variables = model.init(jax.random.key(9), x)

    def loss(params, statistics, x, y):
        both = {"params": params, "batch_stats": statistics}
        out, updates = model.apply(both, x, mutable=["batch_stats"])
        return jnp.mean((out[:, 0] - y) ** 2), updates["batch_stats"]

    args = (variables["batch_stats"], x, draw(9, 4))
    return Problem(loss, variables["params"], args, has_aux=True)


@nonfinite(CASES, "norm at zero", phase="backward", index=(0, 2))
def linen_normalised_embedding():
    """The padding token's row is zero, and its length isn't used; the slope is."""

    class Tagger(linen.Module):
        @linen.compact
        def __call__(self, tokens):
            h = linen.Embed(5, 3)(tokens)
            length = jnp.linalg.norm(h, axis=-1)  # blame
            length = jnp.where(tokens == 0, 1.0, length)
            return linen.Dense(2)(h / length[..., None])

    model, tokens = Tagger(), jnp.array([[1, 2, 0], [3, 1, 4]])
    variables = model.init(jax.random.key(10), tokens)
    table = variables["params"]["Embed_0"]["embedding"]
    variables["params"]["Embed_0"]["embedding"] = table.at[0].set(0.0)

    def loss(variables, tokens, y):
        logits = model.apply(variables, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return Problem(loss, variables, (tokens, jnp.array([[0, 1, 0], [1, 0, 1]])))


@nonfinite(CASES, "empty softmax", index=(0, 0, 2))
def linen_attention_with_an_infinite_bias():
    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x, bias):
            q, k, v = (linen.DenseGeneral((1, 4))(x) for _ in range(3))
            h = linen.dot_product_attention(q, k, v, bias=bias)  # blame
            return linen.DenseGeneral(3, axis=(-2, -1))(h)

    model, x = Layer(), draw(10, 1, 3, 3)
    allowed = jnp.array([[True, False, False], [True, True, False], [False] * 3])
    bias = jnp.where(allowed, 0.0, -jnp.inf)[None, None]
    variables = model.init(jax.random.key(11), x, jnp.zeros_like(bias))

    def loss(variables, x, bias):
        return jnp.mean((model.apply(variables, x, bias) - x) ** 2)

    return Problem(loss, variables, (x, bias))


@nonfinite(CASES, "infinite slope", phase="backward", iteration=0)
def linen_scan_of_remat_blocks():
    class Block(linen.Module):
        @linen.compact
        def __call__(self, h, _):
            update = linen.Dense(3, use_bias=False)(h)
            update = jnp.sqrt(jnp.abs(update))  # blame
            return h + update, None

    class Stack(linen.Module):
        @linen.compact
        def __call__(self, x):
            scanned = linen.scan(
                linen.remat(Block, prevent_cse=False),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=2,
            )
            h, _ = scanned()(x, None)
            return h

    model, x = Stack(), draw(11, 2, 3)
    variables = model.init(jax.random.key(12), x)
    params = jax.tree.map(lambda kernel: kernel.at[0].set(0.0), variables["params"])

    def loss(params, x):
        return jnp.mean(model.apply({"params": params}, x) ** 2)

    return Problem(loss, params, (x,))


@nonfinite(CASES, "custom rule", "division by zero", phase="backward")
def linen_with_a_hand_written_rule():
    """Scales each cotangent to unit length, and one of them is zero."""

    @jax.custom_vjp
    def unit_gradient(h):
        return h

    def backward(_, g):
        size = jnp.max(jnp.abs(g), -1, keepdims=True)
        return (g / size,)  # blame

    unit_gradient.defvjp(lambda h: (h, None), backward)

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            h = unit_gradient(linen.Dense(4)(x))
            return linen.Dense(1)(jnp.tanh(h))[:, 0]

    model, x = Net(), draw(12, 3, 2)

    def loss(variables, x, y, weight):
        errors = optax.huber_loss(model.apply(variables, x), y)
        return jnp.sum(weight * errors)

    variables = model.init(jax.random.key(13), x)
    return Problem(loss, variables, (x, draw(13, 3), jnp.array([1.0, 0.0, 1.0])))


# Flax NNX


@nonfinite(CASES, "domain", phase="forward")
def nnx_log_rate():
    class Rates(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.Linear(2, 4, rngs=rngs)
            self.outer = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            h = nnx.relu(self.inner(x))
            rate = self.outer(h)
            return jnp.log(rate)  # blame

    graph, params = nnx.split(Rates(nnx.Rngs(0)), nnx.Param)

    def loss(params, x, counts):
        log_rate = nnx.merge(graph, params)(x)
        return jnp.mean(jnp.exp(log_rate) - counts * log_rate)

    return Problem(loss, params, (draw(14, 4, 2), jnp.ones((4, 3))))


@nonfinite(CASES, "log of zero", phase="forward", index=(0,))
def nnx_gaussian_likelihood():
    class Head(nnx.Module):
        def __init__(self, rngs):
            self.mean = nnx.Linear(2, 1, rngs=rngs)
            self.sigma = nnx.Linear(2, 1, rngs=rngs)

        def __call__(self, x):
            return self.mean(x), nnx.softplus(self.sigma(x))

    model = Head(nnx.Rngs(1))
    model.sigma.bias[...] = jnp.full(1, -150.0)
    graph, params = nnx.split(model, nnx.Param)

    def loss(params, x, y):
        mean, sigma = nnx.merge(graph, params)(x)
        penalty = jnp.log(sigma)  # blame
        return jnp.mean(0.5 * (y - mean) ** 2 + penalty)

    return Problem(loss, params, (draw(15, 3, 2), draw(16, 3, 1)))


@nonfinite(CASES, "overflow", phase="forward")
def nnx_float16_layer():
    class Net(nnx.Module):
        def __init__(self, rngs):
            half = {"dtype": jnp.float16, "rngs": rngs}
            self.inner = nnx.Linear(2, 8, **half)
            self.outer = nnx.Linear(8, 1, **half)

        def __call__(self, x):
            h = nnx.relu(self.inner(x))
            h = jnp.square(h)  # blame
            return self.outer(h)

    graph, params = nnx.split(Net(nnx.Rngs(2)), nnx.Param)

    def loss(params, x):
        out = nnx.merge(graph, params)(x)
        return jnp.mean(out.astype(jnp.float32) ** 2)

    return Problem(loss, params, (draw(17, 3, 2, scale=900.0),))


@nonfinite(CASES, "non-finite input", phase="forward", origin="args[1]", index=(1,))
def nnx_missing_label():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(2, 1, rngs=rngs)

        def __call__(self, x):
            return self.linear(x)[:, 0]

    graph, params = nnx.split(Net(nnx.Rngs(3)), nnx.Param)

    def loss(params, x, y):
        prediction = nnx.merge(graph, params)(x)
        return optax.l2_loss(prediction, y).mean()  # blame

    return Problem(loss, params, (draw(18, 3, 2), jnp.array([1.0, jnp.nan, 0.0])))


# optax


@nonfinite(CASES, "norm at zero", "infinite slope", phase="backward")
def optax_norm_of_zero_weights():
    """Weight decay by the norm itself, on an adapter that starts at zero."""

    def loss(params, x, y):
        update = x @ params["a"] @ params["b"]
        penalty = optax.tree.norm(params["b"])  # blame
        return optax.l2_loss(update, y).mean() + 0.1 * penalty

    params = {"a": draw(19, 3, 2), "b": jnp.zeros((2, 3))}
    return Problem(loss, params, (draw(20, 4, 3), draw(21, 4, 3)))


@nonfinite(CASES, "infinite slope", phase="backward", index=(2,))
def optax_differentiated_adam():
    """Adam without `eps_root`; feature 2 is always 0, and so is its gradient."""

    def loss(start, x, y):
        optimizer = optax.adam(0.1)

        def inner_loss(w):
            return optax.l2_loss(x @ w, y).mean()

        gradient = jax.grad(inner_loss)(start)
        updates, _ = optimizer.update(gradient, optimizer.init(start))  # blame
        return inner_loss(optax.apply_updates(start, updates))

    x = draw(23, 4, 3).at[:, 2].set(0.0)
    return Problem(loss, draw(22, 3), (x, draw(26, 4)))


@nonfinite(CASES, "log of zero", index=(0, 0))
def optax_divergence_of_softmax():
    def loss(params, x, targets):
        p = jax.nn.softmax(x @ params["w"] * 100)
        log_p = jnp.log(p)  # blame
        return optax.kl_divergence(log_p, targets).mean()

    x = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    targets = jnp.array([[0.5, 0.5], [0.1, 0.9]])
    return Problem(loss, {"w": jnp.array([[0.0, 2.0], [0.1, 0.2]])}, (x, targets))


@nonfinite(CASES, "division by zero", phase="forward")
def optax_masked_loss_of_nothing():
    class Net(eqx.Module):
        mlp: eqx.nn.MLP

        def __call__(self, x):
            return self.mlp(x)

    def loss(model, batch):
        logits = jax.vmap(model)(batch["x"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        kept = (batch["y"] != 0).astype(jnp.float32)
        return (losses * kept).sum() / kept.sum()  # blame

    model = Net(eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(14)))
    return Problem(loss, model, ({"x": draw(24, 3, 2), "y": jnp.zeros(3, int)},))


@nonfinite(CASES, "domain", phase="forward", index=(1,), harmless=True)
def optax_loss_beside_a_bad_metric():
    def loss(model, x, y):
        prediction = jax.vmap(model)(x)[:, 0]
        errors = optax.log_cosh(prediction, y)
        decibels = 10 * jnp.log10(y)  # blame
        return errors.mean(), {"decibels": decibels}

    model = eqx.nn.Linear(2, 1, key=jax.random.key(15))
    args = (draw(25, 3, 2), jnp.array([1.0, -2.0, 3.0]))
    return Problem(loss, model, args, has_aux=True)
