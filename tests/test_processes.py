"""Real processes on loopback: all give what one device gives; one's death ends all."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from processes.verbs import ALONE, VERBS

TESTS = pathlib.Path(__file__).parent
WORKER = TESTS / "processes" / "worker.py"
DEVICES = 4  # of all processes together
# A quiet machine takes a sixth of it; a hang is ended by it.
PATIENCE = 300
# Sums in another order differ by a few roundings of float32, 1.2e-7: up to 3e-7 was
# seen here, and 3e-6 in the rates between which explain_step looks for the best.
ROUNDING = 1e-5
# 4 processes, of one device each, do these alone: each compiles as much as one of 2.
SOME = "gradients", "train", "check_wrong", "trace_nan"
IN_A_HURRY = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Process(subprocess.Popen):
    """One of several, whose output goes to files: a full pipe would stop it."""

    def __init__(self, folder, number, count, *arguments):
        flags = (
            f"--xla_force_host_platform_device_count={DEVICES // count} {IN_A_HURRY}"
        )
        paths = TESTS, TESTS.parent / "examples", os.environ.get("PYTHONPATH")
        own = {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path),
            "XLA_FLAGS": flags,
        }
        self.files = [folder / f"{number}.{name}" for name in ("out", "err")]
        with self.files[0].open("w") as out, self.files[1].open("w") as err:
            super().__init__(
                [sys.executable, "-W", "error", WORKER, *arguments],
                stdin=subprocess.PIPE,  # closes with this process: then it ends itself
                stdout=out,
                stderr=err,
                env=os.environ | own,
            )

    @property
    def printed(self):
        return [file.read_text("utf-8", "replace") for file in self.files]


@contextlib.contextmanager
def started(folder, count, task, names):
    """Several processes, that are ended with the block, whatever happens in it."""
    address = f"127.0.0.1:{free_port()}", str(count)
    processes = []
    try:
        for number in range(count):
            all_of_it = task, names, *address, str(number)
            processes.append(Process(folder, number, count, *all_of_it))
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
            process.stdin.close()


def ended(processes, patience):
    """Waits for all of them: their exit statuses; `None` of those that go on."""
    until = time.monotonic() + patience
    while time.monotonic() < until and any(p.poll() is None for p in processes):
        time.sleep(0.1)
    return [process.poll() for process in processes]


def difference(found, right):
    """In what two findings differ, beyond rounding; `None` if they don't."""
    if isinstance(found, str):
        return found
    (a, tree), (b, same_tree) = jax.tree.flatten(found), jax.tree.flatten(right)
    if tree != same_tree:
        return f"{found} is built otherwise than {right}"
    words = [(x, y) for x, y in zip(a, b, strict=True) if isinstance(y, str)]
    for x, y in words:
        if x != y:
            return f"{x!r} should be {y!r}"
    numbers = [(x, y) for x, y in zip(a, b, strict=True) if not isinstance(y, str)]
    x, y = np.array(numbers, float).reshape(-1, 2).T
    if not np.allclose(x, y, rtol=ROUNDING, atol=ROUNDING, equal_nan=True):
        worst = int(np.nanargmax(np.abs(x - y)))
        return f"{x[worst]} should be {y[worst]}"
    return None


@pytest.mark.parametrize(("count", "names"), [(2, tuple(VERBS)), (4, SOME)])
def test_every_process_gives_what_one_device_gives(count, names, tmp_path):
    with started(tmp_path, count, "verbs", " ".join(names)) as processes:
        # This process computes meanwhile.
        right = {name: VERBS[name](ALONE) for name in names}
        statuses = ended(processes, PATIENCE)
        printed = [process.printed for process in processes]
    assert statuses == [0] * count, printed
    right = json.loads(json.dumps(right, default=float))
    told = [out.rpartition("found ")[2] for out, _ in printed]
    found = json.loads(told[0])
    wrong = {name: difference(found[name], right[name]) for name in names}
    assert {name: text for name, text in wrong.items() if text} == {}
    assert len(set(told)) == 1, "the processes don't agree"
    assert not any("Traceback" in err for _, err in printed)


@pytest.mark.parametrize(("count", "how"), [(3, "killed"), (2, "raises")])
def test_a_process_that_dies_ends_the_others(count, how, tmp_path):
    with started(tmp_path, count, "die", how) as processes:
        *others, dead = processes
        ended([dead], PATIENCE)
        statuses = ended(others, 60)
        told = [process.printed[1] for process in processes]
    assert dead.returncode == (-signal.SIGKILL if how == "killed" else 1), told
    assert None not in statuses, "they go on a minute later"
    assert 0 not in statuses
    if how == "raises":
        assert "MemoryError: no room for batch 30" in told[-1]
    for text in told[:-1]:
        # JAX says it after a missed heartbeat; we, where a connection breaks first.
        assert re.search("another (task|process) died|one has ended", text), text
