"""Convolutional networks, ported: Flax NNX, Equinox, plain JAX."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F
from flax import nnx
from jax import lax, nn
from torch import nn as tnn

from ports.case import Port, Problem, arrays_of, draw, labels, seeded


def tensor(array):
    return torch.tensor(np.asarray(array))


def channels_first(images):
    """The same images for PyTorch."""
    return tensor(images).permute(0, 3, 1, 2).contiguous()


# A small ResNet: batch norm in eval mode against Flax NNX, channels last


class Residual(tnn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        conv = partial(tnn.Conv2d, bias=False)
        self.conv1 = conv(inputs, outputs, 3, stride=stride, padding=1)
        self.conv2 = conv(outputs, outputs, 3, padding=1)
        self.bn1, self.bn2 = tnn.BatchNorm2d(outputs), tnn.BatchNorm2d(outputs)
        self.down = conv(inputs, outputs, 1, stride=stride)

    def forward(self, x):
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.down(x) + self.bn2(self.conv2(h)))


class ResNet(tnn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = tnn.Sequential(Residual(3, 6, 1), Residual(6, 10, 2))
        self.fc = tnn.Linear(10, 4)

    def forward(self, x):
        return self.fc(self.blocks(x).mean((2, 3)))


class NnxResidual(nnx.Module):
    def __init__(self, inputs, outputs, stride, mistake, rngs):
        conv = partial(nnx.Conv, use_bias=False, rngs=rngs)
        padding = "SAME" if mistake == "same" else 1
        eps = 1e-3 if mistake == "eps" else 1e-5
        norm = partial(nnx.BatchNorm, use_running_average=True, epsilon=eps, rngs=rngs)
        self.conv1 = conv(inputs, outputs, (3, 3), strides=stride, padding=padding)
        self.conv2 = conv(outputs, outputs, (3, 3), padding=padding)
        self.bn1, self.bn2 = norm(outputs), norm(outputs)
        self.down = conv(inputs, outputs, (1, 1), strides=stride)

    def __call__(self, x):
        h = nnx.relu(self.bn1(self.conv1(x)))
        return nnx.relu(self.down(x) + self.bn2(self.conv2(h)))


class NnxResNet(nnx.Module):
    def __init__(self, mistake, rngs):
        self.pool = jnp.sum if mistake == "sum_pool" else jnp.mean
        self.block1 = NnxResidual(3, 6, 1, mistake, rngs)
        self.block2 = NnxResidual(6, 10, 2, mistake, rngs)
        self.fc = nnx.Linear(10, 4, rngs=rngs)

    def __call__(self, x):
        return self.fc(self.pool(self.block2(self.block1(x)), axis=(1, 2)))


def resnet_model(arrays, buffers=None, mistake=""):
    model = NnxResNet(mistake, nnx.Rngs(0))
    axes = (3, 2, 1, 0) if mistake == "height_and_width" else (2, 3, 1, 0)
    for k, block in enumerate((model.block1, model.block2)):
        for name in ("conv1", "conv2", "down"):
            kernel = arrays[f"blocks.{k}.{name}.weight"].transpose(axes)
            getattr(block, name).kernel[...] = kernel
        for name in ("bn1", "bn2"):
            norm = getattr(block, name)
            norm.scale[...] = arrays[f"blocks.{k}.{name}.weight"]
            norm.bias[...] = arrays[f"blocks.{k}.{name}.bias"]
            if buffers:
                norm.mean[...] = buffers[f"blocks.{k}.{name}.running_mean"].numpy()
                norm.var[...] = buffers[f"blocks.{k}.{name}.running_var"].numpy()
    model.fc.kernel[...] = arrays["fc.weight"].T
    model.fc.bias[...] = arrays["fc.bias"]
    return model


def resnet(mistake=""):
    module = seeded(5, ResNet)
    with torch.no_grad():  # so that the running statistics are of some data
        for seed in range(20):
            module(tensor(draw(seed, 9, 3, 8, 8)) + 0.5)
    module.train(mistake == "train_mode")
    model = resnet_model(arrays_of(module), dict(module.named_buffers()), mistake)
    graph, params, statistics = nnx.split(model, nnx.Param, ...)

    def loss(params, statistics, x, y):
        logits = nnx.merge(graph, params, statistics)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def torch_loss(module, x, y):
        return F.cross_entropy(module(x), y)

    x, y = draw(6, 5, 8, 8, 3), labels(7, 5, 4)
    options = {"torch_args": (channels_first(x), tensor(y).long())}
    return Problem(loss, params, (statistics, x, y), module, torch_loss, options)


# Another, with group norm, against Equinox


class GroupNet(tnn.Module):
    def __init__(self):
        super().__init__()
        self.stem = tnn.Conv2d(2, 6, 3, padding=1)
        self.norm1, self.norm2 = tnn.GroupNorm(3, 6), tnn.GroupNorm(3, 6)
        self.conv1 = tnn.Conv2d(6, 6, 3, padding=1)
        self.conv2 = tnn.Conv2d(6, 6, 3, padding=1)
        self.fc = tnn.Linear(6, 4)

    def forward(self, x, detach=False):
        x = self.stem(x)
        h = self.conv1(F.relu(self.norm1(x)))
        h = self.conv2(F.relu(self.norm2(h)))
        h = h + (x.detach() if detach else x)
        return self.fc(F.adaptive_avg_pool2d(h, 1).flatten(1))


class EqxNet(eqx.Module):
    stem: eqx.nn.Conv2d
    convs: list
    norms: list
    fc: eqx.nn.Linear
    activation: Callable = nn.relu

    def __call__(self, x):
        x = h = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            h = conv(self.activation(norm(h)))
        return self.fc((x + h).mean(axis=(1, 2)))


def group_net_params(arrays):
    """Equinox has the bias of a convolution as (channels, 1, 1)."""
    keys = jax.random.split(jax.random.key(0), 4)
    model = EqxNet(
        eqx.nn.Conv2d(2, 6, 3, padding=1, key=keys[0]),
        [eqx.nn.Conv2d(6, 6, 3, padding=1, key=key) for key in keys[1:3]],
        [eqx.nn.GroupNorm(3, 6) for _ in range(2)],
        eqx.nn.Linear(6, 4, key=keys[3]),
    )
    names = ("stem", "conv1", "conv2", "norm1", "norm2", "fc")

    def leaves(model):
        layers = (model.stem, *model.convs, *model.norms, model.fc)
        return [leaf for layer in layers for leaf in (layer.weight, layer.bias)]

    new = [arrays[f"{name}.{part}"] for name in names for part in ("weight", "bias")]
    shapes = [leaf.shape for leaf in leaves(model)]
    fitted = [a.reshape(shape) for a, shape in zip(new, shapes, strict=True)]
    return eqx.tree_at(leaves, model, fitted)


def group_net(mistake=""):
    module = seeded(8, GroupNet)
    model = group_net_params(arrays_of(module))
    if mistake == "convs":
        model = eqx.tree_at(lambda m: m.convs, model, model.convs[::-1])
    if mistake == "silu":
        model = eqx.tree_at(lambda m: m.activation, model, nn.silu)
    if mistake == "bias":
        zero = jnp.zeros_like(model.stem.bias)
        model = eqx.tree_at(lambda m: m.stem.bias, model, zero)

    def loss(model, x, y):
        log_p = nn.log_softmax(jax.vmap(model)(x))
        return -jnp.mean(log_p[jnp.arange(len(y)), y])

    def torch_loss(module, x, y):
        return F.cross_entropy(module(x, detach=mistake == "detached"), y)

    args = (draw(9, 5, 2, 7, 7), labels(10, 5, 4))
    return Problem(loss, model, args, module, torch_loss)


# An autoencoder, in plain JAX, channels last


class Autoencoder(tnn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = tnn.Sequential(
            tnn.Conv2d(2, 4, 3, stride=2, padding=1),
            tnn.ReLU(),
            tnn.Conv2d(4, 6, 3, stride=2, padding=1),
        )
        self.decoder = tnn.Sequential(
            tnn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1),
            tnn.ReLU(),
            tnn.ConvTranspose2d(4, 2, 4, stride=2, padding=1),
            tnn.Sigmoid(),
        )

    def forward(self, x):
        return self.decoder(self.encoder(x))


def autoencoder_params(arrays, flip=True):
    """PyTorch's transposed kernels are (in, out, h, w), and run backwards."""
    params = {}
    for name in ("encoder.0", "encoder.2", "decoder.0", "decoder.2"):
        kernel = arrays[f"{name}.weight"]
        if name.startswith("encoder"):
            kernel = kernel.transpose(2, 3, 1, 0)
        else:
            kernel = kernel.transpose(2, 3, 0, 1)
            kernel = kernel[::-1, ::-1] if flip else kernel
        params[name] = {"kernel": kernel, "bias": arrays[f"{name}.bias"]}
    return params


