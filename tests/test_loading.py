"""Tests `load_torch_parameters`: every layout, every file, and what it refuses."""

import itertools
import json
import os
import pickle
import subprocess
import sys
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from flax import nnx
from torch import nn

from jaxgrad import (
    LinearParams,
    LoadedParameter,
    LoadedParameters,
    load_torch_parameters,
)


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def draw(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def mlp(*sizes):
    def make():
        layers = []
        for fan_in, fan_out in itertools.pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
        return nn.Sequential(*layers[:-1])

    return seeded(make)


def plain_like(*sizes):
    """An MLP as people write it: a flat dict, weights (in, out)."""
    like = {}
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes), 1):
        like |= {f"w{i}": jnp.zeros((fan_in, fan_out)), f"b{i}": jnp.zeros(fan_out)}
    return like


def plain_mlp(params, x):
    count = len(params) // 2
    for i in range(1, count + 1):
        x = x @ params[f"w{i}"] + params[f"b{i}"]
        x = jnp.tanh(x) if i < count else x
    return x


def plain_loss(params, x):
    return jnp.mean(plain_mlp(params, x) ** 2)


def torch_loss(module, x):
    return (module(x) ** 2).mean()


def same(ours, theirs, rtol=1e-5):
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=rtol, atol=1e-6)


def layouts(loaded):
    return {
        row.path: (row.torch_name, row.layout, row.how) for row in loaded.parameters
    }


def kinds(loaded):
    return [finding.kind for finding in loaded.findings]


