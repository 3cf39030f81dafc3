"""Stopped at any moment, examples/checkpointed.py goes on to the same bits."""

import functools
import hashlib
import importlib.util
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

EXAMPLE = pathlib.Path(__file__).parents[1] / "examples" / "checkpointed.py"
SMALL = ("--steps=120", "--every=40", "--rows=192", "--width=8")
LONG = ("--steps=400", "--every=10", "--rows=192", "--width=8")
KILLS = 20 if os.environ.get("JAXGRAD_WHOLE_CORPUS") else 6


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("checkpointed", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def whole(example, tmp_path_factory):
    """The parameters' sha256 after a run that nothing stopped."""
    return example.main([str(tmp_path_factory.mktemp("whole")), *SMALL])


@pytest.fixture(scope="module")
def first_half(example, tmp_path_factory):
    folder = tmp_path_factory.mktemp("half") / "run"
    example.main([str(folder), "--until=58", *SMALL])  # in the middle of an epoch
    return folder


@pytest.fixture
def stopped(first_half, tmp_path):
    """A folder with the checkpoints of steps 40 and 58."""
    return shutil.copytree(first_half, tmp_path / "run")


def files(folder):
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).digest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def refused(example, capsys, *arguments):
    """The one message of a run that exits with 1."""
    with pytest.raises(SystemExit) as exit_:
        example.main([str(argument) for argument in arguments])
    code = exit_.value.code  # a message to print means 1
    return code if isinstance(code, str) else (code == 1) * capsys.readouterr().err


def test_it_goes_on_to_the_same_bits(example, whole, stopped, capsys):
    (stopped / "80.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    assert example.main([str(stopped), "--resume", *SMALL]) == whole
    out = capsys.readouterr().out
    assert "ignored: 80.orbax-checkpoint-tmp, half-written" in out
    assert "from the checkpoint of step 58" in out
    assert sorted(path.name for path in stopped.iterdir()) == ["120", "58", "80"]


def test_nothing_to_go_on_from_is_said(example, whole, tmp_path, capsys):
    assert example.main([str(tmp_path / "new"), "--resume", *SMALL]) == whole
    assert "no whole checkpoint: from the beginning" in capsys.readouterr().out


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("other", "named"),
    [
        ("--steps=240", ["--steps", "was  120", "now  240"]),
        ("--batch-size=32", ["--batch-size", "was  64", "now  32"]),
        ("--learning-rate=0.02", ["--learning-rate", "was  0.01", "now  0.02"]),
        ("--seed=1", ["--seed", "was  0", "now  1"]),
        ("--rows=193", ["--rows", "was  192", "now  193"]),
        (
            "--width=9",
            ["state.params['hidden'].weight", "was  float32 (8, 2)", "now  float32 (9"],
        ),
    ],
)
def test_another_run_is_refused(example, stopped, capsys, other, named):
    before = files(stopped)
    message = refused(example, capsys, stopped, "--resume", *SMALL, other)
    assert f"{stopped / '58'} is of another run" in message
    place = message.index(named[0])
    assert all(text in message[place:] for text in named), message
    assert files(stopped) == before


@pytest.mark.bad_input
def test_other_data_are_refused(example, stopped, capsys, monkeypatch):
    x, y = example.spirals(192)
    x[7, 1] += 1e-6
    monkeypatch.setattr(example, "spirals", lambda rows: (x, y))
    message = refused(example, capsys, stopped, "--resume", *SMALL)
    assert "data's sha256\n    was  " in message
    assert message.count("\n    now  ") == 1


@pytest.mark.bad_input
def test_a_folder_in_use_is_refused(example, stopped, capsys):
    before = files(stopped)
    message = refused(example, capsys, stopped, *SMALL)
    assert "isn't empty" in message
    assert "--resume" in message
    assert files(stopped) == before


def test_another_machine_is_a_warning(example, whole, stopped, capsys, monkeypatch):
    here = example.machine()
    monkeypatch.setattr(example, "machine", lambda: here | {"jax": "0.0.1"})
    assert example.main([str(stopped), "--resume", *SMALL]) == whole
    assert f"jax\n    was  {jax.__version__}\n    now  0.0.1" in capsys.readouterr().err


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("item", "said"), [("state", "can't be read"), ("facts", "is damaged: other bytes")]
)
def test_a_damaged_checkpoint_is_noticed(example, whole, stopped, capsys, item, said):
    held = [path for path in (stopped / "58" / item).rglob("*") if path.is_file()]
    largest = max(held, key=lambda path: path.stat().st_size)
    content = largest.read_bytes()
    if item == "facts":  # another digest is as good as other bytes
        content = re.sub(rb'(state.s sha256": ")....', rb"\g<1>beef", content)
    else:
        content = content[:9]
    largest.write_bytes(content)
    message = refused(example, capsys, stopped, "--resume", *SMALL)
    assert f"{stopped / '58'} {said}" in message
    assert "Put it aside" in message
    shutil.rmtree(stopped / "58")
    assert example.main([str(stopped), "--resume", *SMALL]) == whole


