"""Which of several layouts reproduces PyTorch's loss."""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxgrad.comparing.loading.naming import last_name
from jaxgrad.comparing.torch_side import array_of, import_torch, kept, tensors_of
from jaxgrad.pytrees import (
    PyTree,
    function_name,
    loss_and_aux,
    merge_static,
    split_static,
)

_MOST = 256  # evaluations that are tried for one answer
_CLOSE = 1e-5  # of the loss's own size: float32 sums in another order

Choice = tuple[int, ...]


def torch_value(verify: Any, source: Mapping[str, Any]) -> float:
    """PyTorch's loss at the module, which is left as it was found.

    Raises:
      TypeError: `verify` isn't `(loss, args, module, torch_loss)`.
      ValueError: the module's parameters aren't those of the source.
    """
    form = "verify must be (loss, args, module, torch_loss)"
    if not isinstance(verify, tuple | list) or len(verify) != 4:
        raise TypeError(f"{form}, and is {verify!r:.60}.")
    loss, args, module, torch_loss = verify
    torch = import_torch()
    if not callable(loss) or not callable(torch_loss):
        raise TypeError(f"{form}: the first and the last are functions.")
    if not isinstance(args, tuple):
        raise TypeError(f"{form}: args is a tuple, and is a {type(args).__name__}.")
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"{form}: module is an nn.Module, not {module!r:.60}.")
    for name, tensor in module.state_dict().items():
        if name not in source or not hasattr(tensor, "detach"):
            continue
        if tensor.device.type != "cpu":
            raise ValueError(
                f"verify's module is on {tensor.device}; the losses are compared on "
                "the CPU: pass module.cpu()."
            )
        stored = source[name].read()
        mine = array_of(tensor)
        if stored.shape != mine.shape or not np.array_equal(
            stored.astype(mine.dtype), mine, equal_nan=mine.dtype.kind == "f"
        ):
            raise ValueError(
                f"verify's module has another `{name}` than source, so its loss says "
                "nothing about source: module.load_state_dict(...) first."
            )
    with kept(module), torch.no_grad():
        value = torch_loss(module, *tensors_of(args))
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        raise TypeError(
            f"The loss {function_name(torch_loss)} should return a tensor of one "
            f"number, and returned {value!r:.60}."
        )
    return float(value)


def jax_value(verify: Any, params: PyTree) -> Callable[[PyTree], float]:
    """The loss as a function of trees like `params`, compiled once."""
    loss, args, _, _ = verify
    _, static = split_static((params, *args))

    @jax.jit
    def compiled(arrays: list[Any]) -> Any:
        value, _ = loss_and_aux(loss, loss(*merge_static(arrays, static)), False)
        return value

    def value(tree: PyTree) -> float:
        arrays, _ = split_static((tree, *args))
        with jax.default_matmul_precision("highest"):
            return float(compiled(arrays))

    return value


def settle(
    names: Sequence[str],
    counts: Sequence[int],
    value: Callable[[Choice], float],
    wanted: float,
    describe: Callable[[Choice], str],
) -> tuple[Choice, list[int]]:
    """Finds the choice of layouts that gives the wanted loss, the likeliest first.

    Args:
      names: the open leaves' paths.
      counts: how many layouts each has; the first is the likeliest.
      value: the loss with a choice.
      wanted: PyTorch's loss.
      describe: a choice for a person.

    Returns:
      The choice, and the places of the leaves that the loss doesn't settle.

    Raises:
      ValueError: no choice that was tried gives the loss.
    """
    seen: dict[Choice, float] = {}

    def fits(choice: Choice) -> bool:
        if choice not in seen:
            seen[choice] = value(choice)
        gap = abs(seen[choice] - wanted)
        return gap <= _CLOSE * max(abs(wanted), 1e-30)

    every = math.prod(counts) <= _MOST
    choices = _product(counts) if every else _alike(names, counts)
    found = [choice for choice in choices if fits(choice)]
    if not found:
        best = min(seen, key=lambda c: (abs(seen[c] - wanted), c), default=())
        tried = "no layout" if every else f"none of {len(seen)} layouts that were tried"
        hint = "" if every else " Say some by mapping={...}, so that fewer remain."
        nearest = f"{seen.get(best, math.nan):.8g}{describe(best)}"
        raise ValueError(
            f"PyTorch's loss is {wanted:.8g}, and {tried} reproduces it; the "
            f"nearest is {nearest}. Do both losses compute "
            f"the same, at the same mode (module.eval()) and args?{hint}"
        )
    first = found[0]
    places = range(len(names))
    open_leaves = {i for i in places if any(c[i] != first[i] for c in found)}
    if not every:
        for i, count in enumerate(counts):
            others = ((*first[:i], k, *first[i + 1 :]) for k in range(count))
            if any(other != first and fits(other) for other in others):
                open_leaves.add(i)
    return first, sorted(open_leaves)


def _product(counts: Sequence[int]) -> Iterator[Choice]:
    return itertools.product(*map(range, counts))


def _alike(names: Sequence[str], counts: Sequence[int]) -> Iterator[Choice]:
    """The choices in which leaves of the same name have the same layout."""
    for blur in (lambda n: re.sub(r"\d+", "#", n), last_name):
        groups: dict[Any, list[int]] = defaultdict(list)
        for index, (name, count) in enumerate(zip(names, counts, strict=True)):
            groups[blur(name), count].append(index)
        if math.prod(count for _, count in groups) <= _MOST:
            break
    for chosen in itertools.islice(
        itertools.product(*(range(count) for _, count in groups)), _MOST
    ):
        choice = [0] * len(names)
        for group, layout in zip(groups.values(), chosen, strict=True):
            for index in group:
                choice[index] = layout
        yield tuple(choice)
