"""The options that two optimizers may differ in: what to try, and how to say it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxgrad.causes import Cause
from jaxgrad.comparing.trajectories.rules import Array, Rule, Steps

Changes = dict[str, Any]


class Family(NamedTuple):
    """Changes to one option of a rule.

    Attributes:
      changes: those to try as they are, the commonest first.
      free: the option that takes any value, if it does.
    """

    changes: Sequence[Changes]
    free: str | None = None


class Who(NamedTuple):
    """What the two optimizers are called: whose steps these are, and whose rule."""

    ours: str = "JAX's optimizer"
    theirs: str = "PyTorch's"


_SMALL = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-10, 1e-15, 0.0)
_MEMORY = (0.9, 0.99, 0.95, 0.999, 0.98, 0.5, 0.8, 0.0)
_DECAYS = (0.0, 1e-4, 1e-2, 1e-3, 5e-4, 0.1, 1e-5)
_LEVELS = (1.0, 0.5, 0.1, 5.0, 10.0, 0.25, 2.0, 0.01, 0.001)
_NUMBERS: dict[str, dict[str, tuple[float, ...]]] = {
    "SGD": {"momentum": _MEMORY, "dampening": (0.0, *_MEMORY, 0.1)},
    "Adam": {
        "eps": _SMALL,
        "b1": _MEMORY,
        "b2": (0.999, 0.99, 0.95, 0.98, 0.9, 0.9999),
    },
    "RMSprop": {
        "b2": (0.9, 0.99, 0.95, 0.999),
        "eps": _SMALL,
        "momentum": _MEMORY,
        "initial": (0.0, 1.0),
    },
    "Adagrad": {
        "initial": (0.1, 0.0, 1.0),
        "eps": _SMALL,
        "lr_decay": (0.0, 0.1, 0.01),
    },
    "Lion": {"b1": _MEMORY, "b2": _MEMORY},
}
_FLAGS: dict[str, tuple[str, ...]] = {
    "SGD": ("nesterov",),
    "Adam": ("bias_correction", "nesterov", "eps_early"),
    "RMSprop": ("centered", "bias_correction", "nesterov"),
}
# What takes several options at once: the defaults of optax, and betas in use.
_BUNDLES: dict[str, list[Changes]] = {
    "Adam": [
        {"b1": b1, "b2": b2}
        for b1, b2 in ((0.9, 0.999), (0.9, 0.95), (0.9, 0.98), (0.5, 0.999))
    ],
    "RMSprop": [{"b2": 0.9, "eps": 0.0, "eps_root": 1e-8}],
    "Adagrad": [{"initial": 0.1, "eps": 0.0, "eps_root": 1e-7}],
}

ALGORITHMS = (
    Rule("SGD", 1.0),
    Rule("Adam", 1.0),
    Rule("RMSprop", 1.0, b2=0.99, bias_correction=False),
    Rule("RMSprop", 1.0, b2=0.9, eps=0.0, eps_root=1e-8, bias_correction=False),
    Rule("Adagrad", 1.0, eps=1e-10),
    Rule("Adagrad", 1.0, eps=0.0, eps_root=1e-7, initial=0.1),
    Rule("Lion", 1.0, b2=0.99),
    Rule("Adadelta", 1.0, eps=1e-6),
    Rule("Adamax", 1.0),
    Rule("NAdam", 1.0),
    Rule("RAdam", 1.0),
)
"""Rules that may stand in place of another, each with its usual options."""

WHOLE = ("accumulated", "every", "clip_norm", "clip_eps", "clip_value")
"""Options that hold for all parameters together."""


def families(rule: Rule, count: int) -> Iterator[Family]:
    """The changes to a rule that are worth trying, on so many steps."""
    algorithm = rule.algorithm
    for flag in (*_FLAGS.get(algorithm, ()), "held", "maximize"):
        yield Family([{flag: np.logical_not(getattr(rule, flag))}])
    if algorithm == "Adam":
        yield Family([{"amsgrad": kind} for kind in (0, 1, 2)])
    for decoupled in (np.logical_not(rule.decoupled), 0, 1):
        decays = [
            {"weight_decay": value, "decoupled": decoupled}
            for value in (rule.weight_decay, *_DECAYS)
        ]
        yield Family(decays, "weight_decay" if np.ndim(decoupled) == 0 else None)
    if algorithm == "SGD":
        shared: Changes = {"dampening": rule.momentum}
        yield Family([shared, {**shared, "dampened_first": True}])
    for name, values in _NUMBERS.get(algorithm, {}).items():
        yield Family([{name: value} for value in values], name)
    if "eps" in _NUMBERS.get(algorithm, {}):
        inside: list[Changes] = [
            {"eps": 0.0, "eps_root": e} for e in (rule.eps, *_SMALL[:-1])
        ]
        yield Family(inside, "eps_root")
        yield Family([{"eps_root": e} for e in _SMALL[:-1]], "eps_root")
    if algorithm not in _NUMBERS:  # those that PyTorch runs itself
        yield Family([{"eps": e} for e in _SMALL], "eps")
        yield Family([{"b1": b1} for b1 in _MEMORY[:-1]], "b1")
        yield Family([{"b2": b2} for b2 in _MEMORY[:-1]], "b2")
    for changes in _BUNDLES.get(algorithm, ()):
        yield Family([changes])
    yield Family([{"accumulated": True}])
    if count > 1:
        yield Family([{"every": every} for every in (2, 3, 4, 8) if every <= count])
    for name in ("clip_norm", "clip_value"):
        yield Family([{name: level} for level in _LEVELS], name)
    # As torch.nn.utils.clip_grad_norm_ has it.
    clipped = [{"clip_norm": level, "clip_eps": 1e-6} for level in _LEVELS]
    yield Family(clipped, "clip_norm")


def to_scale(name: str, value: float) -> float:
    """An option on the scale that it's fitted on: a logarithm."""
    if name in ("momentum", "dampening", "b1", "b2"):
        return float(np.log(max(1 - value, 1e-12)))
    return float(np.log(max(value, 1e-12)))


