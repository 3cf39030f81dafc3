"""Which JAX leaf is which PyTorch parameter: by content, siblings, order and name."""

import time

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgrad.comparing.layouts import laid_out, put_back
from jaxgrad.comparing.matching import match


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def ones(*shape):
    return np.ones(shape, np.float32)


def zeros(*shape):
    return np.zeros(shape, np.float32)


def matched(leaves, parameters, mapping=None, *, differing=0):
    """The matches; all leaves have a partner, and laid out anew they are the same."""
    found = match(leaves, parameters, mapping)
    assert found.unmatched_leaves == ()
    assert tuple(one.path for one in found.layouts) == tuple(leaves)
    assert len(found.differing) == differing
    for layout in found.layouts:
        leaf = leaves[layout.path]
        again = laid_out(layout, parameters).astype(leaf.dtype)
        if not differing:
            np.testing.assert_array_equal(again, leaf)
        assert covered(layout) == leaf.size or differing
    return found


def covered(layout):
    seen = np.zeros(layout.shape, int)
    for piece in layout.pieces:
        seen[piece.block] += 1
    assert seen.max(initial=0) <= 1
    return int(seen.sum())


def pairs(found):
    """The leaves' only parameters."""
    return {one.path: "+".join(one.pieces[0].names) for one in found.layouts}


def sources(found, path):
    """The parameters a leaf is made of, piece by piece."""
    (layout,) = (one for one in found.layouts if one.path == path)
    return [piece.names for piece in layout.pieces]


def text(found, path):
    (layout,) = (one for one in found.layouts if one.path == path)
    return layout.text


# --- One parameter, in another order.


def test_transposed_and_as_it_is(rng):
    weight, bias = normal(rng, 6, 4), normal(rng, 6)
    found = matched(
        {"dense.kernel": weight.T, "dense.bias": bias},
        {"fc.weight": weight, "fc.bias": bias},
    )
    assert pairs(found) == {"dense.kernel": "fc.weight", "dense.bias": "fc.bias"}
    assert text(found, "dense.kernel") == "transposed"
    assert text(found, "dense.bias") == "as it is"
    assert found.unmatched_names == ()
    assert found.ambiguous == ()


def test_convolution(rng):
    weight = normal(rng, 8, 3, 5, 5)
    found = matched({"k": weight.transpose(2, 3, 1, 0)}, {"w": weight})
    assert text(found, "k") == "axes (2, 3, 1, 0)"


def test_flipped_kernel(rng):
    weight = normal(rng, 8, 3, 5, 5)
    matched({"k": weight.transpose(2, 3, 1, 0)[::-1, ::-1]}, {"w": weight})


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_flattened_channels_last(rng, dtype):
    weight = normal(rng, 32, 6 * 4 * 7)
    leaf = weight.reshape(32, 6, 4, 7).transpose(2, 3, 1, 0).reshape(-1, 32)
    matched({"k": leaf.astype(dtype)}, {"w": weight})


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_rotary_pairs_and_halves(rng, dtype):
    weight = normal(rng, 4 * 16, 24)
    leaf = weight.reshape(4, 2, 8, 24).transpose(3, 0, 2, 1).reshape(24, 64)
    matched({"k": leaf.astype(dtype)}, {"w": weight})


def test_channels_in_any_order(rng):
    weight = normal(rng, 20, 30)
    leaf = weight[rng.permutation(20)][:, rng.permutation(30)].T
    matched({"k": leaf}, {"other": normal(rng, 20, 30), "w": weight})


# --- Split, joined, stacked, summed and shared.


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bias", [zeros(48), None], ids=["zeros", "random"])
def test_split_projection(rng, dtype, bias):
    fused = normal(rng, 48, 16)
    bias = normal(rng, 48) if bias is None else bias
    leaves = {}
    for i, name in enumerate("qkv"):
        rows = slice(16 * i, 16 * i + 16)
        leaves[f"attn.{name}.kernel"] = fused[rows].T.astype(dtype)
        leaves[f"attn.{name}.bias"] = bias[rows].astype(dtype)
    found = matched(
        leaves,
        {"attn.in_proj_weight": fused, "attn.in_proj_bias": bias},
    )
    places = [one.pieces[0].offsets[0][0] for one in found.layouts]
    assert places == [0, 0, 256, 16, 512, 32]
    assert text(found, "attn.k.kernel") == "part 2 of 3, transposed"