def as_source(state, form, folder):
    """A state dict as one of the forms that can be loaded."""
    path = folder / f"weights.{form}"
    if form == "numpy":
        return {name: tensor.detach().numpy() for name, tensor in state.items()}
    if form == "safetensors":
        safetensors.torch.save_file(dict(state), path)
        return path
    if form in ("pt", "pth", "bin"):
        torch.save(state, path)
        return str(path)
    if form == "checkpoint.pt":
        torch.save({"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}}, path)
        return path
    if form == "legacy.pt":
        torch.save(state, path, _use_new_zipfile_serialization=False)
        return path
    if form == "unknown":
        torch.save(state, path)
        return path
    return state


FORMS = [
    *("state_dict", "numpy", "pt", "pth", "bin", "safetensors"),
    *("checkpoint.pt", "legacy.pt", "unknown"),
]


@pytest.mark.parametrize("form", FORMS)
def test_every_source_gives_the_same(form, tmp_path):
    module = mlp(3, 8, 5, 2)
    source = as_source(module.state_dict(), form, tmp_path)
    loaded = load_torch_parameters(source, plain_like(3, 8, 5, 2))
    assert isinstance(loaded, LoadedParameters)
    assert all(isinstance(row, LoadedParameter) for row in loaded.parameters)
    assert ("unwrapped" in kinds(loaded)) == (form == "checkpoint.pt")
    assert layouts(loaded)["w1"] == ("0.weight", "transposed", "shape")
    assert layouts(loaded)["b3"] == ("4.bias", "as it is", "shape")
    x = draw(4, 3)
    same(plain_mlp(loaded.params, x), module(torch.tensor(np.asarray(x))))
    gradient = jax.grad(plain_loss)(loaded.params, x)
    torch_loss(module, torch.tensor(np.asarray(x))).backward()
    same(gradient["w2"].T, module[2].weight.grad)


def test_safetensors_by_content_too(tmp_path):
    path = tmp_path / "weights"
    safetensors.torch.save_file(mlp(3, 4, 2).state_dict(), path)
    assert len(load_torch_parameters(path, plain_like(3, 4, 2)).parameters) == 4


class Params(NamedTuple):
    first: LinearParams
    second: LinearParams


def test_named_tuples_and_shapes_alone():
    module = mlp(3, 4, 4)
    like = Params(
        LinearParams(jnp.zeros((4, 3)), jnp.zeros(4)),
        LinearParams(jnp.zeros((4, 4)), jnp.zeros(4)),
    )
    state = {
        name.replace("0.", "first.").replace("2.", "second."): tensor
        for name, tensor in module.state_dict().items()
    }
    for given in (like, jax.eval_shape(lambda: like)):
        loaded = load_torch_parameters(state, given)
        assert isinstance(loaded.params, Params)
        same(loaded.params.second.weight, module[2].weight)
        assert layouts(loaded)["second.weight"][2] == "convention"


@pytest.mark.parametrize("depth", [1, 3, 13])
def test_an_equinox_mlp_with_its_callables(depth):
    module = mlp(3, *[8] * depth, 2)
    like = eqx.nn.MLP(3, 2, 8, depth, jnp.tanh, key=jax.random.key(0))
    loaded = load_torch_parameters(module.state_dict(), like)
    x = draw(4, 3)
    same(jax.vmap(loaded.params)(x), module(torch.tensor(np.asarray(x))))
    assert loaded.params.activation is like.activation
    if depth > 1:
        row = layouts(loaded)[f"layers[{depth - 1}].weight"]
        assert row == (f"{2 * depth - 2}.weight", "as it is", "convention")
        assert "laid out as PyTorch's, (out, in)" in loaded.findings[0].text


@pytest.mark.parametrize("count", [2, 12])
def test_many_layers_of_one_shape_keep_their_numbers(count):
    sizes = [6] * (count + 1)
    module = mlp(*sizes)
    for like in (
        {
            f"layer{i}": {"kernel": jnp.zeros((6, 6)), "bias": jnp.zeros(6)}
            for i in range(count)
        },
        [{"kernel": jnp.zeros((6, 6)), "bias": jnp.zeros(6)} for _ in range(count)],
    ):
        params = load_torch_parameters(module.state_dict(), like).params
        for i in range(count):
            layer = params[i] if isinstance(params, list) else params[f"layer{i}"]
            same(layer["kernel"].T, module[2 * i].weight)
            same(layer["bias"], module[2 * i].bias)


class EqxCNN(eqx.Module):
    conv1: eqx.nn.Conv2d
    conv2: eqx.nn.Conv2d
    up: eqx.nn.ConvTranspose2d
    norm: eqx.nn.LayerNorm
    group_norm: eqx.nn.GroupNorm
    fc: eqx.nn.Linear

    def __init__(self):
        key = jax.random.key(0)
        self.conv1 = eqx.nn.Conv2d(2, 4, 3, key=key)
        self.conv2 = eqx.nn.Conv2d(4, 4, 3, groups=2, key=key)
        self.up = eqx.nn.ConvTranspose2d(4, 3, 2, key=key)
        self.norm = eqx.nn.LayerNorm(75)
        self.group_norm = eqx.nn.GroupNorm(2, 4)
        self.fc = eqx.nn.Linear(75, 75, key=key)

    def __call__(self, x):
        x = self.up(self.group_norm(self.conv2(self.conv1(x))))
        return self.fc(self.norm(x.reshape(-1)))


class TorchCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3)
        self.conv2 = nn.Conv2d(4, 4, 3, groups=2)
        self.up = nn.ConvTranspose2d(4, 3, 2)
        self.norm = nn.LayerNorm(75)
        self.group_norm = nn.GroupNorm(2, 4)
        self.fc = nn.Linear(75, 75)

    def forward(self, x):
        x = self.up(self.group_norm(self.conv2(self.conv1(x))))
        return self.fc(self.norm(x.flatten(1)))


def test_equinox_convolutions_and_norms():
    module, x = seeded(TorchCNN), draw(2, 8, 8)
    loaded = load_torch_parameters(module.state_dict(), EqxCNN())
    same(loaded.params(x), module(torch.tensor(np.asarray(x))[None])[0], 1e-4)
    rows = layouts(loaded)
    assert rows["conv1.bias"] == ("conv1.bias", "reshaped to (4, 1, 1)", "shape")
    assert rows["up.weight"] == (
        "up.weight",
        "axes (1, 0, 2, 3), mirrored",
        "convention",
    )


class FlaxNet(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv1 = nnx.Conv(1, 6, (3, 3), padding="VALID", rngs=rngs)
        self.bn1 = nnx.BatchNorm(6, use_running_average=True, epsilon=1e-5, rngs=rngs)
        self.conv2 = nnx.Conv(6, 6, (3, 3), padding="VALID", rngs=rngs)
        self.up = nnx.ConvTranspose(6, 4, (2, 2), padding="VALID", rngs=rngs)
        self.embed = nnx.Embed(4, 4, rngs=rngs)
        self.ln = nnx.LayerNorm(4, epsilon=1e-5, rngs=rngs)
        self.fc = nnx.Linear(4, 4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)

    def __call__(self, x, labels):
        x = self.up(self.conv2(nnx.relu(self.bn1(self.conv1(x))))).mean((1, 2))
        return self.dropout(self.fc(self.ln(x + self.embed(labels))))


class TorchNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3)
        self.up = nn.ConvTranspose2d(6, 4, 2)
        self.embed = nn.Embedding(4, 4)
        self.ln = nn.LayerNorm(4)
        self.fc = nn.Linear(4, 4)

    def forward(self, x, labels):
        x = self.up(self.conv2(torch.relu(self.bn1(self.conv1(x))))).mean((2, 3))
        return self.fc(self.ln(x + self.embed(labels)))


def torch_net():
    module = seeded(TorchNet)
    module(torch.tensor(np.asarray(draw(5, 1, 9, 9))), torch.arange(4)[[0, 1, 2, 3, 0]])
    return module.eval()


@pytest.mark.parametrize("only_params", [False, True])
def test_a_flax_nnx_state(only_params):
    module, net = torch_net(), FlaxNet()
    if only_params:
        graph, params, _ = nnx.split(net, nnx.Param, ...)
    else:
        graph, params = nnx.split(net)
    loaded = load_torch_parameters(module.state_dict(), params)
    x, labels = draw(3, 9, 9, 1), jnp.array([3, 0, 2])
    if only_params:
        assert "bn1.running_mean" in str(loaded)
    else:
        merged = nnx.merge(graph, loaded.params)
        same(
            merged(x, labels),
            module(
                torch.tensor(np.asarray(x.transpose(0, 3, 1, 2))),
                torch.tensor([3, 0, 2]),
            ),
            1e-4,
        )
    rows = layouts(loaded)
    assert rows["conv1.kernel.value"][1:] == ("axes (2, 3, 1, 0)", "shape")
    assert rows["conv2.kernel.value"][1:] == ("axes (2, 3, 1, 0)", "convention")
    assert rows["fc.kernel.value"][1:] == ("transposed", "convention")
    assert rows["embed.embedding.value"][1:] == ("as it is", "convention")
    texts = [finding.text for finding in loaded.findings]
    assert "`kernel` is (in, out)" in texts
    assert any("num_batches_tracked" in text for text in texts)


def test_flax_attention_heads():
    attention = seeded(lambda: nn.MultiheadAttention(6, 2, batch_first=True))
    module = nnx.MultiHeadAttention(2, 6, decode=False, rngs=nnx.Rngs(0))
    state = dict(attention.state_dict())
    weight, bias = state.pop("in_proj_weight"), state.pop("in_proj_bias")
    for place, name in enumerate("qkv"):
        state[f"{name}_proj.weight"] = weight[6 * place : 6 * place + 6]
        state[f"{name}_proj.bias"] = bias[6 * place : 6 * place + 6]
    graph, like = nnx.split(module)
    loaded = load_torch_parameters(state, like)
    x = draw(3, 5, 6)
    tensor = torch.tensor(np.asarray(x))
    same(nnx.merge(graph, loaded.params)(x), attention(tensor, tensor, tensor)[0])
    assert any("split or merged" in finding.text for finding in loaded.findings)
    assert layouts(loaded)["value.kernel.value"][0] == "v_proj.weight"


def test_the_alphabet_is_no_evidence():
    # A dict sorts its keys: decoder comes first, and 10 before 2.
    state = {
        f"{part}.{i}.{role}": torch.full(shape, float(number))
        for number, (part, i, (role, shape)) in enumerate(
            (part, i, each)
            for part in ("encoder", "decoder")
            for i in range(12)
            for each in (("weight", (3, 4)), ("bias", (3,)))
        )
    }
    like = {
        part: {str(i): {"b": jnp.zeros(3), "w": jnp.zeros((4, 3))} for i in range(12)}
        for part in ("encoder", "decoder")
    }
    loaded = load_torch_parameters(state, like)
    for part in ("encoder", "decoder"):
        for i in range(12):
            number = state[f"{part}.{i}.bias"][0]
            assert (loaded.params[part][str(i)]["b"] == float(number)).all()
            assert (loaded.params[part][str(i)]["w"] == float(number) - 1).all()


def test_what_is_no_float_stays():
    key = jax.random.key(1)
    like = {
        "w": jnp.zeros((2, 3)),
        "key": key,
        "raw": jax.random.PRNGKey(0),
        "steps": jnp.array(7),
        "num_batches_tracked": jnp.array(0),
        "rate": 0.5,
        "name": "net",
        "none": None,
    }
    state = {"w": torch.ones(2, 3), "num_batches_tracked": torch.tensor(9)}
    params = load_torch_parameters(state, like).params
    assert params["key"] is key
    assert params["raw"] is like["raw"]
    assert params["steps"] == 7
    assert params["num_batches_tracked"] == 9
    assert (params["rate"], params["name"], params["none"]) == (0.5, "net", None)


@pytest.mark.parametrize("form", ["state_dict", "pt", "safetensors"])
def test_dtypes_are_those_of_like(form, tmp_path):
    state = {
        "half.weight": torch.tensor([1.0, 2.5, -3.0], dtype=torch.bfloat16),
        "wide.weight": torch.tensor([1 / 3, 0.5, np.inf]),
    }
    like = {
        "half": {"w": jnp.zeros(3, jnp.bfloat16)},
        "wide": {"w": jnp.zeros(3, jnp.float16)},
    }
    loaded = load_torch_parameters(as_source(state, form, tmp_path), like)
    assert loaded.params["half"]["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        loaded.params["half"]["w"].astype(np.float32), [1, 2.5, -3]
    )
    assert loaded.params["wide"]["w"].dtype == jnp.float16
    said = {finding.kind: finding for finding in loaded.findings}
    assert set(said) == {"precision", "nonfinite"}
    assert said["precision"].leaf == "wide.w"
    assert said["precision"].text == "1 of 3 numbers lost digits as float16"


def test_the_arrays_are_no_views_of_pytorchs_memory():
    state = {"w": torch.ones(64, 64), "b": torch.ones(64)}
    like = LinearParams(jnp.zeros((64, 64)), jnp.zeros(64))
    params = load_torch_parameters(state, like).params
    for tensor in state.values():
        tensor.fill_(5)
    assert all((leaf == 1).all() for leaf in params)


def test_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.lm_head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.lm_head.weight = self.wte.weight

    state = Tied().state_dict()
    one = load_torch_parameters(state, {"wte": jnp.zeros((9, 4))})
    assert kinds(one) == ["tied"]
    same(one.params["wte"], state["wte.weight"])
    both = load_torch_parameters(
        state, {"wte": jnp.zeros((9, 4)), "lm_head": jnp.zeros((4, 9))}
    )
    same(both.params["lm_head"].T, state["wte.weight"])
    state.pop("lm_head.weight")
    like = {"wte": jnp.zeros((9, 4)), "head": jnp.zeros((4, 9))}
    with pytest.raises(ValueError, match=r"(?s)no parameter.*`head`.*mapping"):
        load_torch_parameters(state, like)
    shared = load_torch_parameters(state, like, mapping={"head": "wte.weight"})
    same(shared.params["head"].T, state["wte.weight"])


def test_which_of_two_tied_names_does_not_matter():
    shared = torch.ones(9, 4)
    state = {"p.weight": shared, "q.weight": shared}
    loaded = load_torch_parameters(state, {"table": jnp.zeros((9, 4))})
    assert kinds(loaded) == ["tied"]
    state["q.weight"] = shared.clone()
    with pytest.raises(ValueError, match="could be"):
        load_torch_parameters(state, {"table": jnp.zeros((9, 4))})


def test_buffers_without_a_leaf_are_left_aside():
    state = {
        "h.0.attn.bias": torch.tril(torch.ones(5, 5)).view(1, 1, 5, 5),
        "h.0.attn.masked_bias": torch.tensor(-1e4),
        "h.0.attn.c_proj.weight": torch.ones(2, 3),
        "position_ids": torch.arange(5)[None],
    }
    like = {"h": [{"attn": {"c_proj": jnp.zeros((2, 3))}}]}
    loaded = load_torch_parameters(state, like)
    (finding,) = loaded.findings
    assert finding.kind == "buffers"
    assert "h.0.attn.bias, h.0.attn.masked_bias, position_ids" in finding.text


SQUARE = (4, 4, 4, 4)


def test_a_square_matrix_is_an_error_without_help():
    with pytest.raises(
        ValueError,
        match=r"(?s)`w1` of shape \(4, 4\) could be `0.weight` as it is or "
        r"transposed.*`w3`.*mapping=.*verify=",
    ):
        load_torch_parameters(mlp(*SQUARE).state_dict(), plain_like(*SQUARE))


def test_a_square_matrix_by_mapping():
    module = mlp(*SQUARE)
    turn = {f"w{i}": (f"{2 * i - 2}.weight", lambda w: w.T) for i in (1, 2, 3)}
    loaded = load_torch_parameters(
        module.state_dict(), plain_like(*SQUARE), mapping=turn
    )
    x = draw(5, 4)
    same(plain_mlp(loaded.params, x), module(torch.tensor(np.asarray(x))))
    assert layouts(loaded)["w2"] == ("2.weight", "your transform", "mapping")


@pytest.mark.parametrize("depth", [1, 3, 10])
def test_a_square_matrix_by_pytorchs_loss(depth):
    sizes = [4] * (depth + 1)
    module, x = mlp(*sizes), draw(5, 4)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    loaded = load_torch_parameters(
        module.state_dict(),
        plain_like(*sizes),
        verify=(plain_loss, (x,), module, torch_loss),
    )
    same(plain_mlp(loaded.params, x), module(torch.tensor(np.asarray(x))))
    assert layouts(loaded)["w1"] == ("0.weight", "transposed", "verify")
    assert "verified" in kinds(loaded)
    assert module.training
    assert all((before[n] == t).all() for n, t in module.state_dict().items())


def test_pytorchs_loss_finds_layouts_that_no_custom_has():
    module, x = mlp(4, 4, 4), draw(5, 4)
    names = {"1": "0", "2": "2"}
    like = {i: {"kernel": jnp.zeros((4, 4)), "bias": jnp.zeros(4)} for i in names}

    def loss(params, x):  # the first kernel as PyTorch has it
        x = jnp.tanh(x @ params["1"]["kernel"].T + params["1"]["bias"])
        return jnp.mean((x @ params["2"]["kernel"] + params["2"]["bias"]) ** 2)

    loaded = load_torch_parameters(
        module.state_dict(), like, verify=(loss, (x,), module, torch_loss)
    )
    same(loaded.params["1"]["kernel"], module[0].weight)
    same(loaded.params["2"]["kernel"].T, module[2].weight)


def test_a_loss_that_cannot_tell():
    module = mlp(4, 4)
    verify = (plain_loss, (jnp.zeros((5, 4)),), module, torch_loss)
    with pytest.raises(
        ValueError, match=r"Several layouts give PyTorch's loss.\n.*`w1`"
    ):
        load_torch_parameters(module.state_dict(), plain_like(4, 4), verify=verify)


def test_a_loss_that_cannot_tell_one_of_many():
    sizes = [4] * 11  # more layouts than are tried: w1 alone meets only zeros
    module = mlp(*sizes)
    verify = (plain_loss, (jnp.zeros((5, 4)),), module, torch_loss)
    with pytest.raises(ValueError, match="Several layouts") as error:
        load_torch_parameters(module.state_dict(), plain_like(*sizes), verify=verify)
    assert "`w1`" in str(error.value)
    assert "`w2`" not in str(error.value)


def test_a_custom_settles_what_the_loss_leaves_open():
    module = nn.Linear(4, 4)
    like = {"kernel": jnp.zeros((4, 4)), "bias": jnp.zeros(4)}

    def loss(params, x):
        return jnp.mean((x @ params["kernel"] + params["bias"]) ** 2)

    verify = (loss, (jnp.zeros((5, 4)),), module, torch_loss)
    loaded = load_torch_parameters(module.state_dict(), like, verify=verify)
    same(loaded.params["kernel"].T, module.weight)
    assert layouts(loaded)["kernel"] == ("weight", "transposed", "convention")
    assert kinds(loaded) == ["verified", "convention"]


@pytest.mark.bad_input
def test_a_loss_that_no_layout_reproduces():
    module, x = mlp(*SQUARE), draw(5, 4)

    def loss(params, x):
        return jnp.sum(plain_mlp(params, x) ** 2)

    with pytest.raises(ValueError, match=r"no layout reproduces it; the nearest is"):
        load_torch_parameters(
            module.state_dict(),
            plain_like(*SQUARE),
            verify=(loss, (x,), module, torch_loss),
        )


@pytest.mark.bad_input
def test_verify_with_another_module():
    with pytest.raises(ValueError, match=r"another `0.weight` than source"):
        load_torch_parameters(
            nn.Sequential(nn.Linear(4, 4)).state_dict(),
            plain_like(4, 4),
            verify=(plain_loss, (draw(5, 4),), mlp(4, 4), torch_loss),
        )


@pytest.mark.bad_input
@pytest.mark.parametrize("verify", [3, (plain_loss, 1), (1, (), nn.ReLU(), 2)])
def test_verify_has_four_parts(verify):
    with pytest.raises(TypeError, match=r"verify"):
        load_torch_parameters(mlp(4, 4).state_dict(), plain_like(4, 4), verify=verify)


def test_other_leaves_may_break_a_custom():
    # GPT-2 keeps its weights as (in, out), which the shape of c_fc shows.
    state = {
        "c_fc.weight": torch.ones(4, 8),
        "c_proj.weight": torch.ones(4, 4),
    }
    like = {
        "c_fc": {"kernel": jnp.zeros((4, 8))},
        "c_proj": {"kernel": jnp.zeros((4, 4))},
    }
    with pytest.raises(ValueError, match=r"`c_proj.kernel` .*`c_fc.kernel` breaks it"):
        load_torch_parameters(state, like)
    mapping = {"c_proj.kernel": ("c_proj.weight", lambda w: w)}
    load_torch_parameters(state, like, mapping=mapping)


@pytest.mark.parametrize(
    ("torch_shape", "shape"),
    [
        ((4, 4, 3, 3), (4, 4, 3, 3)),
        ((4, 4, 3, 3), (3, 3, 4, 4)),
        ((8, 3, 3, 3), (3, 3, 3, 8)),
        ((4, 4, 5), (5, 4, 4)),
        ((6, 4, 2, 2), (2, 2, 6, 4)),
        ((8, 3, 2, 2), (12, 8)),
        ((6, 6), (6, 2, 3)),
    ],
)
def test_open_kernels_are_errors(torch_shape, shape):
    state = {"c.weight": torch.ones(torch_shape)}
    with pytest.raises(ValueError, match=r"`c` of shape .* could be `c.weight`"):
        load_torch_parameters(state, {"c": jnp.zeros(shape)})


@pytest.mark.parametrize(
    ("torch_shape", "shape", "made"),
    [
        ((8, 3, 5, 5), (8, 3, 5, 5), lambda w: w),
        ((8, 3, 5, 5), (5, 5, 3, 8), lambda w: w.transpose(2, 3, 1, 0)),
        ((8, 1, 3, 3), (3, 3, 1, 8), lambda w: w.transpose(2, 3, 1, 0)),
        ((8, 3, 5), (5, 3, 8), lambda w: w.transpose(2, 1, 0)),
        ((8, 3, 2, 4, 5), (2, 4, 5, 3, 8), lambda w: w.transpose(2, 3, 4, 1, 0)),
        ((3, 8), (8, 3), lambda w: w.T),
        ((6, 5), (5, 2, 3), lambda w: w.T.reshape(5, 2, 3)),
        ((5, 6), (2, 3, 5), lambda w: w.T.reshape(2, 3, 5)),
        ((1, 7, 4), (7, 4), lambda w: w[0]),
        ((1, 7), (7,), lambda w: w[0]),
        ((7,), (7, 1, 1), lambda w: w[:, None, None]),
        ((), (1,), lambda w: w.reshape(1)),
        ((0, 3), (3, 0), lambda w: w.T),
    ],
)
def test_shapes_that_leave_one_layout(torch_shape, shape, made):
    numbers = np.arange(np.prod(torch_shape, dtype=int), dtype=np.float32)
    source = numbers.reshape(torch_shape)
    loaded = load_torch_parameters({"c.weight": source}, {"c": jnp.zeros(shape)})
    np.testing.assert_array_equal(loaded.params["c"], made(source))
    assert loaded.parameters[0].how == "shape"


def test_mapping_of_several_and_by_name_alone():
    state = {
        "q.weight": torch.ones(2, 3),
        "k.weight": 2 * torch.ones(2, 3),
        "v.weight": 3 * torch.ones(2, 3),
        "x.weight": torch.arange(8.0).reshape(4, 2),
        "y.weight": torch.ones(4, 2),
    }
    like = {
        "qkv": jnp.zeros((6, 3)),
        "one": jnp.zeros((2, 4)),
        "two": jnp.zeros((2, 4)),
    }

    def joined(*arrays):
        assert all(isinstance(array, np.ndarray) for array in arrays)
        return np.concatenate(arrays)

    mapping = {
        "qkv": (["q.weight", "k.weight", "v.weight"], joined),
        "one": "x.weight",
    }
    loaded = load_torch_parameters(state, like, mapping=mapping)
    assert loaded.params["qkv"][:, 0].tolist() == [1, 1, 2, 2, 3, 3]
    same(loaded.params["one"].T, state["x.weight"])
    rows = layouts(loaded)
    assert rows["qkv"] == ("q.weight, k.weight, v.weight", "your transform", "mapping")
    assert rows["one"] == ("x.weight", "transposed", "mapping")
    assert rows["two"] == ("y.weight", "transposed", "shape")


def test_nnx_leaves_may_be_mapped_without_their_value():
    graph, like = nnx.split(nnx.Linear(3, 3, rngs=nnx.Rngs(0)))
    state = nn.Linear(3, 3).state_dict()
    mapping = {"kernel": ("weight", lambda w: w)}
    loaded = load_torch_parameters(state, like, mapping=mapping)
    same(nnx.merge(graph, loaded.params).kernel.get_value(), state["weight"])


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("like", "words"),
    [
        ({"alpha": (4,), "omega": (4,)}, "`alpha` .* could be `p.weight`, `q.weight`"),
        ({"w_in": (4,), "w_out": (4,)}, "leave open which .*\n.*`w_in`"),
    ],
)
def test_names_that_say_nothing(like, words):
    state = {"p.weight": torch.ones(4), "q.weight": torch.zeros(4)}
    like = {name: jnp.zeros(shape) for name, shape in like.items()}
    with pytest.raises(ValueError, match=rf"(?s){words}.*mapping={{"):
        load_torch_parameters(state, like)
    names = list(like)
    mapping = {names[0]: "q.weight"}
    loaded = load_torch_parameters(state, like, mapping=mapping)
    assert loaded.params[names[1]].tolist() == [1] * 4


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "names",
    [
        ["inp", "fc1", "fc2"],
        ["fc1", "fc2", "out"],
        ["first", "second", "third"],
        ["enc0", "enc1", "dec0"],
    ],
)
@pytest.mark.parametrize("numbers", [(0, 1, 2), (0, 2, 4), (1, 2, 3)])
def test_numbers_count_only_beside_as_many_others(names, numbers):
    state = {f"net.{number}.weight": torch.ones(4) for number in numbers}
    like = {name: {"scale": jnp.zeros(4)} for name in names}
    with pytest.raises(ValueError, match="leave open which parameter is which"):
        load_torch_parameters(state, like)


