"""Tests `compare_with_torch`: what it reports, what it leaves alone and refuses."""

import contextlib
import json
import sys
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import jaxgrad
from jaxgrad import compare_with_torch


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X, Y = draw(0, 8, 5), draw(1, 8, 3)


def network(seed=0, dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)
        return nn.Sequential(*parts).to(dtype)


def port(module):
    """The network's parameters as JAX has them: kernels are (in, out)."""
    arrays = {
        name: jnp.asarray(p.detach().float().numpy().copy(), str(p.dtype)[6:])
        for name, p in module.named_parameters()
    }
    return [{"w": arrays[f"{k}.weight"].T, "b": arrays[f"{k}.bias"]} for k in (0, 2)]


def apply(params, x):
    first, second = params
    return jnp.tanh(x @ first["w"] + first["b"]) @ second["w"] + second["b"]


def loss(params, x, y):
    return jnp.mean((apply(params, x) - y) ** 2)


def torch_loss(module, x, y):
    return F.mse_loss(module(x), y)


def compared(
    loss=loss, params=None, args=(X, Y), module=None, torch_loss=torch_loss, **options
):
    """The comparison; what isn't given is the network, its port and their loss."""
    module = network() if module is None else module
    params = port(module) if params is None else params
    return compare_with_torch(
        loss, params, *args, module=module, torch_loss=torch_loss, **options
    )


def row(report, path):
    (found,) = (r for r in report.parameters if path in (r.path, r.torch_name))
    return found


def changed(params, layer, leaf, change):
    params = [dict(part) for part in params]
    params[layer][leaf] = change(params[layer][leaf])
    return params


# Verdicts


def test_a_right_port():
    report = compared()
    assert report
    assert report.ok is True
    assert report.causes == ()
    assert report.first_difference is None
    assert report.unmatched == ((), ())
    assert report.trajectory is None
    assert report.loss.jax == pytest.approx(report.loss.torch, rel=1e-6)
    assert [(r.path, r.torch_name) for r in report.parameters] == [
        ("[0].b", "0.bias"),
        ("[0].w", "0.weight"),
        ("[1].b", "2.bias"),
        ("[1].w", "2.weight"),
    ]
    assert row(report, "[0].w").layout == "transposed"
    assert row(report, "[0].b").layout == "as it is"
    for found in report.parameters:
        assert found.verdict in ("agrees", "rounding")
        assert found.max_error < 1e-6
        assert found.relative_error < 1e-5
        assert found.cosine == pytest.approx(1)
        assert found.cause is None


def test_the_forward_pass_is_listed():
    report = compared()
    forward = {output.module: output for output in report.forward}
    assert {"0", "1", "2"} <= forward.keys()
    assert [forward[k].kind for k in ("0", "1", "2")] == ["Linear", "Tanh", "Linear"]
    assert forward["1"].shape == (8, 6)
    assert forward["1"].error < 1e-5
    assert forward["1"].file == __file__
    assert "jnp.tanh" in forward["1"].text


def test_sum_for_mean():
    report = compared(lambda p, x, y: 24 * loss(p, x, y))
    assert report.causes[0].kind == "reduction"
    assert not report
    assert all(r.verdict == "differs" for r in report.parameters)
    assert row(report, "[0].w").cosine == pytest.approx(1)


def test_the_first_difference_names_module_and_line():
    def other(params, x, y):
        first, second = params
        h = jax.nn.relu(x @ first["w"] + first["b"])
        return jnp.mean((h @ second["w"] + second["b"] - y) ** 2)

    report = compared(other)
    first = report.first_difference
    assert (first.module, first.operation) == ("1", "tanh")
    assert first.file == __file__
    assert "jax.nn.relu" in first.text
    assert first.cause.kind == report.causes[0].kind == "activation"


