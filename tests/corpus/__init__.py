"""The corpus: correct losses, and ways to break their gradients, to tell apart.

`CASES` holds the losses; `WAYS` the breaks, `break_loss` and `break_inner` plant one,
and `effective` says whether it does anything at a case's point, and to which leaves.
"""

from corpus import (
    losses_edges,
    losses_functions,
    losses_libraries,
    losses_linear_algebra,
    losses_networks,
    losses_science,
    losses_training,
)
from corpus.breaks import WAYS, WORTH, Truth, Way, break_inner, break_loss, effective
from corpus.case import Case, Plant, Problem, compiled, gradients, torch_twin, widened

CASES: tuple[Case, ...] = (
    *losses_networks.CASES,
    *losses_training.CASES,
    *losses_linear_algebra.CASES,
    *losses_science.CASES,
    *losses_functions.CASES,
    *losses_edges.CASES,
    *losses_libraries.CASES,
)

__all__ = [
    "CASES",
    "WAYS",
    "WORTH",
    "Case",
    "Plant",
    "Problem",
    "Truth",
    "Way",
    "break_inner",
    "break_loss",
    "compiled",
    "effective",
    "gradients",
    "torch_twin",
    "widened",
]
