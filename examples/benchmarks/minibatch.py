"""Minibatch training by `train`, and by hand in JAX and PyTorch, of the same models."""

import functools
import logging
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import gpt
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F
from check_speed import new_loss, problem
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import jaxgrad

RATE, KEY = 1e-3, jax.random.key(0)
OPTIMIZER = optax.adam(RATE)


class Task(NamedTuple):
    """A model in JAX and the same in PyTorch, its rows, and how many make a batch."""

    loss: Callable
    params: object
    arrays: tuple
    batch: int
    module: nn.Module
    torch_loss: Callable

    @property
    def batches(self):
        """How many an epoch has; all are whole."""
        return len(self.arrays[0]) // self.batch

    @property
    def size(self):
        """How many parameters there are."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.params))


def mlp(widths, batch, batches):
    """A classifier: relu between layers, cross entropy."""
    params, x, labels = problem(widths, batch * batches)
    layers = []
    for weight, bias in params:
        layers += [nn.Linear(*weight.shape), nn.ReLU()]
        _load(layers[-2], (weight.T, bias))
    module = nn.Sequential(*layers[:-1])

    def torch_loss(module, x, labels):
        return F.cross_entropy(module(x), labels)

    return Task(new_loss(), params, (x, labels), batch, module, torch_loss)


def small_gpt(sizes, batches):
    """The GPT of gpt.py, and its twin."""
    params, tokens = gpt.problem(sizes._replace(batch=sizes.batch * batches))
    module = _GPT(sizes)
    _load(module, _in_torch_order(params))

    def torch_loss(module, tokens):
        log_odds = module(tokens[:, :-1])
        return F.cross_entropy(log_odds.flatten(0, 1), tokens[:, 1:].flatten())

    loss = gpt.new_loss(sizes)
    return Task(loss, params, (tokens,), sizes.batch, module, torch_loss)


class _Block(nn.Module):
    """Attention and a network of two layers, each beside a path that goes around."""

    def __init__(self, sizes):
        super().__init__()
        width = sizes.width
        self.heads = sizes.heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * width, width),
        )

    def forward(self, x):
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class _GPT(nn.Module):
    """The scores of the next token, at each place."""

    def __init__(self, sizes):
        super().__init__()
        self.tokens = nn.Embedding(sizes.vocabulary, sizes.width)
        self.places = nn.Parameter(torch.empty(sizes.sequence, sizes.width))
        self.blocks = nn.Sequential(*(_Block(sizes) for _ in range(sizes.blocks)))
        self.norm = nn.LayerNorm(sizes.width)
        self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)

    def forward(self, tokens):
        x = self.blocks(self.tokens(tokens) + self.places)
        return self.head(self.norm(x))


def _in_torch_order(params):
    """gpt.py's parameters as `_GPT.parameters()` has them."""
    yield params["places"]  # a module's own come before those of what is in it
    yield params["tokens"]
    for block in params["blocks"]:
        yield from block["norm1"].values()
        yield from (block["attention"][name].T for name in ("qkv", "out"))
        yield from block["norm2"].values()
        for layer in (block["mlp"]["in"], block["mlp"]["out"]):
            yield from (layer["w"].T, layer["b"])
    yield from params["norm"].values()
    yield params["head"].T


@torch.no_grad()
def _load(module, arrays):
    for parameter, array in zip(module.parameters(), arrays, strict=True):
        parameter.copy_(torch.from_numpy(np.array(array)))


def loss_of(task, result):
    """The loss of all rows after a run."""
    if result is task.module:
        with torch.no_grad():
            return float(task.torch_loss(result, *_tensors(task)))
    return float(jax.jit(task.loss)(result, *task.arrays))


def _tensors(task):
    tensors = [torch.from_numpy(np.array(array)) for array in task.arrays]
    return [t if t.is_floating_point() else t.long() for t in tensors]


# Each of these returns a function that trains for some epochs, from the start, and
# returns the parameters, or PyTorch's module, which is the same each time.


