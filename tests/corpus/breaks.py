"""Ways to break a gradient, planted through `custom_vjp`: the value stays untouched."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np

from corpus.case import Case, Plant, gradients, widened
from jaxgrad.pytrees import kind_of, leaf_name

WORTH = 1e-3
"""A break counts if it's worth more than this share of a leaf's gradient (2-norm)."""


class Way(NamedTuple):
    name: str
    kind: str
    """The cause, in a fixed word."""
    change: Callable[[jax.Array, int], jax.Array] = lambda g, n: g
    """From one operand's gradient, and n (the size of the batch), to a wrong one."""
    fits: Callable[[tuple[int, ...]], bool] = lambda shape: True
    """Says if an operand of this shape can be broken in this way."""
    every: bool = False
    """Breaks every operand that fits, not just one."""
    entries: Callable[[int], list[int]] | None = None
    """Of an operand's size: the entries that are wrong, where it's only some."""
    where: tuple[str, ...] = ("loss", "inner")


class Place(NamedTuple):
    function: str
    file: str
    line: int


class Truth(NamedTuple):
    """What is wrong, as a checker should say it."""

    way: str
    kind: str
    leaves: tuple[str, ...]
    entries: dict[str, tuple[tuple[int, ...], ...]]
    """The wrong entries of a leaf, where they are less than half of it."""
    rule: Place
    """The function whose custom rule is wrong."""
    shares: Mapping[str, float] = MappingProxyType({})
    """Measured: the error as a share of the leaf's gradient, in the 2-norm."""
    factors: Mapping[str, float] = MappingProxyType({})
    """Measured: the leaves whose gradient is wrong by just a constant factor."""


def _several(shape: tuple[int, ...]) -> bool:
    return int(np.prod(shape)) > 1