@pytest.mark.bad_input
def test_one_list_beside_two():
    state = {f"{part}.{i}.weight": torch.ones(4) for part in "xy" for i in (0, 1)}
    with pytest.raises(ValueError, match="leave open which parameter is which"):
        load_torch_parameters(state, [{"scale": jnp.zeros(4)} for _ in range(4)])


def test_blocks_of_several_kinds_in_one_list():
    sizes = {"conv": (6, 6, 3, 3), "bn": (6,)}
    order = ["conv", "bn", None, "conv", "bn", None, "conv", "bn"]
    state = {
        f"features.{place}.{role}": torch.full(shape, float(place))
        for place, kind in enumerate(order)
        if kind
        for role, shape in (("weight", sizes[kind]), ("bias", (6,)))
    }
    like = {
        f"{kind}{i}": {
            ("kernel" if kind == "conv" else "scale"): jnp.zeros(sizes[kind][::-1]),
            "bias": jnp.zeros(6),
        }
        for i in (1, 2, 3)
        for kind in sizes
    }
    params = load_torch_parameters(state, like).params
    for i in (1, 2, 3):
        for kind, place in (("conv", 3 * i - 3), ("bn", 3 * i - 2)):
            assert all((leaf == place).all() for leaf in params[f"{kind}{i}"].values())


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("2.bias"), r"no parameter that fits:\n  `b2` of shape \(5,\)"),
        (
            lambda s: s.update(extra=torch.ones(2, 2)),
            r"have no leaf:\n  `extra` of shape \(2, 2\)",
        ),
        (
            lambda s: s.update({"2.weight": torch.ones(5, 9)}),
            r"`w2` of shape \(8, 5\) \(.* left: `2.weight` of shape \(5, 9\)\)",
        ),
    ],
    ids=["missing", "extra", "shape"],
)
def test_missing_extra_and_other_shapes(change, words):
    state = dict(mlp(3, 8, 5, 2).state_dict())
    change(state)
    with pytest.raises(ValueError, match=words):
        load_torch_parameters(state, plain_like(3, 8, 5, 2))


