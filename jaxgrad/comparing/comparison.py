"""One comparison: values, forward pass, loss and gradients, and why they differ."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxgrad.causes import Cause
from jaxgrad.comparing import telling
from jaxgrad.comparing.backward import Blame, Search
from jaxgrad.comparing.forward import Pool
from jaxgrad.comparing.hypotheses import Context
from jaxgrad.comparing.jax_side import JaxSide
from jaxgrad.comparing.judging import NATIVE, NATIVE_LOSS, SAME, Judge
from jaxgrad.comparing.layouts import laid_out
from jaxgrad.comparing.links import Link, Measure, links_of, opened, sampled
from jaxgrad.comparing.matching import Matches, match
from jaxgrad.comparing.parting import (
    Explained,
    Parting,
    Runs,
    apart,
    explain,
    paddings_of,
)
from jaxgrad.comparing.report import (
    BAD,
    Losses,
    ParameterComparison,
    TorchComparison,
    Unmatched,
    Verdict,
)
from jaxgrad.comparing.sides import (
    Both,
    Refused,
    TorchModel,
    compare_all,
    in_double,
    natively,
)
from jaxgrad.comparing.torch_side import array_of
from jaxgrad.precision import Product, coarsest, findings_of
from jaxgrad.tables import Finding

Array = npt.NDArray[Any]

# Values that differ by less than this share of the final difference don't cause it, and
# such as differ by more than the second do in any case.
_SHARE, _PARTED = 1e-3, 1e-5
# The same in float32.
_PARTED_NATIVELY = 3e-5
# A gradient that is off by more than this natively, and right in float64, has lost more
# than float32's rounding: half of its digits.
_IMPRECISE = 3e-4
_SMALL = 1e-6
# Gradients of two vectors that are closer than this are the same one's.
_ALIKE = 1e-3


@dataclass(frozen=True, eq=False)
class _Found:
    """What was found of the two sides.

    Attributes:
      both: in the precision in which they are judged, with PyTorch's values.
      judge: what says if two gradients differ.
      measures: how far each link's are apart.
      pool: JAX's values.
      parting: how far PyTorch's are found among them.
      explained: what explains the difference of the forward passes.
      blames: what explains that of the gradients.
    """

    both: Both
    judge: Judge
    measures: list[Measure]
    pool: Pool
    parting: Parting
    explained: Explained
    blames: list[Blame]


class Comparison:
    """A JAX loss and a module, their parameters paired.

    Attributes:
      layouts: how the leaves are made of PyTorch's parameters.
    """

    def __init__(
        self,
        side: JaxSide,
        model: TorchModel,
        mapping: Mapping[str, Any],
        rtol: float | None,
    ) -> None:
        self.side, self.model, self._rtol = side, model, rtol
        module = model.module
        self._parameters = {n: array_of(p) for n, p in module.named_parameters()}
        self._buffers = {
            name: array_of(buffer)
            for name, buffer in module.named_buffers()
            if buffer.is_floating_point()
        }
        self._findings: list[Finding] = []
        self._mapping = dict(mapping)
        self._pair(mapping)

    def _pair(self, mapping: Mapping[str, Any]) -> None:
        """Pairs the leaves with PyTorch's parameters."""
        self._matches = self._matched(mapping)
        self.layouts = self._matches.layouts
        shapes = {name: a.shape for name, a in self._parameters.items()}
        leaves = {name: np.asarray(leaf) for name, leaf in self.side.leaves.items()}
        alternatives = {
            a.paths[0]: a.alternatives
            for a in self._matches.ambiguous
            if a.settled == "layout"
        }
        self._links = opened(links_of(self.layouts, shapes), leaves, alternatives)
        self._differing = {d.path for d in self._matches.differing}

    def _matched(self, mapping: Mapping[str, Any]) -> Matches:
        leaves = {name: np.asarray(leaf) for name, leaf in self.side.leaves.items()}
        matches = match(leaves, self._parameters, mapping)
        left = {path: leaves[path] for path in matches.unmatched_leaves}
        if left and self._buffers:
            with contextlib.suppress(ValueError):  # nothing fits
                found = match(left, self._buffers)
                for layout in found.layouts:
                    name = layout.pieces[0].names[0]
                    text = f"is PyTorch's buffer `{name}`, which has no gradient"
                    self._findings.append(Finding("buffer", layout.path, text))
                matches = matches._replace(unmatched_leaves=found.unmatched_leaves)
        return matches

    def report(self, exact: bool) -> TorchComparison:
        """Compares, in float64 too where it's asked for or needed to tell."""
        native = natively(self.model, self.side)
        by_use = self._by_gradients(native)
        if by_use:
            self._pair({**self._mapping, **by_use})
            text = (
                f"{len(by_use)} leaves, `{min(by_use)}` among them, have numbers that "
                "others have too: they were paired by their gradients"
            )
            self._findings.append(Finding("ambiguous", "", text))
        measures = native.measures(self._links)
        with contextlib.ExitStack() as stack:
            both = native
            if exact or self._needs_float64(native, measures):
                try:
                    both = stack.enter_context(in_double(self.model, self.side))
                except Refused as refused:
                    stack.close()
                    text = f"{refused} Rounding is judged by a bound."
                    self._findings.append(Finding("float64", "", text))
            found = self._find(both)
            return self._told(native, measures, found)

    def _by_gradients(self, native: Both) -> dict[str, str]:
        """Another pairing of leaves of equal numbers, if gradients ask for it.

        Which of several equal vectors is which, their contents can't tell. One that is
        used as PyTorch's is has its gradient.
        """
        theirs = self.model.shown(native.theirs)
        found: dict[str, str] = {}
        groups: dict[Any, list[Link]] = {}
        for link in self._links:
            leaf = self.side.leaves.get(link.path)
            if leaf is not None and leaf.ndim < 2 and leaf.shape == link.torch_shape:
                contents = leaf.shape, np.asarray(leaf).tobytes()
                groups.setdefault(contents, []).append(link)
        for group in groups.values():
            paths = [link.path for link in group]
            names = [link.name for link in group if theirs.get(link.name) is not None]
            if len(set(names)) < len(paths) or len(set(paths)) < 2:
                continue
            ours = [native.values.gradients[path].astype(float) for path in paths]
            other = [np.asarray(theirs[name]).astype(float) for name in names]
            off = np.array(
                [
                    [np.linalg.norm(a - b) / (np.linalg.norm(b) or 1) for b in other]
                    for a in ours
                ]
            )
            best = off.argmin(axis=1)
            each_has_one = len(set(best.tolist())) == len(best)
            if np.diag(off).max() > _ALIKE >= off.min(axis=1).max() and each_has_one:
                pairs = zip(paths, best.tolist(), strict=True)
                found |= {path: names[j] for path, j in pairs}
        return found

    def _needs_float64(self, native: Both, measures: Sequence[Measure]) -> bool:
        return (
            bool(self._differing)
            or apart(*native.losses) > NATIVE_LOSS
            or any(m.off > NATIVE * m.theirs for m in measures)
        )

    def _find(self, both: Both) -> _Found:
        both = self._with_torchs_values(both)
        judge = Judge(self.side, both, self._rtol)
        measures = both.measures(self._links)
        pairs = list(zip(self._links, measures, strict=True))
        off = apart(*both.losses)
        wrong = off > judge.loss_bound or any(judge.wrong(*pair) for pair in pairs)
        grey = off > SAME or any(judge.grey(m) for m in measures)
        most = max([off, *(m.relative for m in measures if judge.counts(m))])
        tolerance = _PARTED_NATIVELY
        if both.wide:
            tolerance = float(np.clip(_SHARE * most, SAME, _PARTED))
        pool = Pool(both.values.made())
        runs = Runs(
            both.model.run, pool, both.values.loss, tolerance, closely=both.wide
        )
        nothing = Explained(both.run, runs.parting(both.run))
        blames: list[Blame] = []
        explained = nothing
        if wrong or (both.wide and grey):
            explained = explain(runs, both.run, nothing.parting, self._context(pool))
            if wrong:
                blames = self._gradient_causes(both, explained, judge)
            elif not explained.whole:
                explained = nothing  # constants that one side has in float32
        return _Found(both, judge, measures, pool, nothing.parting, explained, blames)

    def _with_torchs_values(self, both: Both) -> Both:
        """The two sides, with PyTorch's values in place of JAX's that aren't the same.

        They may differ by a rounding: a leaf in bfloat16, a sum of two biases.
        """
        parameters = {n: array_of(p) for n, p in both.model.module.named_parameters()}
        given = dict(self.side.leaves)
        for layout in self.layouts:
            leaf = self.side.leaves[layout.path]
            names = [name for piece in layout.pieces for name in piece.names]
            exact = len(names) == len(layout.pieces) and all(
                self._parameters[name].dtype == leaf.dtype for name in names
            )
            if layout.path in self._differing or (both.wide and not exact):
                given[layout.path] = laid_out(layout, parameters)
        if all(given[name] is leaf for name, leaf in self.side.leaves.items()):
            return both
        return replace(both, values=both.traced(list(given.values())))

    def _context(self, pool: Pool) -> Context:
        return Context(
            list(dict.fromkeys([*self.side.literals(), *pool.scalars()])),
            paddings_of(self.side.equations()),
            dict(self.model.module.named_parameters()),
        )

    def _gradient_causes(
        self, both: Both, explained: Explained, judge: Judge
    ) -> list[Blame]:
        theirs = both.theirs
        if explained.rewrites:
            theirs = both.model.gradients(explained.run)
        counts = telling.counts_of(both.run)
        search = Search(
            both, self._links, explained.rewrites, theirs, judge.wrong, counts,
            values_agree=explained.whole,
        )  # fmt: skip
        return search.run()

    def _told(
        self, native: Both, measures: Sequence[Measure], found: _Found
    ) -> TorchComparison:
        parting = found.parting
        first = telling.first_difference(
            found.both.run, parting, found.pool, found.explained
        )
        causes = [
            *([_VALUES] if self._differing else []),
            *telling.forward_causes(found.both.run, found.explained),
        ]
        products = self.side.products()
        self._findings += findings_of(coarsest(products))
        precision = self._precision(native, measures, found, products)
        causes += [precision[0]] if precision else []
        causes += [blame.cause for blame in found.blames]
        known = [cause for cause in causes if cause.kind != "unknown"]
        causes = known or causes[:1]
        rows = [
            self._row(place, native, measures[place], found, precision)
            for place in range(len(self._links))
        ]
        unmatched = Unmatched(
            self._matches.unmatched_leaves, self._matches.unmatched_names
        )
        finite = bool(np.isfinite(native.losses).all())
        if not finite:
            ours, theirs = native.losses
            text = (
                f"The loss is {ours:g} in JAX and {theirs:g} in PyTorch, which can't "
                "be compared: trace_gradient says where it comes from."
            )
            self._findings.append(Finding("nonfinite", "", text))
        ok = (
            finite
            and all(row.verdict not in BAD for row in rows)
            and apart(*found.both.losses) <= found.judge.loss_bound
            and not self._left_out(native, unmatched)
        )
        self._findings += telling.findings_of(
            self._matches, unmatched, self.side.integers
        )
        return TorchComparison(
            ok=ok,
            loss=Losses(*native.losses),
            forward=telling.module_outputs(found.both.run, parting, found.pool),
            first_difference=None if ok else first,
            parameters=tuple(rows),
            unmatched=unmatched,
            trajectory=None,
            causes=tuple({cause.text: cause for cause in causes}.values()),
            findings=tuple(self._findings),
        )

    def _row(
        self,
        place: int,
        native: Both,
        measure: Measure,
        found: _Found,
        precision: tuple[Cause, Verdict] | None,
    ) -> ParameterComparison:
        link, judged = self._links[place], found.measures[place]
        cause = next((b.cause for b in found.blames if place in b.links), None)
        explained = found.explained.reasons
        verdict: Verdict = "agrees"
        if set(link.path.split(" + ")) & self._differing:
            verdict, cause = "values", _VALUES
        elif not measure.finite:
            verdict = "nonfinite"
        elif found.judge.wrong(link, judged) or (
            explained and found.judge.grey(judged)
        ):
            none = judged.theirs == 0 or judged.ours == 0
            verdict = "missing" if none else "differs"
            if cause is None and explained:
                own = [r for r in explained if link.name in r.parameters]
                cause = telling.cause_of(found.both.run, (own or explained)[0])
        elif precision is not None and measure.relative > _IMPRECISE:
            cause, verdict = precision
        elif measure.off > NATIVE * measure.theirs:
            verdict = "rounding"
        # What is less than so much of the whole gradient is taken for as much: of a
        # gradient that is 0 but for rounding, no share says anything.
        least = _SMALL * found.both.scale
        exact = judged.off / max(judged.theirs, least) if found.both.wide else None
        return ParameterComparison(
            path=link.path,
            torch_name=link.name,
            layout=link.text,
            verdict=verdict,
            max_error=measure.max_error,
            relative_error=measure.relative,
            ulps=measure.ulps,
            cosine=measure.cosine,
            worst=telling.worst_value(self._matches, link) or measure.worst,
            exact_error=exact,
            further=self._further(place, native, found) if exact is not None else "",
            cause=cause,
        )

    def _further(self, place: int, native: Both, found: _Found) -> str:
        """Which side's native gradient is further from the float64 one."""
        link = sampled(self._links[place])
        if found.judge.wrong(link, found.measures[place]):
            return ""
        truth = found.both.theirs
        ours = compare_all([link], native.values.gradients, truth)[0].off
        exact = found.both.values.gradients
        theirs = compare_all([link], exact, native.theirs)[0].off
        if ours == theirs:
            return ""
        return "JAX" if ours > theirs else "PyTorch"

    def _precision(
        self,
        native: Both,
        measures: Sequence[Measure],
        found: _Found,
        products: Sequence[Product],
    ) -> tuple[Cause, Verdict] | None:
        """A product in fewer digits on one side, if that is what makes them differ.

        One that the backend makes by default is rounding: the programs are the same.
        """
        if not found.both.wide or not any(m.relative > _IMPRECISE for m in measures):
            return None
        if any(
            found.judge.wrong(link, m)
            for link, m in zip(self._links, found.measures, strict=True)
        ):
            return None
        arrays = [*self.side.leaves.values(), *self._parameters.values()]
        if any(array.dtype.itemsize < 4 for array in arrays):
            return None  # the parameters themselves have no more digits
        cast = next((p for p in products if p.asked == "cast"), None)
        theirs = sorted(
            {str(r.tensor.dtype).removeprefix("torch.") for r in native.run.records}
            & {"bfloat16", "float16"}
        )
        low = coarsest(products)
        if theirs and (cast or (low and low.asked == "precision")):
            return None
        text = ""
        verdict: Verdict = "differs"
        if theirs:
            text = (
                f"PyTorch computes in {theirs[0]}, JAX doesn't; in float64 they agree."
            )
        elif cast:
            text = (
                f"JAX multiplies in {cast.digits} at {cast.place}, PyTorch doesn't; in "
                "float64 they agree."
            )
        elif low:
            given = self.model.shown(native.theirs)
            again = compare_all(self._links, self.side.highest(), given)
            if all(m.relative <= _IMPRECISE for m in again):
                text = (
                    f"In JAX {low.sentence}. The gradients agree in float64, and with "
                    f"{low.remedy}."
                )
                verdict = "rounding" if low.asked == "default" else "differs"
        return (Cause("matmul_precision", text), verdict) if text else None

    def _left_out(self, native: Both, unmatched: Unmatched) -> bool:
        """Whether something without a partner has a gradient."""
        ours = native.values.gradients
        theirs = self.model.shown(native.theirs)
        return any(np.any(ours[path]) for path in unmatched.jax) or any(
            theirs[name] is not None and np.any(theirs[name])
            for name in unmatched.torch
        )


_VALUES = Cause(
    "values",
    "The parameters have other values: copy PyTorch's, by load_torch_parameters for "
    "instance. What follows was computed with PyTorch's.",
)
