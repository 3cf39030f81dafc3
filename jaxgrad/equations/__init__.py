"""A loss's jaxpr: where its equations stand, and what they compute."""

from jaxgrad.equations.dependence import scan_flags, scan_parts
from jaxgrad.equations.graph import FLAT, Graph, Node, flow, graph_of, run
from jaxgrad.equations.rules import bind_with_lines
from jaxgrad.equations.sites import (
    Path,
    Place,
    Taps,
    bodies,
    body_of,
    call,
    count_numbers,
    equations,
    frames_of,
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
    "FLAT",
    "Graph",
    "Node",
    "Opaque",
    "Path",
    "Place",
    "Taps",
    "Value",
    "Walk",
    "bind",
    "bind_with_lines",
    "bodies",
    "body_of",
    "call",
    "count_numbers",
    "equations",
    "evaluate",
    "flow",
    "frames_of",
    "function_place",
    "graph_of",
    "in_library",
    "inlined",
    "literal",
    "rule_place",
    "rule_sites",
    "run",
    "scan_flags",
    "scan_parts",
    "source_of",
    "step_of",
    "still",
    "taps_of",
    "wider",
]
