"""Where things stand in a jaxpr: its equations, custom rules, and source lines."""

from __future__ import annotations

import functools
import inspect
import os
import site
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

ClosedJaxpr = jax.extend.core.ClosedJaxpr

Path = tuple[int, ...]
"""Where an equation stands: its number, after those of the equations it stands in."""

Taps = Mapping[Path, tuple[Sequence[Any], Sequence[Any]]]
"""Per equation of a trusted rule: an array, or `None`, per input and per output."""

CUSTOM = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")

# Printing is left to the user's own runs.
DROPPED = ("debug_callback", "debug_print")

INLINE = (
    "jit",
    "pjit",
    "remat2",
    "remat",
    "checkpoint",
    "closed_call",
    "core_call",
    "core_closed_call",
    "custom_vmap_call",
)


class Place(NamedTuple):
    """A line of source code."""

    function: str
    file: str
    line: int

    def __str__(self) -> str:
        where = f"{os.path.basename(self.file)}, line {self.line}"
        return f"`{self.function}` ({where})" if self.line else f"`{self.function}`"


def inlined(eqn: Any) -> Any:
    """The jaxpr of an equation that does nothing but run one; else `None`."""
    return body_of(eqn) if eqn.primitive.name in INLINE else None


def body_of(eqn: Any) -> Any:
    """The jaxpr of an equation that runs one: of a custom rule its forward part."""
    for key in ("jaxpr", "call_jaxpr", "call", "fun_jaxpr"):
        if key in eqn.params:
            return closed_jaxpr(eqn.params[key])
    raise KeyError(eqn.primitive.name)


def closed_jaxpr(jaxpr: Any) -> Any:
    """A jaxpr that is closed, over nothing if it was open."""
    if isinstance(jaxpr, ClosedJaxpr):
        return jaxpr
    return ClosedJaxpr(jaxpr, ())


def equations(closed: Any) -> Iterator[Any]:
    """All equations of a jaxpr, those inside others too, from the outside in."""
    for eqn in closed.jaxpr.eqns:
        yield eqn
        for body in bodies(eqn):
            yield from equations(body)


def count_numbers(eqns: Iterable[Any]) -> int:
    """The numbers in all outputs of equations, those inside a scan times its length."""
    total = 0
    for eqn in eqns:
        inside = sum(count_numbers(body.jaxpr.eqns) for body in bodies(eqn))
        outputs = sum(int(np.prod(var.aval.shape)) for var in eqn.outvars)
        total += inside * eqn.params.get("length", 1) or outputs
    return total


def bodies(eqn: Any) -> list[Any]:
    """The jaxprs that an equation holds, closed."""
    items = [
        item
        for value in eqn.params.values()
        for item in (value if isinstance(value, tuple) else (value,))
    ]
    kinds = jax.extend.core.Jaxpr, ClosedJaxpr
    return [closed_jaxpr(item) for item in items if isinstance(item, kinds)]


def rule_sites(
    closed: Any,
    path: Path = (),
    lengths: tuple[int, ...] = (),
    *,
    nested: bool = False,
) -> dict[Path, tuple[Any, tuple[int, ...]]]:
    """The equations of custom rules, and the lengths of the scans they stand in.

    Not those in a while loop, which has no reverse mode; those in another rule's
    forward part only if `nested`.
    """
    sites: dict[Path, tuple[Any, tuple[int, ...]]] = {}
    for number, eqn in enumerate(closed.jaxpr.eqns):
        here, name = (*path, number), eqn.primitive.name
        if name in CUSTOM:
            sites[here] = (eqn, lengths)
        if name in INLINE or (nested and name in CUSTOM):
            sites |= rule_sites(body_of(eqn), here, lengths, nested=nested)
        elif name == "scan":
            inner = (*lengths, eqn.params["length"])
            sites |= rule_sites(eqn.params["jaxpr"], here, inner, nested=nested)
        elif name == "cond":
            for branch, inside in enumerate(eqn.params["branches"]):
                sites |= rule_sites(inside, (*here, branch), lengths, nested=nested)
    return sites


def taps_of(
    closed: Any, trusted: Callable[[Place], bool]
) -> dict[Path, tuple[list[Any], list[Any]]]:
    """Zeros to add to the floating inputs and outputs of trusted rules."""

    def zeros(atoms: Sequence[Any], lengths: tuple[int, ...]) -> list[Any]:
        return [
            jnp.zeros((*lengths, *atom.aval.shape), atom.aval.dtype)
            if jnp.issubdtype(atom.aval.dtype, jnp.floating)
            else None
            for atom in atoms
        ]

    taps: dict[Path, tuple[list[Any], list[Any]]] = {}
    for path, (eqn, lengths) in rule_sites(closed, nested=True).items():
        inside = any(path[: len(outer)] == outer for outer in taps)
        if trusted(rule_place(eqn)) and not inside:
            taps[path] = zeros(eqn.invars, lengths), zeros(eqn.outvars, lengths)
    return taps


def rule_place(eqn: Any) -> Place:
    """The function, file and line of an equation's custom rule."""
    info = body_of(eqn).jaxpr.debug_info.func_src_info or "a function"
    name, _, where = info.partition(" at ")
    file, _, line = where.rpartition(":")
    return Place(name, file, int(line) if line.isdigit() else 0)


def function_place(function: Callable[..., Any]) -> Place:
    """The place of a function, as `rule_place` would give it."""
    inner = inspect.unwrap(getattr(function, "fun", function))
    code = getattr(inner, "__code__", None)
    if code is None:
        return Place(getattr(inner, "__name__", type(inner).__name__), "", 0)
    return Place(inner.__name__, code.co_filename, code.co_firstlineno)


_LIBRARIES = tuple(
    {
        os.path.realpath(folder) + os.sep
        for folder in (
            *site.getsitepackages(),
            site.getusersitepackages(),
            sysconfig.get_path("stdlib"),
            os.path.dirname(os.path.dirname(__file__)),
        )
    }
)


@functools.cache
def in_library(file: str) -> bool:
    """Whether a file is the standard library's, an installed package's, or ours."""
    return os.path.realpath(file).startswith(_LIBRARIES)


def call(function: Callable[..., Any], *operands: Any) -> Any:
    """Calls a function of the user's, so that its lines are told from its callers'."""
    return function(*operands)


def frames_of(eqn: Any) -> list[Place]:
    """The lines that an equation came from, the innermost first.

    Those outside of `call`, if it was made in one, aren't the function's own.
    """
    traceback = eqn.source_info.traceback
    frames: list[Place] = []
    for frame in traceback.frames if traceback else []:
        if frame.file_name == __file__:
            return frames
        name = frame.function_name.rpartition(".<locals>.")[2]
        frames.append(Place(name, frame.file_name, frame.line_num))
    return frames


def source_of(*eqns: Any) -> Place:
    """The innermost line outside of libraries of the first equation that has one.

    Equations inside `jit` have none: those that they stand in come next. A function
    that is all a library's has the library's own line.
    """
    fallback = None
    for eqn in eqns:
        frames = frames_of(eqn)
        for frame in frames:
            if not in_library(frame.file):
                return frame
        own = [frame for frame in frames if not frame.file.startswith(_JAX)]
        fallback = own[0] if own and fallback is None else fallback
    return fallback or Place("a library's function", "", 0)


_JAX = os.path.dirname(jax.__file__) + os.sep
