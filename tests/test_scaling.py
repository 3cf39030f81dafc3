"""The benchmark of scaling runs, every section of it, and says which goals it meets."""

import os
import pathlib
import subprocess
import sys

BENCHMARKS = pathlib.Path(__file__).parents[1] / "examples" / "benchmarks"
SECTIONS = {
    "minibatch": ["parameters, a batch of 256 rows", "jaxgrad.train", "a JAX loop"],
    "rows": ["What a row costs", "largest / smallest"],
    "devices": ["Weak scaling", "over whole"],
    "instruments": ["check_gradient", "trace_gradient", "slope"],
    "table": ["read_moments", "ten times the rows", "1,000 full-batch steps"],
}


def run(*arguments):
    # The flags that the tests set for themselves are none that a reader has.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, "-W", "error", BENCHMARKS / "scaling.py", *arguments],
        capture_output=True,
        text=True,
        env=environment | {"PYTHONIOENCODING": "utf-8"},
        timeout=600,
    )


def test_every_section_prints_its_table():
    done = run("--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    for section, texts in SECTIONS.items():
        for text in texts:
            assert any(text in line for line in lines), (section, text)
    goals = [line for line in lines if "≥ " in line or "≤ " in line]
    # Two of the MLP, one of the GPT, two of reading, and one of memory.
    assert len(goals) == 6
    assert all(line.endswith((" met", " missed")) for line in goals)


def test_a_section_that_is_not_there_is_named():
    done = run("--quick", "row")
    assert done.returncode == 2
    assert "no section `row`; there are minibatch, rows" in done.stderr
