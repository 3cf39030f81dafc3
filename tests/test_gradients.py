"""Tests `grad` and `value_and_grad`: what they give, take, refuse, and compile."""

import gc
import math
import warnings
import weakref
from typing import NamedTuple

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import jaxgrad

X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32)
Y = jnp.asarray(np.random.default_rng(1).normal(size=(6, 2)), jnp.float32)


class Layer(NamedTuple):
    w: jax.Array
    b: jax.Array


LAYER = Layer(X[:3, :2], Y[0])


def layer_loss(layer, x, y):
    return jnp.mean((jnp.tanh(x @ layer.w + layer.b) - y) ** 2)


def plain_sum(params, *_):
    """The sum of all that's differentiable: its gradient is 1 everywhere."""
    leaves = jax.tree.leaves(params)
    floats = [leaf for leaf in leaves if eqx.is_inexact_array(leaf)]
    return sum(jnp.sum(leaf) for leaf in floats)


# What it gives


TREES = {
    "named tuple": (LAYER, lambda t: t),
    "dict": ({"w": LAYER.w, "b": LAYER.b}, lambda t: Layer(t["w"], t["b"])),
    "list": ([LAYER.w, LAYER.b], lambda t: Layer(*t)),
    "nested": (
        {"a": [(LAYER.w,), {"b": LAYER.b}]},
        lambda t: Layer(t["a"][0][0], t["a"][1]["b"]),
    ),
}


@pytest.mark.parametrize("name", TREES)
def test_same_bits_as_jax(name):
    params, as_layer = TREES[name]

    def loss(params, x, y):
        return layer_loss(as_layer(params), x, y)

    expected = jax.jit(jax.value_and_grad(loss))(params, X, Y)
    ours = jaxgrad.value_and_grad(loss)(params, X, Y)
    chex.assert_trees_all_equal(ours, expected, strict=True)
    chex.assert_trees_all_equal(
        jaxgrad.grad(loss)(params, X, Y), jax.jit(jax.grad(loss))(params, X, Y)
    )


def test_aux_comes_out():
    def loss(params, x):
        return jnp.sum(params * x), {"seen": x + 1}

    x = jnp.arange(3.0)
    gradient, aux = jaxgrad.grad(loss, has_aux=True)(x, x)
    (value, aux_too), gradient_too = jaxgrad.value_and_grad(loss, has_aux=True)(x, x)
    assert value == 5.0
    chex.assert_trees_all_equal(gradient, gradient_too, x)
    chex.assert_trees_all_equal(aux, aux_too, {"seen": x + 1})


def test_the_same_compiled_and_not():
    def loss(params, x, scale, *, power=2):
        return jnp.sum((params["w"] * x) ** power) * scale

    cases = [
        (loss, {"w": X[0]}, X[1], jnp.float32(0.5)),
        (loss, {"w": X[0], "name": "a", "off": None}, X[1], 0.5),
        (lambda w: w**2, 3.0),
        (lambda w, flag: w**2 if flag else w, jnp.ones(()), True),
    ]
    for function, *operands in cases:
        compiled = jaxgrad.value_and_grad(function)(*operands)
        with jax.disable_jit():
            plain = jaxgrad.value_and_grad(function)(*operands)
        chex.assert_trees_all_close(compiled, plain, rtol=1e-6)


class Compiled(chex.TestCase):
    """Inside a caller's own jit, and not."""

    @chex.variants(with_jit=True, without_jit=True)
    def test_value_and_grad(self):
        ours = self.variant(jaxgrad.value_and_grad(layer_loss))(LAYER, X, Y)
        chex.assert_trees_all_close(
            ours, jax.value_and_grad(layer_loss)(LAYER, X, Y), rtol=1e-6
        )

    @chex.variants(with_jit=True, without_jit=True)
    def test_grad_of_a_number(self):
        assert self.variant(jaxgrad.grad(lambda w: w**2))(3.0) == 6.0


