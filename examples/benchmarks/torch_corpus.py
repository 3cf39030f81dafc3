"""Does `compare_with_torch` say which ports of tests/ports are right, and what's wrong?

    torch_corpus.py                  all of it: 20 minutes
    torch_corpus.py --only lstm      some, again
    torch_corpus.py --failures       with what isn't said as expected

Beside it stands a person's usual check: the gradients in float32 by
`np.allclose(..., atol=1e-5)`; of optimizers, the parameters after the steps. It is told
which parameter is which. The exit status is 1 if there's a false alarm, a miss or an
error, or a goal isn't met.
"""

import argparse
import fnmatch
import gc
import importlib.metadata
import json
import statistics
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
import jax
import numpy as np
import optax
import torch
from interleaved import duration, machine
from ports import PORTS, compare
from ports.scoring import score
from rich.console import Console
from rich.progress import track

import jaxgrad
from jaxgrad.comparing.layouts import laid_out
from jaxgrad.comparing.links import added, links_of
from jaxgrad.comparing.matching import match
from jaxgrad.comparing.torch_side import array_of, tensors_of
from jaxgrad.pytrees import leaf_name
from jaxgrad.tables import Table

OURS, USUAL = "jaxgrad", "np.allclose"
GOALS = ("0", "0", "100 %", "≥ 95 %", "", "")
CLEARED = 25
"""After so many ports JAX forgets what it has compiled: the memory is limited."""


def ours(port):
    """What the comparison said of a port, and how long it took."""
    problem = port.make()
    began = time.perf_counter()
    try:
        report = compare(problem)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    seconds = time.perf_counter() - began
    return {**asdict(score(port, report)), "seconds": seconds}


def usual(port):
    """The same of a person's usual check."""
    problem = port.make()
    began = time.perf_counter()
    try:
        with torch.random.fork_rng(devices=[]):
            close = (trained if problem.options.get("steps") else differentiated)(
                problem
            )
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    seconds = time.perf_counter() - began
    return {"right": close == (not port.kind), "seconds": seconds}


def allclose(ours, theirs):
    ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
    return np.allclose(ours, theirs, atol=1e-5)


def leaves_of(tree):
    named = jax.tree_util.tree_leaves_with_path(tree)
    return {
        leaf_name(path): np.asarray(leaf)
        for path, leaf in named
        if isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, np.floating)
    }


def correspondence(problem):
    """Which leaf is made of which parameters: the usual check doesn't find it."""
    parameters = {n: array_of(p) for n, p in problem.module.named_parameters()}
    mapping = problem.options.get("mapping")
    return match(leaves_of(problem.params), parameters, mapping).layouts


def torch_args(problem):
    return problem.options.get("torch_args") or tensors_of(problem.args)


def differentiated(problem):
    """Whether all gradients are close; one that PyTorch hasn't is zero."""
    module = problem.module
    layouts = correspondence(problem)
    has_aux = problem.options.get("has_aux", False)
    gradient = jaxgrad.grad(problem.loss, has_aux)(problem.params, *problem.args)
    mine = leaves_of(gradient[0] if has_aux else gradient)
    module.zero_grad()
    problem.torch_loss(module, *torch_args(problem)).backward()
    theirs = {
        name: array_of(torch.zeros_like(p) if p.grad is None else p.grad)
        for name, p in module.named_parameters()
    }
    links = links_of(layouts, {name: a.shape for name, a in theirs.items()})
    total = {name: np.zeros(a.shape, np.float32) for name, a in theirs.items()}
    for link in links:
        total[link.name] = total[link.name] + added(link, mine, link.torch_shape)
    return all(allclose(total[link.name], theirs[link.name]) for link in links)


def trained(problem):
    """Whether the parameters are close after the optimizers' steps."""
    module, params = problem.module, problem.params
    layouts = correspondence(problem)
    optimizer = problem.options.get("optimizer") or optax.sgd(0.01)
    make = problem.options.get("torch_optimizer")
    torchs = make or (lambda ps: torch.optim.SGD(ps, lr=0.01))
    torchs = torchs(list(module.parameters()))
    state, args = optimizer.init(params), torch_args(problem)
    for _ in range(problem.options["steps"]):
        gradient = jaxgrad.grad(problem.loss)(params, *problem.args)
        moves, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, moves)
        torchs.zero_grad()
        problem.torch_loss(module, *args).backward()
        torchs.step()
    theirs = {name: array_of(p) for name, p in module.named_parameters()}
    mine = leaves_of(params)
    return all(allclose(mine[one.path], laid_out(one, theirs)) for one in layouts)


