"""Weak scaling: a gradient and `train` on more and more devices, each with its rows."""

import statistics

import jax
import minibatch
from check_speed import elapsed
from interleaved import interleave
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxgrad

WIDTHS, BATCH = (64, 128, 64, 10), 256


def measure(counts, batches, steps, rounds):
    """Per number of devices: how many rows, and what a row costs.

    Seconds of a gradient, of the same rows on one device, and of `train`; and the
    ratios of the first to one device's and to the second, and of `train` to one's.
    """
    task = minibatch.mlp(WIDTHS, BATCH, batches * max(counts))
    each = len(task.arrays[0]) // max(counts)
    gradient = jaxgrad.value_and_grad(task.loss)
    runs = {}
    for count in counts:
        devices = jax.devices()[:count]
        mesh = jax.make_mesh((count,), ("rows",), (AxisType.Auto,), devices=devices)
        by_row, whole = (
            NamedSharding(mesh, PartitionSpec(*names)) for names in (("rows",), ())
        )
        here = [array[: count * each] for array in task.arrays]
        params = jax.device_put(task.params, whole)
        spread = jax.device_put(here, by_row)

        def trained(params=params, count=count, by_row=by_row):
            return jaxgrad.train(
                task.loss,
                params,
                *task.arrays,
                steps=steps,
                learning_rate=minibatch.RATE,
                batch_size=count * BATCH,
                shuffle_key=minibatch.KEY,
                batch_sharding=by_row,
                progress=False,
            ).params

        of = {
            "split": lambda p=params, a=spread: gradient(p, *a),
            "whole": lambda a=here: gradient(task.params, *a),
            "train": trained,
        }
        for name, run in of.items():
            run()  # compiles
            size = count * (steps * BATCH if name == "train" else each)
            runs[name, count] = lambda run=run, size=size: elapsed(run) / size
    times = interleave(runs, rounds)

    def ratio(name, count, other, others):
        pairs = zip(times[name, count], times[other, others], strict=True)
        return statistics.median(a / b for a, b in pairs)

    return [
        {
            "devices": count,
            "rows": count * each,
            "gradient": statistics.median(times["split", count]),
            "of one": ratio("split", count, "split", 1),
            "of whole": ratio("split", count, "whole", count),
            "train": statistics.median(times["train", count]),
            "train of one": ratio("train", count, "train", 1),
        }
        for count in counts
    ]
