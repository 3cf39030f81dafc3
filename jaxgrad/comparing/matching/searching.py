"""The search for the parameters behind each leaf, stage by stage."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxgrad.comparing.layouts import Layout
from jaxgrad.comparing.matching.content import MOST, Block, agree, slack_of
from jaxgrad.comparing.matching.cutting import cut_at, cuttings, layers_of, parts_of
from jaxgrad.comparing.matching.lookup import look_up
from jaxgrad.comparing.matching.orders import Unit, View, unit, views
from jaxgrad.comparing.matching.record import Ambiguity, Fit, Names, Record, fit_of
from jaxgrad.comparing.matching.settling import likeness, settle, tokens_of

Array = npt.NDArray[Any]

# Plain contents of so few entries are equal by chance.
_TINY = 2
# Values that correlate so much, in so many entries, are the same ones in this order.
_ALIKE, _FEW = 0.9, 16
# A stack has no more layers than these.
_DEEP = 256
# So many entries of a sample rule out most units.
_SCREEN = 24
# In a module with more equal shapes than these, no sums are tried.
_SUMS = 16


class Search(Record):
    """Looks for the partners of leaves, and takes note of them."""

    def find(self, paths: Iterable[str]) -> None:
        """Looks for the partners of some leaves."""
        todo = [self.block(path) for path in paths]
        plain = [block for block in todo if self.sample(block).plain]
        rest = [block for block in todo if not self.sample(block).plain]
        rest = self._by_content(rest, list(self.flat))
        if rest and self._add_sums():
            rest = self._by_content(rest, list(self.flat))
        self.take_poor()
        tiny = [block for block in plain if block.size <= _TINY]
        plain = [block for block in plain if block.size > _TINY]
        self._plain(plain)
        self.take_poor()
        self._leftovers(rest)
        self._leftovers(tiny, tiny=True)
        self._leftovers(plain)
        self._add_zeros()

    def find_in(self, path: str, name: str) -> bool:
        """Looks for a leaf in one parameter; False if the shapes can't fit."""
        block = self.block(path)
        if not self.sample(block).plain:
            self._by_content([block], [(name,)])
            self.take_poor()
        if self.rest([block]) != [block]:
            return True
        one = unit((name,), self.shapes[name])
        fitting = [u for u in (one, *parts_of(one)) if u.size == block.size]
        options = [u for u in fitting if _orders(block, u)]
        for option in [u for u in options if self.free(u)] + options[:1]:
            return self.commit(
                block, fit_of(block, option, _orders(block, option)), 0.0
            )
        return False

    def take(self, layout: Layout) -> None:
        """Takes note of a layout that is given."""
        for piece in layout.pieces:
            one = unit(piece.names, self.shapes[piece.names[0]])
            self.claim(self.block(layout.path), one)

    # --- The stages.

    def _by_content(self, todo: list[Block], names: list[Names]) -> list[Block]:
        """Contents that tell: by samples, and by looking values up."""
        while todo:
            before = todo
            units = self.units({block.size for block in todo}, names, parts=False)
            todo = self._settle(todo, self._fits(todo, units))
            todo = self._look_up(self._cut(todo, names), names)
            if todo == before:
                break
        # What was cut in vain is whole again.
        paths = dict.fromkeys(block.path for block in todo)
        todo = self.rest(self.block(path) for path in paths)
        for block in todo:
            if not self.sample(block).distinct:
                units = self.units({block.size}, names, parts=False)
                self._settle([block], self._fits([block], units, thorough=True))
        return self.rest(todo)

    def _plain(self, todo: list[Block]) -> None:
        """Ones and zeros: cut as their siblings are, the largest first."""
        names = list(self.flat)
        todo = [
            layer
            for block in todo
            for layer in (
                layers_of(block)
                if block.shape and 1 < block.shape[0] == self.depth(block)
                else [block]
            )
        ]
        for size in sorted({block.size for block in todo}, reverse=True):
            some = [block for block in todo if block.size == size]
            units = self.units([size], names, parts=True)
            self._settle(some, self._fits(some, [u for u in units if self.free(u)]))
        self._cut(self.rest(todo), names)

    def _cut(self, todo: list[Block], names: list[Names]) -> list[Block]:
        """Cuts leaves and parameters in equal parts, and tries those."""
        for block in todo:
            plain = self.sample(block).plain
            # Whole parameters first, in few parts. Where values tell, the lookup will
            # find what is cut otherwise than into layers, or out of a fused parameter.
            if self.sample(block).distinct:
                ways = [layers_of(block)] if block.shape and block.shape[0] > 1 else []
                every = [(False, way) for way in ways if len(way) <= _DEEP]
                every += [(True, [block])]
            else:
                ways = list(cuttings(block))
                every = [(False, way) for way in ways] + [(True, [block])]
                every += [(True, way) for way in ways]
            for parts, blocks in every:
                units = self.units({blocks[0].size}, names, parts)
                if plain:
                    units = [u for u in units if self.free(u)]
                if not units or (plain and len(units) < len(blocks)):
                    continue
                probes = {blocks[0], blocks[len(blocks) // 2], blocks[-1]}
                if all(self._fits([probe], units)[probe] for probe in probes):
                    self._settle(blocks, self._fits(blocks, units))
                    break
        return self.rest(todo)

    def _look_up(self, todo: list[Block], names: list[Names]) -> list[Block]:
        """Looks values up; returns what is left, cut where the parameter changes."""
        some = [b for b in todo if b.shape and not self.sample(b).constant]
        if not some:
            return todo
        flat = {name: self.flat[name] for name in names}
        fits: dict[Block, list[Fit]] = {}
        cut: dict[Block, list[Block]] = {}
        found = look_up([(block, self.values(block)) for block in some], flat)
        for block, one in zip(some, found, strict=True):
            for name, offsets in one.offsets.items():
                if self.share(block, name, offsets) >= MOST:
                    at = self._unit_at(name, offsets, block)
                    fit = Fit(at, (partial(tuple, offsets),))
                    fits.setdefault(block, []).append(fit)
            if one.cuts is not None:
                cut[block] = cut_at(block, *one.cuts)
        left = self._settle(todo, fits)
        return [part for block in left for part in cut.get(block, [block])]

    def _leftovers(self, todo: list[Block], tiny: bool = False) -> None:
        """Pairs what is left by closeness, shape and name: their values differ."""
        names = [(name,) for name in self.parameters]
        for parts, close in itertools.product((False, True), (True, False)):
            todo = list(dict.fromkeys(self.rest(todo)))
            for size in sorted({block.size for block in todo}, reverse=True):
                blocks = [block for block in todo if block.size == size]
                units = [u for u in self.units([size], names, parts) if self.free(u)]
                if units and close:
                    self._pair_close(blocks, units)
                elif units:
                    self._pair_named(blocks, units, tiny)

    def _pair_close(self, blocks: Sequence[Block], units: Sequence[Unit]) -> None:
        closest = {(b, u): self._closest(b, u) for b in blocks for u in units}
        fits = [[closest[b, u][0] > _ALIKE for u in units] for b in blocks]
        ours, theirs = [self.label(b) for b in blocks], [self.name(u) for u in units]
        for pair in settle(ours, theirs, np.array(fits), self.known):
            block, one = blocks[pair.leaf], units[pair.torch]
            self.commit(block, closest[block, one][1], 0.0)

    def _pair_named(
        self, blocks: Sequence[Block], units: Sequence[Unit], tiny: bool
    ) -> None:
        fits = np.array([[bool(_orders(b, u)) for u in units] for b in blocks])
        equal = None
        if tiny:
            equal = np.array([[self._equal(b, u) for u in units] for b in blocks])
        ours, theirs = [self.label(b) for b in blocks], [self.name(u) for u in units]
        for pair in settle(ours, theirs, fits, self.known, equal):
            block, one = blocks[pair.leaf], units[pair.torch]
            alone = fits[pair.leaf].sum() == 1 == fits[:, pair.torch].sum()
            same, words = likeness(ours[pair.leaf], theirs[pair.torch])
            near = self.known.near(ours[pair.leaf], [theirs[pair.torch]])[0] > 0
            right = equal is not None and equal[pair.leaf, pair.torch]
            named = words > 0 and (same > 0 or near)
            if alone or right or named or (near and pair.by == "siblings"):
                self.commit(block, fit_of(block, one, _orders(block, one)), 0.0)

    # --- Sums.

    def _add_sums(self) -> bool:
        """The sums of two vectors of one module, as further parameters."""
        groups: dict[Any, list[str]] = defaultdict(list)
        for name, array in self.parameters.items():
            if array.ndim == 1 and array.any():
                groups[tokens_of(name)[:-1], array.shape, array.dtype].append(name)
        for names in groups.values():
            if len(names) <= _SUMS:
                for first, second in itertools.combinations(names, 2):
                    summed = self.parameters[first] + self.parameters[second]
                    self.flat[first, second] = summed
        return len(self.flat) > len(self.parameters)

    def _add_zeros(self) -> None:
        """Adds a bias of zeros that is left to its twin: an LSTM's second bias."""
        used = {n for ps in self.pieces.values() for p in ps for n in p.names}
        for name, array in self.parameters.items():
            for one, other in (("_hh", "_ih"), ("_ih", "_hh")):
                twin = name.replace(one, other)
                if name in used or twin == name or array.ndim != 1 or array.any():
                    continue
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
            alike = one.names if len(one.names) > 1 else self.flat[one.names].dtype
            groups[one.shape, one.steps, alike].append(one)
        taken: dict[Any, Array] = {}
        found: dict[Block, list[Fit]] = {}
        for block in blocks:
            known = self.sample(block)
            step = max(1, len(known.places) // _SCREEN)
            scores: dict[tuple[Unit, View], float] = {}
            for key, same in groups.items():
                if same[0].size != block.size:
                    continue
                slack = slack_of(same[0].names, self.parameters)
                for view in views(block.shape, *key[:2], thorough):
                    # A few entries rule out most of the units.
                    here = key, block.shape, view
                    if here not in taken:
                        at = view.places(known.places[::step])
                        rows = [self.flat[u.names][u.base + at] for u in same]
                        taken[here] = np.stack(rows)
                    few = agree(known.values[None, ::step], taken[here], slack)
                    for row in np.flatnonzero(few.mean(axis=1) >= MOST / 2).tolist():
                        one = same[row]
                        if (block, one.names, one.base) in self.failed:
                            continue
                        score = self._score(block, one, view, slack)
                        if score is not None:
                            scores[one, view] = score
            best = max(scores.values(), default=0.0)
            chosen: dict[Unit, list[View]] = defaultdict(list)
            for (one, view), score in scores.items():
                if known.plain or score >= best - 0.1:
                    chosen[one].append(view)
            found[block] = [fit_of(block, u, orders) for u, orders in chosen.items()]
        return found

    def _score(self, block: Block, one: Unit, view: View, slack: float) -> float | None:
        """The share of equal entries among those that tell the most.

        `None` if most entries of the sample differ.
        """
        known, flat = self.sample(block), self.flat[one.names]
        theirs = flat[one.base + view.places(known.places)]
        if agree(known.values, theirs, slack).mean() < MOST:
            return None
        theirs = flat[one.base + view.places(known.rare_places)]
        return float(agree(known.rare, theirs, slack).mean())

    def _settle(
        self, todo: list[Block], fits: Mapping[Block, Sequence[Fit]]
    ) -> list[Block]:
        """Pairs the blocks with units that fit; returns those that are left."""
        for blocks, units in _components([b for b in todo if fits.get(b)], fits):
            options = {(b, fit.unit): fit for b in blocks for fit in fits[b]}
            self._pair(blocks, units, options, shared=False)
            # What tells something, and was taken by another leaf, is shared.
            for block in self.rest(blocks):
                if block not in blocks:
                    continue
                if not self.sample(block).plain:
                    self._pair([block], units, options, shared=True)
        return self.rest(todo)

    def _pair(
        self,
        blocks: list[Block],
        units: list[Unit],
        options: Mapping[tuple[Block, Unit], Fit],
        shared: bool,
    ) -> None:
        free = [u for u in units if shared or self.free(u)]
        if not free:
            return
        ours, theirs = [self.label(b) for b in blocks], [self.name(u) for u in free]
        fits = np.array([[(b, u) in options for u in free] for b in blocks])
        by: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for pair in settle(ours, theirs, fits, self.known):
            block, one = blocks[pair.leaf], free[pair.torch]
            several = fits[pair.leaf].sum() > 1
            if self.sample(block).plain:
                several |= fits[:, pair.torch].sum() > 1
            if self.commit(block, options[block, one]) and several:
                by[pair.by].append((ours[pair.leaf].text, theirs[pair.torch].text))
        for settled, pairs in by.items():
            paths, names = zip(*pairs, strict=True)
            self.ambiguous.append(Ambiguity(paths, names, settled))

    def _unit_at(self, names: Names, offsets: Sequence[Array], block: Block) -> Unit:
        """The part of a parameter that a block was found in."""
        one = unit(names, self.shapes[names[0]])
        if one.size == block.size:
            return one
        base, mark = sum(int(along.min()) for along in offsets), None
        if base % block.size == 0 and one.size % block.size == 0:
            mark = base // block.size, one.size // block.size
        return Unit(names, block.shape, (), base, mark)

    def _closest(self, block: Block, one: Unit) -> tuple[float, Fit]:
        """The order in which the values are most alike, and how much."""
        known, flat = self.sample(block), self.flat[one.names]
        best = 0.0, fit_of(block, one, ())
        ours = known.values.astype(np.float64)
        if len(ours) < _FEW or known.constant:
            return best
        for view in _orders(block, one):
            theirs = flat[one.base + view.places(known.places)].astype(np.float64)
            with np.errstate(all="ignore"):
                alike = abs(float(_unit_vector(ours) @ _unit_vector(theirs)))
            if alike > best[0]:
                best = alike, fit_of(block, one, [view])
        return best

    def _equal(self, block: Block, one: Unit) -> bool:
        flat = self.flat[one.names][one.base : one.base + one.size]
        return bool(agree(self.values(block).reshape(-1), flat).all())


def _orders(block: Block, one: Unit) -> tuple[View, ...]:
    return views(block.shape, one.shape, one.steps)


def _unit_vector(values: Array) -> Array:
    centred = values - values.mean()
    return np.asarray(centred / np.linalg.norm(centred))


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
