"""What JAX may have in the place of a tensor: a multiple of it, or a part dropped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxgrad.comparing.forward import Pool
from jaxgrad.comparing.hypotheses import Hypothesis
from jaxgrad.comparing.torch_side import Call, Run, tensor_of

if TYPE_CHECKING:
    from jaxgrad.comparing.parting import Parting

# A factor in float64 is known to more digits than these, which are told.
_DIGITS = 1e-9


def related(run: Run, parting: Parting, own: int, pool: Pool) -> Iterator[Hypothesis]:
    """What JAX's values say of a record that isn't among them."""
    record = run.records[own]
    factor = pool.multiple(record.array(run.overwritten, own), _DIGITS)
    if factor is not None:

        def scaled(call: Call) -> Call:
            func, args, kwargs = call
            return (lambda *a, **k: func(*a, **k) * factor), args, kwargs

        if abs(factor + 1) < _DIGITS:
            text = "is of the other sign in JAX"
            yield Hypothesis("sign", text, scaled, once=True)
        else:
            text = f"is {factor:.6g} times as large in JAX"
            yield Hypothesis("factor", text, scaled, once=True)
    for place in record.inputs:
        array = run.records[place].array(run.overwritten, place)
        factor = pool.multiple(array, _DIGITS)
        if factor is not None:
            whole = tensor_of(np.full((), factor))
            text = f"is given an input that is {factor:.6g} times as large in JAX"
            yield Hypothesis("factor", text, _masked(run, place, whole), once=True)
        found = pool.dropped(array)
        if found is not None:
            kept, rate = found
            share = 100 * (1 - float(kept.mean()))
            mask = tensor_of(kept.astype(array.dtype) * rate)
            text = (
                f"is given all numbers, JAX only some: {share:.2g} % of them are "
                f"dropped, and the others multiplied by {rate:.6g} (dropout)"
            )
            own_call = "dropout" in run.records[place].function
            yield Hypothesis(
                "train_mode",
                text,
                _masked(run, place, mask),
                once=True,
                at=place if own_call else None,
            )


def _masked(run: Run, place: int, mask: Any) -> Any:
    """The change of a call that multiplies one of its operands by a mask."""
    shape = tuple(run.records[place].tensor.shape)

    def change(call: Call) -> Call:
        import torch

        func, args, kwargs = call
        done = False

        def times(x: Any) -> Any:
            nonlocal done
            fits = isinstance(x, torch.Tensor) and tuple(x.shape) == shape
            if done or not fits or isinstance(x, torch.nn.Parameter):
                return x
            done = True
            return x * mask.to(x)

        return func, tuple(map(times, args)), {k: times(v) for k, v in kwargs.items()}

    return change
