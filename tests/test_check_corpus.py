"""`check_gradient` on a sample of the corpus: no false alarm, no miss, all named.

`make corpus` runs all of it, beside other checkers.
"""

import os
import warnings

import corpus
import jax
import pytest
from corpus import CASES, WAYS

from jaxgrad import check_gradient
from jaxgrad.pytrees import kind_of, leaf_name

BY_NAME = {case.name: case for case in CASES}
WAY = {way.name: way for way in WAYS}
# A report lists at most so many wrong entries of a leaf.
SHOWN = 16

# Those whose verdict isn't plainly `right`, and some of each shelf.
SAMPLE = [
    case
    for place, case in enumerate(CASES)
    if case.expect or case.stopped or case.x64 or place % 6 == 0
]
CHECKED = CASES if os.environ.get("JAXGRAD_WHOLE_CORPUS") else SAMPLE

# Each way at each of its places, all on different losses.
BROKEN = [
    ("softmax_classifier", "doubled", "loss"),
    ("tiny_loss", "doubled", "inner"),
    ("scan_with_conditional", "halved", "loss"),
    ("top_three", "halved", "inner"),
    ("power_iteration", "times_n", "loss"),
    ("siamese_stop_gradient", "times_n", "inner"),
    ("residual_remat_scan", "over_n", "loss"),
    ("eigenvalues", "over_n", "inner"),
    ("quantiles", "slightly_off", "loss"),
    ("conditional", "slightly_off", "inner"),
    ("custom_root_newton", "negated", "loss"),
    ("trusted_gradient_clipping", "negated", "inner"),
    ("float64_beside_float32", "zeroed", "loss"),
    ("conv_1d_strided_dilated", "zeroed", "inner"),
    ("jitted_sub_functions", "transposed", "loss"),
    ("recurrent_scan", "transposed", "inner"),
    ("physics_informed", "rolled", "loss"),
    ("relu_at_zero", "rolled", "inner"),
    ("gaussian_process", "swapped", "loss"),
    ("triplet_margin", "swapped", "inner"),
    ("gather_along_axis", "scaled_rows", "loss"),
    ("svd_low_rank", "scaled_rows", "inner"),
    ("reshuffled", "scaled_column", "loss"),
    ("linen_mlp", "scaled_column", "inner"),
    ("float16_leaves", "one_entry", "loss"),
    ("rosenbrock", "one_entry", "inner"),
    ("conv_2d", "some_entries", "loss"),
    ("optax_assorted", "some_entries", "inner"),
    ("einsum_batched_matmul", "biased", "loss"),
    ("mixed_dtypes", "biased", "inner"),
    ("bfloat16_inside", "part_of_batch", "loss"),
    ("ridge_regression_bilevel", "part_of_batch", "inner"),
    ("conv_transposed_and_grouped", "stale", "loss"),
    ("cumulative", "stale", "inner"),
    ("tiny_and_huge_leaves", "dropped_argument", "inner"),
    ("equinox_mlp", "transposed", "loss"),
    ("kalman_filter", "transposed", "inner"),
    ("one_leaf_dwarfs_another", "swapped", "loss"),
    ("layer_norm_gelu", "swapped", "inner"),
    ("sorted_weights", "one_entry", "loss"),
    ("policy_gradient", "one_entry", "inner"),
    ("remat_saving_dots_only", "some_entries", "loss"),
    ("multivariate_normal_fit", "some_entries", "inner"),
]


# Three rows of one or two numbers other than 0: too few to see that they are scaled.
# The goal is to name 95 % of the causes.
CAUSELESS = {("gather_along_axis", "scaled_rows", "loss")}


def checked(case, loss, problem):
    with jax.enable_x64(case.x64):
        return check_gradient(loss, problem.params, *problem.args, trust=problem.trust)


@pytest.mark.parametrize("case", CHECKED, ids=lambda case: case.name)
def test_a_correct_loss(case):
    problem = case.build()
    report = checked(case, problem.loss, problem)
    named = jax.tree_util.tree_leaves_with_path(problem.params)
    judged = [
        leaf_name(path)
        for path, leaf in named
        if kind_of(leaf) in ("differentiable", "integer")
    ]
    assert report.ok, str(report)
    assert {leaf.path: leaf.verdict for leaf in report.leaves} == {
        name: case.expect.get(name, "right") for name in judged
    }
    assert any(leaf.held for leaf in report.leaves) == case.stopped
    assert all(rule.verdict != "wrong" for rule in report.rules)


@pytest.mark.parametrize(
    ("name", "way", "where"), BROKEN, ids=["-".join(names) for names in BROKEN]
)
def test_a_broken_gradient(name, way, where):
    case = BY_NAME[name]
    truth = corpus.effective(case, WAY[way], where)
    if where == "inner":
        problem = case.build(corpus.break_inner(WAY[way]))
        loss = problem.loss
    else:
        problem = case.build()
        loss, _ = corpus.break_loss(*problem[:3], WAY[way])
    report = checked(case, loss, problem)
    text = str(report)
    wrong = {leaf.path: leaf for leaf in report.leaves if leaf.verdict == "wrong"}
    assert not report.ok, text
    # Nearly nothing may be said to be wrong, too; and several numbers are right there.
    on_kink = {leaf for leaf, verdict in case.expect.items() if verdict == "kink"}
    also = {*truth.shares, *on_kink}
    assert set(truth.leaves) <= set(wrong) <= {*truth.leaves, *also}, text
    for leaf, entries in truth.entries.items():
        if leaf in wrong:
            said = {entry.index for entry in wrong[leaf].entries}
            # As many as a report lists, and no entry that is right.
            assert said <= set(entries), text
            assert len(said) == min(SHOWN, len(entries)), text
    rules = {
        (rule.function, os.path.basename(rule.file), rule.line): rule
        for rule in report.rules
        if rule.verdict == "wrong"
    }
    assert set(rules) == {truth.rule}, text
    if (name, way, where) in CAUSELESS:
        return
    of_rule = rules[truth.rule].cause
    for leaf in truth.leaves:
        causes = {wrong[leaf].cause.kind}
        if where == "inner" and of_rule is not None:
            causes.add(of_rule.kind)
        assert causes & fitting(truth, leaf), text


def fitting(truth, leaf):
    """The causes that are true of a leaf.

    One that is off by just a constant may be said to be; of a gradient at a stale
    point, which has no name among the causes, it's right to say `unknown`.
    """
    kinds = {truth.kind} | ({"unknown"} if truth.kind == "stale" else set())
    factor = truth.factors.get(leaf)
    if factor is not None:
        kinds.add("factor")
        kinds |= {k for k, x in (("sign", -1), ("zero", 0)) if abs(factor - x) < 1e-9}
    return kinds


@pytest.fixture(autouse=True)
def _quiet():
    """The losses may warn, as when they divide by zero on the road not taken."""
    with warnings.catch_warnings(action="ignore"):
        yield


def test_the_sample():
    assert 35 <= len(SAMPLE) <= 50
    assert len({name for name, _, _ in BROKEN}) == len(BROKEN) >= 40
    assert set(BROKEN) >= CAUSELESS
    assert len(CAUSELESS) <= 0.05 * len(BROKEN)
    places = {(way, where) for _, way, where in BROKEN}
    assert places == {(way.name, where) for way in WAYS for where in way.where}