def share(rows, field):
    told = [row[field] for row in rows if row.get(field) is not None]
    return f"{100 * sum(told) / len(told):.1f} %" if told else "-"


def table(title, rows):
    """Both ways to check, over some ports."""
    lines = []
    for tool in (OURS, USUAL):
        said = [{**row, **row[tool]} for row in rows]
        done = [row for row in said if "error" not in row]
        wrong = [
            sum(not row["right"] for row in done if bool(row["kind"]) == has_kind)
            for has_kind in (False, True)
        ]
        seconds = [row["seconds"] for row in done] or [0.0]
        lines.append(
            [
                tool,
                *map(str, wrong),
                *(share(done, field) for field in ("named", "cause")),
                duration(statistics.median(seconds)),
                duration(sum(seconds)),
            ]
        )
    lines.append(["goal", *GOALS])
    columns = "", "false alarms", "misses", "named", "cause", "median", "total"
    right = sum(not row["kind"] for row in rows)
    failed = {tool: sum("error" in row[tool] for row in rows) for tool in (OURS, USUAL)}
    note = f"{right} right ports, {len(rows) - right} wrong ones."
    note += "".join(f" {n} errors of {tool}." for tool, n in failed.items() if n)
    columns = [columns[0], *(f">{column}" for column in columns[1:])]
    return Table(title, columns, lines, note)


def wrong(row):
    """Whether anything of what was said isn't as it should be."""
    said = row[OURS]
    return "error" in said or False in (said["right"], said["named"], said["cause"])


def failures(rows):
    lines = [
        f"{row['name']}: expected {row['kind'] or 'ok'}"
        + (f" at {', '.join(map(repr, row['where']))}" if row["where"] else "")
        + f"; got {row[OURS].get('error') or row[OURS]['got']}"
        for row in rows
        if wrong(row)
    ]
    return Table("What isn't said as expected", note="\n".join(lines or ["Nothing."]))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", default="*", metavar="PATTERN", help="of the ports' names, or a word")
    add("--every", type=int, default=1, metavar="N", help="only each Nth port")
    add("--failures", action="store_true", help="list what isn't said as expected")
    add("--json", type=Path, metavar="FILE", help="write all that was said")
    options = parser.parse_args()
    ports = [
        port
        for port in PORTS
        if options.only in port.name or fnmatch.fnmatch(port.name, options.only)
    ][:: options.every]
    if not ports:
        parser.error("no such port")

    warnings.simplefilter("ignore")  # the losses may warn
    rows, console = [], Console(stderr=True)
    hidden = not console.is_terminal
    for turn, port in enumerate(track(ports, "", console=console, disable=hidden)):
        rows.append(
            {
                "name": port.name,
                "kind": port.kind,
                "where": port.where,
                OURS: ours(port),
                USUAL: usual(port),
            }
        )
        if turn % CLEARED == CLEARED - 1:
            jax.clear_caches()
            gc.collect()

    about = machine(importlib.metadata.version("torch"))
    print(about, end="\n\n")
    print(table("Does it know a wrong port from a right one, and say why?", rows))
    first = share([row[OURS] for row in rows], "first")
    note = (
        "Named: the module or parameter, by the first difference or a wrong row; by "
        f"the first difference, where there is one, {first}. Cause: the first one is "
        f"what was built in. {USUAL}: float32 gradients of parameters paired for it, "
        "or the parameters after an optimizer's steps; atol=1e-5. A port's seconds "
        "include tracing and compiling."
    )
    print(Table("", note=note))
    if options.failures:
        print(failures(rows))
    if options.json:
        text = json.dumps({"machine": about, "rows": rows}, indent=1)
        options.json.write_text(text + "\n")
    caused = [row[OURS].get("cause") for row in rows if row["kind"]]
    short = sum(bool(cause) for cause in caused) < 0.95 * len(caused)
    bad = ("right", "named")
    sys.exit(
        short
        or any(row[OURS].get(field, False) is False for row in rows for field in bad)
    )


if __name__ == "__main__":
    main()
