"""Pairs the leaves with PyTorch's parameters; every leftover is said or an error."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxgrad.comparing.loading.files import Stored
from jaxgrad.comparing.loading.fitting import fits_of
from jaxgrad.comparing.loading.leaves import Leaf
from jaxgrad.comparing.loading.naming import Side, assign, scores, side_of
from jaxgrad.tables import Finding

_SHOWN = 8


@dataclass(frozen=True)
class Pair:
    """The parameters that a leaf is made of.

    Attributes:
      names: PyTorch's names; one, unless there is a transform of several.
      transform: the user's, from PyTorch's arrays to the leaf.
      mapped: whether the user said so.
    """

    names: tuple[str, ...]
    transform: Callable[..., Any] | None = None
    mapped: bool = False


def pairs_of(
    leaves: Sequence[Leaf], entries: Mapping[str, Stored], mapping: Mapping[str, Any]
) -> tuple[list[Pair | None], list[Finding]]:
    """Per leaf what it's made of, `None` where it stays; and what is left aside.

    Raises:
      ValueError: a leaf has no parameter, a parameter no leaf, or names and shapes
        leave more than one answer.
    """
    pairs = _mapped(leaves, entries, mapping)
    used = {name for pair in pairs.values() for name in pair.names}
    rest = [
        index
        for index, leaf in enumerate(leaves)
        if index not in pairs and leaf.kind in ("differentiable", "integer")
    ]
    names = list(entries)
    mine = side_of([f.path for f in leaves], [f.shape for f in leaves])
    theirs = side_of(names, [entry.shape for entry in entries.values()])
    fits = np.zeros((len(leaves), len(names)), bool)
    known: dict[Any, bool] = {}
    for i in rest:
        for j, name in enumerate(names):
            fits[i, j] = _can_be(
                leaves[i], entries[name], mine, i, theirs, j, name in used, known
            )
    table = scores(mine, theirs, fits)[rest]
    twins = [entry.storage for entry in entries.values()]
    chosen, unclear = assign(table, twins)
    if unclear:
        raise ValueError(_unclear(leaves, names, rest, unclear))
    for row, column in chosen.items():
        pairs[rest[row]] = Pair((names[column],))
    used |= {name for pair in pairs.values() for name in pair.names}
    missing = [i for i in rest if i not in pairs and leaves[i].kind == "differentiable"]
    findings, extra = _leftovers(entries, used)
    if missing or extra:
        raise ValueError(_unmatched(leaves, missing, entries, extra, mine, theirs))
    return [pairs.get(index) for index in range(len(leaves))], findings


def _can_be(
    leaf: Leaf,
    entry: Stored,
    mine: Side,
    i: int,
    theirs: Side,
    j: int,
    used: bool,
    known: dict[Any, bool],
) -> bool:
    """Whether a leaf could be an entry, by shape and dtype."""
    floating = leaf.kind == "differentiable"
    if entry.floating != floating:
        return False
    if floating:
        key = (entry.shape, leaf.shape)
        if key not in known:
            known[key] = bool(fits_of(*key))
        # What the user gave to another leaf is shared only with one of that name.
        return known[key] and not (
            used and mine.names[i].layer != theirs.names[j].layer
        )
    same = mine.names[i].last == theirs.names[j].last
    return same and not used and entry.shape == leaf.shape


def _mapped(
    leaves: Sequence[Leaf], entries: Mapping[str, Stored], mapping: Mapping[str, Any]
) -> dict[int, Pair]:
    """What the user said.

    Raises:
      ValueError: there is no such leaf or parameter, or the shapes don't fit.
      TypeError: what is said has another form.
    """
    places = {leaf.path.removesuffix(".value"): i for i, leaf in enumerate(leaves)}
    places |= {leaf.path: index for index, leaf in enumerate(leaves)}
    pairs: dict[int, Pair] = {}
    for path, said in mapping.items():
        if path not in places:
            raise ValueError(_no_such("leaf", path, [f.path for f in leaves]))
        leaf = leaves[places[path]]
        if leaf.kind not in ("differentiable", "integer"):
            raise ValueError(f"mapping names `{path}`, which is {leaf.kind}, no array.")
        named, transform = said, None
        if isinstance(said, tuple) and len(said) == 2 and callable(said[1]):
            named, transform = said
        several = (named,) if isinstance(named, str) else named
        if (
            not isinstance(several, tuple | list)
            or not several
            or not all(isinstance(name, str) for name in several)
            or (len(several) > 1 and transform is None)
        ):
            raise TypeError(
                f"mapping[{path!r}] must be a name, (name, transform) or ([name, ...], "
                f"transform), and is {said!r:.60}."
            )
        for name in several:
            if name not in entries:
                raise ValueError(_no_such("parameter", name, list(entries)))
        if transform is None:
            shape = entries[several[0]].shape
            if not fits_of(shape, leaf.shape):
                raise ValueError(
                    f"mapping gives `{path}` of shape {leaf.shape} the parameter "
                    f"`{several[0]}` of shape {shape}, which fits in no layout: say "
                    f"({several[0]!r}, transform), from PyTorch's array to the leaf."
                )
        pairs[places[path]] = Pair(tuple(several), transform, True)
    return pairs


def _no_such(what: str, name: str, there: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, there, 3, 0.3) or there[:5]
    return (
        f"mapping names the {what} `{name}`, and there is none. The nearest: "
        f"{', '.join(near)}."
    )


def _leftovers(
    entries: Mapping[str, Stored], used: set[str]
) -> tuple[list[Finding], list[str]]:
    """The entries that no leaf took: those that needn't have one, and the others."""
    storages = {entries[name].storage: name for name in used}
    findings, extra = [], []
    aside = []
    for name, entry in entries.items():
        if name in used:
            continue
        twin = storages.get(entry.storage)
        if twin is not None:
            text = f"the same memory as `{twin}`, which was loaded"
            findings.append(Finding("tied", name, text))
        elif _is_buffer(name, entry):
            aside.append(name)
        else:
            extra.append(name)
    if aside:
        more = f" and {len(aside) - _SHOWN} more" if len(aside) > _SHOWN else ""
        text = f"no leaf has these: {', '.join(aside[:_SHOWN])}{more}"
        findings.append(Finding("buffers", "", text))
    return findings, extra


