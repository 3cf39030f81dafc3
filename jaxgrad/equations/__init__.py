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
from jaxgrad.equations.values import Change, Value, bind, literal, still, wider
from jaxgrad.equations.walking import Opaque, Seen, Walk, evaluate, step_of

__all__ = [
    "Change",
    "Opaque",
    "Path",
    "Place",
    "Seen",
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
