"""Loads PyTorch's parameters into a pytree, by name and shape: never by a guess."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxgrad.comparing.loading.files import Stored, read_source
from jaxgrad.comparing.loading.fitting import (
    Custom,
    Fit,
    custom_of,
    fits_of,
    is_transposed_convolution,
)
from jaxgrad.comparing.loading.leaves import Leaf, leaves_of
from jaxgrad.comparing.loading.naming import last_name
from jaxgrad.comparing.loading.partners import Pair, pairs_of
from jaxgrad.comparing.loading.verifying import jax_value, settle, torch_value
from jaxgrad.pytrees import PyTree
from jaxgrad.tables import Finding, Report, Table, findings_table

Array = npt.NDArray[Any]
How = Literal["shape", "mapping", "verify", "convention"]

_ROWS = 30


@dataclass(frozen=True)
class LoadedParameter:
    """Where one leaf's numbers come from.

    Attributes:
      path: the leaf's path.
      torch_name: PyTorch's name; several are joined by commas.
      shape: the leaf's shape.
      layout: how PyTorch's array is laid out in the leaf: `as it is`, `transposed`,
        `axes (2, 3, 1, 0)`, or `your transform`.
      how: what settled the layout: its `shape`, your `mapping`, PyTorch's loss
        (`verify`), or a `convention`, which a finding names.
    """

    path: str
    torch_name: str
    shape: tuple[int, ...]
    layout: str
    how: How


@dataclass(frozen=True, eq=False, repr=False)
class LoadedParameters(Report):
    """What `load_torch_parameters` made.

    Attributes:
      params: the pytree, with PyTorch's numbers.
      parameters: one row per leaf that was loaded, in the order of the tree.
      findings: what to know beyond the table: conventions that were taken, buffers
        that were left aside, numbers that lost digits.
    """

    params: PyTree
    parameters: tuple[LoadedParameter, ...]
    findings: tuple[Finding, ...]

    def tables(self) -> list[Table]:
        """The leaves and where each comes from, and what to know."""
        rows = [
            [row.path, row.torch_name, row.layout, row.how]
            for row in self.parameters[:_ROWS]
        ]
        folded = self.parameters[_ROWS:]
        if folded:
            rows.append([f"and {len(folded)} more", "", "", ""])
        count = len(self.parameters)
        title = f"Loaded {count} {'leaf' if count == 1 else 'leaves'} from PyTorch"
        tables = [Table(title, ["leaf", "PyTorch", "layout", "settled by"], rows)]
        if self.findings:
            tables.append(findings_table(self.findings))
        return tables


def load_torch_parameters(
    source: Any,
    like: PyTree,
    *,
    mapping: Mapping[str, Any] | None = None,
    verify: tuple[Any, ...] | None = None,
) -> LoadedParameters:
    """Lays PyTorch's parameters into a pytree, by name and shape.

    Which parameter a leaf takes is decided by the names, the numbers in them, and the
    shapes; in which layout, by the shapes. Where these leave a choice open it is
    settled by `mapping`, by `verify`, or by a convention that the report names:
    a leaf called `kernel` is (in, out), `embedding` is (number, features), and the
    weights of Equinox's layers and of `LinearParams` are laid out as PyTorch's. Where
    none of them settles it, that is an error.

    Args:
      source: a state dict (`module.state_dict()`; NumPy arrays will do), or the path of
        a `.pt`, `.pth`, `.bin` or `.safetensors` file that holds one. Nothing is
        unpickled but tensors.
      like: the pytree to fill: its leaves have the shapes and dtypes that are wanted,
        and may be `jax.ShapeDtypeStruct`. What is no array of floats stays as it is,
        but for integers whose name a buffer has.
      mapping: leaf path -> PyTorch's name, or `(name, transform)`, where `transform`
        makes the leaf of PyTorch's NumPy array; `([name, ...], transform)` makes it of
        several. It goes before everything else.
      verify: `(loss, args, module, torch_loss)`: the layouts that shapes leave open are
        those with which `loss(params, *args)` is what `torch_loss(module, *args)` is,
        with `args` as tensors. `module` holds the source's parameters.

    Returns:
      A `LoadedParameters`, whose `params` is `like` with PyTorch's numbers.

    Raises:
      ValueError: a leaf has no parameter, a parameter has no leaf, shapes don't fit, a
        choice stays open, no layout reproduces PyTorch's loss, or the file isn't one
        of parameters (or holds code, which isn't run).
      TypeError: the source, or something in it or in `like`, is of a wrong type.
      FileNotFoundError: there is no such file.
      ImportError: PyTorch is needed and isn't installed.

    Example:
      >>> import jaxgrad, numpy as np
      >>> state = {"weight": np.ones((2, 3)), "bias": np.array([0.5, 0.3])}
      >>> like = {"kernel": np.zeros((3, 2)), "bias": np.zeros(2)}
      >>> loaded = jaxgrad.load_torch_parameters(state, like)
      >>> loaded.params["kernel"].shape, loaded.parameters[1].layout
      ((3, 2), 'transposed')

    Source: the layouts are those of https://docs.pytorch.org/docs/stable/nn.html,
    "Variables" of each module.
    """
    entries, findings = read_source(source)
    leaves, treedef = leaves_of(like)
    pairs, said = pairs_of(leaves, entries, mapping or {})
    laid = [
        _Open(leaf, pair, entries)
        for leaf, pair in zip(leaves, pairs, strict=True)
        if pair
    ]
    _check_transposed(laid)
    if verify is not None:
        kinds = _by_verify(laid, leaves, treedef, entries, verify)
    else:
        kinds = _by_convention(laid)
    arrays = {id(one.leaf): one.array(entries) for one in laid}
    params = treedef.unflatten(arrays.get(id(f), (f.value,))[0] for f in leaves)
    told = [Finding(*text) for one in laid for text in arrays[id(one.leaf)][1]]
    return LoadedParameters(
        params,
        tuple(one.row() for one in laid),
        (*findings, *kinds, *_regrouped(laid), *said, *told),
    )


class _Open:
    """A leaf, its parameter, and the layouts that are still open."""

    def __init__(self, leaf: Leaf, pair: Pair, entries: Mapping[str, Stored]) -> None:
        self.leaf, self.pair = leaf, pair
        self.how: How = "mapping" if pair.mapped else "shape"
        self.fits: list[Fit] = []
        self.custom: Custom | None = None
        if pair.transform is None:
            self.torch_shape = entries[pair.names[0]].shape
            self.fits = fits_of(self.torch_shape, leaf.shape)
            self.custom = custom_of(leaf.path, leaf.owner, self.torch_shape, self.fits)

    @property
    def usual(self) -> Fit | None:
        """The layout that the custom says, if it fits."""
        if self.custom is None:
            return None
        return self.custom.pick(self.torch_shape, self.fits)

    def numbers(self, entries: Mapping[str, Stored], fit: int = 0) -> Array:
        """PyTorch's numbers, laid out."""
        arrays = [entries[name].read() for name in self.pair.names]
        if self.pair.transform is None:
            return self.fits[fit](arrays[0])
        made = np.asarray(self.pair.transform(*arrays))
        if made.shape != self.leaf.shape:
            shapes = ", ".join(str(array.shape) for array in arrays)
            raise ValueError(
                f"mapping's transform for `{self.leaf.path}` makes {made.shape} of "
                f"{shapes}; the leaf has shape {self.leaf.shape}."
            )
        return made

    def array(
        self, entries: Mapping[str, Stored], fit: int = 0
    ) -> tuple[jax.Array, list[tuple[str, str, str]]]:
        """The leaf's new array, in its dtype and of its own memory; and what to say."""
        numbers, path = self.numbers(entries, fit), self.leaf.path
        dtype = jax.dtypes.canonicalize_dtype(self.leaf.dtype)
        with np.errstate(all="ignore"):
            cast = numbers.astype(dtype, copy=False)
        said = []
        if numbers.dtype != cast.dtype:
            with np.errstate(all="ignore"):
                lost = int((cast.astype(numbers.dtype) != numbers).sum())
                lost -= int((numbers != numbers).sum())
            if lost:
                text = f"{lost} of {cast.size} numbers lost digits as {dtype}"
                said.append(("precision", path, text))
        if jnp.issubdtype(dtype, jnp.floating):
            bad = int((~np.isfinite(cast.astype(np.float32))).sum())
            if dtype == np.float64:
                bad = int((~np.isfinite(cast)).sum())
            if bad:
                was = int((~np.isfinite(numbers.astype(np.float64))).sum())
                text = f"{bad} of {cast.size} numbers aren't finite"
                text += ", nor in PyTorch" if was == bad else f"; in PyTorch {was}"
                said.append(("nonfinite", path, text))
        return jnp.array(cast, copy=True), said

    def row(self) -> LoadedParameter:
        """What the report says."""
        text = "your transform" if self.pair.transform else self.fits[0].text
        return LoadedParameter(
            self.leaf.path, ", ".join(self.pair.names), self.leaf.shape, text, self.how
        )


def _check_transposed(laid: Sequence[_Open]) -> None:
    """A transposed convolution's kernel is mirrored, even where only one order fits."""
    for one in laid:
        if not one.fits or not is_transposed_convolution(one.leaf.owner):
            continue
        kernel = len(one.torch_shape) > 2 and last_name(one.leaf.path) == "weight"
        if kernel and one.usual is None:
            raise ValueError(
                f"Leaf `{one.leaf.path}` is a transposed convolution in groups, whose "
                f"layout isn't covered: give it by mapping={{{one.leaf.path!r}: "
                f"({one.pair.names[0]!r}, transform)}}."
            )


def _by_convention(laid: Sequence[_Open]) -> list[Finding]:
    """Settles what is open by customs, and says which.

    Raises:
      ValueError: no custom says it, or other leaves break the custom.
    """
    # A shape that settles a layout may show that these names don't mean the usual.
    breaks: dict[Any, str] = {}
    for one in laid:
        if len(one.fits) == 1 and one.custom is not None and one.usual is None:
            breaks.setdefault(_kind(one), one.leaf.path)
    said: dict[str, list[str]] = defaultdict(list)
    trouble = []
    for one in laid:
        if len(one.fits) < 2:
            continue
        usual, broken = one.usual, breaks.get(_kind(one))
        if usual is None or one.custom is None or broken is not None:
            but = ""
            if one.custom is not None and broken is not None:
                but = f" ({one.custom.said} by custom, but `{broken}` breaks it)"
            trouble.append(_open_text(one) + but)
            continue
        one.fits, one.how = [usual], "convention"
        said[one.custom.said].append(one.leaf.path)
    if trouble:
        raise ValueError(_say_which(trouble))
    return [
        Finding("convention", paths[0] if len(paths) == 1 else "", _with(text, paths))
        for text, paths in said.items()
    ]


def _kind(one: _Open) -> Any:
    long = sum(n > 1 for n in one.torch_shape)
    return last_name(one.leaf.path), type(one.leaf.owner).__name__, long


def _with(text: str, paths: Sequence[str]) -> str:
    if len(paths) == 1:
        return text
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return f"{text}: {', '.join(paths[:3])}{more}"


def _open_text(one: _Open) -> str:
    texts = [fit.text for fit in one.fits]
    return (
        f"Leaf `{one.leaf.path}` of shape {one.leaf.shape} could be "
        f"`{one.pair.names[0]}` {', '.join(texts[:-1])} or {texts[-1]}"
    )


def _say_which(trouble: Sequence[str]) -> str:
    more = f"\nand {len(trouble) - 8} more" if len(trouble) > 8 else ""
    return "\n".join(trouble[:8]) + (
        f"{more}\nSay which by mapping={{leaf: (name, transform)}} (for instance "
        "lambda w: w.T, or lambda w: w for as it is), or by verify=(loss, args, "
        "module, torch_loss)."
    )


def _by_verify(
    laid: Sequence[_Open],
    leaves: Sequence[Leaf],
    treedef: Any,
    entries: Mapping[str, Stored],
    verify: tuple[Any, ...],
) -> list[Finding]:
    """Settles what is open by PyTorch's loss.

    Raises:
      ValueError: no layout gives it, or several do and no custom says which.
    """
    wanted = torch_value(verify, entries)
    undecided = [one for one in laid if len(one.fits) > 1]
    for one in undecided:  # the custom first
        one.fits = sorted(one.fits, key=lambda fit: fit is not one.usual)
    made: dict[tuple[int, int], Any] = {}

    def array(one: _Open, fit: int) -> Any:
        if (id(one.leaf), fit) not in made:
            made[id(one.leaf), fit] = one.array(entries, fit)[0]
        return made[id(one.leaf), fit]

    def tree(choice: tuple[int, ...]) -> PyTree:
        fits = {id(one.leaf): k for one, k in zip(undecided, choice, strict=True)}
        by_leaf = {id(one.leaf): array(one, fits.get(id(one.leaf), 0)) for one in laid}
        return treedef.unflatten(by_leaf.get(id(f), f.value) for f in leaves)

    def describe(choice: tuple[int, ...]) -> str:
        both = zip(undecided, choice, strict=True)
        texts = [f"{one.leaf.path} {one.fits[k].text}" for one, k in both]
        return f", with {', '.join(texts[:4])}" if texts else ""

    counts = [len(one.fits) for one in undecided]
    loss = jax_value(verify, tree((0,) * len(counts)))

    def value(choice: tuple[int, ...]) -> float:
        return loss(tree(choice))

    names = [one.leaf.path for one in undecided]
    choice, unsettled = settle(names, counts, value, wanted, describe)
    still = [undecided[i] for i in unsettled]
    rest = _by_convention_of(still, choice, undecided)
    for one, k in zip(undecided, choice, strict=True):
        if one not in still:
            one.fits, one.how = [one.fits[k]], "verify"
    text = f"the loss is PyTorch's, {wanted:.8g}"
    return [Finding("verified", "", text), *rest]


def _by_convention_of(
    still: Sequence[_Open], choice: tuple[int, ...], undecided: Sequence[_Open]
) -> list[Finding]:
    """What the loss leaves open, custom may settle, if it was what the loss allows."""
    chosen = dict(zip(map(id, undecided), choice, strict=True))
    for one in still:
        if chosen[id(one)]:
            one.custom = None  # another layout than the usual was needed
    try:
        return _by_convention(still)
    except ValueError as error:
        raise ValueError(f"Several layouts give PyTorch's loss.\n{error}") from None


def _regrouped(laid: Sequence[_Open]) -> list[Finding]:
    """Says where axes were split or merged: in the order of PyTorch's numbers."""
    paths = [
        one.leaf.path
        for one in laid
        if one.fits and one.fits[0].regrouped and not one.pair.mapped
    ]
    if not paths:
        return []
    text = "axes are split or merged in PyTorch's order (heads before their features)"
    one = paths[0] if len(paths) == 1 else ""
    return [Finding("convention", one, _with(text, paths))]
