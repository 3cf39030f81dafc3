"""The GPT in Equinox, whose attention keeps q, k and v apart."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from gpt.in_torch import BLOCKS, CONTEXT, HEADS, VOCABULARY, WIDTH

import jaxgrad


class Block(eqx.Module):
    """Attention and an MLP, each added to what comes in."""

    ln_1: eqx.nn.LayerNorm
    attn: eqx.nn.MultiheadAttention
    ln_2: eqx.nn.LayerNorm
    c_fc: eqx.nn.Linear
    c_proj: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.ln_1 = eqx.nn.LayerNorm(WIDTH)
        self.attn = eqx.nn.MultiheadAttention(
            HEADS,
            WIDTH,
            use_query_bias=True,
            use_key_bias=True,
            use_value_bias=True,
            use_output_bias=True,
            key=keys[0],
        )
        self.ln_2 = eqx.nn.LayerNorm(WIDTH)
        self.c_fc = eqx.nn.Linear(WIDTH, 4 * WIDTH, key=keys[1])
        self.c_proj = eqx.nn.Linear(4 * WIDTH, WIDTH, key=keys[2])

    def __call__(self, x):
        """The block."""
        mask = jnp.tri(len(x), dtype=bool)
        normed = jax.vmap(self.ln_1)(x)
        x = x + self.attn(normed, normed, normed, mask=mask)
        return x + jax.vmap(self.mlp)(x)

    def mlp(self, x):
        """The MLP, of one token."""
        return self.c_proj(jax.nn.gelu(self.c_fc(self.ln_2(x))))


class GPT(eqx.Module):
    """Scores for the next token, at each place."""

    wte: eqx.nn.Embedding
    wpe: eqx.nn.Embedding
    h: list[Block]
    ln_f: eqx.nn.LayerNorm

    def __init__(self, key):
        keys = jax.random.split(key, BLOCKS + 2)
        self.wte = eqx.nn.Embedding(VOCABULARY, WIDTH, key=keys[0])
        self.wpe = eqx.nn.Embedding(CONTEXT, WIDTH, key=keys[1])
        self.h = [Block(key) for key in keys[2:]]
        self.ln_f = eqx.nn.LayerNorm(WIDTH)

    def __call__(self, tokens):
        """The scores of a row of tokens."""
        x = jax.vmap(self.wte)(tokens) + self.wpe.weight[: len(tokens)]
        for block in self.h:
            x = block(x)
        return jax.vmap(self.ln_f)(x) @ self.wte.weight.T


def loss(model, tokens):
    scores = jax.vmap(model)(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(scores, tokens[:, 1:]).mean()


def load(state):
    """The parameters of a state dict of PyTorch's, of which c_attn is cut in three."""

    def cut(fused, third):
        return fused.reshape(3, WIDTH, *fused.shape[1:])[third]

    mapping = {
        f"h[{block}].attn.{name}_proj.{what}": (
            f"h.{block}.attn.c_attn.{what}",
            functools.partial(cut, third=third),
        )
        for block in range(BLOCKS)
        for what in ("weight", "bias")
        for third, name in enumerate(["query", "key", "value"])
    }
    model = GPT(jax.random.key(0))
    return jaxgrad.load_torch_parameters(state, model, mapping=mapping).params