def test_a_bias_is_never_taken_for_a_weight():
    state = {"norm.weight": torch.ones(4)}
    with pytest.raises(ValueError, match=r"`norm.bias`"):
        load_torch_parameters(state, {"norm": {"bias": jnp.zeros(4)}})


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("mapping", "error", "words"),
    [
        ({"w9": "0.weight"}, ValueError, "the leaf `w9`, .* nearest: w"),
        ({"w1": "0.wieght"}, ValueError, "`0.wieght`, .* nearest: 0.weight"),
        ({"w1": "2.bias"}, ValueError, r"`w1` of shape \(3, 8\) .*\(5,\)"),
        ({"w1": ("0.weight", lambda w: w)}, ValueError, r"makes \(8, 3\) of"),
        ({"w1": 3}, TypeError, r"mapping\['w1'\] must be a name"),
        ({"w1": ["0.weight", "0.bias"]}, TypeError, "must be a name"),
    ],
)
def test_wrong_mappings(mapping, error, words):
    with pytest.raises(error, match=words):
        load_torch_parameters(
            mlp(3, 8, 5, 2).state_dict(), plain_like(3, 8, 5, 2), mapping=mapping
        )


class Malicious:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.bad_input
@pytest.mark.parametrize("protocol", ["zipped", 2, 4])
@pytest.mark.parametrize("name", ["weights.pt", "weights.bin", "weights"])
def test_code_in_a_file_is_refused_and_not_run(protocol, name, tmp_path):
    path, mark = tmp_path / name, tmp_path / "ran"
    bad = {"weight": Malicious(str(mark))}
    if protocol == "zipped":
        torch.save(bad, path)
    else:
        path.write_bytes(pickle.dumps(bad, protocol))
    with pytest.raises(
        ValueError, match=r"run code.*nothing of it was run.*state_dict\(\)"
    ):
        load_torch_parameters(path, plain_like(3, 2))
    assert not mark.exists()