def by_train(task, epochs, **options):
    """As a user of jaxgrad has it."""
    optimizer = optax.adam(RATE)
    return lambda: (
        jaxgrad.train(
            task.loss,
            task.params,
            *task.arrays,
            steps=epochs * task.batches,
            optimizer=optimizer,
            batch_size=task.batch,
            progress=False,
            **{"shuffle_key": KEY, **options},
        ).params
    )


def _jax_step(task):
    """A function of the carried state, the data, and the rows of this step."""

    def step(carry, arrays, rows):
        params, state = carry
        batch = [array[rows] for array in arrays]
        value, gradient = jax.value_and_grad(task.loss)(params, *batch)
        updates, state = OPTIMIZER.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    return OPTIMIZER.init, step


def by_jitted_step(task, epochs):
    """A good JAX loop: Python calls a compiled step, which takes its own rows."""
    init, step = _jax_step(task)

    @functools.partial(jax.jit, donate_argnums=0)
    def compiled(carry, arrays, order, number):
        first = number * task.batch
        rows = jax.lax.dynamic_slice_in_dim(order, first, task.batch)
        return step(carry, arrays, rows)

    @jax.jit
    def shuffled(epoch):
        key = jax.random.fold_in(KEY, epoch)
        return jax.random.permutation(key, len(task.arrays[0]))

    def run():
        params = jax.tree.map(jnp.copy, task.params)  # the step overwrites its own
        carry, losses = (params, init(params)), []
        for epoch in range(epochs):
            order = shuffled(epoch)
            for number in range(task.batches):
                carry, value = compiled(carry, task.arrays, order, number)
                losses.append(value)
        return carry[0]

    return run


def by_scan(task, epochs):
    """An epoch is one `lax.scan`: Python does nothing in between."""
    init, step = _jax_step(task)

    @jax.jit
    def epoch_of(carry, arrays, epoch):
        key = jax.random.fold_in(KEY, epoch)
        order = jax.random.permutation(key, len(arrays[0]))
        batches = order.reshape(task.batches, task.batch)
        return jax.lax.scan(lambda c, rows: step(c, arrays, rows), carry, batches)

    def run():
        carry, losses = (task.params, init(task.params)), []
        for epoch in range(epochs):
            carry, values = epoch_of(carry, task.arrays, epoch)
            losses.append(values)
        return carry[0]

    return run


class Indexed:
    """Batches taken by indexing whole tensors: what a DataLoader's default doesn't."""

    def __init__(self, tensors, batch):
        self.tensors, self.batch = tensors, batch

    def __iter__(self):
        for rows in torch.randperm(len(self.tensors[0])).split(self.batch):
            yield [tensor[rows] for tensor in self.tensors]


def by_torch(task, epochs, loader=None, compiled=False):
    """PyTorch's usual loop; compiled: the loss with its gradient, and Adam's update."""
    tensors = _tensors(task)
    if loader is None:
        data = TensorDataset(*tensors)
        batches = DataLoader(data, batch_size=task.batch, shuffle=True)
    else:
        batches = loader(tensors, task.batch)
    module = task.module
    start = {name: value.clone() for name, value in module.state_dict().items()}
    compile_ = torch.compile if compiled else lambda function: function
    loss = compile_(lambda *batch: task.torch_loss(module, *batch))
    optimizer = torch.optim.Adam(module.parameters(), RATE)
    fresh = optimizer.state_dict()
    update = compile_(optimizer.step)

    def run():
        module.load_state_dict(start)
        optimizer.load_state_dict(fresh)
        losses = []
        for _ in range(epochs):
            for batch in batches:
                optimizer.zero_grad()
                value = loss(*batch)
                value.backward()
                update()
                losses.append(value.detach())
        return module

    return run


def compiled_torch(task, epochs):
    """`by_torch`, compiled, and a note: why it can't be, if so."""
    torch.compiler.reset()  # an earlier task's; it keeps only a few
    torch._logging.set_logs(all=logging.ERROR)  # one line on a profiler it leaves out
    try:
        with warnings.catch_warnings(action="ignore"):  # PyTorch's own, compiling
            run = by_torch(task, epochs, compiled=True)
            run()
    except Exception as error:  # no C++ compiler, or a Python it doesn't know yet
        return None, f"torch.compile failed: {type(error).__name__}."
    return run, ""