@pytest.mark.parametrize(("layer", "name"), [(0, "0.weight"), (1, "2.weight")])
def test_another_value_is_the_first_finding(layer, name):
    changes = changed(port(network()), layer, "w", lambda w: w.at[2, 1].add(0.25))
    report = compared(params=changes)
    assert not report
    assert report.causes[0].kind == "values"
    assert report.findings[0].kind == "values"
    assert report.findings[0].leaf == f"[{layer}].w"
    found = row(report, name)
    assert found.verdict == "values"
    assert found.worst.index == (2, 1)
    assert found.worst.jax - found.worst.torch == pytest.approx(0.25, rel=1e-3)
    assert "[2, 1]" in str(report)
    others = [r for r in report.parameters if r is not found]
    assert all(r.verdict in ("agrees", "rounding") for r in others)


def test_what_has_no_partner_is_listed():
    module = network()
    params = [*port(module), draw(5, 4, 4)]
    report = compared(lambda p, x, y: loss(p[:2], x, y), params, module=module)
    assert report.unmatched == (("[2]",), ())
    assert report.ok  # it has no gradient

    with_gradient = compared(
        lambda p, x, y: loss(p[:2], x, y) + jnp.sum(p[2] ** 2), params, module=module
    )
    assert with_gradient.unmatched.jax == ("[2]",)
    assert not with_gradient

    module.register_parameter("more", nn.Parameter(torch.randn(7)))
    other = compared(module=module, params=port(network()))
    assert other.unmatched == ((), ("more",))
    assert other.ok


def test_a_bias_that_one_side_has_not():
    params = port(network())
    without = [{"w": part["w"]} for part in params]

    def other(p, x, y):
        h = jnp.tanh(x @ p[0]["w"]) @ p[1]["w"]
        return jnp.mean((h - y) ** 2)

    report = compared(other, without)
    assert not report
    assert set(report.unmatched.torch) == {"0.bias", "2.bias"}
    assert report.causes[0].kind == "bias"


def test_frozen_on_both_sides():
    module = network()
    module[0].weight.requires_grad_(False)

    def frozen(params, x, y):
        first, second = params
        first = {**first, "w": jax.lax.stop_gradient(first["w"])}
        return loss([first, second], x, y)

    assert compared(frozen, module=module)
    assert module[0].weight.requires_grad is False


@pytest.mark.parametrize("side", ["jax", "torch"])
def test_frozen_on_one_side(side):
    module, ours = network(), loss
    if side == "torch":
        module[0].weight.requires_grad_(False)
    else:

        def ours(params, x, y):
            return loss(changed(params, 0, "w", jax.lax.stop_gradient), x, y)

    report = compared(ours, module=module)
    assert not report
    assert row(report, "0.weight").verdict == "missing"
    assert report.causes[0].kind == "missing_gradient"
    bad = [r for r in report.parameters if r.verdict not in ("agrees", "rounding")]
    assert [r.torch_name for r in bad] == ["0.weight"]


def test_ties():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(5, 5)
            self.down = nn.Linear(5, 5, bias=False)
            self.down.weight = self.up.weight

        def forward(self, x):
            return self.down(torch.tanh(self.up(x)))

    module = Tied()
    w, b = (jnp.asarray(p.detach().numpy().copy()) for p in module.parameters())

    def tied(p, x):
        return jnp.mean((jnp.tanh(x @ p["w"].T + p["b"]) @ p["w"].T) ** 2)

    def untied(p, x):
        return jnp.mean((jnp.tanh(x @ p["w"].T + p["b"]) @ p["v"]) ** 2)

    def torchs(module, x):
        return (module(x) ** 2).mean()

    for ours, params in (
        (tied, {"w": w, "b": b}),
        (untied, {"w": w, "v": w.T, "b": b}),
    ):
        report = compared(ours, params, (X,), module, torchs)
        assert report, str(report)
    assert row(report, "up.weight").layout == "shared"
    assert set(row(report, "up.weight").path.split(" + ")) == {"v", "w"} or set(
        row(report, "up.weight").path.split(" + ")
    ) == {"['v']", "['w']"}