@pytest.mark.bad_input
def test_a_diverging_run_keeps_the_last_finite_parameters(example, tmp_path, capsys):
    wild = (tmp_path / "run", *SMALL, "--every=6", "--learning-rate=1e5")
    example.main([*map(str, wild), "--until=6"])
    before = files(tmp_path / "run")
    message = refused(example, capsys, *wild, "--resume")
    assert message.startswith("Stopped: non-finite ")
    newest = pathlib.Path(message.partition("parameters are in ")[2].partition(". ")[0])
    after = files(tmp_path / "run")
    assert all(after[path] == before[path] for path in before if path.parts[0] == "6")
    assert newest.name.isdecimal()
    saved = example.ocp.StandardCheckpointer().restore(newest / "state")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved["params"]))


# No file may grow past so many bytes: what a full disk does, in a process of its own.
FULL = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.bad_input
@pytest.mark.parametrize("most", [0, 300])  # Orbax's code fails, or TensorStore's
def test_a_full_disk_costs_nothing_that_was_saved(example, whole, stopped, most):
    before = files(stopped)
    command = [sys.executable, "-W", "error", "-c", FULL, str(most), EXAMPLE]
    run = subprocess.run(
        [*command, stopped, "--resume", *SMALL],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 1, run.stdout + run.stderr
    assert run.stderr.count("\n") == 1, run.stderr
    assert run.stderr.startswith(
        "The checkpoint of step 80 can't be saved: File too large"
    )
    assert f"The last whole one: {stopped / '58'}." in run.stderr
    assert "--resume" in run.stderr
    after = files(stopped)
    assert {path: after[path] for path in before} == before
    assert example.main([str(stopped), "--resume", *SMALL]) == whole


def started(folder, cache, slowest):
    # The flags that the tests set for themselves are none that a reader has. What takes
    # longer to compile than the slowest is kept: a killed run reads and never writes.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(slowest),
    }
    return subprocess.Popen(
        [sys.executable, "-W", "error", EXAMPLE, folder, "--resume", *LONG],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def follow(run, step):
    """Reads what it prints, until it has saved this step, or one after it."""
    lines = []
    for line in run.stdout:
        lines.append(line)
        if line.startswith("step ") and int(line.split()[1]) >= step:
            return "".join(lines)
    raise AssertionError("".join(lines))


def stop_in_a_save(run, folder, patience):
    """Stops it where a half-written checkpoint lies in the folder."""
    while run.poll() is None:
        if list(folder.glob("*.orbax-checkpoint-tmp")):
            time.sleep(patience)
            run.send_signal(signal.SIGSTOP)
            time.sleep(0.02)  # until all its threads have stopped
            if list(folder.glob("*.orbax-checkpoint-tmp")):
                return
            run.send_signal(signal.SIGCONT)
    raise AssertionError(run.stdout.read())


def test_killed_at_random_moments_it_ends_in_the_same_bits(tmp_path):
    expected, _ = started(tmp_path / "whole", tmp_path / "cache", 0).communicate()
    *_, end = expected.splitlines()
    assert end.startswith("sha256 "), expected

    chance = random.Random(0)
    folder = tmp_path / "killed"
    start = functools.partial(started, folder, tmp_path / "cache", 1e9)
    last = 320  # of the 400 steps: some are left for Ctrl-C
    moments = sorted(chance.uniform(0, last) for _ in range(KILLS))
    printed = []
    for number, moment in enumerate(moments):
        run = start()
        printed.append(follow(run, moment) if number else "")
        if number % 2:
            stop_in_a_save(run, folder, patience=chance.uniform(0, 0.01))
        else:  # the first one while it starts
            time.sleep(chance.uniform(0, 0.06 if number else 2))
        run.kill()
        run.communicate()
        assert run.returncode == -signal.SIGKILL
    run = start()
    printed.append(follow(run, last))
    run.send_signal(signal.SIGINT)
    out, _ = run.communicate()
    assert run.returncode == 128 + signal.SIGINT, out
    assert "Go on: the same with --resume." in out

    out, _ = start().communicate()
    # Every second one was killed in a save, and the next one says so.
    assert sum("half-written" in text for text in printed) >= KILLS // 2
    assert out.splitlines()[-1] == end, out