def test_split_heads(rng):
    fused, out = normal(rng, 48, 16), normal(rng, 16, 16)
    q, k, v = (part.reshape(4, 4, 16) for part in np.split(fused, 3))
    leaves = {
        "q": q.transpose(2, 0, 1),
        "k": k,
        "v": v.transpose(0, 2, 1),
        "out": out.T.reshape(4, 4, 16),
    }
    found = matched(leaves, {"in_proj_weight": fused, "out.weight": out})
    assert pairs(found)["out"] == "out.weight"


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_joined_projection(rng, dtype):
    q, k, v = (normal(rng, 16, 16) for _ in range(3))
    leaves = {
        "qkv.kernel": np.concatenate([q, k, v]).T.astype(dtype),
        "qkv.bias": zeros(48).astype(dtype),
    }
    parameters = {"a.q.weight": q, "a.q.bias": zeros(16), "a.k.weight": k}
    parameters |= {"a.k.bias": zeros(16), "a.v.weight": v, "a.v.bias": zeros(16)}
    found = matched(leaves, parameters)
    assert sources(found, "qkv.bias") == [("a.q.bias",), ("a.k.bias",), ("a.v.bias",)]
    assert text(found, "qkv.kernel") == "3 joined along axis 1, each transposed"


def test_joined_in_unequal_parts(rng):
    q, k, v = normal(rng, 40, 16), normal(rng, 8, 16), normal(rng, 8, 16)
    found = matched(
        {"qkv": np.concatenate([q, k, v]).T},
        {"q.weight": q, "k.weight": k, "v.weight": v},
    )
    assert len(sources(found, "qkv")) == 3


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_stacked_layers(rng, equal, dtype):
    """Layers stacked for a scan; a fresh TransformerEncoder repeats its layers."""
    depth, leaves, parameters = 11, {}, {}
    first = normal(rng, 24, 8)
    for i in range(depth):
        weight = first if equal else normal(rng, 24, 8)
        parameters[f"layers.{i}.norm1.weight"] = ones(8)
        parameters[f"layers.{i}.norm1.bias"] = zeros(8)
        parameters[f"layers.{i}.attn.in_proj_weight"] = weight
        parameters[f"layers.{i}.attn.in_proj_bias"] = zeros(24)
        parameters[f"layers.{i}.norm2.weight"] = ones(8)
        parameters[f"layers.{i}.norm2.bias"] = zeros(8)
    parameters["norm.weight"], parameters["norm.bias"] = ones(8), zeros(8)
    every = range(depth)
    fused = [parameters[f"layers.{i}.attn.in_proj_weight"].T for i in every]
    stacked = np.stack(fused).astype(dtype)
    for i, name in enumerate("qkv"):
        leaves[f"blocks.attn.{name}.kernel"] = stacked[:, :, 8 * i : 8 * i + 8]
        leaves[f"blocks.attn.{name}.bias"] = zeros(depth, 8).astype(dtype)
    for name in ("norm1", "norm2"):
        leaves[f"blocks.{name}.scale"] = ones(depth, 8)
        leaves[f"blocks.{name}.bias"] = zeros(depth, 8)
    leaves["norm.scale"], leaves["norm.bias"] = ones(8), zeros(8)
    found = matched(leaves, parameters)
    for path, name in [
        ("blocks.norm1.scale", "norm1.weight"),
        ("blocks.norm2.bias", "norm2.bias"),
        ("blocks.attn.q.kernel", "attn.in_proj_weight"),
        ("blocks.attn.v.bias", "attn.in_proj_bias"),
    ]:
        assert sources(found, path) == [(f"layers.{i}.{name}",) for i in every]
    assert pairs(found)["norm.scale"] == "norm.weight"
    assert found.unmatched_names == ()
    thirds = {one.path: one.pieces[3].offsets[1][0] for one in found.layouts[:6]}
    assert [thirds[f"blocks.attn.{n}.kernel"] for n in "qkv"] == [0, 0, 0]
    firsts = {one.path: one.pieces[3].offsets[0][0] for one in found.layouts[:6]}
    assert [firsts[f"blocks.attn.{n}.kernel"] for n in "qkv"] == [0, 64, 128]
    assert [firsts[f"blocks.attn.{n}.bias"] for n in "qkv"] == [0, 8, 16]


