"""LSTMs and GRUs, which PyTorch computes in one call: gates, biases, layers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from jaxgrad.comparing.hypotheses.base import (
    Context,
    Hypothesis,
    given,
    instead,
    own_name,
    permutations,
    rows_of,
)


def recurrent(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    """An LSTM or a GRU, which PyTorch computes in one call."""
    import torch

    letters = "ifgo" if name == "lstm" else "rzn"
    gates = len(letters)
    weights = o["params"]
    for order in permutations(gates):
        new = "".join(letters[i] for i in order)
        text = f"has its gates in the order {letters}, JAX as {new}"
        changed = [rows_of(w, order) for w in weights]
        yield Hypothesis("permuted", text, given(params=changed))
    matrices = [i for i, w in enumerate(weights) if w.dim() == 2]
    biases = [i for i, w in enumerate(weights) if w.dim() == 1]
    both = (0, 1), "bias_ih and bias_hh"
    for which, said in (both, ((0,), "bias_ih"), ((1,), "bias_hh")):
        hit = {p for k, p in enumerate(biases) if k % 2 in which}
        left = [w * 0 if i in hit else w for i, w in enumerate(weights)]
        if biases:
            yield Hypothesis("bias", f"adds {said}, JAX doesn't", given(params=left))
    if name == "gru" and biases:
        # b_hn stands inside of the product with the reset gate: moved out to b_in.
        moved = list(weights)
        for one, two in zip(biases[::2], biases[1::2], strict=True):
            mask = torch.zeros(3, 1, dtype=weights[one].dtype)
            mask[2] = 1
            mask = mask.expand(3, len(weights[one]) // 3).reshape(-1)
            moved[one] = weights[one] + mask * weights[two]
            moved[two] = weights[two] * (1 - mask)
        text = "multiplies b_hn by the reset gate, JAX adds it after that"
        yield Hypothesis("bias", text, given(params=moved))
    for one, two in itertools.combinations(range(len(weights)), 2):
        if weights[one].shape == weights[two].shape:
            swapped = list(weights)
            swapped[one], swapped[two] = weights[two], weights[one]
            mine, other = (own_name({"w": weights[i]}, "w", c) for i in (one, two))
            text = f"uses `{mine}` where JAX has `{other}`, and the reverse"
            yield Hypothesis("swapped", text, given(params=swapped))
    per_layer = len(weights) // max(1, o["num_layers"])
    for one, two in itertools.combinations(range(o["num_layers"]), 2):
        places = list(range(len(weights)))
        for k in range(per_layer):
            a, b = one * per_layer + k, two * per_layer + k
            places[a], places[b] = b, a
        layered = [weights[i] for i in places]
        if [w.shape for w in layered] == [w.shape for w in weights]:
            text = f"has the layers {one} and {two} in order, JAX exchanged"
            yield Hypothesis("swapped", text, given(params=layered))
    for place in matrices:
        blocks = weights[place].chunk(gates)
        if blocks[0].shape[0] != blocks[0].shape[1]:
            continue
        for chosen in [*([i] for i in range(gates)), list(range(gates))]:
            turned = list(weights)
            turned[place] = torch.cat(
                [b.T if i in chosen else b for i, b in enumerate(blocks)]
            )
            turned_gates = "".join(letters[i] for i in chosen)
            own = own_name({"w": weights[place]}, "w", c)
            text = (
                f"multiplies by `{own}`, JAX by the transpose of its gates "
                f"{turned_gates}"
            )
            yield Hypothesis("transposed", text, given(params=turned))
    if name == "lstm" and not o["bidirectional"]:
        text = "has sigmoid gates, JAX hard sigmoids"
        hard = instead(lambda o: _lstm(o, torch.nn.functional.hardsigmoid))
        yield Hypothesis("activation", text, hard)
    if o.get("train") and o.get("dropout"):
        text = f"drops with p={o['dropout']:g} (it's in train mode), JAX doesn't"
        yield Hypothesis("train_mode", text, given(train=False))


def _lstm(o: dict[str, Any], gate: Callable[[Any], Any]) -> Any:
    """What an LSTM gives whose gates have another activation."""
    import torch

    xs = o["input"].transpose(0, 1) if o["batch_first"] else o["input"]
    per_layer = len(o["params"]) // o["num_layers"]
    hs, cs = [], []
    for layer in range(o["num_layers"]):
        own = o["params"][layer * per_layer : (layer + 1) * per_layer]
        w, u, *biases = own
        h, c = (state[layer] for state in o["hx"])
        made = []
        for x in xs:
            z = x @ w.T + h @ u.T + sum(biases)
            i, f, g, out = z.chunk(4, -1)
            c = gate(f) * c + gate(i) * g.tanh()
            h = gate(out) * c.tanh()
            made.append(h)
        xs = torch.stack(made)
        hs.append(h)
        cs.append(c)
    ys = xs.transpose(0, 1) if o["batch_first"] else xs
    return ys, torch.stack(hs), torch.stack(cs)
