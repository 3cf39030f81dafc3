"""Every verb on small losses: alike on one device and on those of many processes."""

import functools
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.multihost_utils import process_allgather

import jaxgrad

ROWS, BATCH = 20, 8  # two batches of 8 rows and a short one of 4, on 4 devices


class Place(NamedTuple):
    """Where arrays are laid; each function takes what every process holds whole.

    Attributes:
      rows: lays rows over all devices.
      copy: puts a copy on every device.
      fsdp: lays the first axis over the devices where it divides, as a copy elsewhere.
      mine: of a batch, the rows that this process is to give to `batches`.
      sharding: the layout of rows; `None` on one device.
    """

    rows: Callable[[Any], Any]
    copy: Callable[[Any], Any]
    fsdp: Callable[[Any], Any]
    mine: Callable[[Any], Any]
    sharding: Any


def here(tree: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree)


ALONE = Place(here, here, here, lambda batch: batch, None)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


PARAMS = {"in": draw(0, 4, 8), "out": draw(1, 8, 1), "bias": draw(2, 1)}
X = draw(3, ROWS, 4) * [1, 3, 0.3, 1] + [0, 5, 0, 0]
X = X.astype(np.float32)
Y = draw(4, ROWS, 1)


def norm_loss(params, x, y):
    """Its batch norm makes the mean of the devices' own gradients a wrong one."""
    h = x @ params["in"]
    h = (h - h.mean(axis=0)) / jnp.sqrt(h.var(axis=0) + 1e-3)
    return jnp.mean((jnp.tanh(h) @ params["out"] + params["bias"] - y) ** 2)


def mean_loss(params, x, y):
    h = jnp.tanh(x @ params["in"])
    return jnp.mean((h @ params["out"] + params["bias"] - y) ** 2)


def noisy_loss(params, x, y, key):
    h = jnp.tanh(x @ params["in"])
    h = h * jax.random.bernoulli(key, 0.5, h.shape)
    return jnp.mean((h @ params["out"] + params["bias"] - y) ** 2)


@jax.custom_vjp
def dense(x, weight):
    return x @ weight


def dense_backward(saved: Any, g: Any) -> Any:
    x, weight = saved
    one = jnp.arange(len(weight))[:, None] == 5
    return g @ weight.T, jnp.where(one, 1.5, 1.0) * (x.T @ g)


dense.defvjp(lambda x, weight: (x @ weight, (x, weight)), dense_backward)


def wrong_loss(params, x, y):
    h = jnp.tanh(x @ params["in"])
    return jnp.mean((dense(h, params["out"]) + params["bias"] - y) ** 2)


def nan_loss(params, x, y):
    h = x @ params["in"]
    roots = jnp.where(h > 0, jnp.sqrt(h), 0.0)
    return jnp.mean((roots @ params["out"] - y) ** 2) + 0 * jnp.sum(params["bias"])


def plain(tree: Any) -> list[Any]:
    """The numbers of a tree, wherever its arrays are: all processes call this."""
    leaves = jax.tree.leaves(tree)
    return [np.asarray(process_allgather(x, tiled=True)).tolist() for x in leaves]


def same_layout(tree: Any, params: Any) -> None:
    for x, p in zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True):
        assert x.sharding.is_equivalent_to(p.sharding, x.ndim), (x.sharding, p.sharding)


def shown(report: Any) -> None:
    """Process 0 alone prints: if that needed the others, it would hang."""
    if jax.process_index() == 0:
        assert str(report)
        report.to_dict()


def gradients(place: Place) -> list[Any]:
    x, y = place.rows((X, Y))
    found = []
    for lay in (place.copy, place.fsdp):
        params = lay(PARAMS)
        value, gradient = jaxgrad.value_and_grad(norm_loss)(params, x, y)
        alone = jaxgrad.grad(norm_loss)(params, x, y)
        same_layout(gradient, params)
        same_layout(alone, params)
        found += plain((value, gradient, alone))
    return found


def run(place: Place, loss: Callable[..., Any], *data: Any, **options: Any) -> Any:
    params = place.fsdp(PARAMS)
    result = jaxgrad.train(loss, params, *place.rows(data), **options)
    same_layout(result.params, params)
    return result


def facts(result: jaxgrad.TrainResult) -> list[Any]:
    losses, norms = result.losses.tolist(), result.gradient_norms.tolist()
    return [result.steps, losses, norms, plain(result.params)]


def train(place: Place) -> list[Any]:
    return facts(run(place, norm_loss, X, Y, steps=12, learning_rate=0.05))


def train_rows(place: Place) -> list[Any]:
    """Shuffled rows and noise; 4 steps and 5 more are 9 steps, to the same bits."""
    again = functools.partial(
        run,
        place,
        noisy_loss,
        X,
        Y,
        batch_size=BATCH,
        shuffle_key=jax.random.key(5),
        step_key=jax.random.key(6),
        optimizer=optax.sgd(0.05, momentum=0.9),
    )
    whole, half = again(steps=9), again(steps=4)
    rest = again(steps=5, state=half.state)
    return [facts(whole), plain(whole.params) == plain(rest.params)]


def train_uneven(place: Place) -> list[Any]:
    """Batches of 6 rows, which don't divide over 4 devices."""
    options = {"batch_size": 6, "reduction": "mean", "learning_rate": 0.05}
    return facts(run(place, mean_loss, X, Y, steps=5, **options))


