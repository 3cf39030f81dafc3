"""Runs a function of a benchmark in a process of its own, where its memory can be seen.

alone.py MODULE FUNCTION '[...]'      the arguments, and what is printed, are JSON
"""

import gc
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax

LIMIT = 600  # seconds for one


def elsewhere(module, function, *arguments, **environment):
    """What a function returns in a process of its own; `None` if it takes too long."""
    command = [sys.executable, __file__, module, function, json.dumps(arguments)]
    env = os.environ | environment
    try:
        return json.loads(subprocess.check_output(command, env=env, timeout=LIMIT))
    except subprocess.TimeoutExpired:
        return None


def beyond(task):
    """Seconds that a task takes here, and bytes at its peak beyond what there were."""
    gc.collect()  # JAX too lets go of arrays of NumPy's then
    resident = memory_now("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    began = time.perf_counter()
    jax.block_until_ready(task())
    return time.perf_counter() - began, memory_now("VmHWM") - resident


def memory_now(field):
    """A line of what Linux knows of this process; not so getrusage's ru_maxrss.

    That one starts at the size of the parent process.
    """
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])


def main():
    module, function, arguments = sys.argv[1:]
    found = getattr(importlib.import_module(module), function)(*json.loads(arguments))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
