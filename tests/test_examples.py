"""Each example and benchmark runs as a reader would run it, and prints 80 columns."""

import os
import pathlib
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
TESTS = sorted(EXAMPLES.glob("test_*.py"))
SCRIPTS = sorted(set(EXAMPLES.glob("*.py")) - set(TESTS))
assert SCRIPTS, f"no scripts in {EXAMPLES}"


def output_of(script, *arguments):
    # The flags that the tests set for themselves are none that a reader has.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    run = subprocess.run(
        [sys.executable, "-W", "error", script, *arguments],
        capture_output=True,
        text=True,
        env=environment | {"PYTHONIOENCODING": "utf-8"},
        timeout=120,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout.splitlines()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_an_example_runs_and_finds_what_it_claims(script):
    lines = output_of(script)
    assert lines
    assert [line for line in lines if len(line) > 80] == []


@pytest.mark.parametrize("tests", TESTS, ids=lambda tests: tests.stem)
def test_an_example_of_tests_passes(tests):
    *_, last = output_of("-m", "pytest", "-q", "-p", "no:cacheprovider", tests)
    assert " passed" in last


def test_the_benchmark_runs():
    lines = output_of(EXAMPLES / "benchmarks" / "overhead.py", "--quick")
    assert [line for line in lines if len(line) > 80] == []
    for label in ("import jaxgrad", "jaxgrad.train", "linear_loss", "x.sum()"):
        assert any(label in line for line in lines), label
