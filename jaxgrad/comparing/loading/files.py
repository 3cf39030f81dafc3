"""Reads PyTorch's parameters: a state dict, or a file of one. Nothing is unpickled."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxgrad.comparing.torch_side import array_of, import_torch
from jaxgrad.pytrees import is_array
from jaxgrad.tables import Finding

Array = npt.NDArray[Any]

_WRAPPERS = ("state_dict", "model", "model_state_dict")
# Safetensors' words for what an entry is: see https://github.com/huggingface/safetensors
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


class Stored(NamedTuple):
    """An entry of a state dict, which is read when it's needed.

    Attributes:
      shape: its shape.
      floating: whether its numbers are floats.
      read: gives its numbers; the array may be a view of PyTorch's memory.
      storage: equal for entries that are the same memory.
    """

    shape: tuple[int, ...]
    floating: bool
    read: Callable[[], Array]
    storage: Hashable


class Source(NamedTuple):
    """What stands in a state dict, in its order.

    Attributes:
      entries: the arrays, by their names.
      findings: what to know about them.
    """

    entries: dict[str, Stored]
    findings: tuple[Finding, ...]


def read_source(source: Any) -> Source:
    """Reads a state dict, or a `.pt` or `.safetensors` file.

    Raises:
      TypeError: the source is neither, or an entry is no array.
      FileNotFoundError: there is no such file.
      ValueError: the file isn't one of PyTorch's parameters.
      ImportError: a `.pt` file is to be read, and PyTorch isn't installed.
    """
    if isinstance(source, Mapping):
        return _entries(source, "source")
    if not isinstance(source, str | os.PathLike):
        kind = type(source)
        hint = (
            ": pass module.state_dict()"
            if callable(getattr(source, "state_dict", None))
            else ""
        )
        raise TypeError(
            "source must be a state dict, or the path of a .pt or .safetensors file, "
            f"and is a {kind.__module__}.{kind.__qualname__}{hint}."
        )
    path = Path(source)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; a .pt or .safetensors file is needed.")
    with path.open("rb") as file:  # FileNotFoundError says what there is to say
        head = file.read(9)
    found = _content(head)
    kind_of = {".safetensors": "safetensors", ".pt": "torch", ".pth": "torch"}
    kind_of[".bin"] = "torch"
    wanted = kind_of.get(path.suffix.lower())
    if found is None or wanted not in (None, found):
        what = "a file that torch.save wrote" if wanted == "torch" else "safetensors"
        if wanted is None:
            what = "a .pt or .safetensors file"
        seen = {
            None: f"begins with {head[:8]!r}" if head else "is empty",
            "torch": "looks like one of torch.save: name it .pt",
            "safetensors": "looks like one of safetensors: name it .safetensors",
        }[found]
        raise ValueError(f"{path} isn't {what}: it {seen}.")
    if found == "safetensors":
        return Source(_safetensors(path), ())
    return _entries(_torch_load(path), str(path))


def _content(head: bytes) -> str | None:
    """What a file is, by its first bytes."""
    if head[4:] == b"\0\0\0\0{":  # the header's length, and the header
        return "safetensors"
    zipped_or_pickled = head.startswith((b"PK\x03\x04", b"\x80"))
    return "torch" if zipped_or_pickled else None


def _torch_load(path: Path) -> Any:
    torch = import_torch()
    import pickle  # for its error's type alone

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on the pickle's protocol
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL `?([\w.]+)", str(error))
        what = "a pickle of another kind than torch.save's, which could run code"
        if named:
            what = f"more than tensors: reading it would run code, `{named[1]}`"
        raise ValueError(
            f"{path} holds {what}; so it's refused, and nothing of it was run. Save "
            "the tensors alone: torch.save(module.state_dict(), path)."
        ) from error
    # A broken file ends in whatever the reader meets first.
    except Exception as error:
        if "TorchScript" in str(error):
            raise ValueError(
                f"{path} is a TorchScript archive, which holds code: save the tensors "
                "alone, torch.save(module.state_dict(), path)."
            ) from error
        raise ValueError(
            f"{path} is broken or cut short: {_brief(str(error) or repr(error))}"
        ) from error


def _brief(text: str) -> str:
    return text.strip().splitlines()[0].partition(". ")[0].rstrip(".") + "."


def _entries(state: Any, where: str) -> Source:
    """The arrays of a mapping, unwrapped if they stand one floor deeper."""
    findings: list[Finding] = []
    if isinstance(state, Mapping):
        inner = [key for key in _WRAPPERS if isinstance(state.get(key), Mapping)]
        if len(inner) > 1:
            raise ValueError(
                f"{where} holds several state dicts, under {', '.join(inner)}: pass "
                f"the one that you mean, checkpoint[{inner[0]!r}]."
            )
        if inner:
            rest = [str(key) for key in state if key != inner[0]]
            beside = f"; {', '.join(rest[:6])} left aside" if rest else ""
            text = f"the state dict is {where}[{inner[0]!r}]{beside}"
            findings.append(Finding("unwrapped", "", text))
            state = state[inner[0]]
    if not isinstance(state, Mapping):
        kind = type(state)
        raise ValueError(
            f"{where} holds a {kind.__module__}.{kind.__qualname__}, not a state dict "
            "(names and tensors)."
        )
    entries = {}
    for name, value in state.items():
        if str(name).endswith("_extra_state"):
            findings.append(Finding("left_aside", str(name), "no parameter"))
            continue
        entries[str(name)] = _stored(str(name), value, where)
    if not entries:
        raise ValueError(f"{where} holds no tensors.")
    return Source(entries, tuple(findings))


def _stored(name: str, value: Any, where: str) -> Stored:
    if is_array(value):
        floating = jnp.issubdtype(value.dtype, jnp.floating)
        if value.dtype.kind == "c":
            raise TypeError(_complex(name, value.dtype))
        shape = tuple(value.shape)
        return Stored(shape, floating, lambda: np.asarray(value), ("array", id(value)))
    if type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "detach"):
        return _tensor(name, value)
    kind = type(value)
    raise TypeError(
        f"{where}[{name!r}] is a {kind.__module__}.{kind.__qualname__}; a state dict "
        "holds tensors under their parameters' names."
    )


def _tensor(name: str, tensor: Any) -> Stored:
    import torch

    if tensor.is_complex():
        raise TypeError(_complex(name, tensor.dtype))
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        what = "meta" if tensor.is_meta else tensor.layout
        what = "quantized" if tensor.is_quantized else what
        raise TypeError(f"`{name}` is a {what} tensor; only plain ones can be loaded.")
    floating = tensor.is_floating_point()

    def read() -> Array:
        wide = tensor.element_size() == 1 and floating  # NumPy has no float8
        return array_of(tensor.float() if wide else tensor)

    shape = tuple(tensor.shape)
    storage: Hashable = ("array", id(tensor))
    if tensor.numel():
        storage = (str(tensor.device), tensor.data_ptr(), shape, tensor.stride())
    return Stored(shape, floating, read, storage)


def _complex(name: str, dtype: Any) -> str:
    return (
        f"`{name}` has dtype {dtype}: complex parameters aren't covered. Hold the real "
        "and the imaginary part as two real ones."
    )


def _safetensors(path: Path) -> dict[str, Stored]:
    """The entries of a safetensors file, each a view of the file.

    The format is a length, a header in JSON, and the numbers.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        first = 8 + length
        if first > size:
            raise ValueError(
                f"{path} is broken or cut short: its header should take {length} "
                f"bytes, and the file has {size}."
            )
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path} is broken: its header isn't JSON.") from error
    header.pop("__metadata__", None)
    entries = {}
    for name, about in header.items():
        try:
            word, shape = about["dtype"], tuple(map(int, about["shape"]))
            begin, end = map(int, about["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is broken: its header has {about!r}.") from error
        if word not in _DTYPES:
            raise TypeError(f"`{name}` has dtype {word}, which isn't covered.")
        dtype = np.dtype(_DTYPES[word])
        if min(shape, default=0) < 0 or end - begin != dtype.itemsize * math.prod(
            shape
        ):
            raise ValueError(
                f"{path} is broken: `{name}` has shape {shape} and {end - begin} bytes."
            )
        if not 0 <= begin <= end <= size - first:
            raise ValueError(
                f"{path} is cut short: `{name}` ends at byte {first + end}, and the "
                f"file at {size}."
            )
        entries[name] = Stored(
            shape,
            jnp.issubdtype(dtype, jnp.floating),
            _view(path, dtype, first + begin, shape),
            ("file", begin, end) if end > begin else ("file", name),
        )
    if not entries:
        raise ValueError(f"{path} holds no tensors.")
    return entries


def _view(
    path: Path, dtype: np.dtype[Any], first: int, shape: tuple[int, ...]
) -> Callable[[], Array]:
    def read() -> Array:
        if 0 in shape:
            return np.zeros(shape, dtype)
        count = math.prod(shape)
        bytes_ = np.memmap(path, np.uint8, "r", first, (count * dtype.itemsize,))
        return np.asarray(bytes_).view(dtype).reshape(shape)

    return read
