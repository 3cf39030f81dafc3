"""What an optimizer does, as numbers: the rules that PyTorch and optax have, predicted.

A rule says how far each entry moves, given where it stands and the gradients so far.
But for norms over all entries, every rule here treats each entry by itself, so that
some entries of each parameter are enough to tell one rule from another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Steps(NamedTuple):
    """What an optimizer was given and did, on some entries of each parameter.

    Attributes:
      names: the parameters, by PyTorch's names.
      first: the place of each parameter's first entry.
      before: (steps, entries) the entries before each step.
      gradients: (steps, entries) what the optimizer was given.
      moved: (steps, entries) what it added to the entries.
      norms: the 2-norm of each step's whole gradient, with the entries not shown here.
      noise: what rounding explains, as a share of a parameter's movement.
      epsilon: that of the dtype.
    """

    names: tuple[str, ...]
    first: Array
    before: Array
    gradients: Array
    moved: Array
    norms: Array
    noise: float
    epsilon: float

    @property
    def length(self) -> int:
        """How many steps there are."""
        return len(self.moved)

    def spread(self, values: Any) -> Array:
        """A value per parameter (the last axis), for each of its entries."""
        sizes = np.diff(np.append(self.first, self.moved.shape[1]))
        return np.repeat(np.asarray(values), sizes, axis=-1)

    def norm(self, entries: Array) -> Array:
        """(steps, parameters): the 2-norm of each parameter's entries."""
        squares = np.add.reduceat(np.square(entries), self.first, axis=-1)
        return np.asarray(np.sqrt(squares))

    def slack(self) -> Array:
        """(steps, parameters): what rounding explains of each movement."""
        stored = 4 * self.epsilon * self.norm(self.before)
        tiny = float(np.finfo(self.before.dtype).tiny)
        return np.asarray(self.noise * self.norm(self.moved) + stored + tiny)

    def cut(self, count: int) -> Steps:
        """The first few steps."""
        return self._replace(
            before=self.before[:count],
            gradients=self.gradients[:count],
            moved=self.moved[:count],
            norms=self.norms[:count],
        )


class Rule(NamedTuple):
    """An optimizer: numbers and flags, each for all entries or one per entry.

    The names are those of `torch.optim`, and what it doesn't have beside them.

    Attributes:
      algorithm: the class in `torch.optim`; `AdamW` is `Adam` with decoupled decay.
      lr: the learning rate; a row per step where it changes.
      decoupled: weight decay stands apart from the gradient.
      dampened_first: dampening begins with the first gradient.
      b1: the first of Adam's betas.
      b2: the second of them; RMSprop's alpha.
      eps_root: an epsilon inside the square root.
      eps_early: epsilon is added before the bias correction.
      amsgrad: 1 as PyTorch has it, 2 with the maximum taken after the bias correction.
      initial: what the accumulator of squares begins with.
      held: the entry doesn't move.
      accumulated: each gradient is the sum of all so far: they are never zeroed.
      every: one movement in so many steps, by the mean of their gradients.
      clip_norm: the norm over all parameters that the gradient is clipped to.
      clip_eps: what is added to that norm before dividing by it.
      clip_value: what each entry of the gradient is clipped to.
      groups: the options of each parameter, for a class that is run by PyTorch itself.
    """

    algorithm: str
    lr: Any
    weight_decay: Any = 0.0
    decoupled: Any = False
    momentum: Any = 0.0
    dampening: Any = 0.0
    dampened_first: Any = False
    nesterov: Any = False
    b1: Any = 0.9
    b2: Any = 0.999
    eps: Any = 1e-8
    eps_root: Any = 0.0
    eps_early: Any = False
    bias_correction: Any = True
    amsgrad: Any = 0
    centered: Any = False
    initial: Any = 0.0
    lr_decay: Any = 0.0
    maximize: Any = False
    held: Any = False
    accumulated: bool = False
    every: int = 1
    clip_norm: float = np.inf
    clip_eps: float = 0.0
    clip_value: float = np.inf
    groups: tuple[Mapping[str, Any], ...] = ()


