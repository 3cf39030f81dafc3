"""The GPT in plain JAX: dicts and functions, and a scan over stacked blocks."""

import jax
import jax.numpy as jnp
import optax
from gpt.in_torch import BLOCKS, CONTEXT, HEADS, VOCABULARY, WIDTH

import jaxgrad


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def layer_norm(p, x):
    x = x - x.mean(axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(x.var(axis=-1, keepdims=True) + 1e-5)
    return p["scale"] * x + p["bias"]


def attention(p, x):
    places, width = x.shape
    qkv = dense(p["c_attn"], x).reshape(places, 3, HEADS, width // HEADS)
    q, k, v = qkv.swapaxes(0, 1)
    x = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return dense(p["c_proj"], x.reshape(places, width))


def block(p, x):
    x = x + attention(p["attn"], layer_norm(p["ln_1"], x))
    hidden = jax.nn.gelu(dense(p["c_fc"], layer_norm(p["ln_2"], x)))
    return x + dense(p["c_proj"], hidden)


def gpt(params, tokens):
    """The scores of a row of tokens."""
    x = params["wte"][tokens] + params["wpe"][: len(tokens)]
    x, _ = jax.lax.scan(lambda x, p: (block(p, x), None), x, params["h"])
    return layer_norm(params["ln_f"], x) @ params["wte"].T


def loss(params, tokens):
    scores = jax.vmap(gpt, (None, 0))(params, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(scores, tokens[:, 1:]).mean()


def load(state):
    """The parameters of a state dict of PyTorch's, with the blocks stacked."""

    def layer(n_in, n_out):
        return {"kernel": jnp.zeros((n_in, n_out)), "bias": jnp.zeros(n_out)}

    norm = {"scale": jnp.zeros(WIDTH), "bias": jnp.zeros(WIDTH)}
    one = {
        "ln_1": norm,
        "attn": {"c_attn": layer(WIDTH, 3 * WIDTH), "c_proj": layer(WIDTH, WIDTH)},
        "ln_2": norm,
        "c_fc": layer(WIDTH, 4 * WIDTH),
        "c_proj": layer(4 * WIDTH, WIDTH),
    }
    like = {
        "wte": jnp.zeros((VOCABULARY, WIDTH)),
        "wpe": jnp.zeros((CONTEXT, WIDTH)),
        "h": [one] * BLOCKS,
        "ln_f": norm,
    }
    params = jaxgrad.load_torch_parameters(state, like).params
    stacked = jax.tree.map(lambda *blocks: jnp.stack(blocks), *params["h"])
    return params | {"h": stacked}
