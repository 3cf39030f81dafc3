"""Which variables of a jaxpr depend on the parameters, without computing any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.extend.core

from jaxgrad.equations.sites import CUSTOM, INLINE, body_of


def moving(closed: Any, flags: Sequence[bool]) -> list[bool]:
    """Whether each output depends on them; `flags` says it of each input."""
    environment = dict(zip(closed.jaxpr.invars, flags, strict=True))
    for eqn in closed.jaxpr.eqns:
        inputs = [
            not isinstance(atom, jax.extend.core.Literal)
            and environment.get(atom, False)
            for atom in eqn.invars
        ]
        outputs = [any(inputs)] * len(eqn.outvars)
        name = eqn.primitive.name
        if any(inputs):
            if name in INLINE or name in CUSTOM:
                outputs = moving(body_of(eqn), inputs)
            elif name == "scan":
                outputs = scan_flags(eqn.params, inputs)
            elif name == "while":
                outputs = while_flags(eqn.params, inputs)
            elif name == "cond":
                outputs = cond_flags(eqn.params, inputs)
        environment.update(zip(eqn.outvars, outputs, strict=True))
    return [
        not isinstance(atom, jax.extend.core.Literal) and environment.get(atom, False)
        for atom in closed.jaxpr.outvars
    ]


def scan_parts(params: Mapping[str, Any], inputs: Sequence[Any]) -> Any:
    """The inputs of a scan: its constants, what it carries, and its rows."""
    if "ft_in" in params:  # from jax 0.12
        parts = params["ft_in"].update(inputs).unpack()
        return tuple(list(part) for part in parts)
    first = params["num_consts"]
    then = first + params["num_carry"]
    return list(inputs[:first]), list(inputs[first:then]), list(inputs[then:])


def scan_flags(params: Mapping[str, Any], flags: Sequence[bool]) -> list[bool]:
    """As `moving`, of the outputs of a scan."""
    consts, carry, xs = scan_parts(params, flags)
    while True:
        out = moving(params["jaxpr"], [*consts, *carry, *xs])
        after = [a or b for a, b in zip(carry, out, strict=False)]
        if after == carry:
            return [*carry, *out[len(carry) :]]
        carry = after


def while_flags(params: Mapping[str, Any], flags: Sequence[bool]) -> list[bool]:
    """As `moving`, of a while loop: all move if the number of its steps does."""
    first = params["cond_nconsts"]
    then = first + params["body_nconsts"]
    tests, consts, carry = flags[:first], flags[first:then], list(flags[then:])
    while True:
        if moving(params["cond_jaxpr"], [*tests, *carry])[0]:
            return [True] * len(carry)
        out = moving(params["body_jaxpr"], [*consts, *carry])
        after = [a or b for a, b in zip(carry, out, strict=True)]
        if after == carry:
            return carry
        carry = after


def cond_flags(params: Mapping[str, Any], flags: Sequence[bool]) -> list[bool]:
    """As `moving`, of a cond or switch."""
    branches = [moving(branch, flags[1:]) for branch in params["branches"]]
    return [flags[0] or any(out) for out in zip(*branches, strict=True)]