def test_nested_in_other_transformations():
    gradient = jaxgrad.grad(layer_loss)
    plain = jax.grad(layer_loss)
    per_example = jax.vmap(gradient, in_axes=(None, 0, 0))(LAYER, X, Y)
    for row in range(len(X)):
        one = jax.tree.map(lambda g, row=row: g[row], per_example)
        chex.assert_trees_all_close(one, plain(LAYER, X[row], Y[row]), rtol=1e-5)

    def norm(layer, gradient):
        return sum(jnp.vdot(g, g) for g in gradient(layer, X, Y))

    chex.assert_trees_all_close(
        jaxgrad.grad(norm)(LAYER, gradient), jax.grad(norm)(LAYER, plain), rtol=1e-5
    )
    tangent = jax.jvp(lambda layer: gradient(layer, X, Y), (LAYER,), (LAYER,))
    chex.assert_trees_all_close(
        tangent,
        jax.jvp(lambda layer: plain(layer, X, Y), (LAYER,), (LAYER,)),
        rtol=1e-5,
    )


def test_it_exports_through_an_outer_jit():
    compiled = jax.jit(jaxgrad.value_and_grad(layer_loss))
    exported = jax.export.export(compiled, platforms=["cpu", "cuda", "tpu"])(
        LAYER, X, Y
    )
    assert exported.platforms == ("cpu", "cuda", "tpu")
    chex.assert_trees_all_equal(exported.call(LAYER, X, Y), compiled(LAYER, X, Y))


def test_data_on_many_devices():
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("batch",), auto, devices=jax.devices()[:2])
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    gradient = jaxgrad.grad(layer_loss)
    split = gradient(LAYER, jax.device_put(X, rows), jax.device_put(Y, rows))
    assert split.w.sharding.device_set == set(jax.devices()[:2])
    chex.assert_trees_all_close(split, gradient(LAYER, X, Y), rtol=1e-5)


# What it takes


def test_a_whole_equinox_mlp():
    model = eqx.nn.MLP(3, 2, 8, 2, key=jax.random.key(0))

    def loss(model, x, y):
        return jnp.mean((jax.vmap(model)(x) - y) ** 2)

    value, gradient = jaxgrad.value_and_grad(loss)(model, X, Y)
    theirs = eqx.filter_value_and_grad(loss)(model, X, Y)
    assert gradient.activation is None
    assert jax.tree.structure(gradient) == jax.tree.structure(theirs[1])
    chex.assert_trees_all_close(
        jax.tree.leaves((value, gradient)), jax.tree.leaves(theirs), rtol=1e-5
    )


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_flax_linen_with_dropout_and_batch_norm(make_key, train):
    net = LinenNet()
    variables = net.init(jax.random.key(0), X, False)

    def loss(params, batch_stats, x, y, key, train):
        if train:  # a plain flag, not a tracer
            out, new = net.apply(
                {"params": params, "batch_stats": batch_stats},
                x,
                train,
                rngs={"dropout": key},
                mutable=["batch_stats"],
            )
        else:
            new = {"batch_stats": batch_stats}
            out = net.apply({"params": params, **new}, x, train)
        return jnp.mean((out - y) ** 2), new["batch_stats"]

    operands = (variables["params"], variables["batch_stats"], X, Y, make_key(1))
    ours = jaxgrad.value_and_grad(loss, has_aux=True)(*operands, train)
    theirs = jax.value_and_grad(loss, has_aux=True)(*operands, train)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-6)
    old, new = jax.tree.leaves((operands[1], ours[0][1]))[::2]
    assert np.any(old != new) == train


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