def test_reordered_gates(rng):
    weight = normal(rng, 4 * 6, 5)
    i, f, g, o = np.split(weight, 4)
    matched({"k": np.concatenate([i, f, o, g]).T}, {"weight_ih_l0": weight})
    leaf = np.concatenate([i, f, o, g]).T.astype(ml_dtypes.bfloat16)
    matched({"k": leaf}, {"weight_ih_l0": weight})


def test_summed_biases(rng):
    first, second = normal(rng, 20), normal(rng, 20)
    parameters = {"lstm.bias_ih_l0": first, "lstm.bias_hh_l0": second}
    found = matched({"cell.bias": first + second}, parameters)
    assert sources(found, "cell.bias") == [("lstm.bias_ih_l0", "lstm.bias_hh_l0")]
    assert found.unmatched_names == ()
    wide = {name: array.astype(np.float64) for name, array in parameters.items()}
    again = match({"cell.bias": first + second}, wide)
    assert again.differing == ()
    assert again.unmatched_names == ()


def test_summed_zeros():
    parameters = {"lstm.bias_ih_l0": zeros(20), "lstm.bias_hh_l0": zeros(20)}
    found = matched({"cell.bias": zeros(20)}, parameters)
    assert found.unmatched_names == ()


@pytest.mark.parametrize("joined", [True, False])
def test_gru_biases(rng, joined):
    ours, theirs = normal(rng, 15), normal(rng, 15)
    both = ours + theirs
    leaves = {"r": both[:5], "z": both[5:10], "n": ours[10:]}
    if joined:
        leaves = {"bias": np.concatenate([both[:10], ours[10:]])}
    leaves["bias_n"] = theirs[10:]
    found = matched(leaves, {"bias_ih_l0": ours, "bias_hh_l0": theirs})
    assert found.unmatched_names == ()


def test_tied_weights(rng):
    table, other = normal(rng, 50, 8), normal(rng, 50, 8)
    found = matched(
        {"head.kernel": table.T, "wte.embedding": table}, {"wte.weight": table}
    )
    assert pairs(found) == {"head.kernel": "wte.weight", "wte.embedding": "wte.weight"}
    # Where there are enough, each has its own.
    parameters = {"wte.weight": table, "head.weight": table, "other": other}
    found = matched({"head.kernel": table.T, "wte.embedding": table}, parameters)
    assert pairs(found) == {"head.kernel": "head.weight", "wte.embedding": "wte.weight"}
    assert found.unmatched_names == ("other",)


def test_padded_vocabulary(rng):
    table = normal(rng, 50, 8)
    found = match({"wte": np.concatenate([table, zeros(6, 8)])}, {"wte.weight": table})
    assert found.unmatched_leaves == ()
    assert found.differing == ()


# --- Any such map.


