"""Ports that `compare_with_torch` once called wrong or didn't explain; each stays."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jax import lax
from torch import nn
from torch.utils.checkpoint import checkpoint

from jaxgrad import compare_with_torch


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def whole(seed, end, *shape):
    return jnp.asarray(np.random.default_rng(seed).integers(0, end, shape), jnp.int32)


def arrays(module):
    return {
        name: jnp.asarray(p.detach().float().numpy().copy(), str(p.dtype)[6:])
        for name, p in module.named_parameters()
    }


def assert_right(module, torch_loss, loss, params, *args, **options):
    report = compare_with_torch(
        loss, params, *args, module=module, torch_loss=torch_loss, **options
    )
    assert report.ok, report
    assert not report.causes, report
    return {row.path: row.torch_name for row in report.parameters}


def assert_wrong(module, torch_loss, loss, params, *args):
    """The report on a wrong port, and the causes' kinds."""
    report = compare_with_torch(
        loss, params, *args, module=module, torch_loss=torch_loss
    )
    assert not report.ok, report
    return report, [cause.kind for cause in report.causes]


def square(module, *args):
    return (module(*args) ** 2).mean()


def squared_error(module, x, y):
    return F.mse_loss(module(x), y)


def torch_cross_entropy(module, x, y):
    return F.cross_entropy(module(x), y)


def dense(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def cross_entropy(scores, labels):
    picked = jnp.take_along_axis(jax.nn.log_softmax(scores), labels[..., None], -1)
    return -picked.mean()


def layer_norm(x, weight, bias, epsilon=1e-5):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt(x.var(-1, keepdims=True) + epsilon) * weight + bias


def rms_norm(x, weight, epsilon):
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + epsilon) * weight


class RMSNorm(nn.Module):
    """As in most of the models that have one: by hand."""

    def __init__(self, size, epsilon):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x):
        mean = x.pow(2).mean(-1, keepdim=True)
        return x * torch.rsqrt(mean + self.epsilon) * self.weight


# Right ports, with numbers that fit in several ways


def test_a_bias_of_zeros_for_heads_that_are_transposed():
    module = nn.Linear(5, 12)
    nn.init.zeros_(module.bias)
    a = arrays(module)
    kernel = a["weight"].reshape(3, 4, 5).transpose(2, 1, 0)
    scale = jnp.arange(12.0).reshape(3, 4).T

    def loss(p, x):
        return jnp.mean(jnp.sin(jnp.einsum("bi,ihk->bhk", x, p["k"]) + p["b"]) * scale)

    def torch_loss(module, x):
        return (module(x).sin() * torch.arange(12.0)).mean()

    params = {"k": kernel, "b": a["bias"].reshape(3, 4).T}
    assert_right(module, torch_loss, loss, params, draw(1, 5, 5))


def test_a_symmetric_weight():
    module = nn.Linear(4, 4)
    weight = torch.randn(4, 4)
    module.weight.data = weight + weight.T
    a = arrays(module)
    params = {"w": a["weight"].T, "b": a["bias"]}

    def loss(p, x):
        return jnp.mean((x @ p["w"] + p["b"]) ** 2)

    assert_right(module, square, loss, params, draw(1, 5, 4))


def test_weights_that_are_all_ones():
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    for parameter in module.parameters():
        nn.init.ones_(parameter)
    a = arrays(module)

    def loss(p, x, y):
        h = jnp.tanh(x @ p["l1"]["w"] + p["l1"]["b"])
        return jnp.mean((h @ p["l2"]["w"] + p["l2"]["b"] - y) ** 2)

    params = {
        f"l{i}": {"w": a[f"{n}.weight"].T, "b": a[f"{n}.bias"]}
        for i, n in ((1, 0), (2, 2))
    }
    x, y = 0.1 * draw(1, 5, 4), draw(2, 5, 4)
    assert_right(module, squared_error, loss, params, x, y)


def test_a_constant_kernel_of_a_convolution():
    module = nn.Conv2d(3, 3, 3, padding=1)
    nn.init.constant_(module.weight, 0.1)
    nn.init.zeros_(module.bias)
    a = arrays(module)
    x, y = draw(1, 2, 5, 5, 3), draw(2, 2, 5, 5, 3)

    def loss(p, x, y):
        layouts = "NHWC", "HWIO", "NHWC"
        h = lax.conv_general_dilated(
            x, p["k"], (1, 1), "SAME", dimension_numbers=layouts
        )
        return jnp.mean((h + p["b"] - y) ** 2)

    params = {"k": a["weight"].transpose(2, 3, 1, 0), "b": a["bias"]}
    tensors = [torch.tensor(np.moveaxis(v, -1, 1)) for v in (x, y)]
    assert_right(module, squared_error, loss, params, x, y, torch_args=tensors)


