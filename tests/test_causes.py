"""Tests which cause is named for a wrong gradient, and that none is named by chance."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgrad.causes import KINDS, find_cause

SHAPES = [(3,), (6,), (4, 5), (5, 5), (3, 4, 5), (8, 1), (1, 6)]
SEEDS = range(5)


def rng(seed=0):
    return np.random.default_rng(seed)


def normal(shape, seed=0):
    return rng(seed).normal(size=shape)


def kind(claimed, reference, **options):
    cause = find_cause("w", np.asarray(claimed), np.asarray(reference), **options)
    assert cause.kind in KINDS
    assert cause.text.startswith("The gradient of `w` ")
    assert cause.text.endswith(".")
    return cause.kind


def text(claimed, reference, **options):
    return find_cause("w", claimed, reference, **options).text


# What the corpus does to an operand's gradient, where its shape allows it.
def off(g, places):
    flat = g.ravel().copy()
    rms = np.sqrt(np.mean(flat**2))
    flat[places] += np.maximum(np.abs(flat[places]), rms)
    return flat.reshape(g.shape)


def column(g):
    wrong = g.copy()
    wrong[..., g.shape[-1] // 2] *= 2
    return wrong


def matrix(g):
    return g.ndim == 2 and min(g.shape) > 1


WAYS = {
    "doubled": ("factor", lambda g: g * 2),
    "halved": ("factor", lambda g: g / 2),
    "times_n": ("factor", lambda g: g * 8),
    "over_n": ("factor", lambda g: g / 8),
    "slightly_off": ("factor", lambda g: g * 1.005),
    "negated": ("sign", lambda g: -g),
    "zeroed": ("zero", lambda g: g * 0),
    "transposed": ("transposed", lambda g: g.T, lambda g: g.shape == (5, 5)),
    "rolled": ("permuted", lambda g: np.roll(g, 1)),
    "scaled_rows": (
        "rows",
        lambda g: g * (1 + np.arange(len(g)))[:, None],
        matrix,
    ),
    "scaled_column": ("columns", column, matrix),
    "one_entry": ("entries", lambda g: off(g, [g.size // 2])),
    "some_entries": (
        "entries",
        lambda g: off(g, [g.size // 5, g.size // 2, g.size - 1]),
        lambda g: g.size > 6,
    ),
    "biased": ("offset", lambda g: g + 0.01 * np.sqrt(np.mean(g**2))),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scale", [1e-8, 1, 1e8, 1e-200, 1e200])
def test_each_way_of_the_corpus_by_its_kind(way, shape, scale):
    expected, change, *fits = WAYS[way]
    for seed in SEEDS:
        g = normal(shape, seed)
        if all(fit(g) for fit in fits):
            assert kind(change(g) * scale, g * scale) == expected


@pytest.mark.parametrize("way", WAYS)
def test_noise_below_the_bound_changes_nothing(way):
    expected, change, *_ = WAYS[way]
    for seed in SEEDS:
        g = normal((5, 5), seed)
        noise = normal((5, 5), seed + 100)
        reference = g + 1e-6 * np.linalg.norm(g) * noise / np.linalg.norm(noise)
        assert kind(change(g), reference, noise=2e-6) == expected
        # and with a bound that's too low there's still what explains 99 %
        assert kind(change(g), reference) == expected


@pytest.mark.parametrize("way", sorted(set(WAYS) - {"one_entry", "some_entries"}))
def test_a_sample_of_the_entries_is_enough(way):
    expected, change, *_ = WAYS[way]
    for seed in SEEDS:
        g = normal((30, 30), seed)
        reference = g.copy()
        reference.ravel()[rng(seed).permutation(900)[200:]] = np.nan
        claimed = g.T if way == "transposed" else change(g)
        assert kind(claimed, reference) == expected


def test_measured_entries_are_those_that_are_counted():
    reference = normal(100)
    reference[20:] = np.nan
    claimed = normal(100)
    claimed[[3, 7]] *= 5
    cause = find_cause("w", claimed, reference)
    assert cause.kind == "entries"
    assert "2 of 20 entries that were measured" in cause.text
    assert "[3] and [7]" in cause.text


@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([*SHAPES, (), (1,), (2,)]),
    factor=st.one_of(
        st.floats(-1e8, 1e8).filter(lambda c: abs(c) > 1e-8),
        st.floats(-10, 10).filter(lambda c: abs(c) > 1e-8),
    ).filter(lambda c: abs(abs(c) - 1) > 1e-6),
)
def test_any_constant_is_a_factor(seed, shape, factor):
    g = normal(shape, seed)
    assert kind(g * factor, g) == "factor"


@settings(max_examples=300)
@given(seed=st.integers(0, 10**9), shape=st.sampled_from(SHAPES))
def test_another_array_has_no_simple_cause(seed, shape):
    claimed, reference, *others = rng(seed).normal(size=(6, *shape))
    options = {
        "counts": {"batch size": 8, "number of outputs": 10},
        "other_claimed": {"a": others[0]},
        "other_reference": {"a": others[1], "b": others[2]},
    }
    assert kind(claimed, reference, **options) == "unknown"
    terms = [("a", others[3]), ("b", reference - others[3])]
    assert kind(claimed, reference, contributions=terms, **options) == "unknown"


def test_large_samples_of_one_distribution_are_not_each_other_in_another_order():
    claimed, reference = rng().normal(size=(2, 10**5))
    assert kind(claimed, reference) == "unknown"
    assert kind(claimed, reference, noise=1e-2) == "unknown"
    assert kind(rng().permutation(reference), reference) == "permuted"


def test_a_few_large_numbers_do_not_make_the_others_right():
    for seed in range(20):
        claimed, reference = rng(seed).standard_cauchy(size=(2, 1000))
        assert kind(claimed, reference) == "unknown"
    claimed = reference * (1 + 1e-7 * normal(1000))
    claimed[17] += 1000
    assert kind(claimed, reference) == "entries"


def test_other_leaves_may_be_anything():
    g = normal(5) * 1e-200
    wild = np.array([np.inf, np.nan, 1e300, -np.inf, 1])
    others = {"other_claimed": {"b": wild}, "other_reference": {"b": wild}}
    assert kind(2 * g, g, **others) == "factor"
    assert kind(normal(5, 1), normal(5), **others) == "unknown"


def test_factors_are_named():
    g, counts = normal(20), {"batch size": 8, "number of outputs": 10}
    says = [
        (8, "8 times too large, and 8 is the batch size: a sum where the loss takes"),
        (0.1, "10 times too small, and 10 is the number of outputs: a mean where"),
        (80, "80 is the batch size times the number of outputs: a sum"),
        (-8, "of the wrong sign and 8 times too large, and 8 is the batch size"),
        (2, "2 times too large, as if a term counted twice."),
        (0.5, "2 times too small, as if a factor were missing."),
        (8.001, "is 8.001 times what it should be"),
        (-3.25, "is -3.25 times what it should be"),
        (1.005, "is 1.005 times what it should be"),
    ]
    for factor, words in says:
        assert words in text(g * factor, g, counts=counts)
    one = text(g * 2, g, counts={"batch size": 2, "classes": 2, "one": 1})
    assert "2 is the batch size or the classes:" in one
    assert kind(2 * g, g, counts={"none": 0}) == "factor"


def test_a_factor_of_noisy_numbers_keeps_its_name():
    g = normal(1000)
    claimed = 8 * g * (1 + 1e-7 * normal(1000, 1))
    assert "8 is the batch size" in text(
        claimed, g, counts={"batch size": 8}, noise=1e-6
    )


def test_tiny_is_neither_zero_nor_a_factor():
    assert kind(1e-3 * normal((4, 5)), normal((4, 5), 1)) == "unknown"
    assert kind(1e5 * normal((4, 5)), normal((4, 5), 1)) == "unknown"


def test_scalars():
    def one(x):
        return np.array(x)

    assert kind(one(0.0), one(2.0)) == "zero"
    assert kind(one(-2.0), one(2.0)) == "sign"
    assert kind(one(3.0), one(2.0)) == "factor"
    assert kind(one(3.0), one(0.0)) == "offset"
    assert kind(one([[3.0]]), one([[0.0]])) == "offset"
    # One way, it may be chance; both ways it's more than a factor.
    other = {"other_claimed": {"b": one(2.0)}, "other_reference": {"b": one(3.0)}}
    assert kind(one(3.0), one(2.0), **other) == "swapped"
    other["other_claimed"]["b"] = one(3.0)
    assert kind(one(3.0), one(2.0), **other) == "factor"


def test_two_entries():
    g = np.array([1.0, 2.5])
    assert kind(g * 3, g) == "factor"
    assert kind(g[::-1], g) == "permuted"
    assert kind(g * [1, 3], g) == "entries"
    assert kind(g + 1, g) == "offset"
    assert kind(g * [2, 3], g) == "unknown"
    assert kind(g * [2, 2.01], g) == "unknown"


def test_one_known_entry_says_little():
    claimed, reference = normal((2, 10))
    reference[1:] = np.nan
    assert kind(claimed, reference) == "unknown"
    claimed[0] = 0  # others aren't, so it isn't missing altogether
    assert kind(claimed, reference) == "unknown"
    assert kind(claimed * 0, reference) == "zero"
    reference[1:3] = normal(2)
    claimed[:3] = 0
    assert "zero wherever it was measured" in text(claimed, reference)


def test_a_right_gradient_of_zero():
    zero, one = np.zeros((4, 5)), np.zeros((4, 5))
    one[1, 2] = 3
    assert kind(zero + 2, zero) == "offset"
    assert kind(zero + 0.1, zero) == "offset"
    cause = find_cause("w", one, zero)
    assert cause.kind == "unknown"
    assert "1 of 20 entries" in cause.text
    assert kind(normal((4, 5)), zero, other_claimed={"b": zero}) == "unknown"
    terms = [("a", normal((4, 5))), ("b", -normal((4, 5)))]
    assert kind(terms[0][1], zero, contributions=terms) == "unknown"


@pytest.mark.parametrize("shape", [(2, 2), (5, 5), (3, 4, 3), (3, 3, 3), (2, 3, 2, 3)])
def test_any_order_of_the_axes_is_transposed(shape):
    g = normal(shape)
    for order in list(itertools.permutations(range(g.ndim)))[1:]:
        wrong = g.transpose(order)
        if wrong.shape == g.shape:
            assert kind(wrong, g) == "transposed"
            assert "and of the wrong sign." in text(-wrong, g)
            assert "and 2 times too large" in text(2 * wrong, g)
        else:
            assert kind(wrong.reshape(shape), g) in ("transposed", "permuted")


def test_transposed_says_how():
    g = normal((4, 5))
    assert "is transposed." in text(normal((5, 5)).T, normal((5, 5)))
    assert "laid out as shape (5, 4)." in text(g.T.reshape(4, 5), g)
    assert "axes as (1, 2, 0)" in text(
        normal((3, 3, 3)).transpose(1, 2, 0), normal((3, 3, 3))
    )


def test_a_symmetric_matrix_is_not_transposed():
    g = normal((5, 5))
    g = g + g.T
    assert kind(2 * g, g) == "factor"
    assert kind(off(g, [3]), g) == "entries"
    assert kind(g @ g, g) == "unknown"
    assert kind(np.roll(g, 1), g) == "permuted"
    almost = off(g, [3])  # whose transpose has two other entries
    assert kind(almost.T, almost) == "transposed"


@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(6,), (4, 5), (3, 4, 5)]),
    shift=st.integers(1, 59),
    data=st.data(),
)
def test_any_roll_is_permuted_and_says_by_how_much(seed, shape, shift, data):
    g = normal(shape, seed)
    axis = data.draw(st.sampled_from([None, *range(g.ndim)]))
    length = g.size if axis is None else shape[axis]
    shift %= length
    if shift:
        cause = find_cause("w", np.roll(g, shift, axis), g)
        assert cause.kind == "permuted"
        by, where = cause.text.split("rolled by ")[1].split(maxsplit=1)
        along = None if "flat" in where else int(where.strip(" .").split()[-1])
        right = np.roll(g, shift, axis)
        np.testing.assert_array_equal(np.roll(g, int(by), along), right)


def test_reversed_and_shuffled():
    g = normal((4, 5))
    assert "reversed along axis 1" in text(g[:, ::-1], g)
    assert "reversed along axis 0" in text(g[::-1], g)
    assert "reversed as a flat list" in text(g[::-1, ::-1], g)
    assert "reversed along axis 0, and of the wrong sign" in text(-g[::-1], g)
    assert "in another order" in text(g[[2, 0, 3, 1]], g)
    assert "rolled by -1 along axis 0, and of the wrong sign" in text(
        -np.roll(g, -1, 0), g
    )
    repeated = np.array([1.0, 1, 2, 2, 2])
    assert "rolled by 1 along axis 0" in text(np.roll(repeated, 1), repeated)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_swapped_names_the_other_leaf(shape):
    a, b, c = normal((3, *shape))
    both = {
        "other_claimed": {"c": c, "b": a, "d": np.ones(99)},
        "other_reference": {"c": c, "b": b, "d": np.ones(99)},
    }
    cause = find_cause("w", b, a, **both)
    assert cause.kind == "swapped"
    assert "`w` and that of `b` are swapped." in cause.text
    assert "is that of `b`." in text(b, a, other_reference={"c": c, "b": b})
    assert "stands under `b`." in text(c, a, other_claimed={"c": c, "b": a})
    hidden = b.copy()
    hidden.ravel()[0] = np.nan
    assert kind(b, a, other_reference={"b": hidden}) == "swapped"
    assert kind(b, a, other_reference={"b": hidden * np.nan}) == "unknown"


def test_rows_and_columns_say_which():
    g = normal((4, 5))
    factors = np.array([1, 2, 3, 4.5])
    assert "factor in rows 1, 2 and 3 of 4: 2, 3, 4.5 times" in text(
        g * factors[:, None], g
    )
    assert "factor in column 2 of 5: 2 times" in text(column(g), g)
    assert "factor in column 2 of 5: 2 times" in text(
        column(normal((3, 4, 5))), normal((3, 4, 5))
    )
    dead = g * [1, 0, 1, 1, 1]
    assert "factor in column 1 of 5: 0 times" in text(dead, g)
    wrong = g.copy()
    wrong[2] = normal(5, 9)
    cause = find_cause("w", wrong, g)
    assert (cause.kind, "row 2 of 4, and right in the others" in cause.text) == (
        "rows",
        True,
    )
    g[2, 1] = wrong[2, 1] = 0  # which tells nothing
    assert kind(wrong, g) == "rows"
    wrong = g.copy()
    wrong[:, [0, 3]] = normal((4, 2), 9)
    assert kind(wrong, g) == "columns"


@settings(max_examples=50)
@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(4, 5), (5, 5), (2, 3), (3, 4, 5)]),
    rows=st.booleans(),
    rank_one=st.booleans(),
)
def test_slices_with_factors_of_their_own(seed, shape, rows, rank_one):
    g = normal(shape, seed)
    if rank_one:
        g = np.multiply.outer(g[(slice(None),) + (0,) * (g.ndim - 1)], g[0])
    axis = 0 if rows else g.ndim - 1
    factors = rng(seed + 1).uniform(1.5, 9, size=shape[axis])
    wrong = np.moveaxis(np.moveaxis(g, axis, -1) * factors, -1, axis)
    assert kind(wrong, g) == ("rows" if rows else "columns")


def test_noise_of_a_row_grows_with_its_factor():
    g = normal((4, 5))
    wrong = np.array([[1], [1e7], [2], [3]]) * g * (1 + 1e-8 * normal((4, 5), 1))
    assert kind(wrong, g, noise=1e-7) == "rows"


def test_rows_of_one_number_are_not_rows():
    diagonal = np.diag(normal(6))
    assert kind(diagonal * normal((6, 1), 1), diagonal) == "unknown"
    assert kind(normal((8, 1)), normal((8, 1), 1)) == "unknown"
    g = np.zeros((6, 4))
    g[:, 1] = normal(6)
    g[2] = normal(4)
    wrong = g.copy()
    wrong[4, 1] *= 3
    assert kind(wrong, g) == "entries"


def test_zeros_of_a_sparse_gradient_are_no_evidence():
    g = np.zeros((100, 4))
    wrong = g.copy()
    g[:5], wrong[:5] = normal((2, 5, 4))
    assert kind(wrong, g) == "unknown"
    wrong[:4] = g[:4]
    assert kind(wrong, g) == "rows"


def test_entries_say_where_and_what():
    g = np.arange(1.0, 21).reshape(4, 5) * 1e-9
    wrong = g.copy()
    wrong[2, 1] = 7e-9
    said = text(wrong, g)
    assert "1 of 20 entries, and right in the others: wrong at [2, 1];" in said
    assert "[2, 1] is 7e-09 and should be 1.2e-08." in said
    wrong[0, 0] *= 1 + 1e-6  # tiny, and yet more than noise
    assert "2 of 20 entries" in text(wrong, g)
    wrong.ravel()[[0, 7, 9, 18]] *= -1
    assert "[0, 0], [1, 2], [1, 4] and 2 more;" in text(wrong, g)


def test_what_fits_exactly_goes_before_what_fits_nearly():
    g = np.array([1000.0, 1, 2, -1, 3, 2])
    wrong = g * [2, 1, 1, 1, 1, 1]  # nearly twice the whole
    assert kind(wrong, g) == "entries"
    wrong = g + 1e-3 * normal(6)
    wrong[0] = 2000
    cause = find_cause("w", wrong, g)
    assert cause.kind == "factor"
    assert "% unexplained" in cause.text


def rows_of_a_batch(n, shape, seed=0):
    return [(f"row {i}", g) for i, g in enumerate(normal((n, *shape), seed))]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("n", [2, 5, 8])
def test_part_of_a_batch_is_a_missing_term(shape, n):
    for seed in SEEDS:
        terms = rows_of_a_batch(n, shape, seed)
        total = sum(g for _, g in terms)
        first = sum(g for _, g in terms[: (n + 1) // 2])
        calls = []

        def later(terms=terms, calls=calls):
            calls.append(1)
            return terms

        cause = find_cause("w", first, total, contributions=later)
        assert cause.kind == "missing_term"
        assert calls == [1]
        if n == 8:
            assert cause.text.endswith("lacks rows 4 to 7.")
        # A factor is simpler, so nothing is asked for.
        assert kind(2 * total, total, contributions=later) == "factor"
        assert calls == [1]
        # The mean over a half, and one row that is missing.
        assert kind(2 * first, total, contributions=terms) == "missing_term"
        assert kind(total - terms[1][1], total, contributions=terms) == "missing_term"


def test_missing_terms_and_how_often_the_rest_counts():
    terms = rows_of_a_batch(8, (4, 5))
    parts = np.array([g for _, g in terms])
    total = parts.sum(0)

    def says(*weights):
        return text(np.tensordot(weights, parts, 1), total, contributions=terms)

    assert "lacks row 1, row 3 and row 6." in says(1, 0, 1, 0, 1, 1, 0, 1)
    assert "lacks rows 5 to 7, and counts the rest 1 and 2 times." in says(
        2, 2, 2, 1, 1, 0, 0, 0
    )
    assert "lacks row 0, and counts the rest 1.143 times." in says(0, *[8 / 7] * 7)
    for weights in [(1, 1, 1, 1, 2, 2, 1, 1), (1, 1, 1, 1, 0.5, 1, 1, 0)]:
        assert "no simple cause fits" in says(*weights)


def test_terms_of_a_loss_by_their_labels():
    penalty, data = normal((2, 4, 5))
    terms = [("the penalty", penalty), ("the data term", data)]
    assert "lacks the penalty." in text(data, penalty + data, contributions=terms)
    # The sum is only nearly the reference.
    near = penalty + data + 1e-10 * normal((4, 5), 1)
    assert "lacks the penalty." in text(data, near, contributions=terms, noise=1e-8)


def test_terms_that_cannot_be_told_apart():
    one, two = normal((2, 4, 5))
    terms = [("a", one), ("b", one), ("c", two), ("d", two * 0)]
    assert kind(one + two, 2 * one + two, contributions=terms) == "missing_term"
    assert kind(normal((4, 5), 9), 2 * one + two, contributions=terms) == "unknown"
    assert kind(one, one + two, contributions=[("d", two * 0)] * 2) == "unknown"
    # More terms than numbers: anything is some combination of them.
    terms = rows_of_a_batch(8, (3,))
    total = sum(g for _, g in terms)
    for seed in range(50):
        wrong = normal(3, seed + 1)
        assert kind(wrong, total, contributions=terms) == "unknown"


def test_a_sample_is_enough_for_a_missing_term():
    terms = rows_of_a_batch(8, (30,))
    total = sum(g for _, g in terms)
    reference = np.where(np.arange(30) % 2, total, np.nan)
    assert kind(total - terms[3][1], reference, contributions=terms) == "missing_term"


@pytest.mark.parametrize(
    ("claimed", "reference", "words"),
    [
        (np.ones(3), np.ones(3) + 1e-12, "agrees"),
        (np.zeros(3), np.zeros(3), "agrees"),
        (np.ones(3), np.array([1, np.nan, np.nan]), "agrees"),
        (np.ones(3), np.ones(4), r"shape \(3,\), its reference \(4,\)"),
        (np.ones(3), np.full(3, np.nan), "finite entry"),
        (np.array([1, np.nan]), np.ones(2), "isn't finite"),
        (np.ones((0, 3)), np.ones((0, 3)), "finite entry"),
    ],
)
def test_mistakes_of_the_caller(claimed, reference, words):
    with pytest.raises(ValueError, match=words):
        find_cause("w", claimed, reference)


def test_arrays_are_left_as_they_are():
    claimed, reference = normal((2, 4, 5))
    before = claimed.copy(), reference.copy()
    find_cause("w", claimed, reference)
    np.testing.assert_array_equal((claimed, reference), before)


@pytest.mark.parametrize("way", ["doubled", "rolled", "one_entry", "shuffled", "other"])
def test_a_million_entries_take_no_time(way):
    g = normal((100, 100, 100))
    wrong = {
        "shuffled": lambda g: rng(1).permutation(g.ravel()).reshape(g.shape),
        "other": lambda g: normal(g.shape, 1),
    }.get(way) or WAYS[way][1]
    claimed = wrong(g)
    start = time.perf_counter()
    kind(claimed, g)
    assert time.perf_counter() - start < 5
