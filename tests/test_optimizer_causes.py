"""Tests that right pairs of optimizers agree, and that wrong ones give their cause."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from jaxgrad.comparing.trajectories import trajectories
from jaxgrad.comparing.trajectories.running import JaxMover, TorchMover

# A key bias that has no effect on the loss, as in attention, and one without gradient.
NAMES = ("inner.weight", "inner.bias", "key.bias", "outer.weight", "outer.bias", "idle")
SHAPES = ((8, 5), (8,), (4,), (3, 8), (3,), (6,))


@jax.jit
@jax.value_and_grad
def VALUE_AND_GRAD(p, x, y, scale):
    hidden = jnp.tanh(x @ p["inner/weight"] + p["inner/bias"])
    # softmax(z + c) = softmax(z): c's gradient is rounding noise.
    shared = jax.nn.softmax(hidden[:, :4] + p["key/bias"].mean(), axis=-1)
    out = hidden @ p["outer/weight"] + p["outer/bias"]
    return scale * jnp.mean((out - y) ** 2) + 0.1 * jnp.mean(shared[:, 0] ** 2)


def problem(dtype=np.float64, torch_loss=None, scale=1.0):
    """A two-layer net in JAX, weights transposed, and the same in PyTorch."""
    rng = np.random.default_rng(0)
    start = {
        name: (0.5 * rng.normal(size=shape)).astype(dtype)
        for name, shape in zip(NAMES, SHAPES, strict=True)
    }
    x, y = (rng.normal(size=(16, n)).astype(dtype) for n in (5, 3))
    parameters = {
        name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()
    }

    def torch_mse():
        p = parameters
        hidden = torch.tanh(torch.tensor(x) @ p["inner.weight"].T + p["inner.bias"])
        shared = torch.softmax(hidden[:, :4] + p["key.bias"].mean(), dim=-1)
        out = hidden @ p["outer.weight"].T + p["outer.bias"]
        fit = scale * ((out - torch.tensor(y)) ** 2).mean()
        return fit + 0.1 * (shared[:, 0] ** 2).mean() + 0 * p["idle"].sum()

    def to_torch(leaves):
        return {
            path.replace("/", "."): leaf.T if leaf.ndim == 2 else leaf
            for path, leaf in leaves.items()
        }

    def value_and_grad(leaves):
        return VALUE_AND_GRAD(leaves, x, y, scale)

    jax_start = {
        name.replace(".", "/"): value.T if value.ndim == 2 else value
        for name, value in start.items()
    }
    ours = JaxMover(
        start=jax_start,
        value_and_grad=value_and_grad,
        unflatten=lambda leaves: {"net": dict(leaves), "static": None},
        flatten=lambda tree: tree["net"],
        to_torch=to_torch,
        gradients_to_torch=to_torch,
    )
    theirs = TorchMover(
        start, parameters, (torch_loss or (lambda _, f: f))(parameters, torch_mse)
    )
    return ours, theirs


def run(optimizer, make, steps=6, **options):
    return trajectories(
        *problem(**options), steps=steps, optimizer=optimizer, torch_optimizer=make
    )


def torch_of(name, *args, **options):
    return lambda ps: getattr(torch.optim, name)(ps, *args, **options)


SGD, ADAM, ADAMW = (torch_of(name, lr=0.01) for name in ("SGD", "Adam", "AdamW"))
RMSPROP, ADAGRAD = (torch_of(name, lr=0.01) for name in ("RMSprop", "Adagrad"))


def matrices(tree):
    return jax.tree.map(lambda p: p.ndim > 1, tree)


def named_groups(**options):
    """Decay on the matrices alone, as people have it in PyTorch."""
    return lambda ps: torch.optim.AdamW(
        [
            {"params": [p for p in ps if p.ndim > 1]},
            {"params": [p for p in ps if p.ndim < 2], **options},
        ],
        lr=0.01,
        weight_decay=0.01,
    )


def coupled(decay, then):
    return optax.chain(optax.add_decayed_weights(decay), then)


RIGHT = {
    "sgd": (optax.sgd(0.01), SGD),
    "momentum": (
        optax.sgd(0.1, momentum=0.9),
        torch_of("SGD", lr=0.1, momentum=0.9),
    ),
    "nesterov": (
        optax.sgd(0.1, momentum=0.9, nesterov=True),
        torch_of("SGD", lr=0.1, momentum=0.9, nesterov=True),
    ),
    "sgd_decay": (
        coupled(1e-3, optax.sgd(0.1)),
        torch_of("SGD", lr=0.1, weight_decay=1e-3),
    ),
    "adam": (optax.adam(0.01), ADAM),
    "adam_coupled": (
        coupled(0.1, optax.adam(0.01)),
        torch_of("Adam", lr=0.01, weight_decay=0.1),
    ),
    "adamw": (optax.adamw(0.01, weight_decay=0.01), ADAMW),
    "adamw_groups": (
        optax.adamw(0.01, weight_decay=0.01, mask=matrices),
        named_groups(weight_decay=0.0),
    ),
    "rmsprop": (optax.rmsprop(0.01, decay=0.99, eps_in_sqrt=False), RMSPROP),
    "rmsprop_centered": (
        optax.rmsprop(0.01, 0.99, centered=True, eps_in_sqrt=False, momentum=0.9),
        torch_of("RMSprop", lr=0.01, centered=True, momentum=0.9),
    ),
    "adagrad": (
        optax.chain(optax.scale_by_rss(0.0, eps=1e-20), optax.scale(-0.01)),
        ADAGRAD,
    ),
    "adamax": (optax.adamax(0.01), torch_of("Adamax", lr=0.01)),
    "adadelta": (
        optax.adadelta(0.1, rho=0.9, eps=1e-6),
        torch_of("Adadelta", lr=0.1, rho=0.9, eps=1e-6),
    ),
    "float32_rate": (optax.sgd(np.float32(0.01)), SGD),
    "schedule": (
        optax.sgd(lambda step: 0.1 * 0.5**step),
        lambda ps: decaying(torch.optim.SGD(ps, lr=0.1)),
    ),
}


def decaying(optimizer):
    def halve(it, *_):
        for group in it.param_groups:
            group["lr"] /= 2

    optimizer.register_step_post_hook(halve)
    return optimizer


@pytest.mark.parametrize("case", RIGHT)
def test_right_pairs_agree(case):
    found = run(*RIGHT[case])
    assert found.ok, found.causes
    assert found.first_step is None
    assert found.causes == ()
    assert found.steps == 6
    assert found.losses["optax"] == pytest.approx(found.losses["torch"], rel=1e-6)


@pytest.mark.parametrize("case", ["momentum", "adam", "adagrad", "rmsprop_centered"])
def test_right_pairs_agree_in_float32(case):
    found = run(*RIGHT[case], dtype=np.float32)
    assert found.ok, found.causes


def no_correction(lr):
    """Adam as it's written from memory."""

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return zeros, zeros

    def update(grads, state, params=None):
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state[0], grads)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, state[1], grads)
        out = jax.tree.map(lambda m, v: -lr * m / (jnp.sqrt(v) + 1e-8), m, v)
        return out, (m, v)

    return optax.GradientTransformation(init, update)