def rule_of(
    optimizer: Any,
    groups: Mapping[str, Mapping[str, Any]],
    rates: Sequence[Mapping[str, float]],
    steps: Steps,
) -> Rule:
    """The rule of a PyTorch optimizer, as its options tell it.

    Args:
      optimizer: the instance.
      groups: the options of the group that each parameter is in, by name.
      rates: per step, the learning rate of each parameter, by name.
      steps: says which entries the rule is for.
    """
    known = [cls.__name__ for cls in type(optimizer).__mro__]
    algorithm = next((name for name in known if name in _CLASSES), known[0])
    held = [name not in groups for name in steps.names]
    some = optimizer.param_groups[0]
    in_order = [groups.get(name, some) for name in steps.names]
    lr = [[row.get(name, some["lr"]) for name in steps.names] for row in rates]

    def read(group: Mapping[str, Any]) -> dict[str, float]:
        b1, b2 = group.get("betas", (0.0, group.get("alpha", 0.999)))
        options = {"b1": b1, "b2": b2} | {
            option: group[option] for option in Rule._fields if option in group
        }
        options["initial"] = group.get("initial_accumulator_value", 0.0)
        options["decoupled"] = "AdamW" in known or group.get("decoupled_weight_decay")
        return {
            option: float(value or 0)
            for option, value in options.items()
            if option != "lr"
        }

    options = [read(group) for group in in_order]
    # An option that some classes lack, such as Adam's epsilon, has Rule's default.
    per_entry: dict[str, Any] = {
        option: steps.spread([each[option] for each in options])
        for option in options[0]
    }
    return Rule(
        algorithm=_CLASSES.get(algorithm, algorithm),
        lr=steps.spread(np.asarray(lr, float)),
        held=steps.spread(held),
        bias_correction=algorithm != "RMSprop",
        groups=tuple(
            {k: v for k, v in group.items() if k in _TORCH_OPTIONS}
            for group in in_order
        ),
    )._replace(**per_entry)


# What predicts each class: a rule written here, or the class itself.
_CLASSES = {
    "AdamW": "Adam",
    **{name: name for name in ("SGD", "Adam", "RMSprop", "Adagrad")},
    **{name: name for name in ("NAdam", "RAdam", "Adamax", "Adadelta", "Rprop")},
}
# Of those classes that PyTorch runs itself.
_TORCH_OPTIONS = ("betas", "eps", "rho", "momentum_decay", "etas", "step_sizes")


@np.errstate(all="ignore")  # a wrong hypothesis may overflow
def movements(rule: Rule, steps: Steps) -> Array:
    """(steps, entries): how far the rule moves each entry, from where it stands."""
    gradients, before = steps.gradients, steps.before
    lr = np.broadcast_to(rule.lr, gradients.shape)
    if rule.every > steps.length:
        return np.zeros_like(gradients)
    if rule.every > 1:
        count = steps.length // rule.every * rule.every
        due = slice(rule.every - 1, count, rule.every)
        blocks = gradients[:count].reshape(-1, rule.every, gradients.shape[1])
        gradients, before, lr = blocks.mean(1), before[due], lr[due]
        norms = steps.norms[due]
    else:
        norms = steps.norms
    gradients = np.where(rule.maximize, -gradients, gradients)
    if rule.accumulated:
        gradients = np.cumsum(gradients, axis=0)
    if rule.clip_norm < np.inf:
        shares = np.minimum(1, rule.clip_norm / (norms + rule.clip_eps))
        gradients = gradients * shares[:, None]
    if rule.clip_value < np.inf:
        gradients = np.clip(gradients, -rule.clip_value, rule.clip_value)
    decay = rule.weight_decay * before
    gradients = gradients + np.where(rule.decoupled, 0, decay)
    direct = _DIRECTIONS.get(rule.algorithm)
    if direct is None:
        directions = _by_torch(rule, gradients, lr, steps)
    else:
        directions = direct(rule, gradients)
    moved = -lr * (directions + np.where(rule.decoupled, decay, 0))
    moved = np.where(rule.held, 0, moved)
    if rule.every > 1:
        spaced = np.zeros_like(steps.gradients)
        spaced[due] = moved
        return spaced
    return np.asarray(moved)


def _sgd(rule: Rule, gradients: Array) -> Array:
    kept = np.where(np.equal(rule.momentum, 0), 1, 1 - np.asarray(rule.dampening))
    buffer: Any = 0.0
    directions = []
    for t, g in enumerate(gradients):
        share = kept if t else np.where(rule.dampened_first, kept, 1)
        buffer = rule.momentum * buffer + share * g
        ahead = g + rule.momentum * buffer
        directions.append(np.where(rule.nesterov, ahead, buffer))
    return np.array(directions)


