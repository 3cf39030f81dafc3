"""The `jaxgrad` command: `jaxgrad lesson`."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence

from jaxgrad.lesson_lines import DEFAULTS


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command, and returns its exit status: 0 if every comparison agrees."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments or ["lesson"])

    from rich.console import Console

    from jaxgrad.lesson import lesson
    from jaxgrad.tables import WIDTH

    with Console(stderr=True).status("computing the lesson (first use compiles)"):
        report = lesson(
            learning_rate=options.learning_rate,
            steps=options.steps,
            torch=options.torch,
        )
    try:
        if options.json:
            print(json.dumps(report.to_dict(), indent=1, allow_nan=False))
        elif sys.stdout.isatty():
            console = Console(highlight=False)
            console.width = min(console.width, WIDTH)
            for table in report.tables():
                table.draw(console)
        else:
            print(report)
        sys.stdout.flush()
    except BrokenPipeError:  # `jaxgrad lesson | head` closes the pipe: that's no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0 if report else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxgrad",
        description="Gradients with JAX. Without a command: the lesson.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "lesson",
        help="gradients on one linear neuron, in JAX beside PyTorch",
        description="Computes the whole lesson in JAX, beside PyTorch's figures: live "
        "if PyTorch is installed, else recorded ones. Exit status: 0 if every "
        "comparison agrees within its tolerance, else 1.",
    )
    command.add_argument(
        "--learning-rate",
        type=_rate,
        default=DEFAULTS["learning_rate"],
        help="default: %(default)s",
    )
    command.add_argument(
        "--steps",
        type=_steps,
        default=DEFAULTS["steps"],
        help="train on for at most so many steps; default: %(default)s",
    )
    command.add_argument("--json", action="store_true", help="print plain data")
    command.add_argument(
        "--no-torch",
        dest="torch",
        action="store_false",
        default=None,
        help="take PyTorch's recorded figures, though PyTorch is installed",
    )
    return parser


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0 and finite, and is {text}")
    return value


def _steps(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, and is {text}")
    return value
