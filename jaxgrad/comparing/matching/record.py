"""What the search for partners has found so far, and what is still free."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from jaxgrad.comparing.layouts import Layout, Piece
from jaxgrad.comparing.matching.content import (
    MOST,
    Block,
    Sample,
    sample,
    share,
    uncovered,
)
from jaxgrad.comparing.matching.cutting import joined, parts_of
from jaxgrad.comparing.matching.orders import (
    Places,
    Unit,
    View,
    describe,
    offsets_of,
    unit,
)
from jaxgrad.comparing.matching.settling import Known, Label, ranks, tokens_of

Array = npt.NDArray[Any]
Names = tuple[str, ...]
Offsets = tuple[Places, ...]

# A match with fewer equal entries is taken only if there is nothing better.
_GOOD = 0.95


@dataclass(frozen=True, eq=False)
class Ambiguity:
    """What the contents left open.

    Attributes:
      paths: leaves whose contents are equal; `w 1/3` is the second of three parts.
      names: the parameters they were paired with, in the same order: any other pairing
        of the two lists fits the contents as well.
      settled: what decided: `siblings` (their partners' module), `name` or `order`; or
        `layout`, if it's one leaf, whose axes may also be in another order, since its
        contents are constant or symmetric.
      alternatives: the other layouts of that leaf, if it's a whole one.
    """

    paths: tuple[str, ...]
    names: tuple[str, ...]
    settled: str
    alternatives: tuple[Layout, ...] = ()


class Fit(NamedTuple):
    """A unit that fits a block, in some orders: functions that return the offsets."""

    unit: Unit
    orders: tuple[Callable[[], Offsets], ...]


def fit_of(block: Block, one: Unit, orders: Iterable[View]) -> Fit:
    """A unit in these orders."""

    def lazily(view: View) -> Callable[[], Offsets]:
        return lambda: offsets_of(view, block.shape, one.base)

    return Fit(one, tuple(lazily(view) for view in orders))


class Record:
    """The arrays of both sides, and the pairs that are taken."""

    def __init__(
        self, leaves: Mapping[str, Array], parameters: Mapping[str, Array]
    ) -> None:
        self.leaves = dict(leaves)
        self.parameters = {
            name: np.ascontiguousarray(array).reshape(array.shape)
            for name, array in parameters.items()
        }
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(a.shape) for name, a in self.parameters.items()
        }
        # The sums of two parameters are added to these.
        self.flat: dict[Names, Array] = {
            (name,): array.reshape(-1) for name, array in self.parameters.items()
        }
        self.pieces: dict[str, list[Piece]] = defaultdict(list)
        self.equal: Counter[str] = Counter()  # how many entries of a leaf are equal
        self.ambiguous: list[Ambiguity] = []
        self.known = Known()
        self.failed: set[tuple[Block, Names, int]] = set()
        self._poor: dict[Block, tuple[float, Fit]] = {}
        self._ranks = {**ranks(parameters)}, {**ranks(leaves)}
        self._taken: Counter[str] = Counter()
        self._claimed: set[tuple[str, int]] = set()
        self._texts: dict[tuple[str, int], Counter[str]] = defaultdict(Counter)
        self._samples: dict[Block, Sample] = {}
        self._depths: dict[tuple[str, ...], Counter[int]] = defaultdict(Counter)

    def layouts(self) -> dict[str, Layout]:
        """The layouts of the leaves that are covered by most."""
        found = {}
        for path, pieces in self.pieces.items():
            shape = tuple(self.leaves[path].shape)
            rest = sum(block.size for block in self.rest([self.block(path)]))
            if rest <= (1 - MOST) * self.leaves[path].size:
                one = joined(pieces)
                text = describe(one, shape, self.shapes)
                found[path] = Layout(path, shape, tuple(one), text)
        return found

    # --- Leaves and their blocks.

    def block(self, path: str) -> Block:
        """A leaf as a block."""
        shape = tuple(self.leaves[path].shape)
        return Block(path, (0,) * len(shape), shape)

    def rest(self, blocks: Iterable[Block]) -> list[Block]:
        """What isn't covered yet of the blocks."""
        pieces = self.pieces
        return [r for b in blocks for r in uncovered(b, pieces.get(b.path, []))]

    def values(self, block: Block) -> Array:
        """A block's numbers."""
        return np.asarray(self.leaves[block.path][block.region])

    def sample(self, block: Block) -> Sample:
        """A sample of a block's numbers."""
        if block not in self._samples:
            self._samples[block] = sample(self.values(block))
        return self._samples[block]

    def label(self, block: Block) -> Label:
        """What a block is called."""
        marks = []
        whole = self.leaves[block.path].shape
        for first, length, all_of in zip(block.start, block.shape, whole, strict=True):
            if 0 < length < all_of:
                marks.append(f"{first // length}/{all_of // length}")
        path = block.path
        return Label(path, tuple(marks), tokens_of(path), self._ranks[1][path])

    def depth(self, block: Block) -> int:
        """How many layers the block's siblings are stacked of; 0 if they aren't."""
        for prefix in self.label(block).prefixes:
            depths = self._depths[prefix]
            if depths:
                return max(depths, key=lambda depth: depths[depth])
        return 0

    # --- Parameters and their parts.

    def units(
        self, sizes: Iterable[int], names: Iterable[Names], parts: bool
    ) -> list[Unit]:
        """The parameters of some sizes; if `parts`, also equal parts of larger ones."""
        wanted = {size for size in sizes if size}
        found = []
        for name in names:
            one = unit(name, self.shapes[name[0]])
            if one.size in wanted:
                found.append(one)
            if parts and any(
                one.size > size and one.size % size == 0 for size in wanted
            ):
                found += [part for part in parts_of(one) if part.size in wanted]
        return found

    def name(self, one: Unit) -> Label:
        """What a unit is called."""
        name = one.names[0]
        marks = () if one.mark is None else (f"{one.mark[0]}/{one.mark[1]}",)
        return Label(name, marks, tokens_of(name), self._ranks[0][name])

    def free(self, one: Unit) -> bool:
        """Whether no leaf has this unit yet."""
        return all(
            self._taken[name] + one.size <= self.parameters[name].size
            and (name, one.base) not in self._claimed
            for name in one.names
        )

    # --- Pairs.

    def share(self, block: Block, names: Names, offsets: Offsets) -> float:
        """The share of a block's entries that are those of the parameters."""
        piece = Piece(names, block.start, offsets)
        return share(self.leaves[block.path], piece, self.parameters)

    def commit(self, block: Block, fit: Fit, least: float = _GOOD) -> bool:
        """Takes a fit, in the order that suits best, if enough entries agree.

        If only most agree, it's kept for `take_poor`; `least` 0 takes it unseen.
        """
        one = fit.unit
        options = [order() for order in fit.orders]
        shares = [0.0] * len(options)
        if least:
            constant = self.sample(block).constant
            looked = options[:1] if constant else options
            shares = [self.share(block, one.names, offsets) for offsets in looked]
            shares *= len(options) // len(looked)
        best = max(shares)
        if best < least:
            if best >= MOST and best > self._poor.get(block, (0.0, fit))[0]:
                self._poor[block] = best, fit
            self.failed.add((block, one.names, one.base))
            return False
        kept = [i for i, equal in enumerate(shares) if equal >= best - 1e-3]
        pieces = [Piece(one.names, block.start, options[i]) for i in kept]
        piece = self._preferred(block, pieces)
        self.equal[block.path] += round(best * block.size) if least else 0
        self.pieces[block.path].append(piece)
        self.claim(block, one)
        return True

    def take_poor(self) -> None:
        """Takes the matches with many other entries, where nothing was better."""
        for block, (_, fit) in self._poor.items():
            if self.rest([block]) == [block]:
                self.commit(block, fit, least=MOST)

    def claim(self, block: Block, one: Unit) -> None:
        """Takes note of a pair."""
        label = self.label(block)
        self.known.add(label, self.name(one))
        whole = self.leaves[block.path].shape
        stacked = bool(whole) and block.shape[0] == 1 < whole[0]
        for prefix in label.prefixes:
            self._depths[prefix][whole[0] if stacked else 0] += 1
        for name in one.names:
            self._taken[name] += block.size
            self._claimed.add((name, one.base))

    def _preferred(self, block: Block, pieces: Sequence[Piece]) -> Piece:
        """Of several layouts, that of leaves of the same name, or the usual one."""
        texts = [describe([p], block.shape, self.shapes) for p in pieces]
        # That axes are split otherwise than they were joined is least likely.
        likely = [i for i, text in enumerate(texts) if "reshaped" not in text]
        if likely:
            pieces, texts = [pieces[i] for i in likely], [texts[i] for i in likely]
        last, rank = tokens_of(block.path)[-1], len(block.shape)
        seen = self._texts[last, rank]
        if len(pieces) == 1:
            seen[texts[0]] += 1
            return pieces[0]
        usual = "as it is"
        if last == "kernel":
            usual = "transposed" if rank == 2 else f"axes {(*range(2, rank), 1, 0)}"
        wanted = [*(text for text, _ in seen.most_common()), usual, "as it is"]
        at = next((texts.index(text) for text in wanted if text in texts), 0)
        others: tuple[Layout, ...] = ()
        if block.shape == self.leaves[block.path].shape:
            others = tuple(
                Layout(block.path, block.shape, (piece,), text)
                for i, (piece, text) in enumerate(zip(pieces, texts, strict=True))
                if i != at
            )
        path = " ".join((block.path, *self.label(block).marks))
        names = (pieces[0].names[0],)
        self.ambiguous.append(Ambiguity((path,), names, "layout", others))
        return pieces[at]