def nnx_loss(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


def by_path(tree):
    """Leaves by path, without the `None`s."""
    return dict(jax.tree_util.tree_leaves_with_path(tree))


def test_a_whole_flax_nnx_module():
    model = NNXNet(nnx.Rngs(0))
    value, gradient = jaxgrad.value_and_grad(nnx_loss)(model, X, Y)
    expected_value, expected = nnx.value_and_grad(nnx_loss)(NNXNet(nnx.Rngs(0)), X, Y)
    chex.assert_trees_all_close(value, expected_value, rtol=1e-5)
    for name in "first", "norm", "last":
        for leaf in "kernel", "bias", "scale":
            if leaf in expected[name]:
                chex.assert_trees_all_close(
                    getattr(getattr(gradient, name), leaf)[...],
                    expected[name][leaf][...],
                    rtol=1e-4,
                    atol=1e-6,
                )
    held = set(by_path(model)) - set(by_path(gradient))
    assert {leaf.dtype for path, leaf in by_path(model).items() if path in held} == {
        jax.random.key(0).dtype,
        np.dtype(np.uint32),
    }


def test_flax_nnx_split_with_its_state_through_aux():
    model = NNXNet(nnx.Rngs(0))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, graphdef, rest, x, y):
        model = nnx.merge(graphdef, params, rest)
        return nnx_loss(model, x, y), nnx.state(model, nnx.Not(nnx.Param))

    gradient_of = jaxgrad.value_and_grad(loss, has_aux=True)
    (value, new), gradient = gradient_of(params, graphdef, rest, X, Y)
    chex.assert_trees_all_equal_structs(gradient, params)
    chex.assert_trees_all_equal_structs(new, rest)

    # The module itself, in evaluation order: the same loss, the same new state.
    np.testing.assert_allclose(value, nnx_loss(model, X, Y), rtol=1e-5)
    after = nnx.state(model, nnx.Not(nnx.Param))
    for ours, theirs in zip(*map(jax.tree.leaves, (new, after)), strict=True):
        if jnp.issubdtype(ours.dtype, jnp.floating):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5)
        else:
            assert np.all(ours == theirs)


def test_static_leaves_have_no_gradient():
    params = {"w": jnp.array([2.0, 3.0]), "name": "ridge", "power": 3, "off": None}

    def loss(params):
        assert params["name"] == "ridge"
        return jnp.sum(params["w"] ** params["power"])

    gradient = jaxgrad.grad(loss)(params)
    np.testing.assert_allclose(gradient.pop("w"), [12.0, 27.0])
    assert gradient == {"name": None, "power": None, "off": None}


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_keys_are_held_fixed(make_key):
    key = make_key(0)

    def loss(params):
        return jnp.sum(params["w"] * jax.random.normal(params["key"], (3,)))

    gradient = jaxgrad.grad(loss)({"w": jnp.ones(3), "key": key})
    assert gradient["key"] is None
    chex.assert_trees_all_close(gradient["w"], jax.random.normal(key, (3,)))


def test_a_number_alone_is_the_parameter():
    value, gradient = jaxgrad.value_and_grad(lambda w: w**2)(3.0)
    assert (value, gradient) == (9.0, 6.0)


def test_numpy_parameters():
    params = jax.tree.map(np.asarray, LAYER)
    chex.assert_trees_all_equal(
        jaxgrad.grad(layer_loss)(params, np.asarray(X), np.asarray(Y)),
        jaxgrad.grad(layer_loss)(LAYER, X, Y),
        strict=True,
    )


def test_dtypes_are_kept():
    names = ["bfloat16", "float16", "float32", "float64"]
    with jax.enable_x64(True):
        params = {name: jnp.ones(2, name) for name in names}
        params["number"] = np.float64(1)
        gradient = jaxgrad.grad(
            lambda p: sum(jnp.sum(a).astype(float) for a in p.values())
        )(params)
    for name in names:
        chex.assert_trees_all_equal(gradient[name], params[name], strict=True)
    assert gradient["number"].dtype == np.float64


def test_flags_and_numbers_are_told_apart():
    slopes = {bool: 2.0, int: 3.0, float: 5.0}
    gradient = jaxgrad.grad(lambda w, flag: w * slopes[type(flag)])
    for _ in range(2):
        for one in (True, 1, 1.0):
            assert gradient(jnp.ones(()), one) == slopes[type(one)]
            assert gradient(jnp.ones(()), {"flag": one}["flag"]) == slopes[type(one)]
    sign = jaxgrad.grad(lambda w, x: w * math.copysign(1, x))
    assert [sign(jnp.ones(()), zero) for zero in (0.0, -0.0, 0.0)] == [1, -1, 1]


# What it compiles


class Counted:
    """A loss that counts how often it is traced."""

    def __init__(self):
        self.traces = 0

    def __call__(self, params, *args):
        self.traces += 1
        return plain_sum(params)

    def method(self, params, *args):
        return self(params)

    def other(self, params, *args):
        return 2 * self(params)


