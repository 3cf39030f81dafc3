"""One of several processes: joins the others, does its task, prints what it found."""

import json
import os
import signal
import sys
import threading
import traceback

import jax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from many_processes import out_at_once

from processes.verbs import VERBS, Place, differentiate_until, train_until

# Seconds. Short where a death is to be noticed; else as long as JAX's own, since four
# processes that compile on a busy machine may be late.
HEARTBEAT = {"verbs": 100, "die": 10}


def end_with_the_test():
    """Ends this process when the test's end of the pipe closes, however it died."""
    sys.stdin.read()
    os._exit(1)


def join(heartbeat, coordinator, processes, process):
    jax.distributed.initialize(
        coordinator,
        int(processes),
        int(process),
        heartbeat_timeout_seconds=heartbeat,
        shutdown_timeout_seconds=60,
    )


def over_all_devices():
    """The place of arrays that every process has a part of."""
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), (AxisType.Auto,))
    split, everywhere = NamedSharding(mesh, P("batch")), NamedSharding(mesh, P())

    def mine(array):
        each = len(array) // jax.process_count()
        return array[each * jax.process_index() :][:each]

    def rows(array):
        return jax.make_array_from_process_local_data(split, mine(array))

    def copy(array):
        return jax.make_array_from_process_local_data(everywhere, array, array.shape)

    def fsdp(array):
        return copy(array) if len(array) % jax.device_count() else rows(array)

    def each(lay):
        return lambda tree: jax.tree.map(lay, tree)

    return Place(each(rows), each(copy), each(fsdp), each(mine), split)


def do_verbs(*names):
    """Prints what each verb finds; the text of the exception where one fails."""
    place, found = over_all_devices(), {}
    for name in names:
        try:
            found[name] = VERBS[name](place)
        except (Exception, pytest.fail.Exception):
            found[name] = traceback.format_exc()
    print("found", json.dumps(found, default=float))


def do_die(how):
    """The last process is killed while it trains, or raises between two gradients."""

    def die():
        if jax.process_index() == jax.process_count() - 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise MemoryError("no room for batch 30")

    work = train_until if how == "killed" else differentiate_until
    work(over_all_devices(), 30, die)


def main():
    task, names, *address = sys.argv[1:]
    threading.Thread(target=end_with_the_test, daemon=True).start()
    join(HEARTBEAT[task], *address)
    try:
        {"verbs": do_verbs, "die": do_die}[task](*names.split())
    except BaseException as error:
        out_at_once(error)


if __name__ == "__main__":
    main()