def running_sum():
    """A gradient that is never zeroed."""

    def init(params):
        return jax.tree.map(jnp.zeros_like, params)

    def update(grads, state, params=None):
        total = jax.tree.map(jnp.add, grads, state)
        return total, total

    return optax.GradientTransformation(init, update)


def frozen(path, then):
    def labels(tree):
        return {
            "net": {name: "held" if name == path else "on" for name in tree["net"]},
            "static": None,
        }

    return optax.multi_transform({"on": then, "held": optax.set_to_zero()}, labels)


class Clipping(torch.optim.SGD):
    """A person's own class, that does more than its options say."""

    def step(self, closure=None):
        ps = [p for group in self.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(ps, 0.5)
        return super().step(closure)


def clipping(ps):
    return Clipping(ps, lr=0.1)


class Keeping(torch.optim.SGD):
    def zero_grad(self, set_to_none=True):
        pass


def but_one(ps):
    return torch.optim.SGD([p for p in ps if p.shape != (3, 8)], lr=0.01)


def two_rates(ps):
    return torch.optim.SGD(
        [
            {"params": [p for p in ps if p.ndim > 1], "lr": 0.1},
            {"params": [p for p in ps if p.ndim < 2], "lr": 0.01},
        ]
    )


MOMENTUM = torch_of("SGD", lr=0.1, momentum=0.9)
WRONG = {
    # name: (optax, torch, kinds, what the text says)
    "rate": (optax.sgd(0.02), SGD, "learning_rate", "2 times"),
    "rate_adam": (optax.adam(0.003), ADAM, "learning_rate", "0.003 against 0.01"),
    "rate_groups": (optax.sgd(0.1), two_rates, "learning_rate", "inner.bias"),
    "schedule": (
        optax.sgd(optax.linear_schedule(0.0, 0.01, 4)),
        SGD,
        "schedule",
        "0, 0.0025, 0.005",
    ),
    "schedule_adam": (
        optax.adam(optax.cosine_decay_schedule(0.01, 6)),
        ADAM,
        "schedule",
        "0.01, ",
    ),
    "schedule_torch": (
        optax.sgd(0.1),
        lambda ps: decaying(torch.optim.SGD(ps, lr=0.1)),
        "schedule",
        "0.1, 0.05",
    ),
    "no_decay": (optax.adam(0.01), ADAMW, "weight_decay", "has no weight decay"),
    "other_decay": (optax.adamw(0.01), ADAMW, "weight_decay", "0.0001"),
    "odd_decay": (
        optax.adamw(0.01, weight_decay=0.037),
        ADAMW,
        "weight_decay",
        "0.037",
    ),
    "coupled": (
        coupled(0.01, optax.adam(0.01)),
        ADAMW,
        "weight_decay",
        "coupled",
    ),
    "decoupled": (
        optax.adamw(0.01, weight_decay=0.01),
        torch_of("Adam", lr=0.01, weight_decay=0.01),
        "weight_decay",
        "decoupled",
    ),
    "added_decay": (optax.adamw(0.01), ADAM, "weight_decay", "0.0001"),
    "odd_coupled": (
        coupled(0.023, optax.adam(0.01)),
        ADAM,
        "weight_decay",
        "0.023",
    ),
    "sgd_decay": (
        optax.sgd(0.1),
        torch_of("SGD", lr=0.1, weight_decay=0.01),
        "weight_decay",
        "0.01",
    ),
    "decay_mask": (
        optax.adamw(0.01, weight_decay=0.01, mask=matrices),
        ADAMW,
        "weight_decay",
        "`inner.bias`",
    ),
    "decay_unmasked": (
        optax.adamw(0.01, weight_decay=0.01),
        named_groups(weight_decay=0.0),
        "weight_decay",
        "`inner.bias`",
    ),
    "epsilon": (optax.adam(0.01, eps=1e-3), ADAM, "optimizer_epsilon", "0.001"),
    "odd_epsilon": (optax.adam(0.01, eps=3e-5), ADAM, "optimizer_epsilon", "3e-05"),
    "epsilon_root": (
        optax.adam(0.01, eps=0.0, eps_root=1e-5),
        torch_of("Adam", lr=0.01, eps=1e-5),
        "optimizer_epsilon",
        "inside the square root",
    ),
    "betas": (optax.adam(0.01, b2=0.95), ADAM, "betas", "beta2 0.95"),
    "both_betas": (optax.adam(0.01, b1=0.8, b2=0.97), ADAM, "betas", "beta2 0.97"),
    "odd_beta": (optax.adam(0.01, b1=0.87), ADAM, "betas", "beta1 0.87"),
    "no_momentum": (optax.sgd(0.1), MOMENTUM, "momentum", "momentum 0"),
    "other_momentum": (optax.sgd(0.1, momentum=0.95), MOMENTUM, "momentum", "0.95"),
    "odd_momentum": (optax.sgd(0.1, momentum=0.73), MOMENTUM, "momentum", "0.73"),
    "dampening": (
        optax.sgd(0.1, momentum=0.9),
        torch_of("SGD", lr=0.1, momentum=0.9, dampening=0.9),
        "dampening",
        "dampening 0",
    ),
    "averaged": (
        optax.chain(optax.ema(0.9, debias=False), optax.scale(-0.1)),
        MOMENTUM,
        "dampening",
        "the first too",
    ),
    "nesterov": (
        optax.sgd(0.1, momentum=0.9, nesterov=True),
        MOMENTUM,
        "nesterov",
        "looks ahead",
    ),
    "no_nesterov": (
        optax.sgd(0.1, momentum=0.9),
        torch_of("SGD", lr=0.1, momentum=0.9, nesterov=True),
        "nesterov",
        "no nesterov",
    ),
    "bias_correction": (no_correction(0.01), ADAM, "bias_correction", "not correct"),
    "amsgrad": (
        optax.adam(0.01),
        torch_of("Adam", lr=0.01, amsgrad=True, betas=(0.9, 0.5)),
        ("bias_correction", "betas"),
        "amsgrad",
    ),
    "rmsprop": (
        optax.rmsprop(0.01),
        RMSPROP,
        ("betas", "optimizer_epsilon"),
        "alpha 0.9",
    ),
    "rmsprop_root": (
        optax.rmsprop(0.01, decay=0.99, eps=1e-4),
        torch_of("RMSprop", lr=0.01, eps=1e-4),
        "optimizer_epsilon",
        "inside the square root",
    ),
    "centered": (
        optax.rmsprop(0.01, decay=0.99, eps_in_sqrt=False, centered=True),
        RMSPROP,
        "bias_correction",
        "is centered",
    ),
    "adagrad": (optax.adagrad(0.01), ADAGRAD, "optimizer_epsilon", "accumulator 0.1"),
    "clipping": (
        optax.chain(optax.clip_by_global_norm(0.3), optax.sgd(0.1)),
        torch_of("SGD", lr=0.1),
        "clipping",
        "global norm of 0.3",
    ),
    "clipping_adam": (
        optax.chain(optax.clip_by_global_norm(0.7), optax.adam(0.1)),
        torch_of("Adam", lr=0.1),
        "clipping",
        "global norm",
    ),
    "clipped_entries": (
        optax.chain(optax.clip(0.01), optax.sgd(0.1)),
        torch_of("SGD", lr=0.1),
        "clipping",
        "entries to 0.01",
    ),
    "torch_clips": (
        optax.sgd(0.1),
        lambda ps: Clipping(ps, lr=0.1),
        "clipping",
        "norm of 0.5",
    ),
    "accumulated": (
        optax.chain(running_sum(), optax.sgd(0.01)),
        SGD,
        "accumulated",
        "sum of all",
    ),
    "accumulated_adam": (
        optax.chain(running_sum(), optax.adam(0.01)),
        ADAM,
        "accumulated",
        "sum of all",
    ),
    "torch_accumulates": (
        optax.sgd(0.01),
        lambda ps: Keeping(ps, lr=0.01),
        "accumulated",
        "zero_grad",
    ),
    "every_second": (
        optax.MultiSteps(optax.adam(0.01), 2),
        ADAM,
        "accumulated",
        "once in 2 steps",
    ),
    "sign": (optax.sgd(-0.01), SGD, ("sign"), "climbs"),
    "held": (
        frozen("outer/weight", optax.sgd(0.01)),
        SGD,
        "missing_gradient",
        "`outer.weight`",
    ),
    "lacking": (optax.sgd(0.01), but_one, "missing_gradient", "`outer.weight`"),
    "algorithm": (optax.sgd(0.01), ADAM, "algorithm", "is SGD"),
    "algorithm_momentum": (
        optax.sgd(0.03, momentum=0.9),
        ADAM,
        "algorithm",
        "momentum 0.9",
    ),
    "algorithm_adamw": (optax.adamw(0.02), MOMENTUM, "algorithm", "AdamW"),
    "lion": (optax.lion(0.01, weight_decay=0.0), ADAM, "algorithm", "Lion"),
    "rate_and_decay": (
        optax.adamw(0.02, weight_decay=0.05),
        ADAMW,
        ("weight_decay", "learning_rate"),
        "0.05",
    ),
    "momentum_and_nesterov": (
        optax.sgd(0.1, momentum=0.6, nesterov=True),
        MOMENTUM,
        ("momentum", "nesterov"),
        "0.6",
    ),
    "epsilon_and_decay": (
        optax.adamw(0.01, eps=1e-5, weight_decay=0.03),
        ADAMW,
        ("weight_decay", "optimizer_epsilon"),
        "0.03",
    ),
    "rate_and_clipping": (
        optax.chain(optax.clip_by_global_norm(2.1), optax.sgd(0.05)),
        torch_of("SGD", lr=0.1),
        ("clipping", "learning_rate"),
        "0.05",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_pairs_give_their_cause(case):
    optimizer, make, kinds, words = WRONG[case]
    found = run(optimizer, make)
    assert not found.ok
    kinds = {kinds} if isinstance(kinds, str) else set(kinds)
    assert {cause.kind for cause in found.causes} == kinds, found.causes
    assert words in " ".join(cause.text for cause in found.causes)
    assert found.cause is found.causes[0]
    assert found.torch_name in NAMES
    assert found.step_error > 1e-7


@pytest.mark.parametrize(
    "case", ["rate", "coupled", "epsilon", "dampening", "clipping"]
)
def test_causes_are_found_in_float32(case):
    optimizer, make, kind, _ = WRONG[case]
    found = run(optimizer, make, dtype=np.float32)
    assert [cause.kind for cause in found.causes] == [kind], found.causes


def test_the_default_is_plain_sgd_three_times():
    found = run(None, None)
    assert found.ok
    assert list(found.losses) == ["jaxgrad.sgd_update", "optax", "torch"]
    for losses in found.losses.values():
        assert len(losses) == 6
        assert losses == pytest.approx(found.losses["torch"], rel=1e-12)
    assert found.error < 1e-12


def test_where_they_part_is_said():
    found = run(optax.sgd(0.02), SGD)
    assert found.first_step == 1
    assert found.step_error == pytest.approx(1)
    found = run(optax.sgd(0.1, momentum=0.9), torch_of("SGD", lr=0.1))
    assert found.first_step == 2
    late = optax.sgd(lambda step: jnp.where(step < 3, 0.1, 0.05))
    assert run(late, torch_of("SGD", lr=0.1)).first_step == 4
    held = frozen("outer/weight", optax.sgd(0.01))
    assert run(held, SGD).torch_name == "outer.weight"


def test_noise_is_not_accused():
    # Adam moves the key bias by its rounding noise: another way on each side.
    found = run(optax.adam(0.01), ADAM)
    assert found.ok
    assert found.error < 1e-6
    wrong = run(optax.adam(0.02), ADAM)
    assert wrong.torch_name != "key.bias"
    # The epsilons differ where only noise can tell, and the rates everywhere.
    adagrad = optax.chain(optax.scale_by_rss(0.0, eps=1e-30), optax.scale(-0.02))
    (cause,) = run(adagrad, ADAGRAD).causes
    assert "is 2 times that of PyTorch's: 0.02 against 0.01." in cause.text


def test_gradients_that_differ_are_said_and_the_optimizer_is_not_accused():
    def halved(parameters, loss):
        return lambda: loss() / 2

    found = run(optax.sgd(0.1), torch_of("SGD", lr=0.1), torch_loss=halved)
    assert [cause.kind for cause in found.causes] == ["gradients"]
    assert found.first_step == 1
    assert "optimizers agree" in found.cause.text


def test_a_gradient_that_differs_does_not_hide_an_optimizer_that_does():
    def halved(parameters, loss):
        return lambda: loss() / 2

    found = run(optax.adamw(0.01), ADAMW, torch_loss=halved)
    assert [cause.kind for cause in found.causes] == ["weight_decay"]


def test_a_parameter_without_gradient_is_passed_over_in_pytorch():
    def without_idle(parameters, loss):
        def run():
            kept = parameters["idle"]
            parameters["idle"] = torch.zeros(6)
            try:
                return loss()
            finally:
                parameters["idle"] = kept

        return run

    right = optax.adamw(0.01, weight_decay=0.01)
    found = run(right, ADAMW, torch_loss=without_idle)
    assert [cause.kind for cause in found.causes] == ["weight_decay"]
    assert "`idle`" in found.cause.text
    assert found.torch_name == "idle"
    assert run(optax.sgd(0.1), torch_of("SGD", lr=0.1), torch_loss=without_idle).ok


def test_an_optimizer_that_nothing_explains_is_unknown():
    odd = optax.stateless(lambda grads, _: jax.tree.map(lambda g: -(g**3), grads))
    found = run(odd, SGD)
    assert [cause.kind for cause in found.causes] == ["unknown"]
    assert not found.ok


def test_what_an_optimizer_factory_closes_over_is_moved():
    for rate in (0.01, 0.02):
        ours, theirs = problem()
        kept = torch.optim.Adam(theirs.parameters.values(), lr=0.01)
        found = trajectories(
            ours,
            theirs,
            steps=4,
            optimizer=optax.adam(rate),
            torch_optimizer=lambda ps, kept=kept: kept,
        )
        kinds = [cause.kind for cause in found.causes]
        assert kinds == ([] if rate == 0.01 else ["learning_rate"])


def test_overflow_on_both_sides_ends_the_run():
    found = run(optax.sgd(1e200), torch_of("SGD", lr=1e200))
    assert found.ok
    assert found.steps < 6


def test_overflow_on_one_side_is_a_difference():
    found = run(optax.sgd(1e200), SGD)
    assert not found.ok
    assert found.causes


def test_an_optimizer_that_looks_at_values_runs():
    eager = optax.stateless(
        lambda grads, _: jax.tree.map(
            lambda g: -0.01 * g if float(g.sum()) < 1e9 else g, grads
        )
    )
    assert run(eager, SGD).ok


def test_no_steps_are_no_difference():
    found = run(optax.sgd(0.01), SGD, steps=0)
    assert found.ok
    assert found.steps == 0
    assert found.torch_name is None


def test_bad_input():
    with pytest.raises(ValueError, match="steps must be 0 or more, and is -1"):
        run(None, None, steps=-1)
    with pytest.raises(ValueError, match="torch_optimizer isn't: give both"):
        run(optax.sgd(0.1), None)
    with pytest.raises(ValueError, match=r"torch_optimizer is given.*optimizer isn't"):
        run(None, SGD)
    with pytest.raises(TypeError, match=r"optax\.GradientTransformation"):
        run(0.1, SGD)
    with pytest.raises(TypeError, match="must be a function that makes an optimizer"):
        run(optax.sgd(0.1), torch.optim.SGD([torch.zeros(1)], lr=0.1))
    with pytest.raises(TypeError, match="returned a list"):
        run(optax.sgd(0.1), lambda ps: ps)
    with pytest.raises(ValueError, match="LBFGS evaluates the loss by itself"):
        run(optax.sgd(0.1), torch_of("LBFGS"))
    with pytest.raises(ValueError, match="line search"):
        run(optax.lbfgs(), SGD)
