"""The gradient checkers that `check_corpus.py` compares, each asked in the same way."""

import os
import time
import warnings
from typing import NamedTuple

import chex
import corpus
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import torch
from corpus import breaks
from torch.autograd.gradcheck import GradcheckError

from jaxgrad.pytrees import kind_of, leaf_name

OURS = "jaxgrad"
SHOWN = 16
"""A report of ours lists at most so many wrong entries of a leaf."""

CASES = {case.name: case for case in corpus.CASES}
WAYS = {way.name: way for way in corpus.WAYS}


class Variant(NamedTuple):
    """A loss of the corpus, as it is or with a broken gradient: plain data to send."""

    name: str
    way: str = ""
    where: str = ""
    truth: corpus.Truth | None = None

    def __str__(self):
        """The options that run it again."""
        broken = f"{self.way} --where {self.where}" if self.way else "none"
        return f"--only {self.name} --way {broken}"

    def problem(self):
        """The loss, params, args and trusted rules, built anew."""
        case, way = CASES[self.name], WAYS.get(self.way)
        if self.where == "inner":
            return case.build(corpus.break_inner(way))
        problem = case.build()
        if way is None:
            return problem
        broken, _ = corpus.break_loss(*problem[:3], way)
        return problem._replace(loss=broken)


def broken(name, way, where):
    """The variant, or None if the break has no effect."""
    with warnings.catch_warnings(action="ignore"):
        truth = corpus.effective(CASES[name], WAYS[way], where)
    return Variant(name, way, where, truth) if truth else None


# A tool takes a variant and gives the check to run and to time, or None if it has none.


def by_jaxgrad(variant):
    from jaxgrad import check_gradient

    loss, params, args, trust = variant.problem()
    return lambda: check_gradient(loss, params, *args, trust=trust)


def by_check_grads(variant):
    f, arrays = of_float_arrays(variant.problem())
    return lambda: jax.test_util.check_grads(f, arrays, order=1, modes=("rev",))


def by_chex(variant):
    f, arrays = of_float_arrays(variant.problem())
    return lambda: chex.assert_numerical_grads(f, arrays, order=1, modes=("rev",))


def by_gradcheck(variant, fast_mode=True):
    case = CASES[variant.name]
    # The twin is one function, and its data can't be had: no other break translates.
    if not case.twin or variant.where == "inner" or variant.way == "part_of_batch":
        return None
    twin, leaves = corpus.torch_twin(case)
    f = broken_twin(variant, twin) if variant.way else twin
    return lambda: torch.autograd.gradcheck(f, leaves, fast_mode=fast_mode)


TOOLS = {
    OURS: by_jaxgrad,
    "check_grads": by_check_grads,
    "chex": by_chex,
    "gradcheck": by_gradcheck,
    "gradcheck_slow": lambda variant: by_gradcheck(variant, fast_mode=False),
}


def of_float_arrays(problem):
    """The loss as a function of its float arrays alone, and those."""
    leaves, treedef = jax.tree.flatten(problem.params)
    places = [i for i, x in enumerate(leaves) if kind_of(x) == "differentiable"]

    def loss(*values):
        full = list(leaves)
        for place, value in zip(places, values, strict=True):
            full[place] = jnp.asarray(value)  # check_grads gives NumPy's at times
        return problem.loss(treedef.unflatten(full), *problem.args)

    return loss, tuple(leaves[i] for i in places)


def broken_twin(variant, twin):
    """The PyTorch twin with the gradient that `break_loss` gives the loss."""
    way, problem = WAYS[variant.way], CASES[variant.name].build()
    leaves = jax.tree.leaves(problem.params)
    arrays = [x for x in jax.tree.leaves(problem.args) if kind_of(x) != "static"]
    n = breaks._batch(arrays or leaves)
    targets = breaks._targets(way, [np.shape(x) for x in leaves], spread=True)

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(context, *values):
            context.save_for_backward(*values)
            return twin(*values)

        @staticmethod
        def backward(context, cotangent):
            with torch.enable_grad(), jax.enable_x64(True):
                point = [jnp.asarray(x.detach().numpy()) for x in context.saved_tensors]
                moved = [
                    torch.tensor(np.asarray(x)).requires_grad_()
                    for x in breaks._moved(way, point)
                ]
                gradient = torch.autograd.grad(twin(*moved), moved, cotangent)
                right = [jnp.asarray(g.numpy()) for g in gradient]
                wrong = breaks._changed(way, right, targets, n)
                return tuple(torch.tensor(np.asarray(g)) for g in wrong)

    return Broken.apply


