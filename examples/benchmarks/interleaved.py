"""Times things against each other: in turns, many times, in one run on one machine."""

import os
import platform
import random
import statistics
from collections.abc import Callable, Iterable

import jax

from jaxgrad.tables import Table

Times = dict[str, list[float]]


def interleave(contestants: dict[str, Callable[[], float]], rounds: int) -> Times:
    """Each contestant's times: every round asks all of them, in an order of its own.

    A slow moment of the machine then meets all alike, and so does what a contestant
    leaves behind: a full cache, or threads that wait busily for more work.
    """
    times: Times = {name: [] for name in contestants}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(contestants), len(contestants)):
            times[name].append(contestants[name]())
    return times


def rows(times: Times, base: str, goals: dict[str, str] | None = None):
    """Per contestant: its median time, and the median of its ratio to `base`."""
    for name, seconds in times.items():
        pairs = zip(seconds, times[base], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        time = duration(statistics.median(seconds))
        yield [name, time, f"{ratio:.3g}", (goals or {}).get(name, "")]


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def show(title: str, rows: Iterable[list[str]], base: str) -> None:
    """Prints a table of `rows`."""
    columns = ["", ">median", f">times {base}", ">goal"]
    print(str(Table(title, columns, rows)).rstrip(), end="\n\n")


def machine(torch_version: str) -> str:
    """The processor, its cores, and the versions of what is timed."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            models = [line for line in lines if line.startswith("model name")]
        name = models[0].partition(":")[2].strip()
    except (OSError, IndexError):
        pass
    return (
        f"{name}, {os.cpu_count()} cores, {platform.system()}\n"
        f"Python {platform.python_version()}, jax {jax.__version__} on "
        f"{jax.default_backend()}, torch {torch_version}"
    )
