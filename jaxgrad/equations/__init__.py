"""A loss's jaxpr: where its equations stand, and what they compute."""

from jaxgrad.equations.sites import (
    Path,
    Place,
    Taps,
    bodies,
    equations,
    function_place,
    in_library,
    inlined,
    rule_place,
    rule_sites,
    source_of,
    taps_of,
)
from jaxgrad.equations.values import Value, bind, literal, still, wider
from jaxgrad.equations.walking import Opaque, Walk, evaluate, step_of

__all__ = [
    "Opaque",
    "Path",
    "Place",
    "Taps",
    "Value",
    "Walk",
    "bind",
    "bodies",
    "equations",
    "evaluate",
    "function_place",
    "in_library",
    "inlined",
    "literal",
    "rule_place",
    "rule_sites",
    "source_of",
    "step_of",
    "still",
    "taps_of",
    "wider",
]