def run(tool, variant):
    """What a tool says of a variant, as plain data; None if it can't be asked."""
    report, message = None, ""
    with (
        jax.enable_x64(CASES[variant.name].x64),
        warnings.catch_warnings(action="ignore"),
    ):
        check = TOOLS[tool](variant)
        if check is None:
            return None
        began = time.perf_counter()
        try:
            report = check()
            said = "alarm" if tool == OURS and not report.ok else "quiet"
        except Exception as error:
            alarm = isinstance(error, AssertionError | GradcheckError) and tool != OURS
            said = "alarm" if alarm else "error"
            message = f"{type(error).__name__}: {error}"
        seconds = time.perf_counter() - began
    row = {
        "tool": tool,
        "case": variant.name,
        "way": variant.way,
        "where": variant.where,
        "again": str(variant),
        "said": said,
        "seconds": seconds,
        "message": message[:2000],
    }
    if tool == OURS and report is not None:
        told = named(report, variant) if variant.truth else verdicts(report, variant)
        row |= {"evaluations": report.evaluations, **told}
    return row


def verdicts(report, variant):
    """On how many leaves of a correct loss the verdict is known, and where it's off."""
    said = {leaf.path: leaf.verdict for leaf in report.leaves}
    expect = CASES[variant.name].expect
    judged = [
        leaf_name(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(variant.problem().params)
        if kind_of(leaf) in ("differentiable", "integer")
    ]
    unexpected = {
        name: f"{said.get(name)}, not {expect.get(name, 'right')}"
        for name in judged
        if said.get(name) != expect.get(name, "right")
    }
    return {"verdicts": len(judged), "unexpected": unexpected}


def named(report, variant):
    """How much of the truth the report names; None where there is nothing to name.

    A cause may be told of the leaf or, where an inner function is broken, of its rule.
    A leaf that is off by just a constant is named by that too, and of a stale point,
    which has no name among the causes, it's right to say `unknown`.
    """
    truth, expect = variant.truth, CASES[variant.name].expect
    wrong = {leaf.path: leaf for leaf in report.leaves if leaf.verdict == "wrong"}
    pardoned = {*truth.shares, *(k for k, v in expect.items() if v == "kink")}
    rules = {
        (rule.function, os.path.basename(rule.file), rule.line): rule
        for rule in report.rules
        if rule.verdict == "wrong"
    }
    of_rule = rules[truth.rule].cause if truth.rule in rules else None
    fitting = {truth.kind, "unknown"} if truth.kind == "stale" else {truth.kind}
    if truth.way == "part_of_batch" and variant.where == "inner":
        # The same thing, where each output comes of one entry or row of the operand.
        fitting |= {"entries", "rows"}

    def cause_named(name):
        if variant.where == "inner" and of_rule and of_rule.kind in fitting:
            return True
        factor = truth.factors.get(name)
        also = set() if factor is None else {"factor"}
        if factor is not None:
            also |= {
                k for k, x in (("sign", -1), ("zero", 0)) if abs(factor - x) < 1e-9
            }
        cause = wrong[name].cause if name in wrong else None
        return cause is not None and cause.kind in fitting | also

    def entries_named(name):
        said = {tuple(e.index) for e in wrong[name].entries} if name in wrong else set()
        true = set(truth.entries[name])
        return true <= said if len(true) <= SHOWN else bool(said) and said <= true

    few = [name for name in truth.leaves if name in truth.entries]
    return {
        "leaves": set(truth.leaves) <= set(wrong),
        "entries": all(map(entries_named, few)) if few else None,
        "rule": truth.rule in rules,
        "cause": all(map(cause_named, truth.leaves)),
        "leaf accused": not set(wrong) <= {*truth.leaves, *pardoned},
        "rule accused": bool(set(rules) - {truth.rule}),
        "causes": {
            name: leaf.cause and leaf.cause.kind for name, leaf in wrong.items()
        },
        "cause of the rule": of_rule and of_rule.kind,
        "truth": truth._asdict(),
    }