def test_stacked_layers_of_zeros():
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            parts = [(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(3)]
            self.b = nn.ModuleList(nn.Sequential(*part) for part in parts)
            for first, _, last in parts:
                for zero in (first.bias, last.weight, last.bias):
                    nn.init.zeros_(zero)

        def forward(self, x):
            for block in self.b:
                x = x + block(x)
            return x

    module = Blocks()
    a = arrays(module)

    def stack(name):
        return jnp.stack([a[f"b.{i}.{name}"] for i in range(3)])

    def block(x, p):
        return x + jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"], None

    def loss(p, x, y):
        return jnp.mean((lax.scan(block, x, p)[0] - y) ** 2)

    params = {"b1": stack("0.bias"), "b2": stack("2.bias")}
    params["w1"] = stack("0.weight").swapaxes(1, 2)
    params["w2"] = stack("2.weight").swapaxes(1, 2)
    x, y = draw(1, 5, 4), draw(2, 5, 4)
    assert_right(module, squared_error, loss, params, x, y)


def test_equal_numbers_without_axes():
    class Polynomial(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(torch.tensor(1.0)) for _ in "abc")

        def forward(self, x):
            return self.a * x**2 + self.b * x + self.c

    def loss(p, x):
        return jnp.mean((p["quad"] * x**2 + p["lin"] * x + p["const"]) ** 2)

    params = dict.fromkeys(("const", "lin", "quad"), jnp.array(1.0))
    pairs = assert_right(Polynomial(), square, loss, params, draw(1, 5))
    assert pairs == {"const": "c", "lin": "b", "quad": "a"}


def test_equal_layer_norms_side_by_side():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 6)
            self.first = nn.LayerNorm(6)
            self.second = nn.LayerNorm(6)

        def forward(self, x):
            h = self.lin(x)
            return torch.tanh(self.first(h)) * self.second(h).sigmoid()

    def loss(p, x):
        h = x @ p["lin"]["w"] + p["lin"]["b"]
        gate = jax.nn.sigmoid(layer_norm(h, *p["a"]))
        return jnp.mean((jnp.tanh(layer_norm(h, *p["z"])) * gate) ** 2)

    module = Gated()
    a = arrays(module)
    params = {
        "lin": {"w": a["lin.weight"].T, "b": a["lin.bias"]},
        "z": (a["first.weight"], a["first.bias"]),
        "a": (a["second.weight"], a["second.bias"]),
    }
    pairs = assert_right(module, square, loss, params, draw(1, 5, 4))
    assert (pairs["z[0]"], pairs["a[1]"]) == ("first.weight", "second.bias")


# A small Llama: norms of ones, and rotary positions in halves or interleaved

HEADS, WIDTH = 2, 4
SIZE, TOKENS = HEADS * WIDTH, 12
ANGLES = np.outer(np.arange(6), [1.0, 0.01]).astype(np.float32)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(SIZE, SIZE, False) for _ in "qkvo")

    def forward(self, x):
        heads = [part(x).view(*x.shape[:2], HEADS, WIDTH) for part in (self.q, self.k)]
        cos, sin = (torch.tensor(f(ANGLES))[:, None] for f in (np.cos, np.sin))
        turned = []
        for one, two in (h.chunk(2, -1) for h in heads):
            turned.append(torch.cat([one * cos - two * sin, two * cos + one * sin], -1))
        q, k = (h.transpose(1, 2) for h in turned)
        v = self.v(x).view(*x.shape[:2], HEADS, WIDTH).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(out.transpose(1, 2).flatten(2))


class Llama(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(TOKENS, SIZE)
        self.norms = nn.ModuleList(RMSNorm(SIZE, 1e-5) for _ in range(3))
        self.layers = nn.ModuleList(Attention() for _ in range(2))
        self.head = nn.Linear(SIZE, TOKENS, False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for norm, layer in zip(self.norms, self.layers, strict=False):
            x = x + layer(norm(x))
        return self.head(self.norms[2](x))


def llama_loss(interleaved=False, diagonal=0):
    cos, sin = jnp.cos(ANGLES)[:, None], jnp.sin(ANGLES)[:, None]

    def turn(x):
        if interleaved:
            one, two = x[..., ::2], x[..., 1::2]
            turned = jnp.stack([one * cos - two * sin, one * sin + two * cos], -1)
            return turned.reshape(x.shape)
        one, two = jnp.split(x, 2, -1)
        return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], -1)

    def attention(p, name, x):
        q, k, v = (
            (x @ p[f"{name}.{part}.weight"].T).reshape(*x.shape[:2], HEADS, WIDTH)
            for part in "qkv"
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", turn(q), turn(k)) / math.sqrt(WIDTH)
        seen = jnp.tril(jnp.ones(scores.shape[2:], bool), diagonal)
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e30))
        out = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return out.reshape(x.shape) @ p[f"{name}.o.weight"].T

    def loss(p, tokens):
        x = p["embed.weight"][tokens]
        for i in range(2):
            h = rms_norm(x, p[f"norms.{i}.weight"], 1e-5)
            x = x + attention(p, f"layers.{i}", h)
        scores = rms_norm(x, p["norms.2.weight"], 1e-5) @ p["head.weight"].T
        return cross_entropy(scores[:, :-1], tokens[:, 1:])

    return loss


