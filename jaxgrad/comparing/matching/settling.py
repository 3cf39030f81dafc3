"""Pairs leaves with parameters where their contents leave it open.

What decides is, in this order: siblings (whose partners stand in the same PyTorch
module), words of the names, and the natural order, in which layer 2 is before 10.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Tokens = tuple[str, ...]
Rank = tuple[tuple[float, float], ...]

_SYNONYMS = {
    word: words[0]
    for words in (
        ("weight", "kernel", "weights", "w", "scale", "gamma", "g"),
        ("weight", "embedding", "embeddings", "embed"),
        ("bias", "biases", "b", "beta", "shift", "offset"),
        ("linear", "dense", "fc", "lin"),
        ("norm", "ln", "layernorm", "bn", "batchnorm"),
        ("q", "query"),
        ("k", "key"),
        ("v", "value"),
        ("attention", "attn", "mha"),
    )
    for word in words
}
# Siblings count for more than words, equal contents and order.
_SIBLINGS, _LAST_WORD, _WORDS, _EQUAL, _ORDER = 1000.0, 10.0, 5.0, 8.0, 1.0


class Label(NamedTuple):
    """What a block of a leaf, or a part of a parameter, is called.

    Attributes:
      name: the leaf's path or the parameter's name.
      marks: which part it is of it: `("1/3",)`.
      tokens: the name in its components.
      rank: its place in the natural order of all names.
    """

    name: str
    marks: Tokens
    tokens: Tokens
    rank: Rank

    @property
    def text(self) -> str:
        """The name with its marks."""
        return " ".join((self.name, *self.marks))

    @property
    def numbers(self) -> tuple[int, ...]:
        """The part's index, per axis that is cut."""
        return tuple(int(mark.split("/")[0]) for mark in self.marks)

    @property
    def prefixes(self) -> list[Tokens]:
        """The modules around it: the nearest first, those of the same part before."""
        parents = self.tokens[:-1]
        plain = [parents[:n] for n in range(len(parents), 0, -1)]
        if not self.marks:
            return plain
        marked = (*self.marks, *parents)
        return [marked[:n] for n in range(len(marked), 0, -1)] + plain

    @property
    def heads(self) -> list[Tokens]:
        """All beginnings of the name, with and without the marks."""
        plain = [self.tokens[:n] for n in range(1, len(self.tokens) + 1)]
        if not self.marks:
            return plain
        marked = (*self.marks, *self.tokens)
        return plain + [marked[:n] for n in range(1, len(marked) + 1)]


def tokens_of(name: str) -> Tokens:
    """The components of a path or name: `layers[0].w` is `layers`, `0`, `w`."""
    return tuple(t for t in re.split(r"[.\[\]/'\"]+", name) if t) or (name,)


def ranks(names: Iterable[str]) -> dict[str, Rank]:
    """Sort keys: numbers by value, and other components in the order they came."""
    seen: dict[tuple[Tokens, str], float] = {}
    found = {}
    for name in names:
        tokens, key = tokens_of(name), []
        for at, token in enumerate(tokens):
            stem = re.sub(r"\d+", "#", token)
            place = seen.setdefault((tokens[:at], stem), float(len(seen)))
            digits = re.findall(r"\d+", token)
            key.append((place, float(digits[-1]) if digits else -1.0))
        found[name] = tuple(key)
    return found


class Known:
    """The partners that are known, by the module around the leaf."""

    def __init__(self) -> None:
        self._heads: dict[Tokens, Counter[Tokens]] = defaultdict(Counter)
        self._total: Counter[Tokens] = Counter()

    def add(self, leaf: Label, torch: Label) -> None:
        """Takes note of a pair."""
        for prefix in leaf.prefixes:
            self._total[prefix] += 1
            self._heads[prefix].update(torch.heads)

    def near(self, leaf: Label, names: Sequence[Label]) -> npt.NDArray[np.float64]:
        """How near each parameter is to the partners of the leaf's siblings.

        It's the mean number of components in common, of the nearest siblings first.
        """
        score, weight = np.zeros(len(names)), 1.0
        for prefix in leaf.prefixes:
            if not self._total[prefix]:
                continue
            counted, total = self._heads[prefix], self._total[prefix]
            here = [sum(counted[h] for h in name.heads) / total for name in names]
            score += weight * np.asarray(here)
            weight /= 16
        return score