def batches(place: Place, epochs: int = 1) -> Iterator[Any]:
    """What the loader of a process yields: its rows of batches of 8, 8 and 4."""
    for _ in range(epochs):
        for start in range(0, ROWS, BATCH):
            yield place.mine((X[start : start + BATCH], Y[start : start + BATCH]))


def run_on(place: Place, given: Iterator[Any], steps: int | None = 6) -> Any:
    layout = {"batch_sharding": place.sharding, "batches": given}
    return run(place, norm_loss, steps=steps, learning_rate=0.05, **layout)


def train_batches(place: Place) -> list[Any]:
    return facts(run_on(place, batches(place, 2), None))


def last_process() -> bool:
    return jax.process_index() == jax.process_count() - 1


def train_broken(place: Place) -> list[Any]:
    """One loader fails, or ends early; every process is told, and keeps what it has."""

    def failing() -> Iterator[Any]:
        yield from batches(place)
        if last_process():
            raise OSError("disk on fire")
        yield from batches(place)

    def ending() -> Iterator[Any]:
        yield from batches(place, 1 if last_process() else 2)

    kept = []
    for loader in (failing(), ending()):
        with pytest.raises(jaxgrad.BatchError) as caught:
            run_on(place, loader)
        kept.append(facts(caught.value.result))
    return kept


def train_interrupted(place: Place) -> list[Any]:
    """Ctrl-C comes to one process; all stop before the same update."""

    def interrupting() -> Iterator[Any]:
        yield from batches(place)
        if last_process():
            os.kill(os.getpid(), signal.SIGINT)
        yield from batches(place, 3)

    return [(run_on(place, interrupting()).stopped or "")[:11]]


def train_until(place: Place, number: int, then: Callable[[], None]) -> None:
    """Trains for ever, and does something where the batch of a number is due."""

    def endless() -> Iterator[Any]:
        for count in itertools.count():
            if count == number:
                then()
            yield next(batches(place))

    run_on(place, endless(), None)


def differentiate_until(place: Place, number: int, then: Callable[[], None]) -> None:
    """Computes gradients for ever, and does something before that of a number."""
    params, rows = place.fsdp(PARAMS), place.rows((X, Y))
    for count in itertools.count():
        if count == number:
            then()
        jax.block_until_ready(jaxgrad.grad(norm_loss)(params, *rows))


def checked(place: Place, loss: Callable[..., Any]) -> list[Any]:
    check = jaxgrad.check_gradient(loss, place.fsdp(PARAMS), *place.rows((X, Y)))
    shown(check)
    entries = [
        [leaf.path, list(entry.index), entry.claimed, entry.reference]
        for leaf in check.leaves
        for entry in leaf.entries
    ]
    leaves = [
        [leaf.path, leaf.verdict, leaf.cause.kind if leaf.cause else None]
        for leaf in check.leaves
    ]
    return [check.ok, leaves, entries]


def check_right(place: Place) -> list[Any]:
    return checked(place, norm_loss)


def check_wrong(place: Place) -> list[Any]:
    return checked(place, wrong_loss)


def traced(place: Place, loss: Callable[..., Any]) -> list[Any]:
    params = place.fsdp(PARAMS)
    trace = jaxgrad.trace_gradient(loss, params, *place.rows((X, Y)))
    shown(trace)
    same_layout(trace.gradient, params)
    bad = trace.first_nonfinite
    where = bad and [bad.line, bad.reason, list(bad.index)]
    if jax.process_count() > 1:
        refuses_alone(trace)
    return [trace.ok, trace.loss, where, plain(trace.gradient)]


def refuses_alone(trace: jaxgrad.GradientTrace) -> None:
    """What would take all processes is refused, not waited for; the report says so."""
    assert "other_processes" in [finding.kind for finding in trace.findings]
    if jax.process_index() == 0:
        with pytest.raises(RuntimeError, match="processes"):
            trace.steps[0].inside()


def trace(place: Place) -> list[Any]:
    return traced(place, norm_loss)


def trace_nan(place: Place) -> list[Any]:
    return traced(place, nan_loss)


def explain(place: Place) -> list[Any]:
    params, rows = place.fsdp(PARAMS), place.rows((X, Y))
    step = jaxgrad.explain_step(norm_loss, params, *rows, learning_rate=0.05)
    shown(step)
    whole = [step.loss, step.gradient_norm, step.decrease, step.curvature]
    whole += [step.best_rate, step.first_rise]
    leaves = [[x.path, x.gradient_norm, x.relative_step] for x in step.leaves]
    return [step.ok, whole, leaves]


def misplaced(place: Place) -> list[Any]:
    """Parameters on one device, and data on others: each verb names the leaf."""
    params = jax.device_put(PARAMS, jax.local_devices()[-1])
    rows = (X, Y), place.sharding or jax.local_devices()[0]
    x, y = place.rows((X, Y)) if place.sharding else jax.device_put(*rows)
    for verb in (
        jaxgrad.grad(mean_loss),
        functools.partial(jaxgrad.train, mean_loss, steps=1, learning_rate=0.1),
        functools.partial(jaxgrad.check_gradient, mean_loss),
        functools.partial(jaxgrad.trace_gradient, mean_loss),
        functools.partial(jaxgrad.explain_step, mean_loss, learning_rate=0.1),
    ):
        with pytest.raises(ValueError, match=r"bias.* device"):
            verb(params, x, y)
    return []


VERBS = {
    verb.__name__: verb
    for verb in (
        gradients,
        train,
        train_rows,
        train_uneven,
        train_batches,
        train_broken,
        train_interrupted,
        check_right,
        check_wrong,
        trace,
        trace_nan,
        explain,
        misplaced,
    )
}