def test_a_gradient_that_is_zero():
    """A key's bias adds the same to all scores of a row: softmax doesn't see it."""
    module = nn.MultiheadAttention(6, 2, batch_first=True)
    with torch.no_grad():
        module.in_proj_bias.normal_()
    params = {n: jnp.asarray(p.detach().numpy()) for n, p in module.named_parameters()}

    def attention(p, x):
        qkv = x @ p["in_proj_weight"].T + p["in_proj_bias"]
        q, k, v = (
            part.reshape(*x.shape[:2], 2, 3).swapaxes(1, 2)
            for part in jnp.split(qkv, 3, -1)
        )
        weights = jax.nn.softmax(q @ k.swapaxes(-1, -2) / np.sqrt(3), -1)
        out = (weights @ v).swapaxes(1, 2).reshape(x.shape)
        out = out @ p["out_proj.weight"].T + p["out_proj.bias"]
        return jnp.mean(out**2)

    # q, k and v apart, so that the key's bias stands alone.
    def apart(p, x):
        weight = jnp.concatenate([p[f"{k}.w"] for k in "qkv"])
        bias = jnp.concatenate([p[f"{k}.b"] for k in "qkv"])
        return attention({**p, "in_proj_weight": weight, "in_proj_bias": bias}, x)

    split = {n: p for n, p in params.items() if n.startswith("out")}
    for place, k in enumerate("qkv"):
        split[f"{k}.w"] = params["in_proj_weight"][6 * place : 6 * place + 6]
        split[f"{k}.b"] = params["in_proj_bias"][6 * place : 6 * place + 6]

    def torchs(module, x):
        return (module(x, x, x)[0] ** 2).mean()

    for ours, given in ((attention, params), (apart, split)):
        report = compared(ours, given, (draw(7, 2, 4, 6),), module, torchs)
        assert report, str(report)


def test_dropout_in_train_mode_on_one_side():
    module = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Linear(6, 3))
    params = port(module)

    def linear(p, x, y):
        h = (x @ p[0]["w"] + p[0]["b"]) @ p[1]["w"] + p[1]["b"]
        return jnp.mean((h - y) ** 2)

    report = compared(linear, params, module=module)
    assert not report
    assert report.first_difference.module == "1"
    assert report.causes[0].kind == "train_mode"
    assert compared(linear, params, module=module.eval())


def test_bfloat16_on_both_sides():
    module = network(dtype=torch.bfloat16)
    args = X.astype(jnp.bfloat16), Y.astype(jnp.bfloat16)
    assert compared(args=args, module=module)
    assert module[0].weight.dtype == torch.bfloat16
    report = compared(
        lambda p, x, y: 3 * loss(p, x, y),
        args=args,
        module=network(dtype=torch.bfloat16),
    )
    assert report.causes[0].kind in ("factor", "reduction")


def test_jit_scan_vmap_and_cond_inside():
    module = network()
    params = port(module)

    @jax.jit
    def one(params, x):
        return apply(params, x)

    def nested(params, x, y):
        out = jax.vmap(jax.jit(one), (None, 0))(params, x)
        total, _ = jax.lax.scan(
            lambda sum, pair: (sum + jnp.sum((pair[0] - pair[1]) ** 2), None),
            jnp.zeros((), out.dtype),
            (out, y),
        )
        return jax.lax.cond(total > 0, lambda t: t / y.size, lambda t: t, total)

    assert compared(nested, params, module=module)
    halved = compared(lambda *args: nested(*args) / 2, params, module=module)
    assert halved.causes[0].kind == "factor"


def test_a_whole_equinox_model():
    module = network()
    mlp = eqx.nn.MLP(5, 3, 6, 1, jnp.tanh, key=jax.random.key(0))
    arrays = [p for part in port(module) for p in (part["w"].T, part["b"])]
    mlp = eqx.tree_at(
        lambda m: [x for part in m.layers for x in (part.weight, part.bias)],
        mlp,
        arrays,
    )
    report = compared(
        lambda m, x, y: jnp.mean((jax.vmap(m)(x) - y) ** 2), mlp, module=module
    )
    assert report
    assert row(report, "0.weight").path == "layers[0].weight"


# Options


def test_mapping():
    module = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    report = compared(
        params=port(module),
        module=module,
        mapping={"[0].w": "0.weight", "[1].w": ("2.weight", lambda w: w.T)},
    )
    assert report
    assert row(report, "[0].w").layout == row(report, "[1].w").layout == "transposed"