@pytest.mark.bad_input
def test_a_whole_module_in_a_file(tmp_path):
    torch.save(nn.Linear(3, 2), tmp_path / "module.pt")
    with pytest.raises(ValueError, match=r"(?s)module.pt holds more .*state_dict\(\)"):
        load_torch_parameters(tmp_path / "module.pt", plain_like(3, 2))


@pytest.mark.bad_input
@pytest.mark.parametrize("form", ["pt", "legacy.pt", "safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.95])
def test_files_that_are_cut_short(form, kept, tmp_path):
    path = as_source(mlp(30, 80, 20).state_dict(), form, tmp_path)
    with open(path, "rb+") as file:
        file.truncate(int(kept * os.path.getsize(path)))
    with pytest.raises(ValueError, match=r"weights\.\S+ (is|isn't) "):
        load_torch_parameters(path, plain_like(30, 80, 20))


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.txt", "a"])
@pytest.mark.parametrize(
    "text", ["{}", "hello world, this is a text", "<!doctype html>"]
)
def test_files_that_are_something_else(name, text, tmp_path):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"{name} isn't .*begins with"):
        load_torch_parameters(path, plain_like(3, 2))


@pytest.mark.bad_input
def test_a_safetensors_file_under_pytorchs_name(tmp_path):
    path = tmp_path / "a.pt"
    safetensors.torch.save_file(mlp(3, 2).state_dict(), path)
    with pytest.raises(ValueError, match=r"a.pt isn't .*name it .safetensors"):
        load_torch_parameters(path, plain_like(3, 2))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "header",
    [
        {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [-2, 3], "data_offsets": [0, 24]}},
        {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [8, 32]}},
        {"w": {"shape": [2, 3]}},
        {"w": 3},
    ],
)
def test_broken_headers(header, tmp_path):
    text, path = json.dumps(header).encode(), tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(24))
    with pytest.raises(ValueError, match=r"a.safetensors is (broken|cut short)"):
        load_torch_parameters(path, {"w": jnp.zeros((2, 3))})


