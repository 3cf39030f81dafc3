"""Tests `check_gradient` on a mesh: what one device says, and nothing is gathered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgrad import check_gradient
from jaxgrad.compiling import Program

pytestmark = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 devices")


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {"b": draw(0, 64), "v": draw(1, 64, 8), "w": draw(2, 16, 64)}
X, Y = draw(3, 32, 16), draw(4, 32, 8)
# Each has the mesh's shape, its axes, and the axes of each array's dimensions.
LAYOUTS = {
    "data": ((8,), ("d",), {"x": ("d",), "y": ("d",)}),
    "fully": ((8,), ("d",), dict.fromkeys("bvwxy", ("d",))),
    "2x4": (
        (2, 4),
        ("d", "m"),
        {"b": ("m",), "v": ("m",), "w": (None, "m"), "x": ("d",), "y": ("d",)},
    ),
}


def spread(layout, kind=AxisType.Auto):
    shape, axes, specs = LAYOUTS[layout]
    mesh = jax.make_mesh(shape, axes, (kind,) * len(axes))
    arrays = {
        name: jax.device_put(x, NamedSharding(mesh, P(*specs.get(name, ()))))
        for name, x in {**PARAMS, "x": X, "y": Y}.items()
    }
    return mesh, {name: arrays[name] for name in PARAMS}, arrays["x"], arrays["y"]


def with_rule(change):
    """A product whose rule changes the gradient of its second operand."""

    @jax.custom_vjp
    def dense(x, w):
        return x @ w

    def backward(residuals, cotangent):
        x, w = jax.vjp(jnp.matmul, *residuals)[1](cotangent)
        return x, change(w)

    dense.defvjp(lambda x, w: (x @ w, (x, w)), backward)
    return dense


# (A mask, not `.at[3, 5]`: what XLA makes of that on fully sharded arrays is wrong.)
ONE = np.ones((16, 64), np.float32)
ONE[3, 5] = 2
MISTAKES = {
    "none": jnp.matmul,
    "entries": with_rule(lambda g: g * ONE),
    "factor": with_rule(lambda g: g / 2),
    "zero": with_rule(jnp.zeros_like),
}


def network(params, x, y, dense=jnp.matmul, last=jnp.matmul):
    """A batch norm in the middle: its gradient is no average of its parts'."""
    hidden = dense(x, params["w"]) + params["b"]
    hidden = (hidden - hidden.mean(0)) / jnp.sqrt(hidden.var(0) + 1e-3)
    return jnp.mean((last(jnp.tanh(hidden), params["v"]) - y) ** 2)


@functools.cache
def alone(mistake):
    loss = functools.partial(network, dense=MISTAKES[mistake])
    return check_gradient(loss, PARAMS, X, Y)


def assert_same(check, one, cause=True, rounding=1e-9):
    """Two checks with the same results, to rounding."""
    assert check.ok == one.ok
    assert check.forward_mode == one.forward_mode
    assert [rule.verdict for rule in check.rules] == [r.verdict for r in one.rules]
    for leaf, other in zip(check.leaves, one.leaves, strict=True):
        assert (leaf.path, leaf.verdict, leaf.wrong_entries) == (
            other.path,
            other.verdict,
            other.wrong_entries,
        )
        # Of a right leaf it's but rounding, seen along other directions.
        assert leaf.relative_error == pytest.approx(
            other.relative_error, rel=1e-9, abs=rounding
        )
        if cause:
            kinds = leaf.cause and leaf.cause.kind, other.cause and other.cause.kind
            assert kinds[0] == kinds[1]
        assert [e.index for e in leaf.entries] == [e.index for e in other.entries]
        for entry, same in zip(leaf.entries, other.entries, strict=True):
            # A slope is that good: it comes with its own bar.
            bar = 1e-9 * abs(same.reference) + entry.uncertainty + same.uncertainty
            assert abs(entry.reference - same.reference) <= bar
            assert entry.claimed == pytest.approx(same.claimed, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("layout", "mistake"),
    [
        ("data", "entries"),
        ("fully", "none"),
        ("fully", "zero"),
        ("2x4", "factor"),
    ],
)
def test_a_mesh_gives_what_one_device_gives(layout, mistake):
    _, params, x, y = spread(layout)
    loss = functools.partial(network, dense=MISTAKES[mistake])
    check = check_gradient(loss, params, x, y)
    assert_same(check, alone(mistake))
    assert check.ok == (mistake == "none")
    assert not check.findings  # all that is to be said was said
    if mistake != "none":
        (wrong,) = [leaf for leaf in check.leaves if leaf.verdict == "wrong"]
        assert (wrong.path, wrong.cause.kind) == ("w", mistake)


@pytest.mark.parametrize("context", [False, True])
def test_explicit_axes(context):
    mesh, params, x, y = spread("2x4", AxisType.Explicit)
    rows = NamedSharding(mesh, P("d", None))
    loss = functools.partial(
        network,
        dense=MISTAKES["entries"],
        last=functools.partial(jnp.matmul, out_sharding=rows),
    )
    before = jax.sharding.get_abstract_mesh()
    if context:
        with jax.set_mesh(mesh):
            check = check_gradient(loss, params, x, y)
    else:
        check = check_gradient(loss, params, x, y)
    assert jax.sharding.get_abstract_mesh() == before
    assert_same(check, alone("entries"))


