"""The corpus is right, its breaks break, and `value_and_grad` takes its losses."""

import functools
import inspect
import os
from pathlib import Path
from zlib import crc32

import chex
import corpus
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from corpus import CASES, WAYS, Case, Problem, Way

import jaxgrad
from jaxgrad.pytrees import kind_of, leaf_name

# Every second one, to keep the suite short; `make corpus-test` takes them all.
CHECKED = CASES if os.environ.get("JAXGRAD_WHOLE_CORPUS") else CASES[::2]
BY_NAME = {case.name: case for case in CASES}
# Quick to compile, and of all the shapes that the ways need.
SAMPLE = [
    "optax_huber",
    "mixed_scales_in_one_leaf",
    "integers_and_booleans",
    "tiny_and_huge_leaves",
    "optax_hinge_beside_the_kink",
    "numpy_leaves",
    "small_divisor",
    "nnx_mlp",
    "straight_through_rounding",
    "unused_leaf",
    "products_with_a_zero",
    "bfloat16_leaves",
    "log_sum_exp",
    "remat_saving_dots_only",
    "mixed_dtypes",
    "loop_with_fixed_bounds",
    "dense_tanh",
    "jitted_sub_functions",
    "float64_beside_float32",
    "complex_inside",
    "triplet_margin",
    "triangular_solve",
    "kronecker_and_outer",
]

PLACES = [(way, where) for way in WAYS for where in way.where]
NOTHING = Way("nothing", "none")
NEGATED = next(way for way in WAYS if way.name == "negated")


@pytest.fixture(scope="module", params=CHECKED, ids=[c.name for c in CHECKED])
def case(request):
    """Tests of one case follow each other, so that they share what is compiled."""
    return request.param


class Ran:
    """A problem, compiled, with its value and gradients: as it is, or in float64."""

    def __init__(self, problem, x64, wide):
        self.x64 = x64
        with jax.enable_x64(x64):
            at = problem.params, problem.args
            params, self.args = corpus.widened(at) if wide else at
            self.function, self.values = corpus.compiled(problem.loss, params)
        self.value, self.gradients = self(self.values)

    def __call__(self, values):
        with jax.enable_x64(self.x64):
            value, gradients = self.function(values, self.args)
        return np.asarray(value), {k: np.asarray(gradients[k]) for k in self.values}


@functools.cache
def built(name):
    return BY_NAME[name].build()


@functools.cache
def ran_wide(name):
    return Ran(built(name), x64=True, wide=True)


@pytest.fixture(scope="module")
def native(case):
    return Ran(built(case.name), case.x64, wide=False)


@pytest.fixture(scope="module")
def wide(case):
    return ran_wide(case.name)


def test_runs_and_is_finite(case, native):
    assert native.value.shape == ()
    assert np.isfinite(native.value)
    for name, gradient in native.gradients.items():
        assert np.isfinite(gradient.astype(float)).all(), name
        assert gradient.dtype == native.values[name].dtype
    named = jax.tree_util.tree_leaves_with_path(built(case.name).params)
    kinds = {leaf_name(path): kind_of(leaf) for path, leaf in named}
    assert set(case.expect) <= set(kinds)
    for name, kind in kinds.items():
        unfit = case.expect.get(name) == "not_differentiable"
        assert (kind == "integer") == unfit, name


def test_value_and_grad_gives_what_jax_gives(case, native):
    problem = built(case.name)
    ours = jaxgrad.value_and_grad(problem.loss)
    with jax.enable_x64(case.x64):
        if "not_differentiable" in case.expect.values():
            names = "|".join(case.expect)
            with pytest.raises(TypeError, match=f"`({names})` of params has dtype"):
                ours(problem.params, *problem.args)
            return
        value, gradient = ours(problem.params, *problem.args)
    chex.assert_trees_all_equal_dtypes(value, native.value)
    named = jax.tree_util.tree_leaves_with_path(gradient)
    leaves = {leaf_name(path): np.asarray(leaf) for path, leaf in named}
    assert leaves.keys() == native.gradients.keys()
    for name, theirs in native.gradients.items():
        assert leaves[name].dtype == theirs.dtype
        # Two compilations round differently, and some of these losses lose digits.
        half = float(jnp.finfo(theirs.dtype).eps) ** 0.5
        if case.expect.get(name) != "imprecise":
            error = np.linalg.norm(leaves[name].astype(float) - theirs.astype(float))
            assert error <= half * np.linalg.norm(theirs.astype(float)), name


def test_digits_are_as_expected(case, native, wide):
    """Fewer than half of its dtype's digits are left where `imprecise` is expected."""
    for name, gradient in native.gradients.items():
        right = wide.gradients[name]
        error = np.linalg.norm(gradient.astype(float) - right)
        half = float(jnp.finfo(gradient.dtype).eps) ** 0.5
        imprecise = case.expect.get(name) == "imprecise"
        assert (error > half * np.linalg.norm(right)) == imprecise, name


def slopes(run, name):
    """The slope that a leaf's gradient claims along a direction, and how to step."""
    value = np.asarray(run.values[name])
    rng = np.random.default_rng(crc32(name.encode()))
    # In proportion to each entry, so that a step stays inside the loss's domain.
    direction = rng.normal(size=value.shape) * np.where(value, np.abs(value), 1)
    parts = run.gradients[name] * direction

    def at(step):
        moved = jnp.asarray(value + step * direction)
        return float(run({**run.values, name: moved})[0])

    return parts.sum(), np.linalg.norm(parts), at


