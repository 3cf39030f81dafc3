"""Compiles programs that run a few times: small ones in a hurry."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

# What makes XLA compile a small program faster.
_QUICK: dict[str, str | bool] = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}
# Below this many numbers in all variables together, a program takes longer to optimise
# than to run: so many float64 operations take milliseconds, optimising takes more.
_SMALL = 4_000_000


def shaped(shape: Sequence[int], dtype: Any, sharding: Any = None) -> Any:
    """What an array looks like, to compile for it."""
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)  # type: ignore[no-untyped-call]


class Program:
    """A function that is compiled for operands like those given, at its first call.

    `size` says how many numbers it makes, about: few, and it's compiled in a hurry.
    `None` asks for the same numbers as the user's own program, as XLA optimises it: in
    a hurry it computes tanh otherwise, and what is saturated might not be.
    `compile_all` compiles several at the same time.
    """

    def __init__(
        self, function: Callable[..., Any], size: int | None, *operands: Any
    ) -> None:
        with jax.disable_jit(False):  # whatever the user's setting
            self._lowered = jax.jit(function).lower(*operands)
        few = size is not None and size < _SMALL
        self._small = few and jax.default_backend() == "cpu"
        self._run: Any = None

    def compile(self) -> None:
        """Compiles, with little optimisation where that would take too long."""
        if self._run is None and self._small:
            with contextlib.suppress(Exception):  # an XLA without one of the options
                self._run = self._lowered.compile(_QUICK)
        if self._run is None:
            self._run = self._lowered.compile()

    def __call__(self, *operands: Any) -> Any:
        """Runs it."""
        self.compile()
        with jax.disable_jit(False):
            return self._run(*operands)


def compile_all(programs: Sequence[Program]) -> None:
    """Compiles side by side: XLA leaves Python free while it does."""
    with ThreadPoolExecutor(max_workers=len(programs)) as pool:
        list(pool.map(Program.compile, programs))