def test_some_devices_and_arrays_that_are_nowhere_yet():
    """A mesh without the first device; data from NumPy, and a key."""
    mesh = jax.make_mesh((4,), ("d",), (AxisType.Auto,), devices=jax.devices()[2:6])
    params = jax.device_put(PARAMS, NamedSharding(mesh, P("d")))

    def loss(params, x, y, key):
        kept = jax.random.bernoulli(key, 0.5, (32, 1))
        return network(params, x * kept, y)

    arguments = np.asarray(X), Y, jax.random.key(0)
    one = check_gradient(loss, PARAMS, *arguments)
    assert_same(check_gradient(loss, params, *arguments), one)
    with jax.set_mesh(mesh):  # a mesh alone takes what is nowhere, too
        assert check_gradient(loss, jax.tree.map(np.asarray, PARAMS), *arguments).ok


def plain(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["w"] + params["b"]) @ params["v"] - y) ** 2)


def test_what_takes_the_whole_of_a_leaf():
    """It is left out, and said so, where no device has the whole."""
    gradient = jax.grad(plain)(PARAMS, X, Y)
    turned = dict(gradient, w=jnp.roll(gradient["w"], 1, 0))
    one = check_gradient(plain, PARAMS, X, Y, gradient=turned)
    kinds = [leaf.cause and leaf.cause.kind for leaf in one.leaves]
    assert kinds == [None, None, "permuted"]
    _, params, x, y = spread("data")
    check = check_gradient(plain, params, x, y, gradient=turned)
    # The gradient is given in float32, whose rounding is 1e-7.
    assert_same(check, one, rounding=1e-6)
    assert not check.findings
    _, params, x, y = spread("fully")
    check = check_gradient(plain, params, x, y, gradient=turned)
    assert_same(check, one, cause=False, rounding=1e-6)
    (finding,) = check.findings
    assert (finding.kind, finding.leaf) == ("spread", "w")
    assert "on one device" in finding.text


@pytest.mark.parametrize(
    ("change", "kind"), [(lambda g: g * ONE, "entries"), (lambda g: g / 2, "factor")]
)
def test_entries_are_found_without_another_gradient(change, kind):
    """A while loop in the forward part: only the loss's values tell."""

    def thrice(x):
        return jax.lax.fori_loop(0, 3, lambda _, x: jnp.sin(x), x)

    @jax.custom_vjp
    def bent(x):
        def body(state):
            return state[0] + 1, jnp.sin(state[1])

        return jax.lax.while_loop(lambda state: state[0] < 3, body, (0, x))[1]

    def backward(x, g):
        return (change(jax.vjp(thrice, x)[1](g)[0]),)

    bent.defvjp(lambda x: (bent(x), x), backward)

    def loss(params):
        return jnp.mean((bent(params["w"]) @ params["v"]) ** 2)

    _, params, _, _ = spread("fully")
    check = check_gradient(loss, params, leaves="w")
    one = check_gradient(loss, PARAMS, leaves="w")
    (leaf,), (other,) = check.leaves, one.leaves
    assert (leaf.verdict, leaf.cause.kind) == ("wrong", kind)
    assert (other.verdict, other.cause.kind) == ("wrong", kind)
    if kind == "entries":
        assert_same(check, one)


def test_trusted_rules_second_order_and_infinities():
    @jax.custom_vjp
    def rounded(x):
        return jnp.round(4 * x) / 4

    rounded.defvjp(lambda x: (rounded(x), None), lambda _, g: (g,))

    def through(params, x, y):
        return plain({**params, "w": rounded(params["w"])}, x, y)

    _, params, x, y = spread("fully")
    assert check_gradient(through, params, x, y, trust=[rounded]).ok
    assert not check_gradient(through, params, x, y, leaves="w").ok
    check = check_gradient(plain, params, x, y, order=2)
    assert check.ok
    assert check.second_order.ok

    def roots(params):
        safe = jnp.where(params["w"] > 0, jnp.sqrt(params["w"]), 0.0)
        return jnp.sum(safe @ params["v"])

    check, one = (check_gradient(roots, p, leaves="w") for p in (params, PARAMS))
    (leaf,), (other,) = check.leaves, one.leaves
    assert leaf.verdict == other.verdict == "nonfinite"
    assert leaf.wrong_entries == other.wrong_entries
    assert [e.index for e in leaf.entries] == [e.index for e in other.entries]


def test_nothing_is_gathered(monkeypatch):
    """No leaf comes to the host or to one device, and none is copied to all."""
    _, params, x, y = spread("fully")
    shapes = {leaf.shape for leaf in params.values() if leaf.size > 64}
    gathered = []

    def look(tree, where):
        for leaf in jax.tree.leaves(tree):
            if not isinstance(leaf, jax.Array) or not shapes & {
                leaf.shape,
                leaf.shape[1:],
            }:
                continue
            if leaf.is_fully_replicated or len(leaf.sharding.device_set) < 8:
                gathered.append((where, leaf.shape))

    run = Program.__call__

    def spied(program, *operands):
        look(operands, "an operand")
        out = run(program, *operands)
        look(out, "a result")
        return out

    class_of_arrays = type(x)
    to_numpy = class_of_arrays.__array__

    def array(self, *args, **options):
        if self.shape in shapes:
            gathered.append(("the host", self.shape))
        return to_numpy(self, *args, **options)

    put = jax.device_put

    def moved(tree, *args, **options):
        out = put(tree, *args, **options)
        look(out, "a copy")
        return out

    monkeypatch.setattr(Program, "__call__", spied)
    monkeypatch.setattr(class_of_arrays, "__array__", array)
    monkeypatch.setattr(jax, "device_put", moved)
    loss = functools.partial(network, dense=MISTAKES["entries"])
    check = check_gradient(loss, params, x, y)
    assert gathered == []
    np.asarray(params["w"])  # the spies see
    assert gathered
    monkeypatch.undo()
    assert_same(check, alone("entries"))
