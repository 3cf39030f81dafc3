"""What was found, in the report's words: modules, lines, causes."""

from __future__ import annotations

import linecache
import math
from typing import Any

from jaxgrad.causes import Cause
from jaxgrad.comparing.forward import Found, Pool
from jaxgrad.comparing.links import Link
from jaxgrad.comparing.matching import Matches
from jaxgrad.comparing.parting import (
    Explained,
    Parting,
    Reason,
    counterpart,
    line_after,
)
from jaxgrad.comparing.report import Entry, FirstDifference, ModuleOutput, Unmatched
from jaxgrad.comparing.torch_side import Run
from jaxgrad.equations import Place
from jaxgrad.tables import Finding

# So much of a line of code is shown.
_LINE = 72


def module_outputs(run: Run, parting: Parting, pool: Pool) -> tuple[ModuleOutput, ...]:
    """Each submodule's output, and where it is in JAX."""
    rows = []
    for path, kind, made in run.outputs:
        if not made:
            continue
        own = made[0]
        record = run.records[own]
        place = parting.found[own]
        if place is None and own in parting.bad:
            place = pool.near(record.array(run.overwritten, own))
        rows.append(
            ModuleOutput(
                module=path,
                kind=kind,
                shape=tuple(record.tensor.shape),
                error=None if place is None else place.error,
                layout="" if place is None else place.layout,
                **_line(pool, place),
            )
        )
    return tuple(rows)


def _line(pool: Pool, place: Found | None) -> dict[str, Any]:
    if place is None:
        return {"file": "", "line": 0, "text": ""}
    return _source(pool.made[place.value].place)


def _source(place: Place) -> dict[str, Any]:
    text = linecache.getline(place.file, place.line).strip()
    text = text if len(text) <= _LINE else f"{text[: _LINE - 4]} ..."
    return {"file": place.file, "line": place.line, "text": text}


def first_difference(
    run: Run, parting: Parting, pool: Pool, explained: Explained
) -> FirstDifference | None:
    """Where the forward passes part: where a cause was found, or seems to be."""
    if not parting.bad and not explained.reasons:
        return None
    cause, near = None, None
    if explained.reasons:
        first = min(explained.reasons, key=lambda reason: reason.records[0])
        own = first.records[0]
        cause = cause_of(run, first)
        near = pool.near(run.records[own].array(run.overwritten, own))
    else:
        own, near = counterpart(run, parting, pool)
    record = run.records[own]
    module = record.module
    if not module:
        # In the whole module's own lines, or the loss's: the submodule that comes next
        # says more, if there is one.
        later = [p for p, _, made in run.outputs if p and made and min(made) > own]
        module = later[0] if later else ""
    place = Place("", "", 0)
    if near is not None:
        place = pool.made[near.value].place
    else:
        after = line_after(run, parting, own, pool)
        place = place if after is None else pool.made[after].place
    return FirstDifference(
        module=module,
        before=module != record.module,
        operation=record.function,
        torch_file=record.place.file,
        torch_line=record.place.line,
        error=None if near is None else near.error,
        **_source(place),
        cause=cause,
    )


def forward_causes(run: Run, explained: Explained) -> list[Cause]:
    """The causes of a forward difference, in the order of the forward pass."""
    reasons = sorted(explained.reasons, key=lambda reason: reason.records[0])
    return [cause_of(run, reason) for reason in reasons]


def cause_of(run: Run, reason: Reason) -> Cause:
    """A reason, with the modules that it's in."""
    modules = list(dict.fromkeys(run.records[i].module for i in reason.records))
    function = run.records[reason.records[0]].function
    more = f"; {len(modules) - 1} more like it" if len(modules) > 1 else ""
    where = f"`{modules[0]}` ({function}{more})" if modules[0] else f"`{function}`"
    return Cause(reason.kind, f"PyTorch's {where} {reason.text}.")


def worst_value(matches: Matches, link: Link) -> Entry | None:
    """The entry of a leaf's values that differs most, if any does."""
    for differing in matches.differing:
        if differing.path in link.path.split(" + "):
            return Entry(differing.index, differing.leaf, differing.torch)
    return None


def counts_of(run: Run) -> dict[str, int]:
    """Sizes of what the loss is taken of, which a factor may come from."""
    counts: dict[str, int] = {}
    wide = [r.tensor.shape for r in run.records if r.tensor.dim()]
    if not wide:
        return counts
    first, shape = tuple(wide[0]), tuple(wide[-1])
    counts["batch size"] = int(first[0])
    if len(first) > 1:
        counts["size of axis 1"] = int(first[1])
    counts["number of examples"] = int(shape[0])
    if len(shape) > 1:
        counts["number of outputs per example"] = math.prod(shape[1:])
        counts["number of outputs"] = math.prod(shape)
        counts["size of the last axis"] = int(shape[-1])
        counts["number of rows"] = math.prod(shape[:-1])
    return counts


def findings_of(
    matches: Matches, unmatched: Unmatched, integers: tuple[str, ...]
) -> list[Finding]:
    """What to know of the parameters."""
    findings = [
        Finding(
            "values",
            d.path,
            f"{d.count} of {d.size} values differ from PyTorch's; at {list(d.index)} "
            f"{d.leaf:.8g} in JAX and {d.torch:.8g} in PyTorch",
        )
        for d in matches.differing
    ]
    for path in unmatched.jax:
        findings.append(
            Finding("unmatched", path, "no PyTorch parameter has these numbers")
        )
    for name in unmatched.torch:
        findings.append(
            Finding("unmatched", "", f"no JAX leaf has the numbers of `{name}`")
        )
    for a in matches.ambiguous:
        if a.settled == "layout":
            text = f"`{a.names[0]}` fits in another layout too: its numbers are alike"
            findings.append(Finding("ambiguous", a.paths[0], text))
    ordered = [a for a in matches.ambiguous if a.settled == "order"]
    if ordered:
        text = (
            f"{sum(len(a.paths) for a in ordered)} leaves have numbers that others "
            f"have too, from `{ordered[0].paths[0]}` on; they were paired in order"
        )
        findings.append(Finding("ambiguous", "", text))
    findings += [
        Finding("not_differentiable", name, "integers have no gradient")
        for name in integers
    ]
    return findings