def test_gradient_is_the_slope(case, wide):
    """In float64, at the best of nine steps; a stopped loss must differ somewhere."""
    agree = []
    with jax.enable_x64(True):
        for name in wide.values:
            claimed, size, at = slopes(wide, name)
            if case.expect.get(name) == "kink":
                left, right = (at(0) - at(-1e-6)) / 1e-6, (at(1e-6) - at(0)) / 1e-6
                assert abs(left - right) > 1e-3 * size, name
                low, high = sorted((left, right))
                assert low - 1e-5 * size <= claimed <= high + 1e-5 * size, name
                continue
            steps = [10.0**-power for power in range(1, 10)]
            central = [(at(h) - at(-h)) / (2 * h) for h in steps]
            error = np.nanmin(np.abs(np.array(central) - claimed))
            agree.append(error <= 1e-5 * size)
    assert all(agree) != case.stopped


def test_planted_rule_keeps_the_value(case, wide):
    planted = []

    def plant(function):
        planted.append(function)
        return corpus.break_inner(NEGATED)(function)

    broken = Ran(case.build(plant), x64=True, wide=True)
    assert len(planted) == 1
    np.testing.assert_allclose(broken.value, wide.value, rtol=1e-12)
    worst = max(relative_errors(broken.gradients, wide.gradients))
    assert worst > corpus.WORTH


def relative_errors(claimed, right):
    for name, gradient in right.items():
        error = np.linalg.norm(claimed[name] - gradient)
        yield error / (np.linalg.norm(gradient) or 1)


@pytest.mark.parametrize("case", CASES[::18], ids=lambda case: case.name)
def test_rule_that_is_right_changes_nothing(case):
    wide = ran_wide(case.name)
    same = Ran(case.build(corpus.break_inner(NOTHING)), x64=True, wide=True)
    np.testing.assert_allclose(same.value, wide.value, rtol=1e-12)
    assert max(relative_errors(same.gradients, wide.gradients)) < 1e-9


TWINS = [case for case in CASES if case.twin]


@pytest.mark.parametrize("case", TWINS, ids=lambda case: case.name)
def test_twin_agrees(case):
    wide = ran_wide(case.name)
    function, leaves = corpus.torch_twin(case)
    value = function(*leaves)
    gradients = torch.autograd.grad(value, leaves)
    np.testing.assert_allclose(value.item(), wide.value, rtol=1e-9)
    ours = wide.gradients.values()
    for theirs, gradient in zip(gradients, ours, strict=True):
        error = np.linalg.norm(theirs.numpy() - gradient)
        assert error <= 1e-8 * np.linalg.norm(gradient)


def test_size():
    assert len(CASES) >= 80
    assert len(TWINS) >= 25
    assert len(WAYS) >= 12
    assert len(BY_NAME) == len(CASES)
    assert len({way.name for way in WAYS}) == len(WAYS)


@pytest.mark.parametrize(
    ("way", "where"), PLACES, ids=[f"{way.name}-{where}" for way, where in PLACES]
)
def test_way_is_effective(way, where):
    """Each way is effective on ten cases, half of them at each of its places."""
    needed, found = 10 // len(way.where), 0
    for case in map(BY_NAME.get, SAMPLE):
        truth = corpus.effective(case, way, where)
        if truth is None:
            continue
        found += 1
        code = inspect.unwrap(case.make).__code__
        here = truth.rule.file == Path(code.co_filename).name
        assert here == (where == "inner")
        assert (truth.way, truth.kind) == (way.name, way.kind)
        if found == 1 and where == "loss":
            check_whole_loss(case, way, truth)
        if found == needed:
            return
    pytest.fail(f"effective on {found} cases")


def check_whole_loss(case, way, measured):
    """What was planted is what is measured, and the value stays what it was."""
    problem = built(case.name)
    broken, truth = corpus.break_loss(*problem[:3], way)
    assert set(measured.leaves) <= set(truth.leaves)
    assert measured.rule == truth.rule
    for name, entries in truth.entries.items():
        assert set(measured.entries[name]) == set(entries)
    value = Ran(problem._replace(loss=broken), x64=True, wide=True).value
    np.testing.assert_allclose(value, ran_wide(case.name).value, rtol=1e-12)


def test_break_without_effect():
    symmetric = jnp.array([[1.0, 2.0], [2.0, 5.0]])

    def make(plant):
        @plant
        def product(a, b):
            return a * b

        def loss(params):
            return jnp.sum(product(params["used"], symmetric))

        return Problem(loss, {"used": jnp.eye(2)})

    by_name = {way.name: way for way in WAYS}
    case = Case("symmetric", make)
    for where in ("loss", "inner"):
        assert corpus.effective(case, by_name["transposed"], where) is None
        truth = corpus.effective(case, by_name["halved"], where)
        assert truth.leaves == ("used",)
        assert truth.factors == pytest.approx({"used": 0.5})
        assert truth.shares == pytest.approx({"used": 0.5})
        assert not truth.entries
    truth = corpus.effective(case, by_name["one_entry"], "inner")
    assert truth.entries == {"used": ((1, 0),)}
    on_kink = case._replace(expect={"used": "kink"})
    assert corpus.effective(on_kink, by_name["halved"], "loss") is None
