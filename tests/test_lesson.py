"""The lesson as a person runs it: its screen, and its exit status."""

import copy
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from jaxgrad import lesson as lesson_module
from jaxgrad.cli import main
from jaxgrad.lesson_lines import DEFAULTS, PAIRS, live_torch, recorded_torch


def run(*arguments, **options):
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "jaxgrad", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )


@pytest.fixture(scope="module")
def whole():
    return run("lesson")


def test_every_comparison_agrees_with_live_pytorch(whole):
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert f"{len(PAIRS)} of {len(PAIRS)} comparisons agree" in whole.stdout
    assert "run now" in whole.stdout


def test_the_bare_command_is_the_lesson(whole):
    assert run().stdout == whole.stdout


def test_fits_80_columns_without_colour_codes(whole):
    assert max(map(len, whole.stdout.splitlines())) <= 80
    assert "\x1b" not in whole.stdout + whole.stderr


@pytest.mark.parametrize(
    "fact",
    [
        "value, gradient = jaxgrad.value_and_grad(loss)(3.0)\n gradient\n = 6,",
        "jax.jit(jax.grad(loss))(3.0)\n = 6,",
        "loss(jnp.float32(2.9))\n = 8.41,",
        "loss(jnp.float32(3.1))\n = 9.61,",
        "sum(p.size for p in jax.tree.leaves(params))\n = 4,",
        "jaxgrad.linear(params, x)\n = 2.5,",
        "jaxgrad.linear_loss(params, x, y)\n = 6.25,",
        "gradient.weight\n = [-5, -10, -15],",
        "gradient.bias\n = -5,",
        "weight[0][2] -5 3 -15 -15",
        "0.5 - 0.01 * (-5) = 0.55",
        "after.weight\n = [0.55, 0.5, 0.45],",
        "prediction 2.5 3.25 3.25",
        "loss 6.25 3.0625 3.0625",
        "22 steps at a\nlearning rate of 0.01",
        "first.weight + second.weight\n = [-10, -20, -30],",
        "It gives 3.250, 3.0625, 3.1875.",
        "rate of 0.002: 2.650, 5.5225, 0.7275.",
        "float32 0.001 0.00052",
    ],
)
def test_the_lessons_figures_are_on_the_screen(whole, fact):
    assert fact in re.sub(r" +", " ", whole.stdout)


def test_recorded_figures_are_those_of_live_pytorch():
    """Run `python -m jaxgrad.lesson_lines` to record them anew."""
    record = recorded_torch()
    assert {name: record[name] for name in DEFAULTS} == DEFAULTS
    live = live_torch(**DEFAULTS)["figures"]
    assert live.keys() == record["figures"].keys() == {pair.name for pair in PAIRS}
    for name, figure in live.items():
        np.testing.assert_allclose(record["figures"][name], figure, rtol=1e-6)


def test_without_torch_the_recorded_figures_are_marked_so():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'torch' else find(n, *a)\n"
        "from jaxgrad.cli import main; sys.exit(main([]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "recorded, not run now" in done.stdout
    assert f"{len(PAIRS)} of {len(PAIRS)} comparisons agree" in done.stdout


def test_json_is_plain_data(capsys):
    assert main(["lesson", "--json", "--no-torch", "--learning-rate", "0.002"]) == 0
    data = json.loads(capsys.readouterr().out)
    figures = {c["name"]: c for part in data["parts"] for c in part["comparisons"]}
    assert figures["prediction_after"]["jax"] == [[pytest.approx(2.65)]]
    assert figures["prediction_after"]["agrees"] is None
    assert figures["weight_gradient"]["torch"] == [[-5.0, -10.0, -15.0]]


def test_another_learning_rate_without_torch_compares_what_was_recorded(capsys):
    assert main(["lesson", "--no-torch", "--steps", "3"]) == 0
    out = capsys.readouterr().out
    assert "The loss is NOT under it" in out
    assert "more have no recorded figure" in " ".join(out.split())


@pytest.mark.parametrize("rate", ["0.1", "0.0333333", "0.06"])
def test_other_learning_rates_agree_with_pytorch_too(rate, capsys):
    assert main(["lesson", "--learning-rate", rate]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", ["weight_gradient", "second_backward_works"])
def test_a_figure_that_disagrees_fails_the_lesson(name, monkeypatch, capsys):
    record = copy.deepcopy(recorded_torch())
    wrong = {"weight_gradient": [[-5, -10, -15.0001]], "second_backward_works": True}
    record["figures"][name] = wrong[name]
    monkeypatch.setattr(lesson_module, "recorded_torch", lambda: record)
    assert main(["lesson", "--no-torch"]) == 1
    out = capsys.readouterr().out
    assert "which DISAGREES" in out
    assert f"DIFFERS: {name}" in out


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lesson", "--learning-rate", "0"], "must be above 0 and finite, and is 0"),
        (["lesson", "--learning-rate", "nan"], "must be above 0 and finite"),
        (["lesson", "--learning-rate", "fast"], "invalid"),
        (["lesson", "--steps", "-1"], "must be 0 or more, and is -1"),
        (["lessen"], "invalid choice: 'lessen'"),
    ],
)
def test_bad_options_say_what_was_expected(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_a_closed_pipe_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m jaxgrad lesson --no-torch | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "1. A derivative is a limit\n"
    assert done.stderr == ""