@pytest.mark.bad_input
def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.pt"):
        load_torch_parameters(tmp_path / "none.pt", plain_like(3, 2))
    with pytest.raises(ValueError, match=r"is a folder"):
        load_torch_parameters(tmp_path, plain_like(3, 2))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        (nn.Linear(3, 2), TypeError, r"pass module.state_dict\(\)"),
        (3, TypeError, "source must be a state dict"),
        ({}, ValueError, "no tensors"),
        ({"w1": "text"}, TypeError, r"source\['w1'\] is a builtins.str"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, TypeError, "complex"),
        ({"w": torch.ones(2).to_sparse()}, TypeError, "`w` is a .*sparse"),
        ({"w": torch.ones(2, device="meta")}, TypeError, "`w` is a meta"),
        (
            {"model": {"w": torch.ones(2)}, "state_dict": {"w": torch.ones(2)}},
            ValueError,
            "several state dicts, under state_dict, model",
        ),
    ],
)
def test_sources_of_other_kinds(source, error, words):
    with pytest.raises(error, match=words):
        load_torch_parameters(source, plain_like(3, 2))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("like", "error", "words"),
    [
        ({"w": jnp.zeros(3, jnp.complex64)}, TypeError, "`w` has dtype complex64"),
        ({"w": torch.ones(3)}, TypeError, "`w` is a torch.Tensor"),
        ({"n": jnp.arange(3)}, ValueError, "like has no array of floats"),
        ({}, ValueError, "like has no array of floats"),
    ],
)
def test_trees_that_cannot_be_filled(like, error, words):
    with pytest.raises(error, match=words):
        load_torch_parameters({"w": torch.ones(3)}, like)


def test_without_pytorch(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np\n"
        "from jaxgrad import load_torch_parameters as load\n"
        "like = {'w': np.zeros(2)}\n"
        f"print(load({str(tmp_path / 'a.safetensors')!r}, like).params['w'])\n"
        f"load({str(tmp_path / 'a.pt')!r}, like)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[1. 1.]\n"
    assert "pip install 'jaxgrad[torch]'" in done.stderr.splitlines()[-1]


def test_the_report():
    sizes = [3] + [8] * 40
    loaded = load_torch_parameters(
        mlp(*sizes).state_dict(),
        [
            {"kernel": jnp.zeros(s), "bias": jnp.zeros(8)}
            for s in itertools.pairwise(sizes)
        ],
    )
    text = str(loaded)
    assert text.startswith("Loaded 80 leaves from PyTorch")
    assert "and 50 more" in text
    assert "`kernel` is (in, out)" in text
    assert max(map(len, text.splitlines())) <= 80
    data = json.dumps(loaded.to_dict(), allow_nan=False)
    assert json.loads(data)["parameters"][0]["torch_name"] == "0.bias"
    assert "<table>" in loaded._repr_html_()
    with pytest.raises(TypeError, match=r"no verdict"):
        bool(loaded)