@pytest.mark.parametrize(
    "operands",
    [
        (X, Y),
        ({"w": X, "name": "a", "n": 3}, Y, True),
        (X, 0.5, math.nan),
        (3.0,),
        (eqx.nn.MLP(2, 2, 2, 1, key=jax.random.key(0)),),
    ],
    ids=["arrays", "static", "numbers", "a float", "a module"],
)
@pytest.mark.parametrize("kind", ["function", "method", "object"])
def test_compiled_once_in_a_loop(kind, operands):
    counted = Counted()

    def function(*operands):
        return counted(*operands)

    for _ in range(4):
        loss = {"function": function, "method": counted.method, "object": counted}[kind]
        jaxgrad.value_and_grad(loss)(*operands)
    assert counted.traces == 1


def test_compiled_once_per_static_value():
    counted = Counted()
    for _ in range(3):
        for mode in (True, False, "a"):
            jaxgrad.value_and_grad(counted)(X, mode)
    assert counted.traces == 3


def test_two_methods_of_one_object_are_two_losses():
    counted = Counted()
    for _ in range(2):
        assert jaxgrad.grad(counted.method)(1.0) == 1
        assert jaxgrad.grad(counted.other)(1.0) == 2


def test_equal_losses_are_not_confused():
    class Scaled:
        def __init__(self, scale):
            self.scale = scale

        def __eq__(self, other):
            return True

        def __hash__(self):
            return 0

        def __call__(self, w):
            return self.scale * w

    one, two = Scaled(1.0), Scaled(2.0)
    assert [jaxgrad.grad(loss)(1.0) for loss in (one, two, one, two)] == [1, 2, 1, 2]


def test_the_loss_goes_when_its_user_lets_go():
    for operands in (X,), (X, True), (3.0,):

        def loss(params, *_):
            return plain_sum(params)

        jaxgrad.value_and_grad(loss)(*operands)
        jaxgrad.grad(loss)(*operands)
        gone = weakref.ref(loss)
        del loss
        gc.collect()
        assert gone() is None


def test_the_gradient_keeps_its_loss():
    gradient = jaxgrad.grad(lambda w: w**2)
    method = jaxgrad.grad(Counted().method)
    gc.collect()
    assert gradient(3.0) == 6.0
    assert method(3.0) == 1.0


