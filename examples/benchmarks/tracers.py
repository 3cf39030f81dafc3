"""The tools that `trace_corpus.py` compares, and whether what they say is right.

JAX's own is `jax_debug_nans` with `jax_debug_infs`. The line that it names is the
innermost of its error's traceback that stands in the loss's file. It is asked in three
ways of the same compiled `value_and_grad`: as it is; with jit disabled; and so, but not
of infinities, which may be meant.
"""

import contextlib
import functools
import io
import os
import time
import traceback

import faults
import jax

import jaxgrad

OURS = "jaxgrad"

# A tool is asked of a case and its problem, and gives plain data.


def by_jaxgrad(case, problem):
    loss, params, args, has_aux = problem
    trace = jaxgrad.trace_gradient(loss, params, *args, has_aux=has_aux)
    origin = trace.first_nonfinite
    if isinstance(case, faults.Nonfinite):
        wrong = wrong_of(case, origin)
        line = origin.line if origin and same_file(origin, case) else None
        right_kind = bool(origin) and origin.kind in case.kinds
        return {"line": line, "kind": right_kind, "wrong": wrong}
    wrong = [f"accuses {told(origin)}"] if origin else []
    expected = case.zeros if isinstance(case, faults.Zero) else {}
    blocked = trace.blocked
    for leaf in blocked.keys() - expected.keys():
        wrong.append(f"{leaf} is said to be dead: {spots(blocked[leaf])}")
    leaves = {leaf: judged(case, leaf, blocked.get(leaf)) for leaf in expected}
    dead = getattr(case, "dead", {})
    for leaf, places in dead.items():
        found = trace.dead_entries.get(leaf)
        if found is None or found.slices[0] != places:
            wrong.append(f"dead entries of {leaf}: {found}, should be {places}")
    return {
        "accuses": bool(wrong),
        "leaves": leaves,
        "wrong": [
            *wrong,
            *(text for leaf in leaves.values() for text in leaf["wrong"]),
        ],
    }


def by_jax(case, problem, *, infs, jit):
    line = message = None
    with (
        contextlib.redirect_stdout(io.StringIO()),  # it tells that it runs again
        jax.debug_nans(True),
        jax.debug_infs(infs),
        jax.disable_jit(not jit),
    ):
        try:
            faults.gradient(problem)
        except Exception as error:
            if "FloatingPointError" not in type(error).__name__:  # or an internal one
                raise
            line, message = line_of(error, faults.file_of(case)), str(error)[:300]
    return {"line": line, "accuses": message is not None, "message": message}


def line_of(error, file):
    """The innermost line of a file; of what a backward step came from if need be."""
    while error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == file]
        if lines:
            return lines[-1]
        error = error.__cause__
    return None


TOOLS = {
    OURS: by_jaxgrad,
    "JAX, nans and infs": functools.partial(by_jax, infs=True, jit=True),
    "JAX, the same, no jit": functools.partial(by_jax, infs=True, jit=False),
    "JAX, nans, no jit": functools.partial(by_jax, infs=False, jit=False),
}

# Whether what was said is right: as in tests/test_faults.py.


def same_file(spot, case):
    return os.path.exists(spot.file) and os.path.samefile(
        spot.file, faults.file_of(case)
    )


def told(origin):
    index = list(origin.index)
    return f"`{origin.operation}` at line {origin.line}, {origin.kind}, entry {index}"


def spots(blocks):
    texts = [f"`{b.operation}` at line {b.line}, {b.reason}" for b in blocks]
    return "; ".join(texts) or "never used"


def wrong_of(case, origin):
    """What is wrong of an origin, in words."""
    if origin is None:
        return ["no answer"]
    lines = faults.marks(case)
    wrong = []
    if not (same_file(origin, case) and lines.found_by({origin.line})):
        wrong.append(f"the line: should be {sorted(lines.blame)}")
    if origin.kind not in case.kinds:
        wrong.append(f"the kind: should be {' or '.join(case.kinds)}")
    index = tuple(origin.index)[: len(case.index)] if case.index is not None else None
    said = {"phase": origin.phase, "index": index, "iteration": origin.iteration}
    said |= {"branch": origin.branch, "origin": origin.name}
    for name, value in said.items():
        expected = getattr(case, name)
        if expected is not None and value != expected:
            wrong.append(f"the {name}: {value}, should be {expected}")
    if origin.harmless != case.harmless:
        wrong.append(f"harmless is {origin.harmless}")
    if not (origin.reason and origin.repair):
        wrong.append("no reason or no repair")
    return [f"{told(origin)}: wrong in {'; '.join(wrong)}"] if wrong else []


def judged(case, leaf, blocks):
    """Of a leaf whose gradient is zero: are the line and the reason right?"""
    reasons, lines = case.zeros[leaf], faults.marks(case, leaf)
    if blocks is None:
        line = reason = False
    elif not reasons or not blocks:
        line = reason = not reasons and not blocks
    else:
        said = {b.line for b in blocks}
        inside = all(same_file(b, case) for b in blocks)
        line = inside and lines.allow(said) and lines.found_by(said)
        reason = lines.found_by({b.line for b in blocks if b.reason in reasons})
    wrong = []
    if not (line and reason):
        said = "not found" if blocks is None else spots(blocks)
        where = f"line {sorted(lines.blame)}, " if reasons else ""
        right = f"{where}{' or '.join(reasons) or 'never used'}"
        wrong.append(f"{leaf}: {said}; should be {right}")
    return {"line": line, "reason": reason, "wrong": wrong}


def run(tool, case):
    problem, fault = case.build(), type(case).__name__
    began = time.perf_counter()
    try:
        said = TOOLS[tool](case, problem)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"[:300]
        said = {"error": message, "wrong": [message], "accuses": False}
    row = {"tool": tool, "case": case.name, "fault": fault}
    row |= {"harmless": getattr(case, "harmless", False)}
    row |= {"library": faults.in_libraries(case), **said}
    if fault == "Nonfinite":
        line = said.get("line")
        right = line is not None and faults.marks(case).found_by({line})
        row["named"] = "right" if right else "none" if line is None else "wrong"
    return row | {"seconds": time.perf_counter() - began}
