"""The GPT in Flax NNX, whose attention has an axis of heads in its kernels."""

import functools

import optax
from flax import nnx
from gpt.in_torch import BLOCKS, CONTEXT, HEADS, VOCABULARY, WIDTH

import jaxgrad


class Block(nnx.Module):
    """Attention and an MLP, each added to what comes in."""

    def __init__(self, rngs):
        # Flax's epsilon is 1e-6, PyTorch's 1e-5.
        self.ln_1 = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.ln_2 = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)
        self.c_fc = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.c_proj = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, mask):
        """The block."""
        x = x + self.attn(self.ln_1(x), mask=mask)
        return x + self.c_proj(nnx.gelu(self.c_fc(self.ln_2(x))))


class GPT(nnx.Module):
    """Scores for the next token, at each place."""

    def __init__(self, rngs):
        self.wte = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.wpe = nnx.Embed(CONTEXT, WIDTH, rngs=rngs)
        self.h = nnx.List(Block(rngs) for _ in range(BLOCKS))
        self.ln_f = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)

    def __call__(self, tokens):
        """The scores of tokens (batch, place)."""
        x = self.wte(tokens) + self.wpe.embedding[: tokens.shape[-1]]
        mask = nnx.make_causal_mask(tokens)
        for block in self.h:
            x = block(x, mask)
        return self.wte.attend(self.ln_f(x))


def loss(model, tokens):
    scores, labels = model(tokens[:, :-1]), tokens[:, 1:]
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()


def load(state):
    """The parameters of a state dict of PyTorch's, of which c_attn is cut in three."""

    def cut(fused, third):
        _, *inputs = fused.shape  # (3 * WIDTH, WIDTH), or (3 * WIDTH,)
        heads = fused.reshape(3, HEADS, WIDTH // HEADS, *inputs)[third]
        return heads.transpose(2, 0, 1) if inputs else heads

    mapping = {
        f"h[{block}].attn.{name}.{here}": (
            f"h.{block}.attn.c_attn.{there}",
            functools.partial(cut, third=third),
        )
        for block in range(BLOCKS)
        for here, there in [("kernel", "weight"), ("bias", "bias")]
        for third, name in enumerate(["query", "key", "value"])
    }
    model = GPT(nnx.Rngs(0))
    return jaxgrad.load_torch_parameters(state, model, mapping=mapping).params