def test_a_static_number_that_keeps_changing_is_warned_of():
    gradient = jaxgrad.grad(lambda w, options: w * options["rate"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(9):
            gradient(jnp.ones(()), {"rate": step / 8, "name": "a"})
    with pytest.warns(UserWarning, match=r"`args\[0\].rate`.* 9\.5.*jnp.asarray"):
        gradient(jnp.ones(()), {"rate": 9.5, "name": "a"})


# What it refuses


def refused(error, words, loss, *operands, has_aux=False):
    """Both functions refuse; the fast path, the general one, and without jit."""
    for derivative in jaxgrad.grad, jaxgrad.value_and_grad:
        with pytest.raises(error, match=words):
            derivative(loss, has_aux)(*operands)
        with pytest.raises(error, match=words):
            derivative(lambda p, _, *a: loss(p, *a), has_aux)(
                operands[0], "static", *operands[1:]
            )


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("leaf", "words"),
    [
        (np.arange(3), r"`layers\[1\].w`.*dtype int.*jnp.asarray.*split it off"),
        (jnp.ones(3, bool), r"`layers\[1\].w`.*dtype bool.*nnx.split.*nnx.Param"),
        (jnp.ones(3) * 1j, r"`layers\[1\].w`.*complex64 .*complex param.*two real"),
        (torch.ones(3), r"`layers\[1\].w`.*torch.Tensor.*jnp.asarray"),
    ],
    ids=["int", "bool", "complex", "torch"],
)
def test_leaves_without_a_real_gradient(leaf, words):
    params = {"layers": [{"w": jnp.ones(3)}, {"w": leaf}]}
    refused(TypeError, words, plain_sum, params)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("error", "returned", "words"),
    [
        (ValueError, lambda p: p[:1, :1], r"shape \(1, 1\).*`loss.squeeze\(\)`"),
        (ValueError, lambda p: p[0], r"shape \(3,\).*jnp.mean.*jnp.sum"),
        (TypeError, lambda p: None, r"returned None.*`return` missing"),
        (TypeError, lambda p: (p.sum(), p), "tuple of 2.*has_aux=True"),
        (TypeError, lambda p: [p.sum()], "returned a list"),
        (TypeError, lambda p: jnp.argmax(p), "returned int32.*argmax"),
        (TypeError, lambda p: p.sum() > 0, "returned bool"),
        (TypeError, lambda p: p.sum() * 1j, r"complex number.*jnp.abs\(loss\)"),
    ],
    ids=["size 1", "array", "None", "tuple", "list", "int", "bool", "complex"],
)
def test_losses_that_are_not_a_real_scalar(error, returned, words):
    def my_loss(params):
        return returned(params)

    refused(error, words, my_loss, X)
    with pytest.raises(error, match=r"`my_loss` \(test_gradients.py, line \d+\)"):
        jaxgrad.grad(my_loss)(X)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "returned", [lambda p: p.sum(), lambda p: (p.sum(),), lambda p: (p.sum(), 1, 2)]
)
def test_has_aux_needs_a_pair(returned):
    refused(TypeError, r"a pair \(loss, aux\)", returned, X, has_aux=True)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"a": 0.5, "b": "x"}, r"`a` is the Python number 0.5.*jnp.asarray\(0.5\)"),
        (3, r"Python number 3.*jnp.asarray\(3.0\)"),
        ({"name": "x"}, "no array of floats.*`name` is static: str"),
        ({"key": np.zeros(2, np.uint32)}, "no array of floats.*`key` is fixed"),
        ({}, "no leaves"),
        (None, "no leaves"),
    ],
)
def test_nothing_to_differentiate(params, words):
    refused(TypeError, words, lambda params: jnp.ones(()), params)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("arg", "words"),
    [
        ({"modes": [{1, 2}]}, r"`args\[0\].modes\[0\]` is a set.*hashable"),
        ({"x": torch.ones(2)}, r"`args\[0\].x` is a torch.Tensor.*jnp.asarray"),
    ],
)
def test_arguments_that_cannot_be_kept(arg, words):
    for derivative in jaxgrad.grad, jaxgrad.value_and_grad:
        with pytest.raises(TypeError, match=words):
            derivative(plain_sum)(X, arg)


@pytest.mark.bad_input
def test_text_is_refused_by_name():
    with pytest.raises(TypeError, match=r"`args\[0\].names` is an array of dtype <U1"):
        jaxgrad.grad(plain_sum)(X, {"names": np.array(["a", "b"])})


@pytest.mark.bad_input
def test_params_are_needed():
    with pytest.raises(TypeError, match="params is missing"):
        jaxgrad.grad(plain_sum)()


@pytest.mark.bad_input
@pytest.mark.parametrize("loss", [3, None, "loss"])
def test_a_loss_must_be_callable(loss):
    words = r"loss must be a function|parameter 'loss'"
    for derivative in jaxgrad.grad, jaxgrad.value_and_grad:
        with pytest.raises(TypeError, match=words):
            derivative(loss)


@pytest.mark.bad_input
@pytest.mark.parametrize("args", [(), (True,)])
def test_a_loss_own_error_comes_through_as_it_is(args):
    error = TypeError("my own")

    def loss(params, *_):
        raise error

    for derivative in jaxgrad.grad, jaxgrad.value_and_grad:
        with pytest.raises(TypeError) as caught:
            derivative(loss)(X, *args)
        assert caught.value is error


@pytest.mark.bad_input
def test_a_keyword_is_told_where_to_go():
    with pytest.raises(TypeError, match=r"plain_sum.*keyword 'x'.*functools\.partial"):
        jaxgrad.grad(plain_sum)(X, x=X)


@pytest.mark.bad_input
def test_a_key_alone_is_nothing_to_differentiate():
    with pytest.raises(TypeError, match=r"`params` is fixed: key<fry>"):
        jaxgrad.grad(lambda key: jax.random.normal(key))(jax.random.key(0))
