"""Names the precision of products as the cause, where the highest one is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jaxgrad.causes import Cause
from jaxgrad.checking.report import BAD, LeafCheck
from jaxgrad.precision import Product


def fails(leaf: LeafCheck) -> bool:
    """Whether a leaf's gradient isn't what it should be."""
    return leaf.verdict in (*BAD, "imprecise")


def excused(
    leaves: Sequence[LeafCheck], after: Sequence[LeafCheck], low: Product
) -> list[LeafCheck]:
    """The verdicts, with the cause of those that pass at the highest precision.

    None does if any leaf is bad there too: a wrong rule is not to be excused.

    Args:
      leaves: the verdicts on the gradient as it is.
      after: those at the highest precision.
      low: the coarsest product.
    """
    if any(leaf.verdict in BAD for leaf in after):
        return list(leaves)
    return [
        _caused(leaf, then, low) if fails(leaf) and not fails(then) else leaf
        for leaf, then in zip(leaves, after, strict=True)
    ]


def _caused(leaf: LeafCheck, then: LeafCheck, low: Product) -> LeafCheck:
    kept = leaf.verdict in ("imprecise", "nonfinite")
    what = leaf.text if kept else "the gradient is computed in too few digits"
    has = "is right" if then.digits is None else f"has {then.digits:.1f} digits"
    text = f"{what}, since {low.sentence}. It {has} with {low.remedy}."
    row = leaf if kept else replace(then, verdict="imprecise")
    return replace(row, cause=Cause("matmul_precision", text))
