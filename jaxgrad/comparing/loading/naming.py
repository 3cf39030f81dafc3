"""Which leaf is which PyTorch parameter, by their names and sizes alone.

A name is cut into words and numbers. The last word that says what an array does in its
layer (`kernel`, `bias`) is its role; the rest names the layer. Pairs whose shapes fit
get a score: words in common, the same role, the same place among the layers of that
name, and a layer of the same make. The best sum over all pairs is an assignment
problem. An answer counts only if every other one is clearly worse.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_ROLES = {
    "weight": "weight kernel weights scale gamma embedding w g",
    "bias": "bias beta shift offset b biases",
    "mean": "mean",
    "var": "var variance",
}
_ROLE = {word: role for role, words in _ROLES.items() for word in words.split()}
_UNSURE = {"w", "b", "g"}  # they may be roles, or mere letters
# Words that many names share and that tell no two layers apart.
_COMMON = (
    "params param parameters values layers layer model models module modules block "
    "blocks h net network transformer running batch stats raw array"
)
_NOISE = set(_COMMON.split())
_SAME = {
    "attention": "attn",
    "self": "attn",
    "attn": "attn",
    "projection": "proj",
    "linear": "linear",
    "lin": "linear",
    "fc": "linear",
    "dense": "linear",
    "ln": "norm",
    "bn": "norm",
    "gn": "norm",
    "layernorm": "norm",
    "batchnorm": "norm",
    "groupnorm": "norm",
    "rmsnorm": "norm",
    "emb": "embed",
    "embedding": "embed",
    "embeddings": "embed",
    "q": "query",
    "k": "key",
    "v": "value",
    "o": "out",
    "output": "out",
    "input": "in",
    "enc": "encoder",
    "dec": "decoder",
    "convolution": "conv",
    "pos": "position",
    "positional": "position",
    "tok": "token",
}
# A role and a projection in one word, as in {"wq": ..., "bq": ...}.
_JOINED = re.compile(r"([wb])([qkvo])")
_CLEAR = 0.1  # by so much an answer must be better than another


@dataclass(frozen=True)
class Name:
    """A name, cut up.

    Attributes:
      words: what names the layer, in one spelling.
      numbers: its numbers, in order.
      role: what the array does in its layer; empty if no word says it.
      sure: whether that word can't mean anything else.
      last: the last word as it's written, for integer buffers.
    """

    words: tuple[str, ...]
    numbers: tuple[int, ...]
    role: str
    sure: bool
    last: str

    @property
    def layer(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """What two arrays of one layer have in common."""
        return self.words, self.numbers


def parse(text: str) -> Name:
    """Cuts a name into words and numbers."""
    plain = re.sub(r"(?<=[a-z])[123][dD](?![a-z])", "", text)  # the 2 of Conv2d
    spaced = re.sub(r"([a-z0-9])([A-Z])|([A-Z])(?=[A-Z][a-z])", r"\1\3 \2", plain)
    tokens = re.findall(r"[a-z]+|\d+", spaced.lower())
    # A Flax NNX parameter's own `.value` says nothing; a projection of that name does.
    if tokens[-1:] == ["value"] and _ROLE.keys() & tokens[-2:-1]:
        tokens.pop()
    split: list[str] = []
    for token in tokens:
        joined = _JOINED.fullmatch(token)
        split += joined.groups() if joined else [token]
    role, sure, place = "", False, None
    for index, token in enumerate(split):
        if token in _ROLE and (token not in _UNSURE or not sure):
            role, sure, place = _ROLE[token], token not in _UNSURE, index
    words, numbers = [], []
    for index, token in enumerate(split):
        if token.isdigit():
            numbers.append(int(token))
        elif index != place and token not in _NOISE:
            words.append(_SAME.get(token, token))
    return Name(tuple(words), tuple(numbers), role, sure, last_name(text))


def last_name(path: str) -> str:
    """`kernel` of `layers[0].kernel`, and of Flax NNX's `layers[0].kernel.value`."""
    names = [name for name in re.split(r"[^A-Za-z0-9_]+", path) if name] or [path]
    return names[-2] if names[-1] == "value" and len(names) > 1 else names[-1]


@dataclass(frozen=True)
class Side:
    """The names of one side, and what follows from all of them together.

    Attributes:
      names: one per array.
      slots: per array and number, its place among those that stand there, and how many
        those are: without the count, fc1 would go with the first of any list.
      makes: per array, the roles and sizes of its layer's arrays.
      order: the arrays' places in natural order: layer 2 before layer 10.
    """

    names: tuple[Name, ...]
    slots: tuple[tuple[tuple[int, int], ...], ...]
    makes: tuple[Any, ...]
    order: tuple[int, ...]