@st.composite
def mapped(draw):
    """Leaves made of random parameters, by permuting, splitting, joining, stacking."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    leaves, parameters = {}, {}
    for at in range(draw(st.integers(1, 4))):
        rank = draw(st.integers(1, 4))
        shape = tuple(draw(st.integers(2, 6)) for _ in range(rank))
        kind = draw(st.sampled_from(["one", "split", "join", "stack"]))
        axes = draw(st.permutations(range(rank)))
        many = draw(st.integers(2, 4))
        arrays = [normal(rng, *shape) for _ in range(many)]
        if kind == "one":
            parameters[f"m{at}.w"] = arrays[0]
            leaf = arrays[0].transpose(axes)
            leaves[f"n{at}.k"] = leaf.reshape(-1) if draw(st.booleans()) else leaf
        elif kind == "split":
            parameters[f"m{at}.w"] = np.concatenate(arrays)
            for i, array in enumerate(arrays):
                leaves[f"n{at}.k{i}"] = array.transpose(axes)
        else:
            for i, array in enumerate(arrays):
                parameters[f"m{at}.w{i}"] = array
            turned = [array.transpose(axes) for array in arrays]
            if kind == "stack":
                leaves[f"n{at}.k"] = np.stack(turned)
            else:
                axis = draw(st.integers(0, rank - 1))
                leaves[f"n{at}.k"] = np.concatenate(turned, axis)
    return leaves, parameters


@settings(max_examples=150, deadline=None, derandomize=True)
@given(mapped())
def test_any_such_map_is_found(case):
    leaves, parameters = case
    found = matched(leaves, parameters)
    assert found.unmatched_names == ()
    rng = np.random.default_rng(1)
    for layout in found.layouts:
        # <M t, g> is <t, M^T g>.
        cotangent = rng.standard_normal(layout.shape)
        into = {name: np.zeros(a.shape) for name, a in parameters.items()}
        for piece in layout.pieces:
            put_back(piece, cotangent[piece.block], into)
        ahead = (laid_out(layout, parameters) * cotangent).sum()
        back = sum((parameters[n] * into[n]).sum() for n in parameters)
        assert ahead == pytest.approx(back, rel=1e-5, abs=1e-5)


def test_a_sum_is_put_back_to_both(rng):
    first, second = normal(rng, 20), normal(rng, 20)
    parameters = {"bias_ih": first, "bias_hh": second}
    (layout,) = match({"b": first + second}, parameters).layouts
    into = {"bias_ih": np.zeros(20), "bias_hh": np.zeros(20)}
    for piece in layout.pieces:
        put_back(piece, first, into)
    assert (into["bias_ih"] == first).all()
    assert (into["bias_hh"] == first).all()


# --- Values that differ.


def test_most_entries_are_enough(rng):
    weight, other = normal(rng, 30, 20), normal(rng, 30, 20)
    leaf = weight.T.copy()
    leaf[3, 4], leaf[7, 7] = 9, leaf[7, 7] + 0.5
    found = matched({"k": leaf}, {"other": other, "w": weight}, differing=1)
    (one,) = found.differing
    assert (one.path, one.index, one.leaf) == ("k", (3, 4), 9)
    assert one.torch == weight[4, 3]
    assert (one.count, one.size) == (2, 600)
    assert pairs(found) == {"k": "w"}


def test_a_changed_norm(rng):
    """Other values than one, in a few entries, leave the norm where it was."""
    leaves, parameters = {}, {}
    for i in range(3):
        weight = normal(rng, 8, 8)
        parameters |= {f"h.{i}.fc.weight": weight, f"h.{i}.ln.weight": ones(8)}
        leaves |= {f"h.{i}.fc.kernel": weight.T, f"h.{i}.ln.scale": ones(8)}
    leaves["h.1.ln.scale"] = ones(8)
    leaves["h.1.ln.scale"][2] = 1.25
    found = matched(leaves, parameters, differing=1)
    assert pairs(found)["h.1.ln.scale"] == "h.1.ln.weight"
    assert found.differing[0].index == (2,)


def test_a_scaled_leaf_differs_everywhere(rng):
    first, second, bias = normal(rng, 9, 9), normal(rng, 9, 9), normal(rng, 9)
    found = matched(
        {"a.kernel": 2 * first.T, "a.bias": bias, "b.kernel": second.T},
        {"b.weight": second, "a.weight": first, "a.bias": bias},
        differing=1,
    )
    assert pairs(found)["a.kernel"] == "a.weight"
    assert text(found, "a.kernel") == "transposed"
    assert (found.differing[0].count, found.differing[0].size) == (81, 81)


def test_other_values_are_paired_by_siblings_and_names(rng):
    leaves, parameters = {}, {}
    for i in (1, 2):
        parameters[f"fc{i}.weight"] = normal(rng, 5, 5)
        parameters[f"fc{i}.bias"] = normal(rng, 5)
        leaves[f"layers[{i}].kernel"] = parameters[f"fc{i}.weight"].T
        leaves[f"layers[{i}].bias"] = normal(rng, 5)
    found = matched(leaves, parameters, differing=2)
    assert pairs(found) == {
        "layers[1].kernel": "fc1.weight",
        "layers[1].bias": "fc1.bias",
        "layers[2].kernel": "fc2.weight",
        "layers[2].bias": "fc2.bias",
    }


def test_a_norm_of_zeros_instead_of_ones(rng):
    weight = normal(rng, 8, 8)
    found = matched(
        {"fc.kernel": weight.T, "norm.bias": zeros(8), "norm.scale": zeros(8)},
        {"fc.weight": weight, "norm.weight": ones(8), "norm.bias": zeros(8)},
        differing=1,
    )
    assert pairs(found)["norm.scale"] == "norm.weight"
    assert pairs(found)["norm.bias"] == "norm.bias"


def test_one_layer_of_a_stack_differs(rng):
    weights = [normal(rng, 6, 5) for _ in range(5)]
    leaf = np.stack([weight.T for weight in weights])
    leaf[3] = normal(rng, 5, 6)
    parameters = {f"h.{i}.w": weight for i, weight in enumerate(weights)}
    found = matched({"k": leaf}, parameters, differing=1)
    assert sources(found, "k") == [(f"h.{i}.w",) for i in range(5)]
    assert found.differing[0].count == 30
    assert found.differing[0].index[0] == 3


def test_nothing_to_pair_with(rng):
    weight = normal(rng, 6, 4)
    found = match(
        {"extra": normal(rng, 3), "k": weight.T}, {"w": weight, "more": normal(rng, 7)}
    )
    assert found.unmatched_leaves == ("extra",)
    assert found.unmatched_names == ("more",)


# --- bfloat16, and other dtypes.


@pytest.mark.parametrize("side", ["leaf", "torch", "both"])
def test_bfloat16(rng, side):
    weight, other = normal(rng, 40, 40), normal(rng, 40, 40)
    leaf = weight.T.astype(ml_dtypes.bfloat16 if side != "torch" else np.float32)
    dtype = np.float32 if side == "leaf" else ml_dtypes.bfloat16
    parameters = {"other": other.astype(dtype), "w": weight.astype(dtype)}
    found = match({"k": leaf}, parameters)
    assert pairs(found) == {"k": "w"}
    assert found.differing == ()


def test_float64_against_float32(rng):
    weight = rng.standard_normal((6, 4))
    found = match({"k": weight.T.astype(np.float32)}, {"w": weight})
    assert (pairs(found), found.differing) == ({"k": "w"}, ())


def test_nan_is_nan(rng):
    weight = normal(rng, 6, 4)
    weight[0, 0] = np.nan
    assert match({"k": weight.T}, {"w": weight}).differing == ()


def test_pruned_weights(rng):
    """Mostly zeros: the share of equal entries says little, and still it's found."""
    weights = [normal(rng, 30, 30) * (rng.random((30, 30)) < 0.1) for _ in range(4)]
    parameters = {f"w{i}": weight for i, weight in enumerate(weights)}
    leaves = {f"k{i}": weights[3 - i].T for i in range(4)}
    assert pairs(matched(leaves, parameters)) == {
        f"k{i}": f"w{3 - i}" for i in range(4)
    }


