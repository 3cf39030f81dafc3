"""Which tool names the line where a gradient goes bad or dies, on all of tests/faults.

    trace_corpus.py                    all of it, beside jax_debug_nans: 6 minutes
    trace_corpus.py --ours             only jaxgrad
    trace_corpus.py --only 'scan_*'    some, again

The exit status is 1 if jaxgrad is wrong anywhere.
"""

import argparse
import fnmatch
import importlib.metadata
import json
import statistics
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
import faults
from interleaved import duration, machine
from rich.console import Console
from rich.progress import track
from tracers import OURS, TOOLS, run

from jaxgrad.tables import Table

GROUPS = {False: "plain JAX", True: "libraries"}


def shares(rows, right):
    """In each group, and how long it took: cells."""
    cells = []
    for library in GROUPS:
        group = [row for row in rows if row["library"] == library]
        cells.append(f"{sum(map(right, group))} of {len(group)}")
    return cells, duration(statistics.median(row["seconds"] for row in rows))


def nonfinite_table(by_tool):
    lines, of_jax = [], {}
    for tool, rows in by_tool.items():
        cells, seconds = shares(rows, lambda row: row["named"] == "right")
        ours = tool == OURS
        kind = str(sum(row.get("kind", False) for row in rows)) if ours else "-"
        counts = [sum(row["named"] == x for row in rows) for x in ("wrong", "none")]
        lines.append([tool, *cells, kind, *map(str, counts), seconds])
        for row in rows if not ours else ():
            of_jax.setdefault(row["case"], []).append(row["named"] == "right")
    note = "Line: losses of which the line to blame is named. Wrong: another line is."
    if of_jax:
        some, every = (sum(map(of, of_jax.values())) for of in (any, all))
        note += (
            f"\nOne or another of JAX's three ways names the line of {some} losses, "
            f"and all three that of {every}."
        )
    columns = "", ">plain JAX", ">libraries", ">kind", ">wrong", ">none", ">time"
    return Table("Not finite: is the line to blame named?", columns, lines, note)


def harmless_table(rows):
    """Losses that are finite in the end, though a NaN is born on the way."""
    right = sum(row["named"] == "right" for row in rows)
    note = (
        f"A NaN that comes to nothing: {OURS} names the line in {right} of {len(rows)} "
        "such losses. They count neither for nor against the others."
    )
    return Table("", note=note)


def zeros_table(rows):
    lines = []
    for library, group in GROUPS.items():
        chosen = [row for row in rows if row["library"] == library]
        leaves = [leaf for row in chosen for leaf in row.get("leaves", {}).values()]
        counts = [len(chosen), len(leaves)]
        counts += [sum(leaf[of] for leaf in leaves) for of in ("line", "reason")]
        counts += [sum(row["accuses"] or "error" in row for row in chosen)]
        times = [row["seconds"] for row in chosen]
        time = duration(statistics.median(times)) if times else "-"
        lines.append([group, *map(str, counts), time])
    columns = "", ">losses", ">leaves", ">line", ">reason", ">accused", ">time"
    note = (
        "Leaves: those whose gradient is all zero; of each the steps that stop it are "
        "to be named, and why. JAX has nothing to say on zeros.\n"
        "Accused: losses of which anything else is said, or that failed."
    )
    title = f"Zero: does {OURS} name the line and the reason?"
    return Table(title, columns, lines, note)


def healthy_table(by_tool):
    lines = []
    for tool, rows in by_tool.items():
        cells, seconds = shares(rows, lambda row: row["accuses"] or "error" in row)
        lines.append([tool, *cells, seconds])
    columns = "", ">plain JAX", ">libraries", ">time"
    return Table("Healthy: is it accused?", columns, lines)


def wrong_table(rows):
    """What jaxgrad said that isn't right, a line each."""
    texts = [f"{row['case']}: {text}" for row in rows for text in row["wrong"]]
    return Table(f"What {OURS} gets wrong", note="\n".join(texts or ["Nothing."]))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", default="*", metavar="PATTERN", help="of the losses' names")
    add("--ours", action="store_true", help="leave JAX's own tool out")
    add("--json", type=Path, metavar="FILE", help="write all that was said")
    options = parser.parse_args()
    tools = [OURS] if options.ours else list(TOOLS)
    every = (*faults.NONFINITE, *faults.ZEROS, *faults.HEALTHY)
    cases = [case for case in every if fnmatch.fnmatch(case.name, options.only)]
    if not cases:
        parser.error("no such loss")

    warnings.simplefilter("ignore")  # the losses may warn
    began, rows, console = time.perf_counter(), [], Console(stderr=True)
    hidden = not console.is_terminal
    for turn, case in enumerate(track(cases, "", console=console, disable=hidden)):
        start = turn % len(tools)
        for tool in tools[start:] + tools[:start]:  # none always follows another
            if tool == OURS or not isinstance(case, faults.Zero):
                rows.append(run(tool, case))

    about = machine(importlib.metadata.version("torch"))
    print(about, end="\n\n")

    def of(fault, **more):
        chosen = [row for row in rows if row["fault"] == fault]
        chosen = [row for row in chosen if all(row[k] == v for k, v in more.items())]
        return (
            {t: [r for r in chosen if r["tool"] == t] for t in tools} if chosen else {}
        )

    if nonfinite := of("Nonfinite", harmless=False):
        print(nonfinite_table(nonfinite))
    if harmless := of("Nonfinite", harmless=True):
        print(harmless_table(harmless[OURS]))
    if zeros := of("Zero"):
        print(zeros_table(zeros[OURS]))
    if healthy := of("Healthy"):
        print(healthy_table(healthy))
    ours = [row for row in rows if row["tool"] == OURS]
    print(wrong_table(ours))
    seconds = duration(time.perf_counter() - began)
    print(f"All took {seconds}. A loss's seconds include tracing and compiling.")
    if options.json:
        text = json.dumps({"machine": about, "rows": rows}, indent=1)
        options.json.write_text(text + "\n")
    sys.exit(any(row["wrong"] for row in ours))


if __name__ == "__main__":
    main()
