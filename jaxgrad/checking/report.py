"""What a check of a gradient found, as facts, and how it is printed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxgrad.causes import Cause
from jaxgrad.equations import Place
from jaxgrad.tables import Finding, Report, Table, findings_table, number

Verdict = Literal[
    "right",
    "imprecise",
    "wrong",
    "kink",
    "nonfinite",
    "not_differentiable",
    "undecided",
]
# Worst first, as the table has them.
_ORDER: tuple[Verdict, ...] = (
    "wrong",
    "nonfinite",
    "undecided",
    "imprecise",
    "kink",
    "right",
    "not_differentiable",
)
BAD: tuple[Verdict, ...] = ("wrong", "nonfinite", "undecided")
_ROWS = 20
_ENTRIES = 6


@dataclass(frozen=True)
class EntryCheck:
    """One entry of a leaf: what the gradient claims, and what the loss's values say."""

    index: tuple[int, ...]
    claimed: float
    reference: float
    uncertainty: float


@dataclass(frozen=True, eq=False)
class LeafCheck:
    """The verdict on one leaf's gradient.

    Attributes:
      path: the leaf's path.
      shape: its shape.
      dtype: its dtype.
      verdict: one of the fixed words.
      relative_error: the difference from the reference, over the reference (2-norm).
      digits: the decimal digits that the native gradient has right.
      entries: entries that were looked at alone, the worst first.
      wrong_entries: how many entries are wrong, where that is known.
      cause: how the gradient is wrong.
      one_sided: on a kink, the least and the greatest derivative: of the entry that is
        listed first, or along the direction that showed the kink.
      held: "stopped" or "trusted" where the gradient is meant to differ.
      text: why, for a person.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    verdict: Verdict
    relative_error: float | None = None
    digits: float | None = None
    entries: tuple[EntryCheck, ...] = ()
    wrong_entries: int | None = None
    cause: Cause | None = None
    one_sided: tuple[float, float] | None = None
    held: str = ""
    text: str = ""


@dataclass(frozen=True)
class RuleCheck:
    """The verdict on one custom rule, checked alone at the values it sees."""

    function: str
    file: str
    line: int
    verdict: Verdict
    operand: int | None
    relative_error: float | None
    cause: Cause | None
    text: str

    @property
    def place(self) -> str:
        """`function` (file, line)."""
        return str(Place(self.function, self.file, self.line))


@dataclass(frozen=True, eq=False, repr=False)
class GradientCheck(Report):
    """What `check_gradient` found.

    Attributes:
      ok: no leaf is wrong, non-finite or undecided, and no rule is wrong.
      leaves: one `LeafCheck` per leaf, in the order of the tree.
      rules: the custom rules that were checked alone, if a leaf is in doubt.
      findings: what to know beyond the table.
      second_order: the check of the Hessian-vector product, with `order=2`.
      forward_mode: "agrees" or "differs" from reverse mode; "none" where the loss
        has no forward mode.
      evaluations: how often the loss was evaluated.
      seconds: how long it took, compilation included.
    """

    ok: bool
    leaves: tuple[LeafCheck, ...]
    rules: tuple[RuleCheck, ...]
    findings: tuple[Finding, ...]
    second_order: GradientCheck | None
    forward_mode: str
    evaluations: int
    seconds: float

    def tables(self) -> list[Table]:
        """The verdict, the leaves, the worst leaf's entries, the rules, the rest."""
        ranked = sorted(self.leaves, key=lambda leaf: _ORDER.index(leaf.verdict))
        bad = [leaf for leaf in ranked if leaf.verdict in BAD]
        tables = [self._leaves(ranked, bad)]
        tables += [_entries(leaf) for leaf in bad[:3] if leaf.entries]
        if self.rules:
            tables.append(_rules(self.rules))
        if self.findings:
            tables.append(findings_table(self.findings))
        if self.second_order is not None:
            tables.append(Table("Second order: the Hessian times a fixed vector"))
            tables += self.second_order.tables()
        return tables

    def _title(self, ranked: list[LeafCheck], bad: list[LeafCheck]) -> str:
        count = len(self.leaves)
        if bad:
            where = f"`{bad[0].path}`"
            if len(bad) > 1:
                where += f" and {len(bad) - 1} more of {count} leaves"
            same = {leaf.verdict for leaf in bad} == {bad[0].verdict}
            return f"The gradient is {_SAID[bad[0].verdict]} in {where}" + (
                "" if same else " (see below)"
            )
        if not self.ok:
            if any(finding.kind == "value" for finding in self.findings):
                return "The loss has another value than it should: see below"
            if any(rule.verdict == "wrong" for rule in self.rules):
                return "The gradient is right; a custom rule is not"
            return "The gradient is right; its second order is not"
        title = f"The gradient is right in {'its leaf' if count == 1 else 'all leaves'}"
        for verdict in ("imprecise", "kink"):
            some = [leaf.path for leaf in ranked if leaf.verdict == verdict]
            if some:
                more = f" and {len(some) - 1} more" if len(some) > 1 else ""
                title += f"; {_SAID[verdict]} in `{some[0]}`{more}"
        return title

    def _leaves(self, ranked: list[LeafCheck], bad: list[LeafCheck]) -> Table:
        shown = ranked[:_ROWS]
        rows = [
            [
                leaf.path,
                f"{leaf.dtype} {list(leaf.shape)}",
                f"{leaf.verdict}, {leaf.held}" if leaf.held else leaf.verdict,
                "" if leaf.relative_error is None else number(leaf.relative_error, 2),
                "" if leaf.digits is None else number(leaf.digits, 2),
            ]
            for leaf in shown
        ]
        folded = ranked[_ROWS:]
        if folded:
            kinds = {leaf.verdict: 0 for leaf in folded}
            for leaf in folded:
                kinds[leaf.verdict] += 1
            said = ", ".join(f"{n} {verdict}" for verdict, n in kinds.items())
            rows.append([f"and {len(folded)} more", "", said, "", ""])
        texts = [
            f"{leaf.path}: {leaf.cause.text if leaf.cause else leaf.text}"
            for leaf in shown
            if leaf.cause or leaf.text
        ]
        forward = {
            "agrees": " Forward mode agrees with reverse mode.",
            "differs": " Forward mode differs from reverse mode.",
            "none": "",
        }[self.forward_mode]
        note = (
            "relative error: of the gradient's rule, in float64, against differences "
            "of the loss's values (2-norm). digits: decimal digits of the gradient as "
            f"it is computed. {self.evaluations} evaluations of the loss, "
            f"{self.seconds:.2f} s.{forward}"
        )
        return Table(
            self._title(ranked, bad),
            ["leaf", "array", "verdict", ">relative error", ">digits"],
            rows,
            "\n".join([*texts[:_ENTRIES], note]),
        )


_SAID = {
    "imprecise": "imprecise",
    "kink": "on a kink",
    "wrong": "wrong",
    "nonfinite": "not finite",
    "undecided": "undecided",
}


def _entries(leaf: LeafCheck) -> Table:
    note = ""
    if leaf.wrong_entries is not None and leaf.verdict == "wrong":
        total = 1
        for n in leaf.shape:
            total *= n
        verb = "is" if leaf.wrong_entries == 1 else "are"
        note = f"{leaf.wrong_entries} of {total} entries {verb} wrong."
    return Table(
        f"Entries of `{leaf.path}`",
        [
            "index",
            ">claimed by the gradient",
            ">from the loss's values",
            ">give or take",
        ],
        [
            [
                str(list(entry.index)),
                number(entry.claimed, 8),
                number(entry.reference, 8),
                number(entry.uncertainty, 2),
            ]
            for entry in leaf.entries[:_ENTRIES]
        ],
        note,
    )


def _rules(rules: tuple[RuleCheck, ...]) -> Table:
    return Table(
        "Custom rules, each checked alone at the values that it sees",
        ["function", "verdict", "how"],
        [[rule.place, rule.verdict, rule.text] for rule in rules],
    )
