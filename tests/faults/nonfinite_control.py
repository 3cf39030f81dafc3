"""Non-finite values inside loops, branches, batches and rules."""

import jax
import jax.numpy as jnp
from corpus.case import draw
from jax import lax

from faults.case import Nonfinite, Problem, nonfinite

CASES: list[Nonfinite] = []


# Loops


@nonfinite(CASES, "domain", phase="forward", iteration=3)
def scan_forward():
    def loss(w):
        def step(x, _):
            x = jnp.sqrt(x) - 1  # blame
            return x, x

        last, _ = lax.scan(step, w, length=5)
        return last

    return Problem(loss, jnp.float32(5.0))


@nonfinite(CASES, "infinite slope", phase="backward", iteration=1)
def scan_backward():
    def loss(w, xs):
        def step(total, x):
            gap = x - w
            root = jnp.sqrt(gap)  # blame
            return total + root, None

        total, _ = lax.scan(step, jnp.float32(0.0), xs)
        return total

    return Problem(loss, jnp.float32(2.0), (jnp.array([3.0, 2.0, 5.0]),))


@nonfinite(CASES, "division by zero", phase="forward", iteration=3)
def fori_loop():
    def loss(w):
        def body(i, total):
            return total + w / (3 - i)  # blame

        return lax.fori_loop(0, 5, body, jnp.float32(0.0))

    return Problem(loss, jnp.float32(1.0))


@nonfinite(CASES, "overflow", phase="forward", iteration=3)
def while_loop():
    """Without a gradient of its own: it chooses the scale."""

    def loss(w):
        def body(state):
            i, scale = state
            return i + 1, scale**2 * 4  # blame

        start = (0, lax.stop_gradient(jnp.abs(w).sum()))
        _, scale = lax.while_loop(lambda state: state[0] < 6, body, start)
        return jnp.sum(w * scale)

    return Problem(loss, jnp.array([100.0, 50.0]))


@nonfinite(CASES, "log of zero", phase="forward", iteration=2, branch=1)
def branch_inside_a_scan():
    def loss(w, xs):
        def step(total, x):
            def logged(h):
                return jnp.log(h)  # blame

            h = jax.nn.relu(x * w)
            return total + lax.cond(x < 1, logged, jnp.square, h), None

        return lax.scan(step, jnp.float32(0.0), xs)[0]

    return Problem(loss, jnp.float32(0.5), (jnp.array([2.0, 0.5, -1.0, 3.0]),))


@nonfinite(CASES, "infinite slope", "norm at zero", phase="backward", iteration=0)
def hidden_state_that_starts_at_zero():
    def loss(params, xs):
        def step(h, x):
            size = jnp.sqrt(jnp.sum(jnp.square(params["u"] @ h)))  # blame
            h = jnp.tanh(params["w"] @ x + size)
            return h, h

        _, hs = lax.scan(step, jnp.zeros(3), xs)
        return jnp.sum(hs**2)

    params = {"u": draw(0, 3, 3), "w": draw(1, 3, 2)}
    return Problem(loss, params, (draw(2, 4, 2),))


# Branches, batches, nested functions


@nonfinite(CASES, "division by zero", phase="forward", branch=1)
def branch_taken():
    def loss(w, flag):
        def inverse(v):
            return 1 / (v - 1)  # blame

        return lax.cond(flag, inverse, jnp.exp, w)

    return Problem(loss, jnp.float32(1.0), (jnp.asarray(True),))


@nonfinite(CASES, "infinite slope", phase="backward", branch=2)
def switch():
    def loss(w, which):
        def third(v):
            return jnp.sqrt(v).sum()  # blame

        return lax.switch(which, [jnp.sum, jnp.prod, third], w)

    return Problem(loss, jnp.array([1.0, 0.0]), (jnp.asarray(2),))