def from_scale(name: str, x: float) -> float:
    """The option's value, from that scale."""
    if name in ("momentum", "dampening", "b1", "b2"):
        return 1 - float(np.exp(min(x, np.log(2))))
    return float(np.exp(min(x, 100.0)))


_KINDS = {
    "dampened_first": "dampening",
    "b1": "betas",
    "b2": "betas",
    "eps": "optimizer_epsilon",
    "eps_root": "optimizer_epsilon",
    "eps_early": "optimizer_epsilon",
    "initial": "optimizer_epsilon",
    "centered": "bias_correction",
    "amsgrad": "bias_correction",
    "decoupled": "weight_decay",
    "lr_decay": "schedule",
    "maximize": "sign",
    "held": "missing_gradient",
    "every": "accumulated",
    "clip_norm": "clipping",
    "clip_value": "clipping",
}
_SAID: dict[str, Callable[[Any], str]] = {
    "held": lambda on: "stands still" if on else "moves",
    "maximize": lambda on: "climbs" if on else "descends",
    "nesterov": lambda on: "looks ahead (nesterov)" if on else "has no nesterov",
    "bias_correction": lambda on: (
        f"{'corrects' if on else 'does not correct'} its moments for their bias"
    ),
    "amsgrad": lambda way: (
        "has no amsgrad",
        "keeps the largest second moment (amsgrad)",
        "keeps the largest second moment after bias correction (amsgrad)",
    )[int(way)],
    "centered": lambda on: f"{'is' if on else 'is not'} centered",
    "eps_early": lambda on: (
        f"adds epsilon {'before' if on else 'after'} the bias correction"
    ),
    "dampened_first": lambda on: (
        f"dampens {'each gradient, the first too' if on else 'all but the first'}"
    ),
    "accumulated": lambda on: (
        "is given the sum of all gradients so far, which are never zeroed"
        if on
        else "is given each gradient by itself"
    ),
    "every": lambda n: (
        f"moves once in {n} steps, by the mean gradient" if n > 1 else "moves each step"
    ),
    "clip_norm": lambda c: (
        f"clips the gradient to a global norm of {c:.4g}"
        if c < np.inf
        else "does not clip"
    ),
    "clip_value": lambda c: (
        f"clips the gradient's entries to {c:.4g}" if c < np.inf else "does not clip"
    ),
    "momentum": lambda v: f"has momentum {v:.4g}",
    "dampening": lambda v: f"has dampening {v:.4g}",
    "b1": lambda v: f"has beta1 {v:.6g}",
    "b2": lambda v: f"has beta2 {v:.6g}",
    "initial": lambda v: f"has the initial accumulator {v:.4g}",
    "lr_decay": lambda v: f"has the learning rate decay {v:.4g}",
    "eps": lambda v: f"has epsilon {v:.4g}",
    "eps_root": lambda v: f"has {v:.4g} inside the square root",
}


def explain(base: Rule, rule: Rule, steps: Steps, who: Who) -> tuple[Cause, ...]:
    """Says in what a rule differs from another: one cause for each kind."""
    if rule.algorithm != base.algorithm:
        return (_algorithm(base, rule, steps, who),)
    changed: dict[str, list[str]] = {}
    differs = np.zeros(len(steps.names), bool)
    for name in Rule._fields[1:-1]:
        off = _off(base, rule, steps, name)
        if name not in ("lr", "clip_eps") and off.any():
            changed.setdefault(_KINDS.get(name, name), []).append(name)
            differs |= off
    where = ""
    if changed and not differs.all():
        where = f"For {named(steps.names, differs)}, "
    more = ""
    if rule.clip_norm < min(steps.norms.min(), base.clip_norm):
        more = " (Each step is clipped here, so that a learning rate hides the norm.)"
    entries = steps.spread(differs)
    causes = []
    for kind, names in changed.items():
        ours, theirs = (_says(kind, names, r, entries) for r in (rule, base))
        model = called(base)
        text = f"{where}{who.ours} {ours}; {who.theirs} ({model}) {theirs}.{more}"
        causes.append(Cause(kind, text))
    if _off(base, rule, steps, "lr").any():
        causes.append(_rates(base, rule, steps, who))
    return tuple(causes)