def _matrix(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and min(shape) > 1


def _square(shape: tuple[int, ...]) -> bool:
    return _matrix(shape) and shape[0] == shape[1]


def _one(size: int) -> list[int]:
    return [size // 2]


def _three(size: int) -> list[int]:
    return [size // 5, size // 2, size - 1]


def _rms(g: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(g**2))


def _off(entries: Callable[[int], list[int]]) -> Callable:
    """Adds to some entries their own size, or the typical one if that is larger."""

    def change(g: jax.Array, n: int) -> jax.Array:
        flat, chosen = g.ravel(), jnp.array(entries(g.size))
        size = jnp.maximum(jnp.abs(flat[chosen]), _rms(flat))
        return flat.at[chosen].add(size).reshape(g.shape)

    return change


def _factor(name: str, factor: Callable[[int], float], kind: str, every: bool) -> Way:
    return Way(name, kind, lambda g, n: g * factor(n), every=every)


WAYS = (
    _factor("doubled", lambda n: 2.0, "factor", every=False),
    _factor("halved", lambda n: 0.5, "factor", every=False),
    _factor("times_n", float, "factor", every=True),
    _factor("over_n", lambda n: 1 / n, "factor", every=True),
    _factor("slightly_off", lambda n: 1.005, "factor", every=False),
    _factor("negated", lambda n: -1.0, "sign", every=True),
    Way("zeroed", "zero", lambda g, n: jnp.zeros_like(g)),
    Way("transposed", "transposed", lambda g, n: g.T, _square),
    Way("rolled", "permuted", lambda g, n: jnp.roll(g.ravel(), 1).reshape(g.shape)),
    Way("swapped", "swapped"),
    Way(
        "scaled_rows",
        "rows",
        lambda g, n: g * (1 + jnp.arange(len(g), dtype=g.dtype))[:, None],
        _matrix,
    ),
    Way(
        "scaled_column",
        "columns",
        lambda g, n: g.at[:, g.shape[1] // 2].multiply(2),
        _matrix,
    ),
    Way("one_entry", "entries", _off(_one), _several, entries=_one),
    Way(
        "some_entries",
        "entries",
        _off(_three),
        lambda shape: int(np.prod(shape)) > 6,
        entries=_three,
    ),
    Way("biased", "offset", lambda g, n: g + 0.01 * _rms(g)),
    # On an inner function the second half of the outputs; on the whole loss, the
    # gradient of a batch whose second half repeats the first.
    Way("part_of_batch", "missing_term", every=True),
    Way("stale", "stale", every=True),
    Way(
        "dropped_argument",
        "zero",
        lambda g, n: jnp.zeros_like(g),
        where=("inner",),
    ),
)


def _targets(way: Way, shapes: list[tuple[int, ...]], spread: bool) -> tuple[int, ...]:
    """Which operands are broken.

    One that fits: where `spread`, any, though always the same; otherwise the first,
    which depends on the parameters (`dropped_argument` takes the second).
    """
    fitting = [place for place, shape in enumerate(shapes) if way.fits(shape)]
    if way.name == "swapped":
        pairs = [(i, j) for j in fitting for i in range(j) if shapes[i] == shapes[j]]
        return pairs[0] if pairs else ()
    if way.name == "dropped_argument":
        fitting = fitting[1:]
    if way.every or not fitting:
        return tuple(fitting)
    return (fitting[crc32(way.name.encode()) % len(fitting) if spread else 0],)


def _changed(
    way: Way, gradient: list[jax.Array], targets: tuple[int, ...], n: int
) -> list[jax.Array]:
    wrong = list(gradient)
    if way.name == "swapped" and targets:
        i, j = targets
        wrong[i], wrong[j] = (
            gradient[j].astype(gradient[i].dtype),
            gradient[i].astype(gradient[j].dtype),
        )
        return wrong
    for place in targets:
        wrong[place] = way.change(gradient[place], n)
    return wrong


def _moved(way: Way, tree: Any) -> Any:
    """The point where the derivative is taken: a stale one is a tenth off."""
    if way.name != "stale":
        return tree
    return jax.tree.map(
        lambda x: x * 0.9 if kind_of(x) == "differentiable" else x, tree
    )


def _first_half(leaf: Any, n: int) -> Any:
    if kind_of(leaf) == "static" or leaf.shape[:1] != (n,) or n < 2:
        return leaf
    return jnp.concatenate([leaf[: n - n // 2], leaf[: n // 2]])


def _batch(leaves: list[Any]) -> int:
    """The size of the batch: the length of the first array."""
    return next((len(x) for x in leaves if jnp.ndim(x)), 1)


def place_of(function: Callable) -> Place:
    code = inspect.unwrap(function).__code__
    return Place(
        function.__name__, os.path.basename(code.co_filename), code.co_firstlineno
    )


def break_loss(
    loss: Callable, params: Any, args: tuple, way: Way
) -> tuple[Callable, Truth]:
    """Breaks the gradient of the whole loss; `Truth` says what that was built to do."""
    named = [
        (leaf_name(path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if kind_of(leaf) == "differentiable"
    ]
    shapes = [leaf.shape for _, leaf in named]
    targets = _targets(way, shapes, spread=True)
    arrays = [x for x in jax.tree.leaves(args) if kind_of(x) != "static"]
    n = _batch(arrays or [leaf for _, leaf in named])
    part = way.name == "part_of_batch"

    def with_wrong_rule(params: Any, args: tuple) -> tuple[Callable, list, list]:
        leaves, treedef = jax.tree.flatten((params, args))
        count = len(jax.tree.leaves(params))
        kinds = [kind_of(leaf) for leaf in leaves]
        trained = [i for i in range(count) if kinds[i] == "differentiable"]
        held = [
            i for i, kind in enumerate(kinds) if kind != "static" and i not in trained
        ]

        @jax.custom_vjp
        def broken_loss(values, rest):
            full = list(leaves)
            for places, stock in ((trained, values), (held, rest)):
                for place, value in zip(places, stock, strict=True):
                    full[place] = value
            params, args = treedef.unflatten(full)
            return loss(params, *args)

        def forward(values, rest):
            return broken_loss.fun(values, rest), (values, rest)

        def backward(point, cotangent):
            values, rest = point
            if part:
                rest = [_first_half(x, n) for x in rest]
            _, pull = jax.vjp(
                lambda v: broken_loss.fun(v, rest), _moved(way, list(values))
            )
            return _changed(way, pull(cotangent)[0], targets, n), None

        broken_loss.defvjp(forward, backward)
        return broken_loss, [leaves[i] for i in trained], [leaves[i] for i in held]

    def broken(params, *args):
        rule, values, rest = with_wrong_rule(params, args)
        return rule(values, rest)

    entries = {}
    if way.entries:
        for place in targets:
            flat = way.entries(int(np.prod(shapes[place])))
            entries[named[place][0]] = _indices(flat, shapes[place])
    rule = place_of(with_wrong_rule(params, args)[0].fun)
    leaves = tuple(named[place][0] for place in targets)
    return broken, Truth(way.name, way.kind, leaves, entries, rule)


def break_inner(way: Way) -> Plant:
    """Breaks the gradient of the function that it's put on."""

    def plant(function: Callable) -> Callable:
        rule = jax.custom_vjp(function)

        def forward(*operands):
            return function(*operands), operands

        def backward(operands, cotangent):
            if way.name == "part_of_batch":
                cotangent = jax.tree.map(_without_second_half, cotangent)
            _, pull = jax.vjp(function, *_moved(way, operands))
            leaves, treedef = jax.tree.flatten(pull(cotangent))
            real = [i for i, g in enumerate(leaves) if g.dtype != jax.dtypes.float0]
            gradient = [leaves[i] for i in real]
            targets = _targets(way, [g.shape for g in gradient], spread=False)
            outputs = [x for x in jax.tree.leaves(cotangent) if x.ndim]
            n = _batch(outputs or gradient)
            for i, g in zip(real, _changed(way, gradient, targets, n), strict=True):
                leaves[i] = g
            return treedef.unflatten(leaves)

        rule.defvjp(forward, backward)
        return rule

    return plant


def _without_second_half(cotangent: Any) -> Any:
    if cotangent.dtype == jax.dtypes.float0 or cotangent.shape[:1] in ((), (1,)):
        return cotangent
    return cotangent.at[(len(cotangent) + 1) // 2 :].set(0)


def effective(case: Case, way: Way, where: str) -> Truth | None:
    """What the break does at the case's point, in float64; `None` if it's nothing.

    `where` is `loss` or `inner`. A leaf counts as wrong if its gradient is off by more
    than 0.1 % (2-norm), or one of its entries by at least its own size, nothing being
    off elsewhere. Leaves on a kink don't count, since several gradients are right
    there, nor does a break that gives numbers which aren't finite.
    """
    if where not in way.where:
        return None
    inner: list[Callable] = []

    def plant(function: Callable) -> Callable:
        inner.append(function)
        return break_inner(way)(function) if where == "inner" else function

    broken, params, args, _ = case.build(plant)
    rule = place_of(inner[0])
    if where == "loss":
        broken, truth = break_loss(broken, params, args, way)
        rule = truth.rule
        if not truth.leaves:
            return None
    right = _right(case.make, case.x64)
    with jax.enable_x64(True):
        params, args = widened((params, args))
        claimed = gradients(broken, params, *args)
    return _measured(way, rule, right, claimed, case.expect)


@cache
def _right(make: Callable, x64: bool) -> dict[str, np.ndarray]:
    loss, params, args, _ = Case("", make, x64=x64).build()
    with jax.enable_x64(True):
        params, args = widened((params, args))
        return gradients(loss, params, *args)


def _measured(
    way: Way,
    rule: Place,
    right: dict[str, np.ndarray],
    claimed: dict[str, np.ndarray],
    expect: Mapping[str, str],
) -> Truth | None:
    wrong: list[str] = []
    entries, shares, factors = {}, {}, {}
    for name, true in right.items():
        error = claimed[name] - true
        if not np.isfinite(error).all():
            return None
        size = np.linalg.norm(true)
        off = np.abs(error) > 1e-6 * np.abs(true) + 1e-9 * size
        if expect.get(name) == "kink" or not off.any():
            continue
        shares[name] = float(np.linalg.norm(error) / size) if size else np.inf
        few = 2 * np.count_nonzero(off) <= off.size
        if few:
            entries[name] = _indices(np.flatnonzero(off), off.shape)
        if shares[name] > WORTH or (few and (np.abs(error) >= np.abs(true))[off].all()):
            wrong.append(name)
        factor = np.vdot(true, claimed[name]) / size**2 if size else 0.0
        if np.linalg.norm(claimed[name] - factor * true) < 1e-9 * size:
            factors[name] = float(factor)
    if not wrong:
        return None
    return Truth(way.name, way.kind, tuple(wrong), entries, rule, shares, factors)


def _indices(flat: Any, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(
        tuple(int(i) for i in np.unravel_index(place, shape))
        for place in dict.fromkeys(flat)
    )