def likeness(leaf: Label, torch: Label) -> tuple[float, float]:
    """Whether the last words are synonyms, and the share of words in common."""
    ours, theirs = _words(leaf.tokens), _words(torch.tokens)
    last = _last(leaf.tokens[-1])
    same = 1.0 if last and last == _last(torch.tokens[-1]) else 0.0
    both = ours | theirs
    return same, len(ours & theirs) / len(both) if both else 0.0


def _words(tokens: Tokens) -> set[str]:
    found = set()
    for token in tokens:
        apart = re.sub(r"([a-z])([A-Z])", r"\1 \2", token)
        for word in re.findall(r"[a-z]+", apart.lower()):
            found.add(_SYNONYMS.get(word, word))
    return found


def _last(token: str) -> str:
    """`weight` or `bias`, or the token itself, without its number."""
    for word in re.findall(r"[a-z]+", token.lower()):
        if _SYNONYMS.get(word) in ("weight", "bias"):
            return _SYNONYMS[word]
    word = re.sub(r"\d+", "", token).lower()
    return _SYNONYMS.get(word, word)


class Settled(NamedTuple):
    """A pair of places in the two lists, and what settled it."""

    leaf: int
    torch: int
    by: str


def settle(
    leaves: Sequence[Label],
    torch: Sequence[Label],
    fits: npt.NDArray[np.bool_],
    known: Known,
    equal: npt.NDArray[np.bool_] | None = None,
) -> list[Settled]:
    """Pairs leaves with parameters that fit them, each with another one.

    `equal` says whose contents are equal, where that isn't all there is to it. Where
    the leaves are more than the parameters, some stay without.
    """
    siblings = np.stack([known.near(leaf, torch) for leaf in leaves])
    words = np.zeros((len(leaves), len(torch), 2))
    memo: dict[tuple[Tokens, Tokens], tuple[float, float]] = {}
    for i, leaf in enumerate(leaves):
        for j, name in enumerate(torch):
            key = leaf.tokens, name.tokens
            if key not in memo:
                memo[key] = likeness(leaf, name)
            words[i, j] = memo[key]
    names = words @ np.array([_LAST_WORD, _WORDS])
    if equal is not None:
        names = names + _EQUAL * equal
    ours, theirs = _order(leaves), _order(torch)
    # Squares, so that two pairs that cross cost more than two that don't.
    order = np.abs(ours[:, None] - theirs[None, :]) ** 2
    sure = _SIBLINGS * siblings + names
    gain = sure - _ORDER * order
    # Imported where it's used: it takes longer than the rest of this package.
    from scipy.optimize import (  # type: ignore[import-untyped]
        linear_sum_assignment,
    )

    worst = np.abs(gain).max(initial=1.0) * (len(leaves) + len(torch) + 1)
    rows, columns = linear_sum_assignment(np.where(fits, -gain, worst))
    found = []
    for i, j in zip(rows.tolist(), columns.tolist(), strict=True):
        if not fits[i, j]:
            continue
        others = fits[i].copy()
        others[j] = False
        by = "order"
        for what, score in (("siblings", siblings), ("name", sure)):
            if (score[i, j] > score[i, others] + 1e-9).all():
                by = what
                break
        found.append(Settled(i, j, by))
    return found


def _order(labels: Sequence[Label]) -> npt.NDArray[np.float64]:
    """The labels' places in the natural order, from 0 to 1."""
    keys = [(label.numbers, label.rank) for label in labels]
    places = {key: place for place, key in enumerate(sorted(set(keys)))}
    return np.array([places[key] for key in keys]) / max(1, len(places) - 1)