def llama_torch_loss(module, tokens):
    return F.cross_entropy(
        module(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    )


def test_rows_in_another_order_for_interleaved_rotary_positions():
    module = Llama()
    params = arrays(module)
    for name in [f"layers.{i}.{part}.weight" for i in range(2) for part in "qk"]:
        halves = params[name].reshape(HEADS, 2, WIDTH // 2, SIZE)
        params[name] = halves.swapaxes(1, 2).reshape(SIZE, SIZE)
    tokens = whole(3, TOKENS, 2, 6)
    loss = llama_loss(interleaved=True)
    assert_right(module, llama_torch_loss, loss, params, tokens)


def test_a_causal_mask_that_is_off_by_one():
    module = Llama()
    loss, params = llama_loss(diagonal=1), arrays(module)
    tokens = whole(3, TOKENS, 2, 6)
    report, found = assert_wrong(module, llama_torch_loss, loss, params, tokens)
    assert found[:1] == ["mask"], report
    assert report.first_difference.module == "layers.0"


# Right ports, with another way to run PyTorch


def network(*sizes):
    first, hidden, last = sizes
    return nn.Sequential(nn.Linear(first, hidden), nn.Tanh(), nn.Linear(hidden, last))


def apply(p, x):
    return dense(p, "2", jnp.tanh(dense(p, "0", x)))


def assert_network_is_right(torch_loss=square, wrap=lambda module: module):
    module = network(4, 6, 3)

    def loss(p, x):
        return jnp.mean(apply(p, x) ** 2)

    assert_right(wrap(module), torch_loss, loss, arrays(module), draw(1, 5, 4))


def autocast(module, x, y):
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    return F.mse_loss(out.float(), y)


def explicit_cast(module, x, y):
    half = torch.bfloat16

    def linear(layer, x):
        return F.linear(x.to(half), layer.weight.to(half), layer.bias.to(half))

    out = linear(module[2], torch.tanh(linear(module[0], x)))
    return F.mse_loss(out.float(), y)


@pytest.mark.parametrize("torch_loss", [autocast, explicit_cast])
def test_bfloat16_inside(torch_loss):
    module = network(8, 16, 4)

    def loss(p, x, y):
        p, x = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (p, x))
        return jnp.mean((apply(p, x).astype(jnp.float32) - y) ** 2)

    x, y = draw(1, 6, 8), draw(2, 6, 4)
    assert_right(module, torch_loss, loss, arrays(module), x, y)


def test_a_norm_in_float32_inside_a_bfloat16_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(8, 8, False)
            self.w = nn.Parameter(torch.ones(8))
            self.o = nn.Linear(8, 4, False)

        def forward(self, x):
            h = self.l(x).float()
            h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
            return self.o(self.w * h.to(x.dtype))

    def loss(p, x, y):
        h = rms_norm((x @ p["l.weight"].T).astype(jnp.float32), 1.0, 1e-6)
        scores = (p["w"] * h.astype(x.dtype)) @ p["o.weight"].T
        return cross_entropy(scores.astype(jnp.float32), y)

    module = Model().bfloat16()

    def torch_loss(module, x, y):
        return F.cross_entropy(module(x).float(), y)

    x, y = draw(1, 6, 8).astype(jnp.bfloat16), whole(2, 4, 6)
    assert_right(module, torch_loss, loss, arrays(module), x, y)


def test_a_reentrant_checkpoint():
    def torch_loss(module, x):
        out = checkpoint(module, x.requires_grad_(), use_reentrant=True)
        return (out**2).mean()

    assert_network_is_right(torch_loss)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
def test_a_scripted_module():
    assert_network_is_right(wrap=torch.jit.script)


def test_a_module_under_vmap():
    assert_network_is_right(lambda m, x: (torch.vmap(m)(x) ** 2).mean())


def test_sparse_gradients():
    module = nn.Embedding(7, 3, sparse=True)

    def loss(p, t):
        return jnp.mean(p["weight"][t] ** 2)

    assert_right(module, square, loss, arrays(module), whole(1, 7, 5))


# Wrong ports


def test_a_loss_that_is_nan_on_both_sides():
    module = nn.Linear(3, 2)

    def loss(p, x):
        return jnp.mean(jnp.log(x @ p["weight"].T + p["bias"]))

    def torch_loss(module, x):
        return module(x).log().mean()

    params = arrays(module)
    report, _ = assert_wrong(module, torch_loss, loss, params, draw(1, 5, 3))
    assert np.isnan(report.loss).all()
    assert "nonfinite" in {finding.kind for finding in report.findings}


def test_the_epsilon_of_a_norm_written_by_hand():
    module = nn.Sequential(nn.Linear(4, 6), RMSNorm(6, 1e-6), nn.Linear(6, 3))

    def loss(p, x, y):
        h = rms_norm(dense(p, "0", x), p["1.weight"], 1e-5)
        return cross_entropy(dense(p, "2", h), y)

    params = arrays(module)
    x, y = draw(1, 6, 4), whole(2, 3, 6)
    report, found = assert_wrong(module, torch_cross_entropy, loss, params, x, y)
    assert found[:1] == ["epsilon"], report
    assert report.first_difference.module == "1"


class Vision(nn.Module):
    """A ViT without its patches."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        options = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, **options) for _ in range(2)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


def test_the_epsilon_of_one_norm_in_a_vision_transformer():
    module = Vision()
    a = arrays(module)

    def block(name):
        part = {n[len(name) :]: v for n, v in a.items() if n.startswith(name)}
        qkv = part.pop("self_attn.in_proj_weight").T.reshape(8, 3, 2, 4)
        bias = part.pop("self_attn.in_proj_bias").reshape(3, 2, 4)
        out = part.pop("self_attn.out_proj.weight").T.reshape(2, 4, 8)
        return part | {"qkv": qkv, "qkv_bias": bias, "out": out}

    def encode(p, x, epsilon):
        h = layer_norm(x, p["norm1.weight"], p["norm1.bias"], epsilon)
        qkv = jnp.einsum("btd,dchk->cbthk", h, p["qkv"])
        q, k, v = qkv + p["qkv_bias"][:, None, None]
        weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k) / 2)
        out = jnp.einsum("bhts,bshk,hkd->btd", weights, v, p["out"])
        x = x + out + p["self_attn.out_proj.bias"]
        h = layer_norm(x, p["norm2.weight"], p["norm2.bias"])
        return x + dense(p, "linear2", jax.nn.relu(dense(p, "linear1", h)))

    def loss(p, x, y):
        x = jnp.concatenate([jnp.broadcast_to(p["token"], (len(x), 1, 8)), x], 1)
        x = encode(p["blocks"][1], encode(p["blocks"][0], x, 1e-5), 1e-6)
        return cross_entropy(x[:, 0] @ p["head"] + p["head_bias"], y)

    params = {
        "token": a["token"],
        "blocks": [block("blocks.0."), block("blocks.1.")],
        "head": a["head.weight"].T,
        "head_bias": a["head.bias"],
    }
    x, y = draw(1, 3, 4, 8), whole(2, 5, 3)
    report, found = assert_wrong(module, torch_cross_entropy, loss, params, x, y)
    assert found[:1] == ["epsilon"], report
    assert report.first_difference.module == "blocks.1.norm1"


def test_two_mistakes_at_once():
    module = nn.Sequential(
        nn.Embedding(65, 32),
        nn.LayerNorm(32),
        nn.Linear(32, 128),
        nn.GELU(),
        nn.Linear(128, 65),
    )
    nn.init.normal_(module[0].weight, std=0.02)

    def loss(p, token, label):
        h = p["0.weight"][token]
        h = layer_norm(h, p["1.weight"], p["1.bias"], 1e-6)
        return cross_entropy(dense(p, "4", jax.nn.gelu(dense(p, "2", h))), label)

    params = arrays(module)
    x, y = whole(1, 65, 256), whole(2, 65, 256)
    report, found = assert_wrong(module, torch_cross_entropy, loss, params, x, y)
    assert found[:1] == ["epsilon"], report
    assert "gelu" in found, report
    assert report.first_difference.module == "1"


def test_a_gelu_whose_loss_agrees():
    module = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 65))

    def loss(p, x, y):
        return cross_entropy(dense(p, "2", jax.nn.gelu(dense(p, "0", x))), y)

    params = arrays(module)
    x, y = 0.3 * draw(0, 256, 32), whole(1, 65, 256)
    report, found = assert_wrong(module, torch_cross_entropy, loss, params, x, y)
    assert report.loss.jax == pytest.approx(report.loss.torch, rel=3e-7)
    assert found[:1] == ["gelu"], report
    assert report.first_difference.module == "1"
