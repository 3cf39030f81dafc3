"""What to write instead of a line that makes a number that isn't finite."""

from __future__ import annotations

import ast
import copy
from typing import NamedTuple


class _Safe(NamedTuple):
    """How to make the input of an operation safe.

    Attributes:
      test: which inputs are safe already.
      value: a safe one, to put in the place of the others.
    """

    test: str
    value: str


_SAFE = {
    "sqrt": _Safe("{x} > 0", "1.0"),
    "rsqrt": _Safe("{x} > 0", "1.0"),
    "log": _Safe("{x} > 0", "1.0"),
    "pow": _Safe("{x} > 0", "1.0"),
    "log1p": _Safe("{x} > -1", "0.0"),
    "acos": _Safe("jnp.abs({x}) < 1", "0.0"),
    "asin": _Safe("jnp.abs({x}) < 1", "0.0"),
    "atanh": _Safe("jnp.abs({x}) < 1", "0.0"),
    "div": _Safe("{x} != 0", "1.0"),
}

_FUNCTIONS = {
    "sqrt": ("sqrt",),
    "rsqrt": ("rsqrt",),
    "log": ("log", "log2", "log10"),
    "log1p": ("log1p",),
    "pow": ("power", "pow", "float_power"),
    "acos": ("arccos", "acos"),
    "asin": ("arcsin", "asin"),
    "atanh": ("arctanh", "atanh"),
}

_BEFORE = "Make the input safe before the operation, not only the result after it:"

_GENERAL = (
    f"{_BEFORE}\n    safe = jnp.where(ok, x, 1.0)\n    jnp.where(ok, f(safe), 0.0)\n"
    "with `ok` false where the input is the one that is named above."
)

REPAIRS = {
    "norm at zero": (
        "Add a small number under the root, `jnp.sqrt(jnp.sum(x**2, axis=-1) + 1e-12)`,"
        " or make the input safe before the norm:\n"
        "    zero = jnp.all(x == 0, axis=-1, keepdims=True)\n"
        "    length = jnp.linalg.norm(jnp.where(zero, 1.0, x), axis=-1)\n"
        "    jnp.where(zero[..., 0], 0.0, length)"
    ),
    "root": (
        "The divisor is a root that is 0: it has no slope there. Add a small number "
        "under the root, as `jnp.sqrt(variance + 1e-6)`, not to the root."
    ),
    "overflow": (
        "Compute it in a wider dtype (`x.astype(jnp.float32)`), scale the numbers "
        "before, or use the stable form: `jax.nn.logsumexp`, `jax.nn.log_softmax`, "
        "`jax.nn.softplus`, `optax.sigmoid_binary_cross_entropy`."
    ),
    "dropped overflow": (
        f"{_BEFORE}\n    safe = jnp.where(ok, x, 0.0)\n"
        "    jnp.where(ok, f(safe), other)"
    ),
    "equal eigenvalues": (
        "Use what has a slope there: the eigenvalues alone, or a function of the whole "
        "matrix. Else make them differ, by a diagonal that is small beside the matrix: "
        "`a + 1e-3 * jnp.trace(a) / n * jnp.diag(jnp.linspace(0, 1, n))`."
    ),
    "singular matrix": (
        "Add a part of the identity that is small beside the matrix, "
        "`a + 1e-4 * jnp.trace(a) / n * jnp.eye(n)`, or use `jnp.linalg.lstsq`."
    ),
    "empty softmax": (
        "Let the mask leave something: mask with a large negative number instead of "
        "-inf, `jnp.where(mask, scores, -1e9)`, or give the empty rows their own "
        "value:\n    some = mask.any(-1, keepdims=True)\n"
        "    p = jax.nn.softmax(jnp.where(mask | ~some, scores, -jnp.inf))\n"
        "    p = jnp.where(some, p, 0.0)"
    ),
    "out of range": (
        "Keep the index inside of the array, or say what to read outside of it: "
        '`x.at[index].get(mode="fill", fill_value=0)`.'
    ),
    "non-finite input": (
        "Mend it where it comes from, or keep it out before anything is computed of "
        "it: `jnp.where(jnp.isfinite(x), x, 0.0)`. Multiplying by a mask of 0 doesn't."
    ),
    "literal": (
        "Take a finite number in its place, such as -1e9 for a mask, or choose by "
        "`jnp.where` before the product or the difference that makes NaN of it."
    ),
    "parameter": (
        "An earlier update has spoiled it: look at the gradient of the step before, "
        "with the parameters of that step."
    ),
    "nothing to take": (
        "Replace the result where there was nothing to take: "
        "`jnp.where(jnp.isfinite(y), y, 0.0)`, before it is used."
    ),
    "custom rule": "Mend the rule: make its input safe before it is divided by.",
}