@nonfinite(CASES, "domain", phase="forward", index=(2,))
def one_of_a_batch():
    def loss(w, batch):
        def one(x):
            energy = w @ x
            return jnp.log(energy)  # blame

        return jnp.mean(jax.vmap(one)(batch))

    batch = jnp.array([[1.0, 1.0], [2.0, 0.5], [-1.0, -3.0]])
    return Problem(loss, jnp.ones(2), (batch,))


@nonfinite(CASES, "norm at zero", phase="backward", index=(1, 2))
def batch_of_batches():
    def loss(w, points):
        def size(x):
            return jnp.linalg.norm(w * x)  # blame

        return jax.vmap(jax.vmap(size))(points).sum()

    points = draw(3, 2, 3, 2).at[1, 2].set(0.0)
    return Problem(loss, jnp.ones(2), (points,))


@nonfinite(CASES, "infinite slope", phase="backward", index=(0,))
def rematerialised():
    def loss(w, x):
        @jax.checkpoint
        def block(h):
            h = jnp.abs(h)
            return jnp.sqrt(h)  # blame

        return jnp.sum(block(x * w))

    return Problem(loss, jnp.float32(1.0), (jnp.array([0.0, 4.0]),))


@nonfinite(CASES, "log of zero", phase="forward", index=(1,))
def nested_jits():
    @jax.jit
    def entropy(p):
        return -jnp.sum(p * jnp.log(p))  # blame

    @jax.jit
    def normalised(w):
        return w / w.sum()

    @jax.jit
    def penalty(w):
        return entropy(normalised(w))

    def loss(w):
        return jnp.sum(w**2) + penalty(w)

    return Problem(loss, jnp.array([1.0, 0.0]))


@nonfinite(CASES, "domain", phase="forward")
def helper_called_twice():
    """Healthy at the first call, not at the second."""

    def root(x):
        y = jnp.sqrt(x)  # blame
        return y

    def loss(params):
        return root(params["a"]) + root(params["b"])

    return Problem(loss, {"a": jnp.float32(4.0), "b": jnp.float32(-4.0)})


@nonfinite(CASES, "infinite slope", phase="backward")
def one_leaf_only():
    def loss(params, x):
        gate = jnp.sqrt(params["gate"])  # blame
        return jnp.sum((x @ params["w"]) ** 2) + gate

    return Problem(loss, {"w": draw(4, 3), "gate": jnp.float32(0.0)}, (draw(5, 2, 3),))


# Rules written by hand


@nonfinite(CASES, "custom rule", "division by zero", phase="backward", index=(1,))
def custom_vjp():
    @jax.custom_vjp
    def safe_sqrt(x):
        return jnp.sqrt(x)

    def forward(x):
        y = jnp.sqrt(x)
        return y, y

    def backward(y, g):
        slope = g / (2 * y)  # blame
        return (slope,)

    safe_sqrt.defvjp(forward, backward)

    def loss(w):
        return jnp.sum(safe_sqrt(w))

    return Problem(loss, jnp.array([1.0, 0.0]))


@nonfinite(CASES, "custom rule", "division by zero", phase="backward", index=(0,))
def custom_jvp():
    @jax.custom_jvp
    def length(x):
        return jnp.abs(x)

    @length.defjvp
    def rule(primals, tangents):
        (x,), (t,) = primals, tangents
        y = length(x)
        direction = x / y  # blame
        return y, direction * t

    def loss(w):
        return jnp.sum(length(w))

    return Problem(loss, jnp.array([0.0, -2.0]))


@nonfinite(CASES, "custom rule", "log of zero", phase="backward", iteration=1)
def custom_vjp_inside_a_scan():
    @jax.custom_vjp
    def smooth(x):
        return jnp.tanh(x)

    def backward(x, g):
        scale = jnp.log(jnp.abs(x))  # blame
        return (g * scale,)

    smooth.defvjp(lambda x: (jnp.tanh(x), x), backward)

    def loss(w, xs):
        def step(h, x):
            return smooth(h * x) + w, None

        return lax.scan(step, w, xs)[0]

    return Problem(loss, jnp.float32(0.5), (jnp.array([1.0, 0.0, 2.0]),))