def _adam(rule: Rule, gradients: Array) -> Array:
    mean: Any = 0.0
    square: Any = 0.0
    most: Any = 0.0
    directions = []
    for t, g in enumerate(gradients, 1):
        mean = rule.b1 * mean + (1 - rule.b1) * g
        square = rule.b2 * square + (1 - rule.b2) * g * g
        c1 = np.where(rule.bias_correction, 1 - rule.b1**t, 1)
        c2 = np.where(rule.bias_correction, 1 - rule.b2**t, 1)
        seen = np.where(np.equal(rule.amsgrad, 2), square / c2, square)
        most = np.maximum(most, seen)
        variance = np.where(np.equal(rule.amsgrad, 1), most / c2, square / c2)
        variance = np.where(np.equal(rule.amsgrad, 2), most, variance)
        eps = np.where(rule.eps_early, rule.eps / np.sqrt(c2), rule.eps)
        ahead = rule.b1 * mean / (1 - rule.b1 ** (t + 1)) + (1 - rule.b1) * g / c1
        above = np.where(rule.nesterov, ahead, mean / c1)
        directions.append(_over(above, np.sqrt(variance + rule.eps_root) + eps))
    return np.array(directions)


def _rmsprop(rule: Rule, gradients: Array) -> Array:
    mean: Any = 0.0
    square = np.asarray(rule.initial, float)
    buffer: Any = 0.0
    directions = []
    for t, g in enumerate(gradients, 1):
        mean = rule.b2 * mean + (1 - rule.b2) * g
        square = rule.b2 * square + (1 - rule.b2) * g * g
        c = np.where(rule.bias_correction, 1 - rule.b2**t, 1)
        variance = square / c - np.where(rule.centered, np.square(mean / c), 0)
        root = np.sqrt(np.maximum(variance, 0) + rule.eps_root)
        scaled = _over(g, root + rule.eps)
        buffer = rule.momentum * buffer + scaled
        ahead = scaled + rule.momentum * buffer
        directions.append(np.where(rule.nesterov, ahead, buffer))
    return np.array(directions)


def _adagrad(rule: Rule, gradients: Array) -> Array:
    total = rule.initial + np.cumsum(np.square(gradients), axis=0)
    slower = 1 + rule.lr_decay * np.arange(len(gradients))[:, None]
    below = np.sqrt(total + rule.eps_root) + rule.eps
    return np.asarray(_over(gradients, below) / slower)


def _lion(rule: Rule, gradients: Array) -> Array:
    mean: Any = 0.0
    directions = []
    for g in gradients:
        directions.append(np.sign(rule.b1 * mean + (1 - rule.b1) * g))
        mean = rule.b2 * mean + (1 - rule.b2) * g
    return np.array(directions)


def _over(above: Array, below: Array) -> Array:
    """What has no gradient doesn't move, where epsilon is 0 too."""
    return np.asarray(above / np.where(np.equal(below, 0), 1, below))


_DIRECTIONS: dict[str, Callable[[Rule, Array], Array]] = {
    "SGD": _sgd,
    "Adam": _adam,
    "RMSprop": _rmsprop,
    "Adagrad": _adagrad,
    "Lion": _lion,
}

WRITTEN = frozenset(_DIRECTIONS)
"""The algorithms that are predicted here, and not by PyTorch itself."""


def _by_torch(rule: Rule, gradients: Array, lr: Array, steps: Steps) -> Array:
    """The directions of a class of `torch.optim`, which PyTorch itself works out."""
    import torch

    make = getattr(torch.optim, rule.algorithm, None)
    if make is None:
        return np.full_like(gradients, np.nan)
    cuts = steps.first[1:].tolist()
    tensors = [
        torch.from_numpy(np.zeros(len(part)))
        for part in np.split(np.zeros(gradients.shape[1]), cuts)
    ]
    shape = gradients.shape[1:]
    b1, b2, eps = (np.broadcast_to(v, shape) for v in (rule.b1, rule.b2, rule.eps))
    groups = []
    for place, tensor in enumerate(tensors):
        at = int(steps.first[place])
        group = dict(rule.groups[place]) if rule.groups else {}
        if "betas" in group:
            group["betas"] = (float(b1[at]), float(b2[at]))
        if "eps" in group:
            group["eps"] = float(eps[at])
        groups.append({"params": [tensor], "lr": float(lr[0][at]), **group})
    optimizer = make(groups)
    directions = []
    for g, rates in zip(gradients, lr, strict=True):
        parts = np.split(g, cuts)
        for at, tensor, part, group in zip(
            steps.first, tensors, parts, optimizer.param_groups, strict=True
        ):
            tensor.zero_()
            tensor.grad = torch.from_numpy(part.copy())
            group.update(lr=float(rates[at]), weight_decay=0.0)
        optimizer.step()
        moved = np.concatenate([tensor.numpy() for tensor in tensors])
        directions.append(-moved / np.where(rates == 0, 1, rates))
    return np.array(directions)
