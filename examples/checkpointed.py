"""Train with Orbax's checkpoints: stop at any moment, go on to the same bits.

    python checkpointed.py                   the whole story, in a temporary folder
    python checkpointed.py FOLDER            train, with a checkpoint now and then
    python checkpointed.py FOLDER --resume   go on from the newest whole checkpoint

The same bits need the same kind of machine, as many devices and the same jax; on
another one the run goes on with a warning, and is right up to rounding. A checkpoint
of other options, data or shapes is refused. Code isn't compared: a changed loss is
yours to notice. Nothing is unpickled.
"""

import argparse
import contextlib
import functools
import hashlib
import io
import logging
import os
import pathlib
import platform
import re
import signal
import sys
import tempfile

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax
import orbax.checkpoint as ocp

import jaxgrad

KEPT = 3  # checkpoints
DROPPED = 0.1  # of the hidden units

# Orbax logs a half-written checkpoint and a failing save; both are said here.
for name in ("absl", "asyncio"):
    logging.getLogger(name).setLevel(logging.CRITICAL)


def spirals(rows):
    """Points on three arms of a spiral, with noise, and which arm each is on."""
    noise = np.random.default_rng(0)
    arm = np.arange(rows) % 3
    far = noise.uniform(0.1, 1, rows)
    angle = 4 * far + arm * 2 * np.pi / 3 + noise.normal(0, 0.2, rows)
    x = np.stack([far * np.cos(angle), far * np.sin(angle)], axis=1)
    return x.astype(np.float32), arm.astype(np.int32)


def init(key, width):
    first, second = jax.random.split(key)
    return {
        "hidden": jaxgrad.init_linear(first, 2, width),
        "out": jaxgrad.init_linear(second, width, 3),
    }


def loss(params, x, y, key=None):
    hidden = jax.nn.relu(jaxgrad.linear(params["hidden"], x))
    if key is not None:
        kept = jax.random.bernoulli(key, 1 - DROPPED, hidden.shape)
        hidden = jnp.where(kept, hidden / (1 - DROPPED), 0)
    logits = jaxgrad.linear(params["out"], hidden)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@functools.cache  # one object for runs that are alike, so that train compiles once
def optimizer(learning_rate, steps):
    return optax.adamw(optax.cosine_decay_schedule(learning_rate, steps))


def digest(tree):
    """The sha256 of all leaves' dtypes, shapes and bytes."""
    sha = hashlib.sha256()
    for leaf in map(np.asarray, jax.tree.leaves(tree)):
        sha.update(f"{leaf.dtype}{leaf.shape}".encode() + leaf.tobytes())
    return sha.hexdigest()


def machine():
    """What the same bits need."""
    return {
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
    }


def must_be_same(options, data, state):
    """What a run that goes on must share with the one that stopped."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {
        **{f"--{name.replace('_', '-')}": value for name, value in options.items()},
        "data's sha256": digest(data),
        **{
            f"state{jax.tree_util.keystr(path)}": f"{leaf.dtype} {leaf.shape}"
            for path, leaf in leaves
        },
    }


def differences(was, now):
    """One block of lines for each name whose value isn't the same."""
    return [
        f"  {name}\n    was  {was.get(name, 'absent')}\n    now  "
        f"{now.get(name, 'absent')}"
        for name in dict.fromkeys([*was, *now])
        if was.get(name) != now.get(name)
    ]


@contextlib.contextmanager
def or_exit(say):
    """Where Orbax fails: one line, and exit."""
    # Orbax's threads complain beside the error and after it: nobody reads that.
    stderr, sys.stderr = sys.stderr, io.StringIO()
    try:
        yield
    except Exception as error:  # OSError, TensorStore's ValueError, a bare Exception
        code = re.search(r"(?:Errno |os_error_code=')(\d+)", str(error))
        print(say(os.strerror(int(code[1])) if code else error), file=stderr)
        raise SystemExit(1) from None
    sys.stderr = stderr


def newest(manager):
    """The folder of the newest whole checkpoint, in words."""
    step = manager.latest_step()
    return "no whole checkpoint" if step is None else f"{manager.directory / str(step)}"