# --- Equal contents.


def test_equal_layers_go_in_order(rng):
    weight, bias = normal(rng, 6, 6), normal(rng, 6)
    leaves, parameters = {}, {}
    for i in sorted(range(12), key=str):  # as a dict of layers is sorted
        leaves[f"layer_{i}.dense.kernel"] = weight.T
        leaves[f"layer_{i}.dense.bias"] = bias
        leaves[f"layer_{i}.norm.scale"] = ones(6)
    for i in range(12):
        parameters[f"encoder.{i}.linear.weight"] = weight
        parameters[f"encoder.{i}.linear.bias"] = bias
        parameters[f"encoder.{i}.norm.weight"] = ones(6)
    found = matched(leaves, parameters)
    for i in range(12):
        assert pairs(found)[f"layer_{i}.dense.kernel"] == f"encoder.{i}.linear.weight"
        assert pairs(found)[f"layer_{i}.dense.bias"] == f"encoder.{i}.linear.bias"
        assert pairs(found)[f"layer_{i}.norm.scale"] == f"encoder.{i}.norm.weight"
    assert [one.settled for one in found.ambiguous] == ["order", "siblings", "siblings"]
    assert found.ambiguous[0].paths[0] in leaves
    assert found.ambiguous[0].names[0] in parameters


