"""What a case of the faults is, and which of its source lines is to blame.

A comment at the end of a line of the case's own function marks it:

- `# blame`: the instrument must name this line; `# blame: w, b` for these leaves.
- `# or`: naming this line instead is right too.
- `# also`: naming this line beside it is no mistake.
- `# infinite`: an infinity is born here, and masked; `trace.nonfinite` has it.

One comment may hold several: `# blame: w # or: b`.
"""

from __future__ import annotations

import inspect
import io
import tokenize
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgrad.pytrees import kind_of, leaf_name

KINDS = {
    "infinite slope",
    "norm at zero",
    "log of zero",
    "division by zero",
    "zero times infinity",
    "overflow",
    "domain",
    "equal eigenvalues",
    "empty softmax",
    "non-finite input",
    "infinity minus infinity",
    "singular matrix",
    "custom rule",
    "other",
}
REASONS = {
    "stop_gradient",
    "rounding",
    "argmax",
    "comparison",
    "integer cast",
    "flat",
    "maximum's loser",
    "saturation",
    "underflow",
    "branch not taken",
    "zero factor",
    "discarded",
    "cancellation",
    "at a minimum",
}
NEVER_USED = ()
"""In place of the reasons: no step of the loss uses the leaf."""


class Problem(NamedTuple):
    loss: Callable[..., Any]
    params: Any
    args: tuple = ()
    has_aux: bool = False


Make = Callable[[], Problem]


class Nonfinite(NamedTuple):
    """A loss with a value or a gradient that is infinite or NaN."""

    name: str
    build: Make
    kinds: tuple[str, ...]
    """What the origin's `kind` may be; the first is the best."""
    phase: str | None = None
    index: tuple[int, ...] | None = None
    """Of the bad entry, or of its row: later axes aren't compared."""
    iteration: int | None = None
    branch: int | None = None
    harmless: bool = False
    origin: str | None = None
    """The origin's `name`: a parameter's, or `args[0]`."""


class Zero(NamedTuple):
    """A loss with parameters whose gradient is all zero."""

    name: str
    build: Make
    zeros: Mapping[str, tuple[str, ...]]
    """Leaf to the reasons that are right, the best first; or `NEVER_USED`."""


class Healthy(NamedTuple):
    """A loss with nothing to accuse, though it may look like it."""

    name: str
    build: Make
    dead: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    """Leaf to the places along its first axis where its gradient is zero."""


Case = Nonfinite | Zero | Healthy


def nonfinite(shelf: list[Nonfinite], *kinds: str, **expected: Any) -> Callable:
    """Puts a non-finite case on a shelf, under its function's name."""
    assert set(kinds) <= KINDS, kinds
    return _adder(shelf, lambda build: _named(Nonfinite, build, kinds, **expected))


def zero(shelf: list[Zero], zeros: Mapping[str, tuple[str, ...]]) -> Callable:
    """Puts a case with all-zero gradients on a shelf, under its function's name."""
    assert {reason for reasons in zeros.values() for reason in reasons} <= REASONS
    return _adder(shelf, lambda build: _named(Zero, build, zeros))


def healthy(shelf: list[Healthy], **expected: Any) -> Callable:
    """Puts a healthy case on a shelf, under its function's name."""
    return _adder(shelf, lambda build: _named(Healthy, build, **expected))


def _named(kind: Callable, build: Make, *fields: Any, **more: Any) -> Case:
    return kind(build.__name__, build, *fields, **more)


def _adder(shelf: list, made: Callable[[Make], Case]) -> Callable[[Make], Make]:
    def add(build: Make) -> Make:
        shelf.append(made(build))
        return build

    return add


class Marks(NamedTuple):
    """The marked lines of a case's source, for one leaf or for the whole case."""

    blame: frozenset[int]
    either: frozenset[int]
    also: frozenset[int]
    infinite: frozenset[int]

    def found_by(self, lines: set[int]) -> bool:
        """Whether these lines name all that is to blame."""
        return self.blame <= lines or bool(self.either & lines)

    def allow(self, lines: set[int]) -> bool:
        """Whether none of these lines is innocent."""
        return lines <= self.blame | self.either | self.also


def file_of(case: Case) -> str:
    return inspect.getsourcefile(case.build)


def in_libraries(case: Case) -> bool:
    """Whether the case is written with Equinox, Flax or optax."""
    source = inspect.getsource(case.build)
    return any(name in source for name in ("eqx.", "linen.", "nnx.", "optax."))


def marks(case: Case, leaf: str | None = None) -> Marks:
    """The lines that are marked for a leaf; a mark without leaves is for all."""
    words = ("blame", "or", "also", "infinite")
    found: dict[str, set[int]] = {word: set() for word in words}
    for line, mark in _comments(case.build):
        word, _, leaves = mark.strip().partition(":")
        names = [name.strip() for name in leaves.split(",")] if leaves else [leaf]
        if word in found and leaf in names:
            found[word].add(line)
    return Marks(*(frozenset(lines) for lines in found.values()))


def _comments(build: Make) -> list[tuple[int, str]]:
    source, first = inspect.getsourcelines(build)
    tokens = tokenize.generate_tokens(io.StringIO("".join(source)).readline)
    return [
        (first + token.start[0] - 1, mark)
        for token in tokens
        if token.type == tokenize.COMMENT
        for mark in token.string.split("#")[1:]
    ]


class Gradient(NamedTuple):
    loss: np.ndarray
    leaves: dict[str, np.ndarray]
    """The gradient of each differentiable leaf, by its name."""


def gradient(problem: Problem) -> Gradient:
    """What `jax.value_and_grad` gives, compiled."""
    named, treedef = jax.tree_util.tree_flatten_with_path(problem.params)
    leaves = [leaf for _, leaf in named]
    chosen = [i for i, leaf in enumerate(leaves) if kind_of(leaf) == "differentiable"]

    def loss(values: list[Any], args: tuple) -> Any:
        full = dict(enumerate(leaves)) | dict(zip(chosen, values, strict=True))
        return problem.loss(treedef.unflatten(full.values()), *args)

    function = jax.jit(jax.value_and_grad(loss, has_aux=problem.has_aux))
    value, slopes = function([leaves[i] for i in chosen], problem.args)
    names = [leaf_name(named[i][0]) for i in chosen]
    arrays = [np.asarray(slope, np.float64) for slope in slopes]
    value = value[0] if problem.has_aux else value
    return Gradient(
        np.asarray(value, np.float64), dict(zip(names, arrays, strict=True))
    )
