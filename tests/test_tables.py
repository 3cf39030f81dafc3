"""Tests how reports look: in the terminal, in a notebook, and as plain data."""

import dataclasses
import json
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgrad

LONG = "a_leaf_with_a_name_that_is_longer_than_a_line_" * 3


def trained(params, **options):
    def loss(params):
        floats = [
            leaf for leaf in jax.tree.leaves(params) if eqx.is_inexact_array(leaf)
        ]
        return sum(jnp.sum(jnp.sqrt(leaf)) for leaf in floats).astype(jnp.float32)

    return jaxgrad.train(loss, params, **{"steps": 2, "learning_rate": 0.1} | options)


REPORTS = {
    "training": lambda: trained({"w": jnp.ones(2)}),
    "no steps": lambda: trained({"w": jnp.ones(2)}, steps=0),
    "not finite": lambda: trained({LONG: jnp.zeros(2)}),
    "differences": lambda: jaxgrad.difference_table(jnp.exp, 1.0),
    "wide differences": lambda: jaxgrad.difference_table(jnp.exp, 700.0, dtype=float),
}


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
def test_print_fits_80_columns_in_plain_text(report):
    lines = str(report()).splitlines()
    assert max(map(len, lines)) <= 80
    assert all(line == line.rstrip() for line in lines)
    assert "\x1b" not in "".join(lines)


def test_print_shows_the_facts():
    result = trained({LONG: jnp.zeros(2)})
    text = str(result)
    assert "updates made" in text
    assert LONG in "".join(text.split())  # folded, not cut
    table = jaxgrad.difference_table(lambda w: w**2, 3.0)
    rows = [line.split() for line in str(table).splitlines()]
    assert ["1", "7", "1", "6", "0"] in rows
    assert "exact derivative is 6" in str(table)


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
def test_plain_data_is_strict_json(report):
    report = report()
    data = report.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert list(data) == [field.name for field in dataclasses.fields(report)]


def test_plain_data_of_all_kinds_of_leaves():
    params = {
        "bfloat16": jnp.array([1.5, 2.0], jnp.bfloat16),
        "numpy": np.float16(4.0),
        "layer": jaxgrad.LinearParams(jnp.ones((1, 2)), jnp.ones(1)),
        "list": [jnp.ones(()), None, "text", True, 3],
        "not finite": [math.nan, math.inf, -math.inf, 0.5],
        "raw key": jax.random.PRNGKey(7),
        "key": jax.random.key(7),
        "function": math.sin,
    }
    result = trained(params, steps=0)
    data = result.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["params"] == {
        "bfloat16": [1.5, 2.0],
        "numpy": 4.0,
        "layer": {"weight": [[1.0, 1.0]], "bias": [1.0]},
        "list": [1.0, None, "text", True, 3],
        "not finite": ["nan", "inf", "-inf", 0.5],
        "raw key": [0, 7],
        "key": [0, 7],
        "function": repr(math.sin),
    }


def test_numbers_that_are_not_finite_are_words():
    data = trained({"w": jnp.zeros(2)}).to_dict()
    assert data["gradient_norms"] == ["inf"]
    assert data["losses"] == [0.0]


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
def test_a_notebook_shows_a_table(report):
    report = report()
    html = report._repr_html_()
    assert html.count("<table>") == html.count("</table>") == 1
    assert html.count("<tr>") == html.count("</tr>") > 1


def test_html_is_escaped():
    html = trained({"<script>": jnp.zeros(2)})._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


@pytest.mark.bad_input
@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
def test_a_report_without_a_verdict_has_no_truth_value(report):
    report = report()
    with pytest.raises(TypeError, match=r"no verdict: read .*fields") as caught:
        bool(report)
    for field in dataclasses.fields(report):
        assert field.name in str(caught.value)


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
def test_reports_are_frozen_and_compare_by_identity(report):
    report = report()
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.rows = None
    assert report == report
    assert report != dataclasses.replace(report)