def save(manager, step, state, facts):
    """Saves all or nothing; a failing save exits; Ctrl-C waits for the end of it."""
    facts = {"same": facts, "machine": machine(), "state's sha256": digest(state)}
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    with or_exit(
        lambda why: (
            f"The checkpoint of step {step} can't be saved: {why}. The last whole "
            f"one: {newest(manager)}. Put it right, then go on with --resume."
        )
    ):
        one, other = ocp.args.StandardSave(state), ocp.args.JsonSave(facts)
        manager.save(step, args=ocp.args.Composite(state=one, facts=other))
    signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def restore(manager, fresh, facts):
    """The newest whole state, of the fresh one's shapes; else the fresh one."""
    for path in sorted(manager.directory.glob("*.orbax-checkpoint-tmp*")):
        print(f"ignored: {path.name}, half-written")
    step = manager.latest_step()
    if step is None:
        print("no whole checkpoint: from the beginning")
        return fresh

    def damaged(how):
        return f"{newest(manager)} {how}. Put it aside to go on from the one before."

    def read(**items):
        with or_exit(lambda why: damaged("can't be read, or isn't ours")):
            return manager.restore(step, args=ocp.args.Composite(**items))

    saved = read(facts=ocp.args.JsonRestore()).facts
    if differ := differences(saved["same"], facts):
        sys.exit("\n".join([f"{newest(manager)} is of another run:", *differ]))
    if differ := differences(saved["machine"], machine()):
        warning = "warning: right, but not to the bit, since the machine changed:"
        print("\n".join([warning, *differ]), file=sys.stderr)
    # As NumPy arrays, which are bound to no device, so that train compiles for them
    # what it does for its own. To restore sharded parameters give `fresh` itself.
    fresh = jax.tree.map(np.asarray, fresh)
    state = read(state=ocp.args.StandardRestore(fresh)).state
    if digest(state) != saved["state's sha256"]:  # Orbax has no checksum of its own
        sys.exit(damaged("is damaged: other bytes than were saved"))
    print(f"from the checkpoint of step {step}")
    return state


def run(folder, options, every, resume=False, until=None):
    """Trains, and saves every so many steps; returns the parameters' sha256."""
    data = spirals(options["rows"])
    begin, shuffle, dropout = jax.random.split(jax.random.key(options["seed"]), 3)
    train = functools.partial(
        jaxgrad.train,
        loss,
        init(begin, options["width"]),
        *data,
        optimizer=optimizer(options["learning_rate"], options["steps"]),
        batch_size=options["batch_size"],
        shuffle_key=shuffle,
        step_key=dropout,
        progress=False,
    )
    state = train(steps=0).state
    facts = must_be_same(options, data, state)
    if not resume and os.path.isdir(folder) and os.listdir(folder):
        sys.exit(f"{folder} isn't empty. Go on with --resume, or take a new folder.")
    # Orbax writes into STEP.orbax-checkpoint-tmp, and renames it when it's whole; not
    # in the background, so that a failing save is known at once.
    manager = ocp.CheckpointManager(
        pathlib.Path(folder).resolve(),
        options=ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(KEPT),
            enable_async_checkpointing=False,
        ),
    )
    end = min(until or options["steps"], options["steps"])
    try:
        if resume:
            state = restore(manager, state, facts)
        while (step := int(state.step)) < end:
            # In whole pieces, wherever an earlier run was stopped.
            result = train(steps=min(every - step % every, end - step), state=state)
            state, step = result.state, int(result.state.step)
            if result.steps:
                save(manager, step, state, facts)
                mean = f"mean loss {np.mean(result.losses):.4f}"
                print(f"step {step} of {options['steps']}: {mean}, saved", flush=True)
            if (result.stopped or "").startswith("interrupted"):
                raise KeyboardInterrupt
            if result.stopped:
                sys.exit(
                    f"Stopped: {result.stopped}. The last finite parameters are in "
                    f"{newest(manager)}. To go on would end the same: train anew, "
                    "with a smaller --learning-rate."
                )
    except KeyboardInterrupt:
        print(f"\nStopped: {newest(manager)}. Go on: the same with --resume.")
        raise SystemExit(128 + signal.SIGINT) from None
    sha = digest(state.params)
    print(f"step {step}, loss {jax.jit(loss)(state.params, *data):.6f}\nsha256 {sha}")
    return sha


def story(options, every):
    """Once to the end, and once stopped in the middle of an epoch and resumed."""
    half = options["steps"] // 2 + 17
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        print("In one run:")
        whole = run("whole", options, every)
        print(f"\nStopped at step {half}:")
        run("parts", options, every, until=half)
        print("\nResumed:")
        parts = run("parts", options, every, resume=True)
    assert parts == whole
    print("\nThe same bits.")


def positive(text):
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def main(arguments=None):
    """Reads the command line; what goes wrong is one clear message, and exit code 1."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--until", type=positive, help="stop, saved, at this step")
    parser.add_argument("--every", type=positive, default=200, help="steps of one save")
    parser.add_argument("--steps", type=positive, default=1000)
    parser.add_argument("--batch-size", type=positive, default=64)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--width", type=positive, default=32)
    parser.add_argument("--rows", type=positive, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args(arguments))
    how = {name: options.pop(name) for name in ("folder", "resume", "until", "every")}
    if how["folder"] is None:
        return story(options, how["every"])
    try:
        return run(options=options, **how)
    except OSError as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
