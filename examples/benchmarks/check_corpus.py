"""Which checker finds the wrong gradients of tests/corpus, and accuses no right one.

    check_corpus.py                       a sample of the broken gradients: 10 minutes
    check_corpus.py --whole               all of them: hours
    check_corpus.py --only dense_tanh --way rolled --where inner     one, again
    check_corpus.py --way none            only the correct losses

The exit status is 1 if jaxgrad raises a false alarm, misses a gradient or fails.
"""

import argparse
import fnmatch
import itertools
import json
import multiprocessing
import random
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
import checkers
import torch
from checkers import CASES, OURS, TOOLS, WAYS, Variant
from interleaved import duration, machine
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jaxgrad.tables import Table

LISTED = 20
"""A note tells of at most so many broken gradients; `--json` has all of them."""


def broken(cases, options, truths):
    """The breaks with an effect: the cases in turn, each time with another break."""
    places = [
        (way.name, where)
        for way in WAYS.values()
        for where in way.where
        if options.way in (None, way.name) and options.where in (None, where)
    ]
    rng = random.Random(options.seed)
    rng.shuffle(cases)
    rng.shuffle(places)
    for turn, (i, name) in itertools.product(range(len(places)), enumerate(cases)):
        way, where = places[(turn + i) % len(places)]
        variant = truths.submit(checkers.broken, name, way, where).result()
        if variant:
            yield variant


