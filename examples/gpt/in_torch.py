"""A small GPT in PyTorch, laid out as GPT-2: fused q, k and v, and a tied head."""

from torch import nn
from torch.nn import functional as F

VOCABULARY, CONTEXT, WIDTH, HEADS, BLOCKS = 65, 16, 32, 4, 2


class Attention(nn.Module):
    """Causal attention."""

    def __init__(self):
        super().__init__()
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        """What each token takes from those before it."""
        heads = self.c_attn(x).unflatten(-1, (3, HEADS, -1))
        q, k, v = heads.movedim(-3, 0).transpose(-3, -2)  # (batch, head, place, _)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(x.transpose(-3, -2).flatten(-2))


class Block(nn.Module):
    """Attention and an MLP, each added to what comes in."""

    def __init__(self):
        super().__init__()
        self.ln_1 = nn.LayerNorm(WIDTH)
        self.attn = Attention()
        self.ln_2 = nn.LayerNorm(WIDTH)
        self.c_fc = nn.Linear(WIDTH, 4 * WIDTH)
        self.c_proj = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        """The block."""
        x = x + self.attn(self.ln_1(x))
        hidden = F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh")
        return x + self.c_proj(hidden)


class GPT(nn.Module):
    """Scores for the next token, at each place."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, WIDTH)
        self.wpe = nn.Embedding(CONTEXT, WIDTH)
        self.h = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.ln_f = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.wte.weight
        for name, p in self.named_parameters():
            if "ln_" not in name:
                nn.init.normal_(p, std=0.1)

    def forward(self, tokens):
        """The scores of tokens (batch, place)."""
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[-1]]
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def loss(module, tokens):
    scores = module(tokens[:, :-1])
    return F.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten())