def safe_code(operation: str, text: str, *, is_complex: bool = False) -> str:
    """The code that makes the input of an operation on a line safe.

    In general words where the line doesn't show which call it is.
    """
    found = _find(operation, text)
    if found is None:
        return _GENERAL
    node, place, choice = found
    safe = _SAFE[operation]
    argument = ast.unparse(_argument(node, place))
    test = safe.test.format(x=_bracketed(_argument(node, place)))
    if is_complex:
        test = f"{argument} != 0"
    if choice is not None:
        test = choice
    changed = copy.deepcopy(node)
    _put(changed, place, ast.Name("safe"))
    return (
        f"{_BEFORE}\n    safe = jnp.where({test}, {argument}, {safe.value})\n"
        f"    jnp.where({test}, {ast.unparse(changed)}, 0.0)"
    )


def _find(operation: str, text: str) -> tuple[ast.expr, int, str | None] | None:
    """The only expression on a line that is the operation, and the `where` around it.

    And which of its operands has to be made safe.
    """
    try:
        tree = ast.parse(text.strip().removeprefix("return ").rstrip(":,"))
    except SyntaxError:
        return None
    found: list[tuple[ast.expr, int, str | None]] = []

    def visit(node: ast.AST, choice: str | None) -> None:
        if operation == "div" and _is(node, ast.Div):
            found.append((node, 1, choice))  # type: ignore[arg-type]
        if operation == "pow" and _is(node, ast.Pow):
            found.append((node, 0, choice))  # type: ignore[arg-type]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name.rpartition(".")[2] in _FUNCTIONS.get(operation, ()):
                if not name.startswith(("jnp.", "jax.", "np.", "lax.")):
                    found.append((node, -1, choice))  # a method: of what, is unclear
                elif node.args:
                    found.append((node, 0, choice))
            if name.rpartition(".")[2] == "where" and len(node.args) == 3:
                test = ast.unparse(node.args[0])
                visit(node.args[0], choice)
                visit(node.args[1], test)
                visit(node.args[2], f"~({test})")
                return
        for child in ast.iter_child_nodes(node):
            visit(child, choice)

    visit(tree, None)
    if len(found) != 1 or found[0][1] < 0:
        return None
    node, place, choice = found[0]
    names = {n.id for n in ast.walk(_argument(node, place)) if isinstance(n, ast.Name)}
    if choice is not None:
        tested = {n.id for n in ast.walk(ast.parse(choice)) if isinstance(n, ast.Name)}
        # A test of something else doesn't tell where the input is safe.
        if not (names & tested) - {"jnp", "jax", "lax", "np"} and len(tested) > 1:
            choice = None
    return node, place, choice


def _is(node: ast.AST, operator: type[ast.operator]) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, operator)


def _argument(node: ast.expr, place: int) -> ast.expr:
    if isinstance(node, ast.BinOp):
        return node.right if place else node.left
    assert isinstance(node, ast.Call)
    return node.args[place]


def _put(node: ast.expr, place: int, value: ast.expr) -> None:
    if isinstance(node, ast.BinOp):
        if place:
            node.right = value
        else:
            node.left = value
    elif isinstance(node, ast.Call):
        node.args[place] = value


def _bracketed(node: ast.expr) -> str:
    """An expression as one that can be compared."""
    return (
        f"({ast.unparse(node)})" if isinstance(node, ast.IfExp) else ast.unparse(node)
    )
