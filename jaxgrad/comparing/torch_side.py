"""Runs the PyTorch side: every call recorded, and the module left as it was found."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
import numpy.typing as npt

from jaxgrad.equations import Place, in_library
from jaxgrad.pytrees import kind_of, leaf_name

Array = npt.NDArray[Any]
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
Rewrite = Callable[[Call], Call]

_OLDEST = (2, 4)  # whose `weights_only` and function modes are those that we test


def import_torch() -> Any:
    """The torch module.

    Raises:
      ImportError: it isn't installed, or too old.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "compare_with_torch and load_torch_parameters need PyTorch, which isn't "
            "installed: pip install 'jaxgrad[torch]'."
        ) from error
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < _OLDEST:
        raise ImportError(
            f"PyTorch {torch.__version__} is too old: {_OLDEST[0]}.{_OLDEST[1]} or "
            "later is needed: pip install -U 'jaxgrad[torch]'."
        )
    return torch


def tensors_of(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """JAX's `args` as tensors: floats keep their dtype, integers become int64.

    The data are copied: JAX's memory is immutable, and never lent.

    Raises:
      TypeError: a leaf is no array, or the state of a random generator.
    """
    named, treedef = jax.tree_util.tree_flatten_with_path(args)
    tensors = [
        _tensor(leaf_name(path[1:], f"args[{path[0].idx}]"), leaf)
        for path, leaf in named
    ]
    return tuple(jax.tree.unflatten(treedef, tensors))


def _tensor(name: str, leaf: Any) -> Any:
    kind = kind_of(leaf)
    if kind == "fixed" and leaf.dtype == np.uint32 and leaf.shape[-1:] != (2,):
        kind = "integer"  # numbers, not a raw key
    if kind not in ("differentiable", "integer", "complex"):
        what = "the state of a random generator" if kind == "fixed" else f"{leaf!r:.60}"
        raise TypeError(
            f"`{name}` is {what}, which has no counterpart among PyTorch's tensors: "
            "pass torch_args=(...), what torch_loss takes after the module."
        )
    return tensor_of(np.asarray(leaf))


def tensor_of(array: Array) -> Any:
    """A NumPy array as a tensor, copied; integers as int64."""
    import torch

    if array.dtype.name == "bfloat16":
        return torch.tensor(array.astype(np.float32)).to(torch.bfloat16)
    if array.dtype.kind in "iu":
        array = array.astype(np.int64)
    return torch.tensor(array)


def array_of(tensor: Any) -> Array:
    """A tensor's numbers on the host, in its own dtype."""
    import torch

    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:  # which NumPy doesn't know by itself
        bits = tensor.contiguous().view(torch.int16).numpy()
        return np.asarray(bits.view(jax.numpy.bfloat16))
    return np.asarray(tensor.resolve_conj().resolve_neg().numpy())


@contextlib.contextmanager
def kept(module: Any) -> Iterator[None]:
    """Puts a module back as it was: parameters, gradients, buffers, modes, RNG."""
    import torch

    parameters = list(module.parameters())
    data = [(p, p.data, p.data.clone(), p.grad, p.requires_grad) for p in parameters]
    modules = list(module.modules())
    modes = [(m, m.training) for m in modules]
    buffers = [
        (m, name, b, None if b is None else (b.data, b.detach().clone()))
        for m in modules
        for name, b in m._buffers.items()
    ]
    rng, dtype = torch.get_rng_state(), torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_rng_state(rng)
        with torch.no_grad():
            for p, own, copy, grad, needs in data:
                p.grad = None
                p.data = own
                if not torch.equal(own, copy):
                    own.copy_(copy)
                p.requires_grad_(needs)
                p.grad = grad
            for m, name, b, both in buffers:
                m._buffers[name] = b
                if both is not None:
                    b.data = both[0]
                    b.data.copy_(both[1])
        for m, training in modes:
            m.training = training


def to_double(module: Any) -> None:
    """Makes a module's floats float64, within `kept`; and what it makes by default."""
    import torch

    torch.set_default_dtype(torch.float64)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.grad = None
                tensor.data = tensor.data.double()


def doubled(args: Any) -> Any:
    """Tensors of floats in float64, in any nest of tuples, lists and dicts."""
    import torch

    def wide(leaf: Any) -> Any:
        floating = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
        return leaf.detach().double() if floating else leaf

    return torch.utils._pytree.tree_map(wide, args)


class Recorded(NamedTuple):
    """One tensor of floats that PyTorch made.

    Attributes:
      number: which call of the run made it.
      function: the name of what was called: `linear`, `layer_norm`, `add`.
      module: the path of the innermost module that it was called in.
      place: the line of the user's that called it.
      inputs: the recorded tensors, by their places in the list, that it was made of.
      parameters: the module's parameters that it was given.
      tensor: the result, in its graph; `array` has its numbers when it was made.
    """

    number: int
    function: str
    module: str
    place: Place
    inputs: tuple[int, ...]
    parameters: tuple[str, ...]
    tensor: Any

    def array(self, overwritten: Mapping[int, Any], own: int) -> Array:
        """Its numbers, as they were when it was made; none inside of a vmap."""
        try:
            return array_of(overwritten.get(own, self.tensor))
        except RuntimeError:
            return np.zeros(0)


@dataclass
class Run:
    """What one run of the loss gave.

    Attributes:
      loss: the loss, a tensor.
      records: the tensors made, in order.
      overwritten: per record whose tensor was changed in place: what it was.
      outputs: per module, in the order in which they returned: path, class, and the
        records of its outputs.
      calls: each call's function and operands, by number; those that were recorded.
      cuts: the calls at which a gradient stops, `detach` or what runs under `no_grad`,
        by number, with the line.
    """

    loss: Any = None
    records: list[Recorded] = field(default_factory=list)
    overwritten: dict[int, Any] = field(default_factory=dict)
    outputs: list[tuple[str, str, tuple[int, ...]]] = field(default_factory=list)
    calls: dict[int, Call] = field(default_factory=dict)
    cuts: dict[int, Place] = field(default_factory=dict)


def run_torch(
    module: Any,
    torch_loss: Callable[..., Any],
    args: Sequence[Any],
    rewrites: Mapping[int, Rewrite] | None = None,
    *,
    record: bool = True,
    wide: bool = False,
) -> Run:
    """Runs `torch_loss(module, *args)`, within `kept`, and records each call.

    Buffers and the random generator are put back, so that each run is the same.

    Args:
      module: the module.
      torch_loss: the loss.
      args: its other arguments.
      rewrites: per number of a call: what is called instead.
      record: keep the tensors that were made.
      wide: the module is in float64, and casts to fewer digits are left out.

    Raises:
      TypeError: the loss isn't a tensor of one real number that depends on a parameter.
      ValueError: it isn't a scalar, or calls `backward()` itself.
    """
    import torch

    run = Run()
    names = {id(p): name for name, p in module.named_parameters()}
    had = any(p.grad is not None for p in module.parameters())
    makers: dict[int, int] = {}
    stack: list[str] = []
    changes = rewrites or {}
    count = 0

    class Recorder(torch.overrides.TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal count
            kwargs = kwargs or {}
            number, count = count, count + 1
            if number in changes:
                with torch.enable_grad():
                    func, args, kwargs = changes[number]((func, args, kwargs))
            name = name_of(func)
            if wide and name in _CASTS and args[0].is_floating_point():
                out = func(*args, **kwargs)
                if not out.is_floating_point():
                    return out
                func, args, kwargs = torch.Tensor.double, args[:1], {}
            if not record or name in _PASSED_OVER:
                return func(*args, **kwargs)
            given = [x for x in _tensors((args, kwargs)) if x.is_floating_point()]
            inputs = tuple(
                dict.fromkeys(makers[id(x)] for x in given if id(x) in makers)
            )
            used = tuple(dict.fromkeys(names[id(x)] for x in given if id(x) in names))
            mutates = _mutates(func, name, kwargs)
            if mutates and given and id(args[0]) in makers:
                run.overwritten[makers[id(args[0])]] = args[0].detach().clone()
            out = func(*args, **kwargs)
            made = [args[0]] if name == "__setitem__" else _tensors(out)
            made = [x for x in made if x.is_floating_point()]
            if made:
                place = _user_line()
                row = kwargs.get("padding_idx") if name == "embedding" else None
                stops = name in _DETACHING or not torch.is_grad_enabled()
                if stops or row is not None:
                    run.cuts[number] = place
                run.calls[number] = (func, args, kwargs)
                for x in made:
                    makers[id(x)] = len(run.records)
                    run.records.append(
                        Recorded(
                            number, name, stack[-1] if stack else "", place,
                            inputs, used, x,
                        )
                    )  # fmt: skip
            return out

    def entering(path: str) -> Callable[..., None]:
        return lambda *_: stack.append(path)

    def leaving(path: str, kind: str) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            stack.pop()
            made = [makers[id(x)] for x in _tensors(output) if id(x) in makers]
            run.outputs.append((path, kind, tuple(made)))

        return hook

    hooks: list[Any] = []
    rng = torch.get_rng_state()
    before = [(b, b.detach().clone()) for b in module.buffers()]
    try:
        if record:
            for path, part in module.named_modules():
                kind = type(part).__name__
                if isinstance(part, torch.jit.ScriptModule):
                    continue  # it takes no hooks from outside
                hooks += [
                    part.register_forward_pre_hook(entering(path)),
                    part.register_forward_hook(leaving(path, kind)),
                ]
        with torch.enable_grad(), Recorder():
            run.loss = torch_loss(module, *args)
    finally:
        for hook in hooks:
            hook.remove()
        torch.set_rng_state(rng)
        for buffer, copy in before:
            # By `data`, of which autograd takes no notice.
            buffer.data.copy_(copy)
    _check_loss(run.loss, module, had)
    return run


def gradients_of(run: Run, tensors: Sequence[Any]) -> list[Any]:
    """The loss's gradient with respect to tensors; `None` where it doesn't depend.

    Raises:
      ValueError: the loss has freed its graph: it calls `backward()` itself.
    """
    import torch

    needing = [x for x in tensors if x.requires_grad]
    if not needing:
        return [None] * len(tensors)
    try:
        got = torch.autograd.grad(
            run.loss, needing, allow_unused=True, retain_graph=True
        )
    except RuntimeError as error:
        if "second time" in str(error):
            raise ValueError(_BACKWARD) from error
        raise
    if all(g is None for g in got):
        # Some graphs, a reentrant checkpoint's, only know `backward`.
        for x in needing:
            x.grad = None
        run.loss.backward(retain_graph=True)
        got = tuple(x.grad for x in needing)
        for x in needing:
            x.grad = None
    dense = [g.to_dense() if g is not None and g.is_sparse else g for g in got]
    by_id = {id(x): g for x, g in zip(needing, dense, strict=True)}
    return [by_id.get(id(x)) for x in tensors]


_BACKWARD = (
    "torch_loss calls backward() itself: return the loss, and the gradients are taken "
    "from it."
)


def _check_loss(loss: Any, module: Any, had: bool) -> None:
    import torch

    who = "torch_loss"
    if not isinstance(loss, torch.Tensor):
        hint = " Is its `return` missing?" if loss is None else ""
        if isinstance(loss, float):
            hint = " Return the tensor, not `loss.item()`."
        raise TypeError(
            f"{who} returned a {type(loss).__name__}; a scalar tensor was expected."
            f"{hint}"
        )
    if loss.dim() != 0:
        raise ValueError(
            f"{who} returned a tensor of shape {tuple(loss.shape)}; a scalar, of shape "
            "(), was expected: `loss.mean()` or `loss.sum()`."
        )
    if loss.is_complex() or not loss.is_floating_point():
        raise TypeError(f"{who} returned {loss.dtype}; a real number was expected.")
    if not had and any(p.grad is not None for p in module.parameters()):
        raise ValueError(_BACKWARD)
    if not loss.requires_grad and any(p.requires_grad for p in module.parameters()):
        raise ValueError(
            f"{who} returned a tensor that doesn't depend on the module's parameters, "
            "as far as PyTorch knows: look for `.detach()`, `.item()`, `.numpy()`, "
            "`torch.no_grad()`, or a loss of another module than the one given."
        )


_CASTS = ("float", "half", "bfloat16", "to", "type", "type_as")
_DETACHING = ("detach", "data", "detach_")


def uncut(call: Call) -> Call:
    """The call with its gradient let through."""
    import torch

    func, args, kwargs = call
    if name_of(func) == "embedding":
        return func, args, {**kwargs, "padding_idx": None}
    if name_of(func) in _DETACHING:
        return (lambda x: x.view_as(x)), args[:1], {}

    def through(*args: Any, **kwargs: Any) -> Any:
        with torch.enable_grad():
            return func(*args, **kwargs)

    return through, args, kwargs


# Calls that make nothing new.
_PASSED_OVER = frozenset(
    (
        "requires_grad",
        "grad",
        "grad_fn",
        "is_leaf",
        "backward",
        "requires_grad_",
        "item",
    )
)


def name_of(func: Any) -> str:
    """What a call is called: `linear`, `layer_norm`, `add`, `T`."""
    name = getattr(func, "__name__", type(func).__name__)
    if name in ("__get__", "__set__"):
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return str(name)


def _mutates(func: Any, name: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call changes its first operand in place."""
    if name.startswith("__"):
        return name == "__setitem__" or name.startswith("__i")
    return name.endswith("_") or bool(kwargs.get("inplace"))


def _tensors(tree: Any) -> list[Any]:
    """The tensors in any nest of tuples, lists and dicts."""
    import torch

    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    if isinstance(tree, tuple | list):
        return [x for part in tree for x in _tensors(part)]
    return []


def _user_line() -> Place:
    """The innermost line outside of libraries that is running."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if not in_library(code.co_filename) and not code.co_filename.startswith("<"):
            return Place(code.co_name, code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return Place("", "", 0)


def line_text(place: Place) -> str:
    """`file, line n`; empty where there is none."""
    return f"{os.path.basename(place.file)}, line {place.line}" if place.line else ""