def side_of(texts: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> Side:
    """Cuts up the names of one side."""
    if all(text.endswith(".value") for text in texts):
        texts = [text.removesuffix(".value") for text in texts]
    names = tuple(map(parse, texts))
    seen: dict[Any, set[int]] = defaultdict(set)
    layers: dict[Any, list[Any]] = defaultdict(list)
    for name, shape in zip(names, shapes, strict=True):
        for slot, number in enumerate(name.numbers):
            seen[name.words, slot].add(number)
        layers[name.layer].append((name.role, math.prod(shape)))
    slots = tuple(
        tuple(
            (sum(n < number for n in there), len(there))
            for slot, number in enumerate(name.numbers)
            for there in [seen[name.words, slot]]
        )
        for name in names
    )
    natural = sorted(range(len(names)), key=lambda i: (names[i].numbers, i))
    order = [0] * len(names)
    for place, index in enumerate(natural):
        order[index] = place
    makes = tuple(tuple(sorted(layers[name.layer])) for name in names)
    return Side(names, slots, makes, tuple(order))


def scores(
    leaves: Side, entries: Side, fits: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """How well each leaf goes with each entry; -inf where it can't."""
    table = np.full(fits.shape, -np.inf)
    leaf_places = _places(leaves, np.asarray(fits.any(1)))
    entry_places = _places(entries, np.asarray(fits.any(0)))
    for i, j in zip(*np.nonzero(fits), strict=True):
        a, b = leaves.names[i], entries.names[j]
        if a.role and b.role and a.role != b.role and a.sure and b.sure:
            continue
        score = _in_common(a.words, b.words)
        if a.role and b.role:
            score += 0.5 if a.role == b.role else -0.5
        if leaves.makes[i] == entries.makes[j]:
            score += 1.0
        mine, theirs = leaves.slots[i], entries.slots[j]
        if mine and theirs:
            same = 0.0
            if len(mine) == len(theirs):
                equal = sum(x == y for x, y in zip(mine, theirs, strict=True))
                same = equal / len(mine)
            in_order = leaf_places[i] == entry_places[j]
            score += 0.5 * max(same, float(in_order))
            if a.words and a.layer == b.layer:
                score += 0.25
        table[i, j] = score
    return table


def _in_common(mine: tuple[str, ...], theirs: tuple[str, ...]) -> float:
    a, b = set(mine), set(theirs)
    both = len(a & b)
    return both - 0.25 * (len(a | b) - both)


def _places(side: Side, some: npt.NDArray[np.bool_]) -> list[tuple[int, ...]]:
    """Each array's place among those of the same words, role and make."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for index, name in enumerate(side.names):
        if some[index]:
            groups[name.words, name.role, side.makes[index]].append(index)
    places: list[tuple[int, ...]] = [(-1,)] * len(side.names)
    for group in groups.values():
        for place, index in enumerate(sorted(group, key=lambda i: side.order[i])):
            places[index] = (place, len(group))
    return places


def assign(
    table: npt.NDArray[np.float64], twins: Sequence[Any]
) -> tuple[dict[int, int], dict[int, list[int]]]:
    """The best pairs, and for each leaf that isn't clear, what else it could be.

    `twins` is equal for entries that are the same memory: those can't be confused.
    """
    from scipy.optimize import (  # type: ignore[import-untyped]
        linear_sum_assignment,
    )

    rows, columns = table.shape
    if not rows or not columns:
        return {}, {}
    low = -1e6  # a leaf is left out only where nothing fits
    padded = np.where(np.isfinite(table), table, low)
    chosen = {
        int(i): int(j)
        for i, j in zip(*linear_sum_assignment(padded, maximize=True), strict=True)
        if np.isfinite(table[i, j])
    }
    # What it costs a leaf to take another's entry; entries that nobody took stand
    # behind, free to give. A cycle of such moves that costs little is another answer.
    free = [j for j in range(columns) if j not in chosen.values()]
    held = list(chosen.items()) + [(-1, j) for j in free]
    count = len(held)
    cost = np.full((count, count), np.inf)
    for a, (i, j) in enumerate(held):
        for b, (_, other) in enumerate(held):
            if twins[j] == twins[other]:
                continue
            if i >= 0:
                cost[a, b] = table[i, j] - table[i, other]
            else:
                cost[a, b] = 0.0
    first = cost.copy()
    for middle in range(count):
        np.minimum(cost, cost[:, middle, None] + cost[None, middle, :], out=cost)
    unclear: dict[int, list[int]] = {}
    for a, (i, j) in enumerate(held):
        around = first[a] + cost[:, a]
        others = [held[b][1] for b in np.nonzero(around < _CLEAR)[0] if held[b][1] != j]
        if i >= 0 and others:
            unclear[i] = [j, *others]
    return chosen, unclear
