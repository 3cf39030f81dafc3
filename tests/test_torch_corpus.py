"""`compare_with_torch` on ports that are right, and on such as are wrong in one way.

`examples/benchmarks/torch_corpus.py` runs all of them, beside a person's usual check.
"""

import copy
import os
import warnings

import jax
import pytest
import torch
from ports import PORTS, compare
from ports.scoring import score

# Every second one.
SAMPLE = PORTS[::2]
CHECKED = PORTS if os.environ.get("JAXGRAD_WHOLE_CORPUS") else SAMPLE

# Those whose cause isn't found. The goal is to name 95 % of the causes.
CAUSELESS = {"embedding-padding_counted"}


@pytest.mark.parametrize("port", CHECKED, ids=lambda port: port.name)
def test_a_port(port):
    problem = port.make()
    for place, p in enumerate(problem.module.parameters()):
        # As after a step of the user's own, or before the first.
        p.grad = torch.full_like(p, 0.5) if place % 2 else None
    before = state_of(problem.module)
    report = compare(problem)
    said = score(port, report)
    text = f"{said.got}\n{report}"
    assert report.ok == bool(report) == (not port.kind), text
    assert said.named in (None, True), text
    if port.kind:
        assert said.cause == (port.name not in CAUSELESS), text
    assert_same(before, state_of(problem.module))


def state_of(module):
    """All that a comparison might leave changed."""
    return {
        "values": {k: x.clone() for k, x in module.state_dict().items()},
        "memory": {k: x.data_ptr() for k, x in module.state_dict().items()},
        "grads": {k: copy.deepcopy(p.grad) for k, p in module.named_parameters()},
        "needs": {k: p.requires_grad for k, p in module.named_parameters()},
        "training": {k: m.training for k, m in module.named_modules()},
        "hooks": [
            len(hooks)
            for m in module.modules()
            for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)
        ],
        "random": torch.get_rng_state(),
        "dtype": torch.get_default_dtype(),
        "enabled": torch.is_grad_enabled(),
        "x64": jax.config.jax_enable_x64,
    }


def assert_same(before, after):
    assert before.keys() == after.keys()
    for what, was in before.items():
        pairs = [(was, after[what])]
        if isinstance(was, dict):
            assert was.keys() == after[what].keys()
            pairs = [(was[k], after[what][k]) for k in was]
        for one, other in pairs:
            if isinstance(one, torch.Tensor):
                assert one.dtype == other.dtype, what
                assert torch.equal(one, other), what
            else:
                assert one == other, what


@pytest.fixture(autouse=True)
def _quiet():
    """The losses may warn, and what is compiled is forgotten: it would fill memory."""
    with warnings.catch_warnings(action="ignore"):
        yield
    jax.clear_caches()


def test_the_sample():
    names = [port.name for port in PORTS]
    assert len(set(names)) == len(names) >= 200
    wrong = [port for port in PORTS if port.kind]
    in_sample = [port for port in SAMPLE if port.kind]
    assert set(names) >= CAUSELESS
    for ports in (wrong, in_sample):
        without = [port for port in ports if port.name in CAUSELESS]
        assert len(without) <= 0.05 * len(ports)
    modules = {port.name.partition("-")[0] for port in PORTS}
    assert len(modules) >= 24
    steps = [port for port in wrong if port.make().options.get("steps")]
    assert len(steps) >= 6