def autoencoder(mistake=""):
    module = seeded(11, Autoencoder)
    params = autoencoder_params(arrays_of(module), flip=mistake != "unflipped")

    def conv(layer, x):
        return layer["bias"] + lax.conv_general_dilated(
            x,
            layer["kernel"],
            (2, 2),
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def transposed(layer, x, padding):
        return layer["bias"] + lax.conv_transpose(
            x,
            layer["kernel"],
            (2, 2),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def loss(params, x):
        h = nn.relu(conv(params["encoder.0"], x))
        h = conv(params["encoder.2"], h)
        padding = "SAME" if mistake == "same" else ((1, 2), (1, 2))
        h = nn.relu(transposed(params["decoder.0"], h, padding))
        h = transposed(params["decoder.2"], h, "SAME")
        out = jnp.tanh(h) if mistake == "tanh" else nn.sigmoid(h)
        if mistake == "batch_mean":
            return jnp.mean(jnp.sum((out - x) ** 2, axis=(1, 2, 3)))
        return jnp.mean((out - x) ** 2)

    def torch_loss(module, x):
        code = module.encoder(x)
        if mistake == "detached":
            code = code.detach()
        return F.mse_loss(module.decoder(code), x)

    x = draw(12, 5, 8, 8, 2)
    options = {"torch_args": (channels_first(x),)}
    return Problem(loss, params, (x,), module, torch_loss, options)


PORTS: tuple[Port, ...] = (
    Port("resnet", resnet),
    Port("resnet-eps", partial(resnet, "eps"), "epsilon", ("blocks.0.bn1",)),
    Port(
        "resnet-train_mode",
        partial(resnet, "train_mode"),
        "train_mode",
        ("blocks.0.bn1",),
    ),
    Port("resnet-same", partial(resnet, "same"), "padding", ("blocks.1.conv1",)),
    Port("resnet-sum_pool", partial(resnet, "sum_pool"), "factor|reduction", ("fc",)),
    Port(
        "resnet-height_and_width",
        partial(resnet, "height_and_width"),
        "transposed|permuted",
        ("blocks.0.conv1", "blocks.0.conv1.weight"),
    ),
    Port("group_net", group_net),
    Port(
        "group_net-convs_swapped",
        partial(group_net, "convs"),
        "swapped",
        ("conv1", "conv1.weight", "conv2.weight", "convs[0].weight"),
    ),
    Port(
        "group_net-silu_for_relu",
        partial(group_net, "silu"),
        "activation",
        ("conv1",),
    ),
    Port(
        "group_net-bias_not_copied",
        partial(group_net, "bias"),
        "values|bias",
        ("stem", "stem.bias"),
    ),
    Port(
        "group_net-detached",
        partial(group_net, "detached"),
        "missing_gradient",
        ("stem.weight", "stem.bias"),
    ),
    Port("autoencoder", autoencoder),
    Port(
        "autoencoder-unflipped",
        partial(autoencoder, "unflipped"),
        "permuted|transposed",
        ("decoder.0", "decoder.0.weight"),
    ),
    Port("autoencoder-same", partial(autoencoder, "same"), "padding", ("decoder.0",)),
    Port(
        "autoencoder-tanh_for_sigmoid",
        partial(autoencoder, "tanh"),
        "activation",
        ("decoder.3",),
    ),
    Port("autoencoder-batch_mean", partial(autoencoder, "batch_mean"), "reduction"),
    Port(
        "autoencoder-detached",
        partial(autoencoder, "detached"),
        "missing_gradient",
        ("encoder.0.weight", "encoder.2.weight", "encoder.2.bias"),
    ),
)