def _is_buffer(name: str, entry: Stored) -> bool:
    """Whether an entry is surely no parameter: counts, statistics, causal masks."""
    last = name.rpartition(".")[2]
    known = {"running_mean", "running_var", "masked_bias", "inv_freq", "attn_mask"}
    if not entry.floating or last in known:
        return True
    square = len(entry.shape) >= 2 and entry.shape[-1] == entry.shape[-2] > 1
    if not square or set(entry.shape[:-2]) - {1}:
        return False
    lower = np.tril(np.ones(entry.shape[-2:]))
    return bool((entry.read() == lower).all())


def _unclear(
    leaves: Sequence[Leaf],
    names: Sequence[str],
    rest: Sequence[int],
    unclear: Mapping[int, Sequence[int]],
) -> str:
    lines = []
    for row, columns in list(unclear.items())[:_SHOWN]:
        leaf = leaves[rest[row]]
        could = ", ".join(f"`{names[column]}`" for column in columns[:_SHOWN])
        lines.append(f"Leaf `{leaf.path}` of shape {leaf.shape} could be {could}.")
    if len(unclear) > _SHOWN:
        lines.append(f"And {len(unclear) - _SHOWN} more.")
    row, columns = next(iter(unclear.items()))
    example = f"{leaves[rest[row]].path!r}: {names[columns[0]]!r}"
    return (
        "Names and shapes leave open which parameter is which.\n"
        + "\n".join(lines)
        + f"\nSay which: mapping={{{example}, ...}}, leaf path to PyTorch's name."
    )


def _unmatched(
    leaves: Sequence[Leaf],
    missing: Sequence[int],
    entries: Mapping[str, Stored],
    extra: Sequence[str],
    mine: Side,
    theirs: Side,
) -> str:
    names = list(entries)
    columns = [names.index(name) for name in extra]
    every = np.zeros((len(leaves), len(names)), bool)
    every[np.ix_(list(missing), columns)] = True
    near = scores(mine, theirs, every)
    lines = []
    if missing:
        lines.append("These leaves have no parameter that fits:")
    for i in missing[:_SHOWN]:
        line = f"  `{leaves[i].path}` of shape {leaves[i].shape}"
        if columns and np.isfinite(near[i]).any():
            name = names[int(near[i].argmax())]
            line += f" (the nearest left: `{name}` of shape {entries[name].shape})"
        lines.append(line)
    if len(missing) > _SHOWN:
        lines.append(f"  and {len(missing) - _SHOWN} more")
    if extra:
        lines.append("These parameters have no leaf:")
    lines += [f"  `{name}` of shape {entries[name].shape}" for name in extra[:_SHOWN]]
    if len(extra) > _SHOWN:
        lines.append(f"  and {len(extra) - _SHOWN} more")
    lines.append(
        "Leaves and parameters go together one by one. What is fused, split or shared "
        "is said by mapping: {leaf: (name, transform)}, {leaf: ([name, ...], "
        "transform)}, {leaf: name}; what isn't wanted is left out of the state dict."
    )
    return "\n".join(lines)