def test_ones_and_zeros_follow_their_siblings(rng):
    """The modules are called otherwise, and stand in another order."""
    leaves, parameters = {}, {}
    for ours, theirs in [("alpha", "z"), ("beta", "y"), ("gamma", "x")]:
        weight = normal(rng, 8, 8)
        leaves |= {
            f"{ours}.proj.kernel": weight.T,
            f"{ours}.proj.bias": zeros(8),
            f"{ours}.ln.scale": ones(8),
            f"{ours}.ln.offset": zeros(8),
        }
        mine = {
            f"{theirs}.norm.weight": ones(8),
            f"{theirs}.norm.bias": zeros(8),
            f"{theirs}.linear.weight": weight,
            f"{theirs}.linear.bias": zeros(8),
        }
        parameters = mine | parameters
    found = pairs(matched(leaves, parameters))
    for ours, theirs in [("alpha", "z"), ("beta", "y"), ("gamma", "x")]:
        assert found[f"{ours}.proj.bias"] == f"{theirs}.linear.bias"
        assert found[f"{ours}.ln.scale"] == f"{theirs}.norm.weight"
        assert found[f"{ours}.ln.offset"] == f"{theirs}.norm.bias"


def test_a_transformer_encoder():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    module = torch.nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    parameters = {n: p.detach().numpy() for n, p in module.named_parameters()}
    leaves, want = {}, {}
    for i in range(3):
        get = lambda name, i=i: parameters[f"layers.{i}.{name}"]  # noqa: E731
        here = f"blocks[{i}]"
        for j, name in enumerate("qkv"):
            rows = slice(16 * j, 16 * j + 16)
            weight = get("self_attn.in_proj_weight")[rows]
            leaves[f"{here}.attn.{name}.w"] = weight.T.reshape(16, 4, 4)
            leaves[f"{here}.attn.{name}.b"] = get("self_attn.in_proj_bias")[
                rows
            ].reshape(4, 4)
            want[f"{here}.attn.{name}.w"] = f"layers.{i}.self_attn.in_proj_weight"
            want[f"{here}.attn.{name}.b"] = f"layers.{i}.self_attn.in_proj_bias"
        for ours, theirs in [
            ("attn.out", "self_attn.out_proj"),
            ("up", "linear1"),
            ("down", "linear2"),
        ]:
            leaves[f"{here}.{ours}.w"] = get(f"{theirs}.weight").T
            leaves[f"{here}.{ours}.b"] = get(f"{theirs}.bias")
            want[f"{here}.{ours}.w"] = f"layers.{i}.{theirs}.weight"
            want[f"{here}.{ours}.b"] = f"layers.{i}.{theirs}.bias"
        for ours, theirs in [("ln_a", "norm1"), ("ln_b", "norm2")]:
            leaves[f"{here}.{ours}.g"] = get(f"{theirs}.weight")
            leaves[f"{here}.{ours}.b"] = get(f"{theirs}.bias")
            want[f"{here}.{ours}.g"] = f"layers.{i}.{theirs}.weight"
            want[f"{here}.{ours}.b"] = f"layers.{i}.{theirs}.bias"
    found = matched(leaves, parameters)
    assert pairs(found) == want
    assert found.unmatched_names == ()


def test_small_contents_go_by_name():
    """That two numbers are equal by chance doesn't make them partners."""
    found = matched(
        {"fc1.bias": zeros(1) + 0.5, "fc2.bias": zeros(1) + np.float32(0.1)},
        {
            "fc1.bias": zeros(1) + 0.5,
            "fc2.bias": zeros(1) + np.float32(0.2),
            "gain.alpha": zeros(1) + np.float32(0.1),
        },
        differing=1,
    )
    assert pairs(found) == {"fc1.bias": "fc1.bias", "fc2.bias": "fc2.bias"}


def test_a_constant_matrix_is_ambiguous(rng):
    other = normal(rng, 4, 4)
    leaves = {"a.kernel": ones(4, 4), "b.w": other, "c.w": ones(4, 4)}
    parameters = {"a.weight": ones(4, 4), "b.weight": other, "c.weight": ones(4, 4)}
    found = matched(leaves, parameters)
    open_layouts = [one for one in found.ambiguous if one.settled == "layout"]
    assert [one.paths for one in open_layouts] == [("a.kernel",), ("c.w",)]
    assert [one.text for one in open_layouts[0].alternatives] == ["as it is"]
    assert text(found, "a.kernel") == "transposed"
    assert text(found, "c.w") == "as it is"  # as `b.w` has it