def test_mapping_with_a_transform_that_computes():
    """JAX has the logarithm of a scale, and PyTorch the scale: values and gradients."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor([0.5, 2.0, 3.0]))

        def forward(self, x):
            return x * self.scale

    def ours(p, y):
        return jnp.mean((y * 2 * p["half"]) ** 2)

    module = Scaled()
    params = {"half": jnp.array([0.25, 1.0, 1.5])}
    report = compared(
        ours,
        params,
        (Y,),
        module,
        lambda module, y: (module(y) ** 2).mean(),
        mapping={"half": ("scale", lambda scale: scale / 2)},
    )
    assert report, str(report)
    assert row(report, "half").layout == "by the transform given"


def test_mapping_to_what_is_not_there():
    with pytest.raises(KeyError, match=r"0\.weight"):
        compared(mapping={"[0].w": "0.wieght"})
    with pytest.raises(KeyError, match="leaf"):
        compared(mapping={"[7].w": "0.weight"})
    with pytest.raises(ValueError, match="transform"):
        compared(mapping={"[0].w": "2.bias"})


def test_has_aux():
    report = compared(lambda p, x, y: (loss(p, x, y), {"mean": y.mean()}), has_aux=True)
    assert report


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        (np.ones((2, 3), np.float32), torch.float32),
        (np.ones(3, np.float16), torch.float16),
        (jnp.ones(3, jnp.bfloat16), torch.bfloat16),
        (np.ones(3, np.int32), torch.int64),
        (np.ones(3, np.uint8), torch.int64),
        (np.ones(3, bool), torch.bool),
    ],
)
def test_arguments_become_tensors(given, dtype):
    seen = []

    def torchs(module, x, y, more):
        seen.append(more["data"][0])
        return torch_loss(module, x, y)

    array = jnp.asarray(given)
    report = compared(
        lambda p, x, y, more: loss(p, x, y),
        args=(X, Y, {"data": [array]}),
        torch_loss=torchs,
    )
    assert report
    assert seen[0].dtype == dtype
    assert tuple(seen[0].shape) == array.shape
    seen[0].zero_()
    assert np.asarray(array).all()  # it was a copy


def test_torch_args():
    x, y = (torch.tensor(np.asarray(a)) for a in (X, Y))
    report = compared(
        args=(jax.random.key(0), X, Y, "flag"),
        loss=lambda p, key, x, y, flag: loss(p, x, y),
        torch_args=(x, y),
    )
    assert report


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "extra", [jax.random.key(0), jax.random.PRNGKey(0), "flag", print]
)
def test_an_argument_without_a_counterpart(extra):
    with pytest.raises(TypeError, match=r"args\[2\].*torch_args"):
        compared(lambda p, x, y, extra: loss(p, x, y), args=(X, Y, extra))


def test_exact():
    plain, exact = compared(), compared(exact=True)
    assert exact
    for found in exact.parameters:
        assert found.exact_error < 1e-12
        assert found.further in ("", "JAX", "PyTorch")
    assert [r.path for r in exact.parameters] == [r.path for r in plain.parameters]


def test_rtol():
    def nearly(params, x, y):
        return (1 + 1e-4) * loss(params, x, y)

    assert not compared(nearly)
    assert compared(nearly, rtol=1e-3)
    assert not compared(nearly, rtol=1e-5)


def test_a_module_that_refuses_float64():
    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            return self.inner(x) @ torch.eye(3, dtype=torch.float32)

    module = Stubborn()
    params = port(module.inner)
    report = compared(params=params, module=module, exact=True)
    assert report, str(report)
    (finding,) = (f for f in report.findings if f.kind == "float64")
    assert "float64" in finding.text
    assert all(r.exact_error is None for r in report.parameters)
    wrong = compared(lambda p, x, y: 2 * loss(p, x, y), params, module=module)
    assert not wrong
    assert wrong.causes[0].kind == "factor"
    assert all(p.dtype == torch.float32 for p in module.parameters())


# Steps


def test_steps_by_default():
    report = compared(steps=4)
    assert report
    trajectory = report.trajectory
    assert trajectory.ok
    assert trajectory.steps == 4
    assert trajectory.first_step is None
    assert set(trajectory.losses) == {"jaxgrad.sgd_update", "optax", "torch"}
    for losses in trajectory.losses.values():
        assert losses == pytest.approx(trajectory.losses["torch"], rel=1e-5)
    assert trajectory.losses["torch"][0] == pytest.approx(report.loss.torch, rel=1e-6)


def adamw(decay):
    return lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=decay)


def test_steps_with_adamw():
    ours = optax.adamw(1e-2, weight_decay=1e-2)
    right = compared(steps=5, optimizer=ours, torch_optimizer=adamw(1e-2))
    assert right
    wrong = compared(steps=5, optimizer=ours, torch_optimizer=adamw(0.1))
    assert not wrong
    assert wrong.trajectory.first_step == 1
    assert wrong.causes[0].kind == "weight_decay"
    assert all(r.verdict in ("agrees", "rounding") for r in wrong.parameters)
    assert "step 1" in str(wrong)


@pytest.mark.bad_input
def test_steps_that_can_not_be():
    with pytest.raises(ValueError, match="-1"):
        compared(steps=-1)
    with pytest.raises(ValueError, match="torch_optimizer isn't"):
        compared(steps=1, optimizer=optax.sgd(0.1))
    with pytest.raises(ValueError, match="optimizer isn't"):
        compared(steps=1, torch_optimizer=adamw(0.1))
    with pytest.raises(TypeError, match="optax"):
        compared(steps=1, optimizer=0.1, torch_optimizer=adamw(0.1))


# The module is left as it was


def test_the_module_is_left_alone():
    module = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    module[1].train()
    module[2].eval()
    module[2].weight.requires_grad_(False)
    module[0].weight.grad = torch.full_like(module[0].weight, 3.0)
    before = {name: x.clone() for name, x in module.state_dict().items()}
    flags = [m.training for m in module.modules()]
    places = [(id(p), p.data_ptr(), p.requires_grad) for p in module.parameters()]
    buffers = [(id(b), b.data_ptr()) for b in module.buffers()]
    random = torch.get_rng_state()

    def normed(p, x, y):
        h = x @ p[0]["w"] + p[0]["b"]
        h = (h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-5) * p[2] + p[3]
        return jnp.mean((h @ p[1]["w"] + p[1]["b"] - y) ** 2)

    arrays = [jnp.asarray(p.detach().numpy()) for p in module[1].parameters()]
    report = compared(normed, [*port(module), *arrays], module=module, steps=2)
    assert report.forward
    assert report.causes[0].kind == "missing_gradient"
    for name, x in module.state_dict().items():
        assert torch.equal(x, before[name]), name
    assert [m.training for m in module.modules()] == flags
    assert [
        (id(p), p.data_ptr(), p.requires_grad) for p in module.parameters()
    ] == places
    assert [(id(b), b.data_ptr()) for b in module.buffers()] == buffers
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(module[0].weight.grad, torch.full((6, 5), 3.0))
    assert module[2].bias.grad is None
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("run", [0, 1])
def test_the_module_is_left_alone_if_torch_loss_raises(run):
    module = network()
    module.train()
    module[0].bias.requires_grad_(False)
    module[0].weight.grad = torch.ones(6, 5)
    before = {name: x.clone() for name, x in module.state_dict().items()}
    calls = []

    def failing(module, x, y):
        calls.append(x.dtype)
        with torch.no_grad():
            module[0].weight.mul_(2)
        torch.rand(3)
        if len(calls) > run:
            raise RuntimeError("on purpose")
        return torch_loss(module, x, y)

    random = torch.get_rng_state()
    # If it raises in float64 alone, the comparison goes on without.
    with contextlib.suppress(RuntimeError):
        compared(module=module, torch_loss=failing, params=port(network()), exact=True)
    assert len(calls) > run
    for name, x in module.state_dict().items():
        assert x.dtype == torch.float32
        assert torch.equal(x, before[name]), name
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(module[0].weight.grad, torch.ones(6, 5))
    assert not module[0].bias.requires_grad
    assert all(m.training for m in module.modules())
    assert not module[0]._forward_hooks
    assert torch.get_default_dtype() == torch.float32


# The report


REPORTS = {
    "right": dict,
    "steps": lambda: {"steps": 20},
    "exact": lambda: {"exact": True},
    "wrong": lambda: {"loss": lambda p, x, y: jnp.mean((apply(p, x) + y) ** 2)},
    "values": lambda: {
        "params": changed(port(network()), 0, "w", lambda w: w.at[0, 0].set(jnp.nan))
    },
    "infinite": lambda: {"loss": lambda p, x, y: loss(p, x, y) / 0.0},
    "unmatched": lambda: {
        "params": [*port(network()), draw(5, 40, 3)],
        "loss": lambda p, x, y: loss(p[:2], x, y),
    },
    "optimizer": lambda: {
        "steps": 3,
        "optimizer": optax.sgd(0.2),
        "torch_optimizer": lambda ps: torch.optim.SGD(ps, lr=0.1),
    },
}


@pytest.mark.parametrize("name", REPORTS)
def test_habits_of_a_report(name):
    report = compared(**REPORTS[name]())
    right = name in ("right", "steps", "exact", "unmatched")
    assert bool(report) is report.ok is right
    text = str(report)
    assert text == repr(report)
    assert max(map(len, text.splitlines())) <= 80
    first = text.splitlines()[0]
    assert first.startswith("JAX and PyTorch agree to") == right
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["ok"] is right
    assert {"loss", "forward", "parameters", "unmatched", "causes"} <= data.keys()
    assert len(data["parameters"]) == len(report.parameters)
    html = report._repr_html_()
    assert "<table" in html
    assert "0.weight" in html
    with pytest.raises(AttributeError):
        report.ok = True
    assert all(cause.text.strip() for cause in report.causes)


def test_many_parameters_fit_a_screen():
    parts = [nn.Linear(5, 5) for _ in range(40)]
    module = nn.Sequential(*parts)
    params = [
        (jnp.asarray(m.weight.detach().numpy()), jnp.asarray(m.bias.detach().numpy()))
        for m in parts
    ]

    def deep(params, x):
        for w, b in params:
            x = x @ w.T + b
        return 2 * jnp.mean(x**2)

    report = compared(
        deep, params, (X,), module, lambda module, x: (module(x) ** 2).mean()
    )
    assert len(report.parameters) == 80
    assert not report
    text = str(report)
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) < 80


def test_no_warnings():
    with warnings.catch_warnings(action="error"):
        str(compared(steps=2, exact=True))
        str(compared(lambda p, x, y: loss(p, x, y) * jnp.nan))


def test_the_same_again():
    wrong = {"loss": lambda p, x, y: jnp.mean((jnp.sin(apply(p, x)) - y) ** 2)}
    assert str(compared(**wrong)) == str(compared(**wrong))


# Bad input


@pytest.mark.bad_input
def test_without_torch(monkeypatch):
    module = network()
    params = port(module)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxgrad\[torch\]'") as error:
        compare_with_torch(loss, params, X, Y, module=module, torch_loss=torch_loss)
    assert "\n" not in str(error.value)


@pytest.mark.bad_input
def test_an_old_torch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "1.13.1+cu117")
    with pytest.raises(ImportError, match=r"1\.13\.1.*2\.4"):
        compared()


@pytest.mark.bad_input
@pytest.mark.parametrize("version", ["2.4.0", "2.10.0a0+git1234", "3.0"])
def test_versions_that_will_do(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    assert compared()


class Holder(nn.Module):
    """One parameter, of any kind."""

    def __init__(self, value, requires_grad=True):
        super().__init__()
        self.value = nn.Parameter(value, requires_grad=requires_grad)

    def forward(self, x):
        return (x * self.value).sum()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("module", "error", "match"),
    [
        (lambda: network().to("meta"), ValueError, r"`0\.weight` is on meta.*cpu\(\)"),
        (
            lambda: Holder(torch.ones(3, dtype=torch.complex64)),
            TypeError,
            "`value`.*complex64",
        ),
        (
            lambda: Holder(torch.ones(3, dtype=torch.int32), requires_grad=False),
            TypeError,
            "`value`.*int32",
        ),
        (lambda: nn.Sequential(nn.ReLU()), ValueError, "no parameters"),
        (
            lambda: nn.Sequential(nn.LazyLinear(3)),
            ValueError,
            r"`0\.weight` isn't initialized",
        ),
        (lambda: network().state_dict(), TypeError, r"torch\.nn\.Module"),
        (lambda: nn.Linear, TypeError, r"torch\.nn\.Module"),
        (lambda: None, TypeError, r"torch\.nn\.Module"),
    ],
    ids=["meta", "complex", "integer", "empty", "lazy", "dict", "class", "none"],
)
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_modules_that_can_not_be_compared(module, error, match):
    with pytest.raises(error, match=match):
        compare_with_torch(
            loss, port(network()), X, Y, module=module(), torch_loss=torch_loss
        )


@pytest.mark.bad_input
def test_shapes_that_match_nothing():
    params = {"w": draw(8, 4, 7), "b": draw(9, 11)}

    def other(p, x, y):
        return jnp.sum(p["w"] ** 2) + jnp.sum(p["b"] ** 2)

    with pytest.raises(ValueError, match=r"(?s)No JAX leaf fits.*\(4, 7\).*mapping="):
        compared(other, params)


def calls_backward(module, x, y):
    loss = torch_loss(module, x, y)
    loss.backward()
    return loss


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("torchs", "error", "match"),
    [
        (lambda m, x, y: torch_loss(m, x, y).detach(), ValueError, r"\.detach\(\)"),
        (lambda m, x, y: (m(x) - y) ** 2, ValueError, r"shape \(8, 3\)"),
        (lambda m, x, y: torch_loss(m, x, y)[None], ValueError, r"shape \(1,\)"),
        (lambda m, x, y: torch_loss(m, x, y).item(), TypeError, r"loss\.item\(\)"),
        (lambda m, x, y: None, TypeError, "return"),
        (calls_backward, ValueError, r"calls backward\(\)"),
        (lambda m, x, y: torch_loss(m, x, y) * 1j, TypeError, "complex"),
        (lambda m, x, y: m(x).argmax(), TypeError, "int64"),
        (lambda m, x: torch_loss(m, x, x), TypeError, "argument"),
    ],
    ids=[
        "detached",
        "array",
        "one_entry",
        "float",
        "none",
        "backward",
        "complex",
        "integer",
        "arguments",
    ],
)
@pytest.mark.parametrize("grad", [False, True])
def test_torch_losses_that_can_not_be_compared(torchs, error, match, grad):
    module = network()
    if grad:  # the user's own, which may have been there
        for p in module.parameters():
            p.grad = torch.ones_like(p)
    with pytest.raises(error, match=match):
        compared(torch_loss=torchs, module=module)
    for p in module.parameters():
        assert (p.grad is not None) == grad
        assert not grad or torch.equal(p.grad, torch.ones_like(p))


@pytest.mark.bad_input
def test_losses_of_jax_that_can_not_be_compared():
    with pytest.raises((TypeError, ValueError), match=r"\(8, 3\)"):
        compared(lambda p, x, y: (apply(p, x) - y) ** 2)
    with pytest.raises(TypeError, match="tuple"):
        compared(lambda p, x, y: (loss(p, x, y), 1))
    with pytest.raises(TypeError, match="complex"):
        compared(
            lambda p, x, y: loss(port(network()), x, y),
            [{"w": jnp.ones((5, 3), jnp.complex64)}],
        )


def test_the_report_is_made_of_public_types():
    report = compared(lambda *operands: 2 * loss(*operands), steps=2)
    assert isinstance(report, jaxgrad.TorchComparison)
    assert isinstance(report.first_difference, jaxgrad.FirstDifference)
    assert isinstance(report.trajectory, jaxgrad.Trajectory)
    assert all(isinstance(out, jaxgrad.ModuleOutput) for out in report.forward)
    assert len(report.forward) == len(list(network().modules()))
    parameters = report.parameters
    assert all(isinstance(p, jaxgrad.ParameterComparison) for p in parameters)
    assert len(parameters) == len(list(network().parameters()))
