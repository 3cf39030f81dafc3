"""The faults: what plain JAX says of each, and what `trace_gradient` says.

The tests named `test_trace_...` need the instrument, the others don't.
"""

import os

import jax
import numpy as np
import pytest
from faults import (
    HEALTHY,
    KINDS,
    NONFINITE,
    REASONS,
    ZEROS,
    file_of,
    gradient,
    in_libraries,
    marks,
)

FAULTS = (*NONFINITE, *ZEROS)
CASES = (*FAULTS, *HEALTHY)


def each(cases):
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def is_finite(found):
    arrays = [found.loss, *found.leaves.values()]
    return all(np.isfinite(array).all() for array in arrays)


def dead_leaves(found):
    return {leaf for leaf, slope in found.leaves.items() if not slope.any()}


def dead_places(slope):
    return tuple(i for i, part in enumerate(slope) if not np.any(part))


# What plain JAX says


def test_there_are_enough():
    assert len(NONFINITE) >= 45
    assert len(ZEROS) >= 30
    assert len(HEALTHY) >= 25
    for cases in (NONFINITE, ZEROS):
        assert 3 * sum(map(in_libraries, cases)) >= len(cases)


def test_names_are_unique():
    assert len({case.name for case in CASES}) == len(CASES)


def test_each_kind_and_reason_is_somebodys_best():
    best = [reasons[0] for case in ZEROS for reasons in case.zeros.values() if reasons]
    assert {case.kinds[0] for case in NONFINITE} == KINDS - {"other"}
    assert set(best) == REASONS
    assert sum(() in case.zeros.values() for case in ZEROS) >= 2


@pytest.mark.parametrize("reason", sorted(REASONS))
def test_each_reason_has_two_cases(reason):
    having = [c for c in ZEROS if reason in {r[0] for r in c.zeros.values() if r}]
    assert len(having) >= 2


@each(NONFINITE)
def test_nonfinite_has_its_mark(case):
    assert len(marks(case).blame) == 1


@each(ZEROS)
def test_zero_has_its_marks(case):
    for leaf, reasons in case.zeros.items():
        assert bool(marks(case, leaf).blame) == bool(reasons), leaf


@each(HEALTHY)
def test_healthy_has_no_mark(case):
    assert not marks(case).blame


@each(NONFINITE)
def test_nonfinite(case):
    assert is_finite(gradient(case.build())) == case.harmless


@each(ZEROS)
def test_zero(case):
    found = gradient(case.build())
    assert is_finite(found)
    assert dead_leaves(found) == set(case.zeros)


@each(HEALTHY)
def test_healthy(case):
    found = gradient(case.build())
    assert is_finite(found)
    assert not dead_leaves(found)
    for leaf, places in case.dead.items():
        assert dead_places(found.leaves[leaf]) == places


# What the instrument says


def traced(case):
    from jaxgrad import trace_gradient

    problem = case.build()
    trace = trace_gradient(
        problem.loss, problem.params, *problem.args, has_aux=problem.has_aux
    )
    check_gradient_of(trace, gradient(problem))
    return trace


def same_file(one, other):
    return os.path.samefile(one, other)


def check_gradient_of(trace, expected):
    """`trace.gradient` is that of JAX; leaves without one are `None`, or left out."""
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(trace.gradient)]
    assert len(leaves) == len(expected.leaves)
    for mine, slope in zip(leaves, expected.leaves.values(), strict=True):
        finite = np.isfinite(slope)
        np.testing.assert_array_equal(np.isfinite(mine), finite)
        size = np.linalg.norm(slope[finite])
        np.testing.assert_allclose(mine[finite], slope[finite], atol=1e-5 * size)


def check_origin(case, origin):
    assert same_file(origin.file, file_of(case))
    assert marks(case).found_by({origin.line}), f"line {origin.line}: {origin.text}"
    assert origin.kind in case.kinds
    assert origin.reason
    assert origin.repair
    assert origin.harmless == case.harmless
    assert origin.phase in ("forward", "backward")
    if case.phase is not None:
        assert origin.phase == case.phase
    if case.index is not None:
        assert tuple(origin.index)[: len(case.index)] == case.index
    if case.iteration is not None:
        assert origin.iteration == case.iteration
    if case.branch is not None:
        assert origin.branch == case.branch
    if case.origin is not None:
        assert origin.name == case.origin


@each(NONFINITE)
def test_trace_nonfinite(case):
    trace = traced(case)
    assert trace.first_nonfinite is not None
    check_origin(case, trace.first_nonfinite)
    lines = {origin.line for origin in trace.nonfinite}
    assert trace.first_nonfinite.line in lines


def check_blocks(case, leaf, blocks):
    reasons = case.zeros[leaf]
    if not reasons:
        assert blocks == ()
        return
    assert all(same_file(block.file, file_of(case)) for block in blocks)
    allowed = marks(case, leaf)
    said = [(block.line, block.reason) for block in blocks]
    assert allowed.allow({line for line, _ in said}), (leaf, said)
    right = {line for line, reason in said if reason in reasons}
    assert allowed.found_by(right), (leaf, said)


@each(ZEROS)
def test_trace_zero(case):
    trace = traced(case)
    assert trace.first_nonfinite is None
    assert set(trace.blocked) == set(case.zeros)
    for leaf, blocks in trace.blocked.items():
        check_blocks(case, leaf, blocks)


@each(HEALTHY)
def test_trace_healthy(case):
    trace = traced(case)
    assert trace.first_nonfinite is None
    assert not trace.blocked
    assert marks(case).infinite <= {origin.line for origin in trace.nonfinite}
    for leaf, places in case.dead.items():
        assert trace.dead_entries[leaf].slices[0] == places