def run_all(tools, options):
    """All rows; each tool in its own process, since chex patches what JAX has cached.

    What fails of jaxgrad is told at once, on stderr.
    """
    cases = [name for name in CASES if fnmatch.fnmatch(name, options.only)]
    limit = None if options.whole else options.sample
    right = map(Variant, cases) if options.way in (None, "none") else ()
    context = multiprocessing.get_context("spawn")
    rows, console = [], Console(stderr=True, soft_wrap=True, highlight=False)
    columns = (
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with (
        ExitStack() as stack,
        Progress(*columns, console=console, disable=not console.is_terminal) as bar,
    ):
        # A process is replaced now and then, so that what it has compiled goes.
        pools = {
            name: stack.enter_context(
                ProcessPoolExecutor(1, context, max_tasks_per_child=300)
            )
            for name in (*tools, "truth")
        }
        wrong = ()
        if options.way != "none":
            every = broken(list(cases), options, pools["truth"])
            wrong = itertools.islice(every, limit)
        task = bar.add_task("", total=None)
        for turn, variant in enumerate(itertools.chain(right, wrong)):
            bar.update(task, description=str(variant))
            start = turn % len(tools)
            for tool in tools[start:] + tools[:start]:  # none always follows another
                row = pools[tool].submit(checkers.run, tool, variant).result()
                if row is None:
                    continue
                rows.append(row)
                if failed(row):
                    what = {"quiet": "misses", "alarm": "false alarm"}.get(row["said"])
                    text = (
                        f"{OURS}, {what or 'error'}: {variant} {row['message'][:300]}"
                    )
                    bar.console.print(text, markup=False)
            bar.advance(task)
    return rows


def failed(row):
    return row["tool"] == OURS and row["said"] != ("alarm" if row["way"] else "quiet")


def folded(heading, names, limit=None):
    """A line of a note, or none: some of the names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if limit and len(names) > limit else ""
    return [f"{heading}: {', '.join(names[:limit])}{more}."] if names else []


def verdict_table(title, by_tool, wrong, heading):
    """Of each tool: how many losses it judged, how many of them wrongly, how long."""
    lines, note = [], []
    for tool, rows in by_tool.items():
        if not rows:
            continue
        at_fault = [row for row in rows if row["said"] == wrong]
        errors = [row for row in rows if row["said"] == "error"]
        seconds = [row["seconds"] for row in rows]
        counts = map(str, (len(rows), len(at_fault), len(errors)))
        times = duration(statistics.median(seconds)), duration(sum(seconds))
        lines.append([tool, *counts, *times])
        if wrong == "alarm":
            note += folded(f"{tool}, {heading}", (row["case"] for row in at_fault))
        elif tool == OURS:
            again = (row["again"] for row in at_fault)
            note += folded(f"{tool}, {heading}", again, LISTED)
        note += folded(f"{tool}, errors", (row["again"] for row in errors), LISTED)
        told = [row for row in rows if "unexpected" in row]
        if told:
            off = [
                f"{row['case']} {leaf} ({text})"
                for row in told
                for leaf, text in row["unexpected"].items()
            ]
            leaves = sum(row["verdicts"] for row in told)
            note.append(
                f"{tool}'s verdict is the expected one on {leaves - len(off)} of "
                f"{leaves} leaves."
            )
            note += folded("Not on", off)
    columns = ["", ">losses", f">{heading}", ">errors", ">median", ">total"]
    return Table(title, columns, lines, "\n".join(note))


def named_table(by_tool):
    """What jaxgrad names of the broken gradients, and what it accuses in vain."""
    aspects, accused = (
        ("leaves", "entries", "rule", "cause"),
        ("leaf accused", "rule accused"),
    )
    rows = [row for row in by_tool.get(OURS, ()) if row["said"] != "error"]
    cells, note = [], []
    for aspect in aspects:
        told = [row for row in rows if row[aspect] is not None]
        unnamed = [row["again"] for row in told if not row[aspect]]
        share = 100 * (1 - len(unnamed) / len(told)) if told else 0
        cells.append(f"{share:.1f} %" if told else "-")
        note += folded(f"{aspect.capitalize()} not named", unnamed, LISTED)
    for aspect in accused:
        in_vain = [row["again"] for row in rows if row[aspect]]
        cells.append(str(len(in_vain)))
        note += folded(f"Healthy {aspect}", in_vain, LISTED)
    few = sum(row["entries"] is not None for row in rows)
    note.insert(
        0,
        f"Of {len(rows)} broken gradients, {few} are wrong in half of a leaf or less, "
        "and have their entries to name. The other tools name nothing.",
    )
    lines = [
        [tool, *(cells if tool == OURS else "-" * len(cells))]
        for tool, judged in by_tool.items()
        if judged
    ]
    columns = ["", *(f">{aspect}" for aspect in (*aspects, *accused))]
    return Table("Does it name what is wrong?", columns, lines, "\n".join(note))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sample", type=int, default=100, metavar="N", help="broken gradients to take")
    add("--whole", action="store_true", help="take all broken gradients")
    add("--seed", type=int, default=0, help="of the sample")
    add("--tools", default=",".join(TOOLS), metavar="A,B", help="default: %(default)s")
    add("--only", default="*", metavar="PATTERN", help="of the losses' names")
    ways = ["none", *WAYS]
    add("--way", choices=ways, metavar="WAY", help="only what is broken so, or none")
    add("--where", choices=["loss", "inner"], help="only what is broken there")
    add("--json", type=Path, metavar="FILE", help="write all that was said")
    options = parser.parse_args()
    tools = options.tools.split(",")
    if not set(tools) <= set(TOOLS):
        parser.error(f"--tools takes {', '.join(TOOLS)}")

    began = time.perf_counter()
    rows = run_all(tools, options)
    if not rows:
        parser.error("nothing to run: no such loss, or the break has no effect on it")
    about = machine(torch.__version__)
    print(about, end="\n\n")
    right, wrong = (
        {
            tool: [r for r in rows if r["tool"] == tool and bool(r["way"]) == has_way]
            for tool in tools
        }
        for has_way in (False, True)
    )
    if any(right.values()):
        title = "Correct losses: does it stay quiet?"
        print(verdict_table(title, right, "alarm", "false alarms"))
    if any(wrong.values()):
        title = "Broken gradients: does it notice?"
        print(verdict_table(title, wrong, "quiet", "missed"))
    if wrong.get(OURS):
        print(named_table(wrong))
    note = (
        f"All took {duration(time.perf_counter() - began)}. A check's seconds include "
        "tracing and compiling. PyTorch's gradcheck is asked in float64, of the losses "
        "with a PyTorch twin; of the breaks, those of a whole loss but part_of_batch."
    )
    print(Table("", note=note))
    if options.json:
        part = options.json.with_name(options.json.name + ".part")
        part.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
        part.replace(options.json)
    sys.exit(any(map(failed, rows)))


if __name__ == "__main__":
    main()