def named(names: Sequence[str], hit: Array) -> str:
    """Lists the parameters that are hit."""
    some = [f"`{name}`" for name, h in zip(names, hit, strict=True) if h]
    if len(some) > 4:
        some = [*some[:3], f"{len(some) - 3} more"]
    return " and ".join(filter(None, [", ".join(some[:-1]), some[-1]]))


def called(rule: Rule) -> str:
    """What a rule is called."""
    decoupled = rule.algorithm == "Adam" and np.all(rule.decoupled)
    return "AdamW" if decoupled else rule.algorithm


def _off(base: Rule, rule: Rule, steps: Steps, name: str) -> Array:
    """Says of each parameter if an option differs."""
    shape = steps.moved.shape
    old, new = (np.broadcast_to(getattr(r, name), shape) for r in (base, rule))
    unequal = ~np.isclose(old, new, rtol=1e-9, atol=0)
    return np.asarray(np.logical_or.reduceat(unequal, steps.first, axis=1).any(0))


def _says(kind: str, names: list[str], rule: Rule, entries: Array) -> str:
    if kind == "weight_decay":
        decay, apart = _part(rule.weight_decay, entries), _part(rule.decoupled, entries)
        if not decay.any():
            return "has no weight decay"
        way = (
            "apart from the gradient (decoupled, as AdamW)"
            if apart.all()
            else "added to the gradient (coupled, as an L2 penalty)"
        )
        return f"has weight decay {shown(decay)}, {way}"
    told = []
    for name in names:
        values = np.unique(_part(getattr(rule, name), entries))[:3]
        said = [_SAID[name](value) for value in values]
        if rule.algorithm == "RMSprop":  # has one, by another name
            said = [text.replace("beta2", "alpha") for text in said]
        told.append(" or ".join(dict.fromkeys(said)))
    return " and ".join(told)


def _part(value: Any, entries: Array) -> Array:
    return np.asarray(value[..., entries] if np.ndim(value) else value)


def shown(values: Any) -> str:
    """Writes the few values that an option has."""
    texts = [*dict.fromkeys(f"{value:.4g}" for value in np.unique(values))]
    if len(texts) > 3:
        return f"{texts[0]} to {texts[-1]}"
    return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))


def _rates(base: Rule, rule: Rule, steps: Steps, who: Who) -> Cause:
    given, used = (
        np.broadcast_to(r.lr, steps.moved.shape)[:, steps.first] for r in (base, rule)
    )
    ratios = used / np.where(given == 0, np.nan, given)
    if (np.ptp(used, axis=0) > 1e-5 * np.abs(used).max(0)).any() or (
        np.isnan(ratios).any()
    ):
        one, two = (
            ", ".join(f"{rate:.4g}" for rate in rates[:5, 0])
            + (", ..." if len(rates) > 5 else "")
            for rates in (used, given)
        )
        text = f"The learning rates of {who.ours}, step by step, are {one}"
        return Cause("schedule", f"{text}; those of {who.theirs} are {two}.")
    off: Array = np.asarray((np.abs(ratios - 1) > 1e-5).any(0))
    if (np.ptp(given, axis=0) > 0).any():
        one, two = shown(used), ", ".join(f"{rate:.4g}" for rate in given[:5, 0])
        text = f"The learning rate of {who.ours} stays {one}; that of {who.theirs}"
        return Cause("schedule", f"{text} changes from step to step: {two}.")
    where = "" if off.all() else f", for {named(steps.names, off)}"
    text = (
        f"The learning rate of {who.ours} is {shown(ratios[:, off])} times that of "
        f"{who.theirs}: {shown(used[:, off])} against {shown(given[:, off])}{where}."
    )
    return Cause("learning_rate", text)


def _algorithm(base: Rule, rule: Rule, steps: Steps, who: Who) -> Cause:
    usual = [other for other in ALGORITHMS if other.algorithm == rule.algorithm]
    entries = np.ones(steps.moved.shape[1], bool)
    told = [f"learning rate {shown(rule.lr)}"]
    for name in Rule._fields[2:-1]:
        value = getattr(rule, name)
        if name in _SAID and not any(
            np.array_equal(value, getattr(other, name)) for other in usual
        ):
            told.append(_says(name, [name], rule, entries))
    if np.any(rule.weight_decay):
        told.append(_says("weight_decay", [], rule, entries))
    text = f"{who.ours} is {called(rule)} ({', '.join(told)}), and {who.theirs}"
    return Cause("algorithm", f"{text} is {called(base)}.")
