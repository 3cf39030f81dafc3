"""How a report looks: tables in the terminal, in the notebook, and plain data."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 80


@dataclass(frozen=True)
class Table:
    """Rows under headings, between a title and a line of explanation.

    Without columns it is a heading and a paragraph.

    Attributes:
      title: what the table shows; empty for none.
      columns: the headings. One that starts with `>` is aligned to the right.
      rows: one text per column each.
      note: what to know beyond the numbers; empty for none.
    """

    title: str
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    note: str = ""

    def draw(self, console: Console) -> None:
        """Prints the table to a rich console."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        if self.title:
            console.print(Text(self.title, style="bold"))
        if self.columns:
            table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
            table.show_header = any(self.columns)
            for column in self.columns:
                table.add_column(
                    column.removeprefix(">"),
                    justify="right" if column.startswith(">") else "left",
                    overflow="fold",
                )
            for row in self.rows:
                table.add_row(*map(Text, row))
            console.print(table)
        if self.note:
            console.print(Text(self.note), soft_wrap=False)
        console.print()

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(
            width=WIDTH, color_system=None, highlight=False, force_jupyter=False
        )
        with console.capture() as capture:
            self.draw(console)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())

    def to_html(self) -> str:
        """The table as HTML, with every text escaped."""

        def cells(tag: str, texts: Sequence[str]) -> str:
            aligned = zip(self.columns, texts, strict=True)
            return "".join(
                f'<{tag} style="text-align:{"right" if c.startswith(">") else "left"};'
                f'white-space:pre-wrap">{html.escape(text)}</{tag}>'
                for c, text in aligned
            )

        title = html.escape(self.title)
        note = f"<p>{html.escape(self.note)}</p>" if self.note else ""
        if not self.columns:
            return (f"<h4>{title}</h4>" if title else "") + note
        caption = f"<caption>{title}</caption>" if title else ""
        heading = cells("th", [c.removeprefix(">") for c in self.columns])
        rows = "".join(f"<tr>{cells('td', row)}</tr>" for row in self.rows)
        return (
            f"<table>{caption}<thead><tr>{heading}</tr></thead>"
            f"<tbody>{rows}</tbody></table>{note}"
        )


@dataclass(frozen=True)
class Finding:
    """What the reader should know beyond the table.

    Attributes:
      kind: a fixed word.
      leaf: the leaf's path; empty if it's about the whole.
      text: for a person.
    """

    kind: str
    leaf: str
    text: str


def findings_table(findings: Sequence[Finding]) -> Table:
    """What the reader should know, under the tables."""
    rows = [
        [f.kind.replace("_", " "), f"{f.leaf}: {f.text}" if f.leaf else f.text]
        for f in findings
    ]
    return Table("To know", ["", ""], rows)


class Report:
    """The habits that every report of facts shares; a frozen dataclass derives from it.

    `print(report)` shows its tables; `report.to_dict()` is plain data for `json`; a
    notebook shows HTML; and a report without a verdict has no truth value.
    """

    def tables(self) -> list[Table]:
        """What a person reads, in order."""
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n".join(map(str, self.tables()))

    __repr__ = __str__  # for the prompt; a derived dataclass says repr=False

    def _repr_html_(self) -> str:
        return "".join(table.to_html() for table in self.tables())

    def __bool__(self) -> bool:
        ok = getattr(self, "ok", None)
        if ok is None:
            names = [f.name for f in dataclasses.fields(self)]  # type: ignore[arg-type]
            raise TypeError(
                f"A {type(self).__name__} gives no verdict: read one of its fields, "
                f"{', '.join(names)}."
            )
        return bool(ok)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: `json.dumps(report.to_dict(), allow_nan=False)` takes it.

        Non-finite numbers become the strings `nan`, `inf` and `-inf`.
        """
        data: dict[str, Any] = plain(self)
        return data


def plain(value: Any) -> Any:
    """Turns a report, a tree or an array into dicts, lists, numbers and strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f.name for f in dataclasses.fields(value)]
        return {name: plain(getattr(value, name)) for name in fields}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {name: plain(v) for name, v in zip(value._fields, value, strict=True)}
    if isinstance(value, dict):
        return {str(key): plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, jax.Array) and jnp.issubdtype(
        value.dtype, jax.dtypes.prng_key
    ):
        value = jax.random.key_data(value)
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        array = np.asarray(value)
        if array.dtype.kind == "c":
            return {"real": plain(array.real), "imag": plain(array.imag)}
        if array.dtype.kind not in "biuUS":  # bfloat16 and its like aren't NumPy's
            array = array.astype(np.float64)
        return plain(array.tolist())
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return repr(value)


def number(value: Any, digits: int = 6) -> str:
    """A number for a table: `6.25`, `1e-06`, `nan`; `digits` significant digits."""
    text = f"{float(value):.{digits}g}"
    return "0" if text == "-0" else text
