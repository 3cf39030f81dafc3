"""The search for the parameters behind each leaf, stage by stage."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from jaxgrad.comparing.content import (
    MOST,
    Block,
    Sample,
    agree,
    count,
    sample,
    share,
    uncovered,
)
from jaxgrad.comparing.layouts import Layout, Piece
from jaxgrad.comparing.lookup import look_up
from jaxgrad.comparing.orders import Unit, View, describe, offsets_of, unit, views
from jaxgrad.comparing.settling import Known, Label, likeness, ranks, settle, tokens_of

Array = npt.NDArray[Any]
Names = tuple[str, ...]
Places = npt.NDArray[np.int64]
# In how many equal parts a leaf or parameter is cut, by shape alone.
_PARTS = range(2, 9)
# Plain contents of so few entries are equal by chance.
_TINY = 2
_SURE = 0.9
# A match of fewer equal entries is taken if there is nothing better.
_GOOD = 0.95


class Ambiguity(NamedTuple):
    """What the contents left open.

    Attributes:
      paths: leaves (or parts of leaves) whose contents are equal, or one leaf.
      names: the parameters they were paired with, in the same order: any other pairing
        of the two lists fits the contents as well.
      settled: `siblings`, `name` or `order`; or `layout`, if it's one leaf whose axes
        may be in another order (its contents are constant, or symmetric).
      alternatives: the other layouts of that leaf, as texts.
    """

    paths: tuple[str, ...]
    names: tuple[str, ...]
    settled: str
    alternatives: tuple[str, ...] = ()


class Fit(NamedTuple):
    """A unit that fits a block, in some orders (each as offsets)."""

    unit: Unit
    orders: tuple[Callable[[], tuple[Places, ...]], ...]


class Search:
    """What is known so far."""

    def __init__(
        self, leaves: Mapping[str, Array], parameters: Mapping[str, Array]
    ) -> None:
        self.leaves = dict(leaves)
        self.parameters = {
            n: np.ascontiguousarray(a).reshape(a.shape) for n, a in parameters.items()
        }
        self.shapes = {name: tuple(a.shape) for name, a in self.parameters.items()}
        self.flat: dict[Names, Array] = {
            (name,): a.reshape(-1) for name, a in self.parameters.items()
        }
        self.pieces: dict[str, list[Piece]] = defaultdict(list)
        self.equal: Counter[str] = Counter()
        self.ambiguous: list[Ambiguity] = []
        self._leaf_ranks, self._ranks = ranks(leaves), ranks(parameters)
        self._known = Known()
        self._taken: Counter[Names] = Counter()
        self._claimed: set[tuple[Names, int]] = set()
        self._layouts: dict[tuple[str, int], Counter[str]] = defaultdict(Counter)
        self._samples: dict[Block, Sample] = {}
        self._failed: set[tuple[Block, Names, int]] = set()
        self._poor: dict[Block, tuple[float, Fit]] = {}

    # --- What the caller asks for.

    def find(self, paths: Iterable[str]) -> None:
        """Looks for the partners of some leaves."""
        todo = [self._block(path) for path in paths]
        plain = [block for block in todo if self._sample(block).plain]
        rest = [block for block in todo if not self._sample(block).plain]
        rest = self._informative(rest, list(self.flat))
        if rest and self._add_sums():
            rest = self._informative(rest, list(self.flat))
        self._take_poor()
        rest = self._open(rest)
        tiny = [block for block in plain if block.size <= _TINY]
        plain = [block for block in plain if block.size > _TINY]
        for size in sorted({block.size for block in plain}, reverse=True):
            some = [block for block in plain if block.size == size]
            self._settle(some, self._fits(some, self._units([size])))
        plain = self._open(plain)
        plain = self._cut(plain, list(self.flat))
        self._leftovers(rest)
        self._leftovers(tiny, tiny=True)
        self._leftovers(plain)
        self._join_sums()

    def find_in(self, path: str, name: str) -> bool:
        """Looks for a leaf in one parameter; False if the shapes can't fit."""
        block = self._block(path)
        plain = self._sample(block).plain
        if not plain and not self._informative([block], [(name,)]):
            return True
        self._take_poor()
        if not self._open([block]):
            return True
        one = unit((name,), self.shapes[name])
        options = (
            [one]
            if one.size == block.size
            else [part for part in _parts(one) if part.size == block.size]
        )
        options = [u for u in options if self._views(block, u)]
        if not options:
            return False
        free = [u for u in options if self._free(u)] or options
        self._commit(block, self._by_shape(block, free[0]), checked=False)
        return True

    def take(self, layout: Layout) -> None:
        """Takes a layout that is given."""
        block = self._block(layout.path)
        for piece in layout.pieces:
            one = unit(piece.names, self.shapes[piece.names[0]])
            self._claim(block, one)

    def complete(self) -> dict[str, list[Piece]]:
        """The pieces of the leaves that are covered by most."""
        return {
            path: sorted(pieces, key=lambda piece: piece.start)
            for path, pieces in self.pieces.items()
            if sum(count(p.shape) for p in pieces) >= MOST * self.leaves[path].size
        }

    # --- The stages.

    def _informative(self, todo: list[Block], names: list[Names]) -> list[Block]:
        while todo:
            before = todo
            sizes = {block.size for block in todo}
            todo = self._settle(todo, self._fits(todo, self._units(sizes, names, 0)))
            todo = self._look_up(todo, names)
            if todo == before:
                break
        paths = dict.fromkeys(block.path for block in todo)
        todo = [b for path in paths for b in self._rest(self._block(path))]
        for block in todo:
            units = self._units({block.size}, names, 0)
            self._settle([block], self._fits([block], units, thorough=True))
        return self._cut(self._open(todo), names)

    def _take_poor(self) -> None:
        """Takes the matches with many other entries, where nothing is better."""
        for block, (_, fit) in self._poor.items():
            if self._open([block]):
                self._commit(block, fit, lenient=True)

    def _look_up(self, todo: list[Block], names: list[Names]) -> list[Block]:
        if not todo:
            return todo
        flat = {n: self.flat[n] for n in names}
        some = [b for b in todo if b.shape and not self._sample(b).constant]
        found = look_up([(b, self._values(b)) for b in some], flat)
        fits: dict[Block, list[Fit]] = {}
        cut: dict[Block, list[Block]] = {}
        for block, one in zip(some, found, strict=True):
            fits[block] = [
                Fit(self._unit_at(names, offsets, block), (_constant(offsets),))
                for names, offsets in one.offsets.items()
                if self._share(block, names, offsets) >= MOST
            ]
            if one.cuts is not None:
                cut[block] = _cut_at(block, *one.cuts)
        left = self._settle([b for b in some if fits[b]], fits)
        result = []
        for block in todo:
            if block in cut:
                result += cut[block]
            elif block in left or not fits.get(block):
                result.append(block)
        return result

    def _cut(self, todo: list[Block], names: list[Names]) -> list[Block]:
        """Cuts leaves and parameters in equal parts, and tries those."""
        for block in todo:
            if not self._open([block]):
                continue
            plain = self._sample(block).plain
            # Whole parameters first, in few parts.
            cuttings = list(_cuttings(block))
            for parts, blocks in [
                *((0, c) for c in cuttings[1:]),
                *((1, c) for c in cuttings),
            ]:
                units = self._units({blocks[0].size}, names, parts)
                if plain:
                    units = [u for u in units if self._free(u)]
                if not units or (plain and len(units) < len(blocks)):
                    continue
                probes = {blocks[0], blocks[len(blocks) // 2], blocks[-1]}
                if all(self._fits([b], units)[b] for b in probes):
                    self._settle(blocks, self._fits(blocks, units))
                    break
        return self._open(todo)

    def _leftovers(self, todo: list[Block], tiny: bool = False) -> None:
        """Pairs what is left by closeness, shape and name: their values differ."""
        todo = [rest for block in todo for rest in self._rest(block)]
        for certain in (True, False):
            todo = [block for block in todo if self._open([block])]
            for size in sorted({block.size for block in todo}, reverse=True):
                blocks = [block for block in todo if block.size == size]
                units = [u for u in self._units([size]) if self._free(u)]
                if units:
                    self._guess(blocks, units, certain, tiny)

    def _guess(
        self, blocks: list[Block], units: list[Unit], certain: bool, tiny: bool
    ) -> None:
        fits = np.array([[bool(self._views(b, u)) for u in units] for b in blocks])
        if certain:
            close = [[self._closest(b, u)[0] > _SURE for u in units] for b in blocks]
            fits &= np.array(close)
        equal = None
        if tiny:
            equal = np.array([[self._equal(b, u) for u in units] for b in blocks])
        ours, theirs = [self._label(b) for b in blocks], [self._name(u) for u in units]
        for pair in settle(ours, theirs, fits, self._known, equal):
            block, one = blocks[pair.leaf], units[pair.torch]
            alone = fits[pair.leaf].sum() == 1 and fits[:, pair.torch].sum() == 1
            same, words = likeness(ours[pair.leaf], theirs[pair.torch])
            near = self._known.near(ours[pair.leaf], [theirs[pair.torch]])[0] > 0
            named = words > 0 and (same or near)
            right = equal is not None and equal[pair.leaf, pair.torch]
            if certain:
                fit = Fit(one, (self._closest(block, one)[1],))
                self._commit(block, fit, checked=False)
            elif alone or named or right or (near and pair.by == "siblings"):
                self._commit(block, self._by_shape(block, one), checked=False)

    def _add_sums(self) -> list[Names]:
        """The sums of two parameters of one module and shape, as further parameters."""
        groups: dict[Any, list[str]] = defaultdict(list)
        for name, shape in self.shapes.items():
            tokens = tokens_of(name)
            if len(shape) == 1:
                groups[tokens[:-1], shape].append(name)
        found: list[Names] = []
        for names in groups.values():
            if len(names) > 16:
                continue
            for first, second in itertools.combinations(names, 2):
                a, b = self.parameters[first], self.parameters[second]
                if a.dtype == b.dtype and a.any() and b.any():
                    self.flat[first, second] = (a + b).reshape(-1)
                    found.append((first, second))
        return found

    def _join_sums(self) -> None:
        """Adds a parameter of zeros to its twin, as an LSTM's second bias."""
        used = {n for ps in self.pieces.values() for p in ps for n in p.names}
        for name, array in self.parameters.items():
            tokens = tokens_of(name)
            if name in used or array.any() or "_hh" not in tokens[-1]:
                continue
            twin = name[: -len(tokens[-1])] + tokens[-1].replace("_hh", "_ih")
            if self.shapes.get(twin) != array.shape:
                continue
            for path, pieces in self.pieces.items():
                self.pieces[path] = [
                    p._replace(names=(twin, name)) if p.names == (twin,) else p
                    for p in pieces
                ]

    # --- Fits, and what settles them.

    def _fits(
        self, blocks: Sequence[Block], units: Sequence[Unit], thorough: bool = False
    ) -> dict[Block, list[Fit]]:
        """The units that fit each block, on a sample of its entries."""
        groups: dict[Any, list[Unit]] = defaultdict(list)
        for one in units:
            dtype = self.flat[one.names].dtype
            summed = one.names if len(one.names) > 1 else ()
            groups[one.size, one.shape, one.steps, dtype, summed].append(one)
        taken: dict[Any, Array] = {}
        found: dict[Block, list[Fit]] = {}
        for block in blocks:
            mine, scores = [], []
            known = self._sample(block)
            for key, same in groups.items():
                size, shape, steps, *_ = key
                if size != block.size:
                    continue
                slack = self._slack(same[0].names)
                orders: dict[int, list[View]] = defaultdict(list)
                for view in views(block.shape, shape, steps, thorough):
                    here = (key, block.shape, view)
                    if here not in taken:
                        at = view.places(known.places)
                        taken[here] = np.stack(
                            [self.flat[u.names][u.base + at] for u in same]
                        )
                    equal = agree(known.values[None], taken[here], slack)
                    for row in np.flatnonzero(equal.mean(axis=1) >= MOST).tolist():
                        if (block, same[row].names, same[row].base) not in self._failed:
                            orders[row].append(view)
                for row, fitting in orders.items():
                    one = same[row]
                    for view in fitting:
                        at = one.base + view.places(known.rare_places)
                        rare = agree(known.rare, self.flat[one.names][at], slack)
                        mine.append((one, view))
                        scores.append(float(rare.mean()) if len(rare) else 1.0)
            best = max(scores, default=0.0)
            chosen: dict[Unit, list[View]] = defaultdict(list)
            for (one, view), score in zip(mine, scores, strict=True):
                if known.plain or score >= best - 0.1:
                    chosen[one].append(view)
            found[block] = [
                Fit(one, tuple(_lazily(v, block.shape, one.base) for v in orders_of))
                for one, orders_of in chosen.items()
            ]
        return found

    def _settle(
        self, todo: list[Block], fits: Mapping[Block, Sequence[Fit]]
    ) -> list[Block]:
        """Pairs the blocks with units that fit; returns those that are left."""
        for blocks, units in _components([b for b in todo if fits.get(b)], fits):
            options = {(b, f.unit): f for b in blocks for f in fits[b]}
            if len(blocks) == 1 and len(units) == 1:
                fit = options[blocks[0], units[0]]
                if self._free(fit.unit) or not self._sample(blocks[0]).plain:
                    self._commit(blocks[0], fit)
                continue
            self._pair(blocks, units, options, shared=False)
            left = [b for b in self._open(blocks) if not self._sample(b).plain]
            if left:
                self._pair(left, units, options, shared=True)
        return self._open(todo)

    def _pair(
        self,
        blocks: list[Block],
        units: list[Unit],
        options: Mapping[tuple[Block, Unit], Fit],
        shared: bool,
    ) -> None:
        groups = [[b] for b in blocks] if shared else [blocks]
        for group in groups:
            fits = np.array(
                [
                    [(b, u) in options and (shared or self._free(u)) for u in units]
                    for b in group
                ]
            )
            ours = [self._label(b) for b in group]
            theirs = [self._name(u) for u in units]
            by: dict[str, list[tuple[str, str]]] = defaultdict(list)
            for pair in settle(ours, theirs, fits, self._known):
                block, one = group[pair.leaf], units[pair.torch]
                if (
                    self._commit(block, options[block, one])
                    and fits[pair.leaf].sum() > 1
                ):
                    by[pair.by].append(
                        (_text(ours[pair.leaf]), _text(theirs[pair.torch]))
                    )
            for settled, pairs in by.items():
                paths, names = zip(*pairs, strict=True)
                self.ambiguous.append(Ambiguity(paths, names, settled))

    def _commit(
        self, block: Block, fit: Fit, checked: bool = True, lenient: bool = False
    ) -> bool:
        """Takes a fit, in the order that suits best, if most entries agree."""
        one = fit.unit
        options = [order() for order in fit.orders]
        shares = [0.0] * len(options)
        if checked:
            if len(options) > 1 and self._sample(block).constant:
                shares = [self._share(block, one.names, options[0])] * len(options)
            else:
                shares = [self._share(block, one.names, o) for o in options]
            best = max(shares)
            if MOST <= best < _GOOD and not lenient:
                # Perhaps something explains it better.
                if best > self._poor.get(block, (0.0, fit))[0]:
                    self._poor[block] = best, fit
            if best < (MOST if lenient else _GOOD):
                self._failed.add((block, one.names, one.base))
                return False
            kept = [i for i, part in enumerate(shares) if part >= best - 1e-3]
            options, shares = [options[i] for i in kept], [shares[i] for i in kept]
        pieces = [Piece(one.names, block.start, offsets) for offsets in options]
        texts = [describe([p], block.shape, self.shapes) for p in pieces]
        chosen = self._preferred(block, one, texts)
        if len(options) > 1:
            others = tuple(t for i, t in enumerate(texts) if i != chosen)
            named = (block.path,), (one.names[0],)
            self.ambiguous.append(Ambiguity(*named, "layout", others))
        else:
            self._layouts[_last(block.path), len(block.shape)][texts[0]] += 1
        if checked:
            self.equal[block.path] += round(shares[chosen] * block.size)
        self.pieces[block.path].append(pieces[chosen])
        self._claim(block, one)
        return True

    def _preferred(self, block: Block, one: Unit, texts: Sequence[str]) -> int:
        """Of several layouts, that of leaves of the same name, or the usual one."""
        if len(texts) == 1:
            return 0
        for text, _ in self._layouts[_last(block.path), len(block.shape)].most_common():
            if text in texts:
                return texts.index(text)
        rank = len(block.shape)
        usual = "as it is"
        if _last(block.path) == "kernel":
            usual = "transposed" if rank == 2 else f"axes {(*range(2, rank), 1, 0)}"
        for text in (usual, "as it is"):
            if text in texts:
                return texts.index(text)
        return 0

    def _claim(self, block: Block, one: Unit) -> None:
        self._known.add(self._label(block), self._name(one))
        for name in one.names:
            self._taken[name,] += block.size
            self._claimed.add(((name,), one.base))

    def _free(self, one: Unit) -> bool:
        """Whether no leaf has this unit yet."""
        for name in one.names:
            total = self.parameters[name].size
            if self._taken[name,] + one.size > total and total:
                return False
            if ((name,), one.base) in self._claimed:
                return False
        return True

    # --- Small things.

    def _block(self, path: str) -> Block:
        shape = tuple(self.leaves[path].shape)
        return Block(path, (0,) * len(shape), shape)

    def _rest(self, block: Block) -> list[Block]:
        """What isn't covered yet of a block."""
        pieces = self.pieces.get(block.path, [])
        if not pieces:
            return [block]
        whole = self.leaves[block.path].shape
        return uncovered(block.path, whole, pieces) if block.shape else []

    def _open(self, blocks: Iterable[Block]) -> list[Block]:
        """Those that aren't covered yet, whole."""
        return [
            block
            for block in blocks
            if not any(
                uncovered(block.path, block.shape, [_shifted(piece, block)])
                != [Block(block.path, (0,) * len(block.shape), block.shape)]
                for piece in self.pieces.get(block.path, [])
            )
        ]

    def _values(self, block: Block) -> Array:
        return np.asarray(self.leaves[block.path][block.region])

    def _sample(self, block: Block) -> Sample:
        if block not in self._samples:
            self._samples[block] = sample(self._values(block))
        return self._samples[block]

    def _units(
        self,
        sizes: Iterable[int],
        names: Iterable[Names] | None = None,
        parts: int = 1,
    ) -> list[Unit]:
        """The parameters of some sizes, and if `parts` also equal parts of others."""
        wanted, found = set(sizes), []
        for name in self.flat if names is None else names:
            one = unit(name, self.shapes[name[0]])
            if one.size in wanted:
                found.append(one)
            elif parts and one.size > min(wanted, default=0):
                if not any(size and one.size % size == 0 for size in wanted):
                    continue
                found += [u for u in _parts(one) if u.size in wanted]
        return found

    def _unit_at(self, names: Names, offsets: Sequence[Places], block: Block) -> Unit:
        one = unit(names, self.shapes[names[0]])
        if one.size == block.size:
            return one
        base = sum(int(o.min()) for o in offsets)
        mark = None
        if base % block.size == 0 and one.size % block.size == 0:
            mark = base // block.size, one.size // block.size
        return Unit(names, block.shape, (), base, mark)

    def _views(self, block: Block, one: Unit) -> tuple[View, ...]:
        return views(block.shape, one.shape, one.steps)

    def _by_shape(self, block: Block, one: Unit) -> Fit:
        orders = self._views(block, one)
        return Fit(one, tuple(_lazily(v, block.shape, one.base) for v in orders))

    def _closest(
        self, block: Block, one: Unit
    ) -> tuple[float, Callable[[], tuple[Places, ...]]]:
        """The order in which the values are most alike, and how much."""
        known = self._sample(block)
        flat = self.flat[one.names]
        best: tuple[float, Callable[[], tuple[Places, ...]]] | None = None
        for view in self._views(block, one):
            ours = known.values.astype(np.float64)
            theirs = flat[one.base + view.places(known.places)].astype(np.float64)
            ours, theirs = ours - ours.mean(), theirs - theirs.mean()
            norm = float(np.linalg.norm(ours) * np.linalg.norm(theirs))
            alike = 0.0
            if norm > 0 and np.isfinite(norm) and len(ours) > 4:
                alike = abs(float(ours @ theirs)) / norm
            if best is None or alike > best[0]:
                best = alike, _lazily(view, block.shape, one.base)
        assert best is not None
        return best

    def _equal(self, block: Block, one: Unit) -> bool:
        flat = self.flat[one.names][one.base : one.base + one.size]
        return bool(agree(self._values(block).reshape(-1), flat).all())

    def _share(self, block: Block, names: Names, offsets: tuple[Places, ...]) -> float:
        piece = Piece(names, block.start, offsets)
        return share(self.leaves[block.path], piece, self.parameters)

    def _slack(self, names: Names) -> float:
        if len(names) == 1:
            return 0.0
        return float(sum(np.abs(self.parameters[n]).max(initial=0) for n in names))

    def _label(self, block: Block) -> Label:
        marks = []
        for start, length, whole in zip(
            block.start, block.shape, self.leaves[block.path].shape, strict=True
        ):
            if length and length < whole:
                marks.append(f"{start // length}/{whole // length}")
        path = block.path
        return Label(path, tuple(marks), tokens_of(path), self._leaf_ranks[path])

    def _name(self, one: Unit) -> Label:
        name = one.names[0]
        marks = () if one.mark is None else (f"{one.mark[0]}/{one.mark[1]}",)
        return Label(name, marks, tokens_of(name), self._ranks[name])


def _text(label: Label) -> str:
    return " ".join((label.name, *label.marks))


def _last(path: str) -> str:
    return tokens_of(path)[-1]


def _lazily(
    view: View, shape: tuple[int, ...], base: int
) -> Callable[[], tuple[Places, ...]]:
    return lambda: offsets_of(view, shape, base)


def _constant(offsets: tuple[Places, ...]) -> Callable[[], tuple[Places, ...]]:
    return lambda: offsets


def _shifted(piece: Piece, block: Block) -> Piece:
    start = tuple(a - b for a, b in zip(piece.start, block.start, strict=True))
    return piece._replace(start=start)


def _parts(one: Unit) -> Iterator[Unit]:
    """A parameter's equal parts, along its first two axes."""
    for axis in range(min(2, len(one.shape))):
        length = one.shape[axis]
        for many in sorted({*_PARTS, length} if axis == 0 else set(_PARTS)):
            if 1 < many <= length and length % many == 0 and many <= 256:
                for index in range(many):
                    yield unit(one.names, one.shape, (axis, index, many))


def _cut_at(block: Block, axis: int, cuts: Sequence[int]) -> list[Block]:
    ends = [0, *cuts, block.shape[axis]]
    found = []
    for first, last in itertools.pairwise(ends):
        start, shape = list(block.start), list(block.shape)
        start[axis] += first
        shape[axis] = last - first
        found.append(Block(block.path, tuple(start), tuple(shape)))
    return found


def _cuttings(block: Block) -> Iterator[list[Block]]:
    """Ways to cut a block in equal parts: not at all, along one axis, stacked too."""
    yield [block]
    single = []
    for axis, length in enumerate(block.shape):
        for many in sorted({*_PARTS, length} if axis == 0 else set(_PARTS)):
            if 1 < many <= length and length % many == 0 and many <= 256:
                single.append((axis, many))
    single.sort(key=lambda cut: cut[0] != 0 or cut[1] != block.shape[0])
    for axis, many in single:
        step = block.shape[axis] // many
        yield _cut_at(block, axis, range(step, block.shape[axis], step))
    if not block.shape or not 1 < block.shape[0] <= 256:
        return
    layers = _cut_at(block, 0, range(1, block.shape[0]))
    for axis, many in single:
        if axis:
            step = block.shape[axis] // many
            yield [
                small
                for layer in layers
                for small in _cut_at(layer, axis, range(step, block.shape[axis], step))
            ]


def _components(
    blocks: Sequence[Block], fits: Mapping[Block, Sequence[Fit]]
) -> list[tuple[list[Block], list[Unit]]]:
    """Groups of blocks and units that fit each other; single pairs come first."""
    group: dict[Any, Any] = {}

    def root(x: Any) -> Any:
        while group.setdefault(x, x) != x:
            group[x] = group[group[x]]
            x = group[x]
        return x

    for block in blocks:
        for fit in fits[block]:
            group[root(fit.unit)] = root(block)
    found: dict[Any, tuple[list[Block], dict[Unit, None]]] = {}
    for block in blocks:
        mine, units = found.setdefault(root(block), ([], {}))
        mine.append(block)
        units.update(dict.fromkeys(fit.unit for fit in fits[block]))
    result = [(mine, list(units)) for mine, units in found.values()]
    return sorted(result, key=lambda r: (len(r[0]) + len(r[1]) > 2, -r[0][0].size))
