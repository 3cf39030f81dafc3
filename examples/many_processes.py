r"""Trains on the devices of many processes: data parallel, and FSDP.

Alone it starts itself as two processes on this machine, with two devices each. On many
hosts each is started with the address of the first, how many there are, and its number:

    python many_processes.py --coordinator HOST:PORT --processes N --process I

Where Slurm, Open MPI or Cloud TPU starts them, JAX finds all three by itself:

    srun --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 \
      python many_processes.py --cluster
    gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all \
      --command='python3 many_processes.py --cluster'
"""

import argparse
import itertools
import os
import socket
import subprocess
import sys
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxgrad

ROWS, FEATURES, HIDDEN = 512, 16, 64  # rows of each process
STEPS, BATCH = 150, 64


def main():
    """Starts two processes, or is one of several."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--coordinator", help="address and port of process 0")
    parser.add_argument("--processes", type=int, help="how many there are")
    parser.add_argument("--process", type=int, help="which one this is, from 0")
    parser.add_argument("--cluster", action="store_true", help="JAX finds the rest")
    given = parser.parse_args()
    if not (given.cluster or given.coordinator):
        sys.exit(start_two())
    # Before anything that looks for devices. When a process dies, JAX ends the others
    # after so many seconds; its default is 100.
    jax.distributed.initialize(
        given.coordinator,
        given.processes,
        given.process,
        heartbeat_timeout_seconds=20,
    )
    try:
        work()
    except BaseException as error:
        out_at_once(error)


def out_at_once(error):
    """Ends this process; a goodbye would wait for the others, which wait for it."""
    traceback.print_exception(error)
    if isinstance(error, jax.errors.JaxRuntimeError):
        text = "If a connection was lost, another process died first: see its output."
        print(text, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def work():
    """What each process runs: the same calls in the same order."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), (AxisType.Auto,))
    split, copied = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    def sharded(leaf):
        """The first axis that divides is split over the devices."""
        for axis, size in enumerate(leaf.shape):
            if size % jax.device_count() == 0:
                return NamedSharding(mesh, P(*[None] * axis, "data"))
        return copied

    # Each process reads its own rows; together they are one array of all rows.
    mine = rows_of(jax.process_index())
    x, y = (jax.make_array_from_process_local_data(split, a) for a in mine)

    # Made where they belong, so that no device ever has all of them.
    key = jax.random.key(0)
    shapes = jax.eval_shape(init, key)
    everywhere = jax.tree.map(lambda leaf: copied, shapes)
    in_parts = jax.tree.map(sharded, shapes)
    found = {
        name: trained(jax.jit(init, out_shardings=layout)(key), x, y)
        for name, layout in (("data parallel", everywhere), ("FSDP", in_parts))
    }
    # All rows in each process: only to compare, and only since they are few.
    everything = process_allgather((x, y), tiled=True)
    if jax.process_index() == 0:  # which speaks for all
        found["one device"] = trained(init(key), *map(jnp.asarray, everything))
        report(found)


def rows_of(process):
    """The rows that a process reads: here they are drawn."""
    draw = np.random.default_rng(process).standard_normal
    x = draw((ROWS, FEATURES), np.float32)
    return x, np.sin(x[:, :1] * x[:, 1:2]) + 0.1 * draw((ROWS, 1), np.float32)


def init(key):
    """A network of three layers."""
    sizes = FEATURES, HIDDEN, HIDDEN, 1
    keys = jax.random.split(key, 3)
    return [
        {"w": jax.random.normal(k, (a, b)) / a**0.5, "b": jnp.zeros(b)}
        for k, (a, b) in zip(keys, itertools.pairwise(sizes), strict=True)
    ]


def loss(layers, x, y):
    """The mean over all rows, wherever they are."""
    *hidden, last = layers
    for layer in hidden:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return jaxgrad.mean_squared_error(x @ last["w"] + last["b"], y)


def trained(params, x, y):
    """What a device holds, and the losses of a run."""
    result = jaxgrad.train(
        loss,
        params,
        x,
        y,
        steps=STEPS,
        batch_size=BATCH,
        shuffle_key=jax.random.key(1),
        optimizer=optax.adam(3e-3),
    )
    held = [leaf.addressable_data(0) for leaf in jax.tree.leaves(result.params)]
    return x.addressable_data(0).shape[0], sum(a.size for a in held), result.losses


def report(found):
    """Prints a table, and asserts that all runs are the same to rounding."""
    print(f"{jax.process_count()} processes, {jax.device_count()} devices in all")
    print(f"\n{'':28}" + "".join(f"{name:>16}" for name in found))
    *several, one = found.values()
    lines = {
        "rows on a device": [f"{rows:,}" for rows, _, _ in found.values()],
        "parameters on a device": [f"{held:,}" for _, held, _ in found.values()],
        "first loss": [f"{losses[0]:.6f}" for *_, losses in found.values()],
        "last loss": [f"{losses[-1]:.6f}" for *_, losses in found.values()],
    }
    differences = [np.max(np.abs(run[2] - one[2]) / one[2]) for run in several]
    lines["largest relative difference"] = [f"{d:.1e}" for d in differences]
    for label, cells in lines.items():
        print(f"{label:28}" + "".join(f"{cell:>16}" for cell in cells))
    # A sum in another order is off by some 1e-7; 150 steps of Adam carry that on.
    assert max(differences) < 1e-3
    assert one[2][-1] < one[2][0] / 2


def start_two():
    """Runs this file as two processes of two simulated devices each."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    flags = "--xla_force_host_platform_device_count=2"
    processes = []
    try:
        for process in range(2):
            command = [sys.executable, __file__, "--coordinator", address]
            command += ["--processes", "2", "--process", str(process)]
            processes.append(
                subprocess.Popen(
                    command,
                    env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
                    stdout=subprocess.DEVNULL if process else subprocess.PIPE,
                    text=True,
                )
            )
        with processes[0].stdout as lines:
            for line in lines:
                if not line.startswith("[Gloo]"):  # what joins CPUs says hello
                    print(line, end="", flush=True)
        statuses = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, status in enumerate(statuses):
        if status:
            print(f"process {process} ended with status {status}", file=sys.stderr)
    return int(any(statuses))


if __name__ == "__main__":
    main()
