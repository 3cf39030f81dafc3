"""The lesson: gradients on one linear neuron, in JAX beside PyTorch, every part run."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxgrad.differences import difference_table
from jaxgrad.lesson_lines import (
    DEFAULTS,
    PAIRS,
    Figures,
    Pair,
    jax_figures,
    live_comparison,
    live_torch,
    recorded_torch,
)
from jaxgrad.tables import Report, Table, number


@dataclass(frozen=True, eq=False)
class Comparison:
    """One figure from both libraries.

    Attributes:
      name: the figure's name.
      torch_line: PyTorch's lines.
      torch: what they give; `None` where nothing was run or recorded.
      jax_line: JAX's lines.
      jax: what they give.
      tolerance: how far apart the two may be, absolutely.
      agrees: whether they are no further apart; `None` without PyTorch's figure.
      differs: the two are meant to differ, and `agrees` says that they do.
    """

    name: str
    torch_line: str
    torch: Any
    jax_line: str
    jax: Any
    tolerance: float
    agrees: bool | None
    differs: bool


@dataclass(frozen=True, eq=False, repr=False)
class Part(Report):
    """One part of the lesson: a text, the comparisons, and a table of its own.

    Attributes:
      title: the part's number and name.
      text: what it is about.
      comparisons: PyTorch's lines and figures beside JAX's.
      extra: further tables.
      ok: no comparison disagrees.
    """

    title: str
    text: str
    comparisons: tuple[Comparison, ...]
    extra: tuple[Table, ...]
    ok: bool

    def tables(self) -> list[Table]:
        """Text, comparisons, and what stands beside them."""
        rows = []
        for c in self.comparisons:
            rows.append(["PyTorch", f"{c.torch_line}\n  = {_figure(c.torch)}"])
            rows.append(["JAX", f"{c.jax_line}\n  = {_figure(c.jax)}, {_verdict(c)}"])
        tables = [Table(self.title, note=self.text)]
        if rows:
            tables.append(Table("", ["", ""], rows))
        return [*tables, *self.extra]


@dataclass(frozen=True, eq=False, repr=False)
class Lesson(Report):
    """The whole lesson.

    Attributes:
      ok: every comparison agrees within its tolerance.
      torch_version: PyTorch's version.
      torch_live: whether PyTorch ran now; else its figures are recorded ones.
      learning_rate: of the update.
      steps: at most so many, when training on.
      parts: in order.
    """

    ok: bool
    torch_version: str
    torch_live: bool
    learning_rate: float
    steps: int
    parts: tuple[Part, ...]

    def tables(self) -> list[Table]:
        """All parts, then the verdict."""
        return [t for part in self.parts for t in part.tables()] + [_summary(self)]


# Each side rounds every sum and product once, at most 8 of them in a row, by at most
# half an ulp each; and both sides do.
_ULPS = 8
_EPS = float(np.finfo(np.float32).eps)


def lesson(
    *,
    learning_rate: float = DEFAULTS["learning_rate"],
    steps: int = DEFAULTS["steps"],
    torch: bool | None = None,
) -> Lesson:
    """Runs the whole lesson.

    Args:
      learning_rate: of the update.
      steps: at most so many, when training on.
      torch: run PyTorch now (`True`), take its recorded figures (`False`), or run it if
        it is installed (`None`).
    """
    live = importlib.util.find_spec("torch") is not None if torch is None else torch
    options = {**DEFAULTS, "learning_rate": learning_rate, "steps": steps}
    ours = jax_figures(**options)
    record = live_torch(**options) if live else recorded_torch()
    theirs: Figures = record["figures"]
    if any(record[name] != value for name, value in options.items()):
        theirs = {p.name: None if p.depends else theirs[p.name] for p in PAIRS}
    comparisons = {
        pair.name: _compare(pair, theirs[pair.name], ours[pair.name], ours)
        for pair in PAIRS
    }
    parts = tuple(_parts(comparisons, ours, theirs, options))
    if live:
        parts = (*parts[:-1], _compared(learning_rate), parts[-1])  # errata come last
    return Lesson(
        ok=all(part.ok for part in parts),
        torch_version=record["torch"],
        torch_live=live,
        learning_rate=learning_rate,
        steps=steps,
        parts=parts,
    )


def _summary(report: Lesson) -> Table:
    """How many comparisons agree, and where PyTorch's figures are from."""
    compared = [c for part in report.parts for c in part.comparisons]
    agree = sum(c.agrees is True for c in compared)
    missing = sum(c.agrees is None for c in compared)
    source = "run now" if report.torch_live else "recorded, not run now"
    text = (
        f"{agree} of {len(compared) - missing} comparisons agree. PyTorch "
        f"{report.torch_version}: {source}."
    )
    if missing:
        text += (
            f" {missing} more have no recorded figure at this learning rate and number "
            "of steps: install PyTorch to run them."
        )
    for c in compared:
        if c.agrees is False:
            text += (
                f"\nDIFFERS: {c.name}: PyTorch gives {_figure(c.torch)}, JAX "
                f"{_figure(c.jax)}; at most {number(c.tolerance, 2)} apart was "
                "expected."
            )
    return Table("Verdict", note=text)