def test_a_symmetric_matrix_is_ambiguous(rng):
    weight = normal(rng, 6, 6)
    found = matched({"k": weight + weight.T}, {"w": weight + weight.T})
    assert found.ambiguous[0].settled == "layout"
    assert found.ambiguous[0].alternatives[0].text == "transposed"


# --- What the user says.


def test_mapping_without_a_transform(rng):
    weight = normal(rng, 5, 5)
    parameters = {"fc1.weight": weight, "fc2.weight": weight}
    leaves = {"a": weight.T, "b": weight.T}
    found = matched(leaves, parameters, {"a": "fc2.weight"})
    assert pairs(found) == {"a": "fc2.weight", "b": "fc1.weight"}
    assert text(found, "a") == "transposed"
    # Other values: the layout that the shapes leave.
    found = matched(
        {"a": normal(rng, 3, 5)}, {"w": normal(rng, 5, 3)}, {"a": "w"}, differing=1
    )
    assert text(found, "a") == "transposed"


def test_mapping_to_parts(rng):
    fused = normal(rng, 48, 16)
    leaves = {
        name: part.T for name, part in zip("qkv", np.split(fused, 3), strict=True)
    }
    found = matched(leaves, {"w": fused}, dict.fromkeys("qkv", "w"))
    assert [one.pieces[0].offsets[0][0] for one in found.layouts] == [0, 256, 512]


def test_mapping_with_a_transform(rng):
    weight = normal(rng, 6, 4)
    found = matched({"k": weight.T}, {"w": weight}, {"k": ("w", lambda w: w.T)})
    assert found.layouts[0].transform is None
    assert text(found, "k") == "transposed"
    found = matched({"k": 2 * weight.T}, {"w": weight}, {"k": ("w", lambda w: 2 * w.T)})
    assert found.layouts[0].transform is not None
    assert pairs(found) == {"k": "w"}
    assert found.unmatched_names == ()
    found = match({"k": weight.T}, {"w": weight}, {"k": ("w", lambda w: 2 * w.T)})
    assert found.differing[0].count == 24


@pytest.mark.bad_input
def test_mapping_of_unknown_names(rng):
    weight = normal(rng, 6, 4)
    with pytest.raises(KeyError, match=r"JAX leaf `fc\.kernl`.*`fc\.kernel`"):
        match({"fc.kernel": weight.T}, {"fc.weight": weight}, {"fc.kernl": "fc.weight"})
    with pytest.raises(KeyError, match=r"parameter `weight`.*`fc\.weight`"):
        match({"fc.kernel": weight.T}, {"fc.weight": weight}, {"fc.kernel": "weight"})


@pytest.mark.bad_input
def test_mapping_of_shapes_that_cannot_be(rng):
    weight, other = normal(rng, 6, 4), normal(rng, 5, 3)
    with pytest.raises(
        ValueError, match=r"`k` of shape \(4, 6\).*`w` of shape \(5, 3\)"
    ):
        match({"k": weight.T}, {"w": other}, {"k": "w"})
    with pytest.raises(ValueError, match=r"into shape \(5, 3\).*has shape \(4, 6\)"):
        match({"k": weight.T}, {"w": other}, {"k": ("w", lambda w: w)})


@pytest.mark.bad_input
def test_nothing_fits(rng):
    with pytest.raises(ValueError, match=r"`k` \(3, 5\).*`w` \(4, 6\).*mapping="):
        match({"k": normal(rng, 3, 5)}, {"w": normal(rng, 4, 6)})


# --- Size.


def test_large_parameters_take_little_time(rng):
    """Blocks with q, k and v apart, and some million numbers: a few seconds at most."""
    leaves, parameters = {}, {}
    for i in range(4):
        fused, up = normal(rng, 768 * 3, 768), normal(rng, 3072, 768)
        parameters |= {f"h.{i}.attn.weight": fused, f"h.{i}.up.weight": up}
        for j, name in enumerate("qkv"):
            leaves[f"h.{i}.{name}"] = fused[768 * j : 768 * j + 768].T
    leaves["up"] = np.stack([parameters[f"h.{i}.up.weight"].T for i in range(4)])
    begin = time.perf_counter()
    found = match(leaves, parameters)
    assert time.perf_counter() - begin < 10
    assert (found.unmatched_leaves, found.differing) == ((), ())
    assert pairs(found)["h.2.k"] == "h.2.attn.weight"