def _compare(pair: Pair, torch: Any, jax: Any, figures: Figures) -> Comparison:
    size = max(np.max(np.abs(v), initial=0) for v in (torch or 0, jax, pair.scale))
    roundings = _ULPS + (figures["training_steps"] if pair.per_step else 0)
    tolerance = float(roundings * _EPS * size)
    same = torch is not None and bool(
        np.allclose(jax, torch, rtol=0, atol=tolerance, equal_nan=True)
    )
    return Comparison(
        name=pair.name,
        torch_line=pair.torch,
        torch=torch,
        jax_line=pair.jax,
        jax=jax,
        tolerance=tolerance,
        agrees=None if torch is None else same != pair.differs,
        differs=pair.differs,
    )


def _parts(
    comparisons: dict[str, Comparison], jax: Figures, torch: Figures, options: Any
) -> Iterator[Part]:
    """The parts in their order.

    What is given (parameters, input, target, the page's figures) is written here; every
    other number in the texts was computed.
    """
    rate, tolerance = options["learning_rate"], options["tolerance"]
    ours = {name: _figure(value) for name, value in jax.items()}

    def part(title: str, text: str, names: str = "", *extra: Table) -> Part:
        here = tuple(comparisons[name] for name in names.split())
        agree = all(c.agrees is not False for c in here)
        return Part(title, text, here, extra, agree)

    values = np.array([0.5, 0.4, 0.3, 0.3])
    x, target = [1.0, 2.0, 3.0], 5.0
    gradient = [*jax["weight_gradient"][0], *jax["bias_gradient"]]
    names = ["weight[0][0]", "weight[0][1]", "weight[0][2]", "bias[0]"]

    best = []
    for dtype in ("float16", "float32", "float64"):
        shown = difference_table(_square, 3.0, dtype=dtype)
        best.append(
            [
                dtype,
                number(shown.best_forward.h),
                number(shown.best_forward.forward_error, 2),
            ]
        )
    yield part(
        "1. A derivative is a limit",
        "The derivative of a loss L at w is the limit of (L(w+h) - L(w)) / h as h goes "
        "to 0: by how much the loss changes per unit of change in w. For L = w**2 at "
        "w = 3 it is 2w = 6. With a computer's numbers the limit can't be reached: as "
        "h shrinks, the formula's error falls, and then rounding takes over.",
        "limit",
        *difference_table(_square, 3.0).tables(),
        Table(
            "The best h for the forward difference",
            ["dtype", ">best h", ">error"],
            best,
            "So gradients are not computed this way; they are only checked this way.",
        ),
    )
    yield part(
        "2. The gradient of w**2 at 3",
        "jax.grad turns a function that computes a loss into one that computes its "
        "gradient, exactly, with no h. jax.jit compiles a function. "
        "jaxgrad.value_and_grad is both of them, with checks: it returns the loss and "
        "its gradient, and says clearly what is wrong when something is. The gradient "
        f"{ours['square_gradient']} is positive: a larger w means a larger loss, so w "
        f"should go down. Indeed the loss at 2.9 is {ours['square_below']}, and at 3.1 "
        f"it is {ours['square_above']}; at 3 it is {ours['square']}.",
        "square square_gradient square_compiled square_checked square_below "
        "square_above",
    )
    yield part(
        "3. A neuron and its parameters",
        "A linear neuron with 3 inputs computes x W' + b. PyTorch keeps W and b inside "
        "an object; in JAX they are a value that is passed to a function, here a "
        "LinearParams(weight, bias) with PyTorch's shapes. There are 3 weights and 1 "
        f"bias: {ours['parameter_count']} parameters.",
        "weight_shape bias_shape parameter_count",
    )
    yield part(
        "4. Forward: prediction and loss",
        f"With these parameters the neuron predicts {ours['prediction']} where "
        f"{number(target)} is wanted. The loss is the squared error, "
        f"({ours['prediction']} - {number(target)})**2 = {ours['loss']}.",
        "prediction loss",
    )
    yield part(
        "5. Backward: the gradient of every parameter",
        "In PyTorch backward() leaves the gradients in the parameters. In JAX they are "
        "the value of a function, shaped like the parameters themselves.",
        "weight_gradient bias_gradient",
        Table(
            "What each gradient says",
            ["parameter", ">value", ">gradient", "to make the loss fall"],
            [
                [name, number(value), number(g), _advice(g)]
                for name, value, g in zip(names, values, gradient, strict=True)
            ],
        ),
    )
    ((signal,),) = jax["error_signal"]
    yield part(
        "6. Why the gradients differ in size",
        "The loss sees the parameters only through the prediction. Its derivative with "
        f"respect to the prediction, 2 ({ours['prediction']} - {number(target)}) = "
        f"{number(signal)}, is the error signal. By the chain rule each parameter's "
        "gradient is that signal times what the parameter is multiplied by: its own "
        "input, or 1 for the bias.",
        "error_signal",
        Table(
            "Error signal times input",
            ["parameter", ">signal", ">input", ">product", ">gradient"],
            [
                [name, number(signal), number(v), number(signal * v), number(g)]
                for name, v, g in zip(names, [*x, 1.0], gradient, strict=True)
            ],
        ),
    )
    yield part(
        "7. The update",
        "Gradient descent moves every parameter against its gradient: new = old - "
        f"learning rate * gradient. With a learning rate of {number(rate)} the first "
        f"weight becomes {number(values[0])} - {number(rate)} * "
        f"({number(gradient[0])}) = {number(jax['weight_after'][0][0])}. JAX's "
        "arrays don't change: an update returns new ones. Ours by hand, optax's and "
        "PyTorch's:",
        "weight_after weight_after_optax bias_after",
    )
    cycle = [
        [
            name,
            ours[before],
            ours[after],
            _figure(torch[after]),
        ]
        for name, before, after in (
            ("prediction", "prediction", "prediction_after"),
            ("loss", "loss", "loss_after"),
        )
    ]
    yield part(
        "8. One whole cycle",
        "Forward, backward, update, and forward again: the loss fell by "
        f"{ours['improvement']}.",
        "prediction_after loss_after improvement",
        Table(
            f"Before and after one step at learning rate {number(rate)}",
            ["", ">before", ">after (JAX)", ">after (PyTorch)"],
            cycle,
        ),
    )
    ((trained,),) = jax["trained_prediction"]
    reached = (trained - target) ** 2 < tolerance
    yield part(
        "9. Training on",
        f"The same step again and again, until the loss is under {number(tolerance)}: "
        f"{ours['training_steps']} steps at a learning rate of {number(rate)}, and the "
        f"prediction is {ours['trained_prediction']}."
        + (
            ""
            if reached
            else " The loss is NOT under it: the learning rate is too large for this "
            "neuron (above 1/15 it diverges) or the steps are too few."
        ),
        "training_steps trained_weight trained_prediction",
    )
    yield part(
        "10. Why nothing needs zeroing in JAX",
        "PyTorch adds each backward() to the gradients that are there, so they must be "
        "zeroed between steps. A JAX gradient is a returned value: calling the "
        "function twice gives the same value twice, and adding, when it is wanted, "
        "is written.",
        "accumulated zeroed",
    )
    true, page = (
        f"{np.ravel(jax[f'{of}_prediction'])[0]:.3f}, {jax[f'{of}_loss']:.4f}, "
        f"{jax['loss'] - jax[f'{of}_loss']:.4f}"
        for of in ("true", "page")
    )
    yield part(
        "Errata of the PyTorch page",
        "What the page prints, and what its own lines give.",
        "page_prediction page_loss true_prediction true_loss second_backward_works",
        Table(
            "",
            ["the page says", "in truth"],
            [
                [
                    "A step at learning rate 0.01 gives prediction 2.650, loss 5.523, "
                    "improvement 0.727.",
                    f"It gives {true}. The page's figures belong to a learning rate of "
                    f"0.002: {page}.",
                ],
                [
                    "The last block calls step() of an optimizer.",
                    "The page never makes one, so the block stops with a NameError.",
                ],
                [
                    "The last block calls backward() again on the loss of step 4.",
                    "PyTorch refuses, with a RuntimeError: the first call has freed "
                    "the graph. A JAX gradient function can always be called again.",
                ],
            ],
        ),
    )


def _compared(learning_rate: float) -> Part:
    """The whole of both sides, by `compare_with_torch`."""
    report = live_comparison(learning_rate)
    text = (
        "Line by line the two sides agree. compare_with_torch compares them whole: it "
        "pairs the parameters by their values, and says if loss, gradients and three "
        "steps of descent are the same. "
    )
    return Part("11. The whole, compared", text, (), tuple(report.tables()), report.ok)


def _square(w: Any) -> Any:
    return w**2


def _advice(gradient: float) -> str:
    if gradient == 0:
        return "leave it: it has no influence here"
    return "increase it" if gradient < 0 else "decrease it"


def _verdict(comparison: Comparison) -> str:
    if comparison.agrees is None:
        return "not compared"
    if not comparison.agrees:
        return "which DISAGREES"
    return "as it should" if comparison.differs else "which agrees"


def _figure(value: Any) -> str:
    if value is None:
        return "(not recorded for these options)"
    if isinstance(value, bool):
        return str(value)
    flat = np.ravel(value)
    if flat.size == 1 and not (np.ndim(value) == 1 and isinstance(value[0], int)):
        return number(flat[0])
    return "[" + ", ".join(number(v) for v in flat) + "]"
