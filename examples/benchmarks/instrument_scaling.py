"""What an instrument takes, by the number of parameters: seconds, and memory."""

import jax
from alone import beyond
from check_speed import new_loss, problem

import jaxgrad

NATIVE, CHECK, TRACE = "jit(value_and_grad)", "check_gradient", "trace_gradient"
BATCH = 32


def measure(name, widths):
    """Seconds and bytes for an MLP in this process, in which nothing else happens."""
    measured(name, (8, 4, 10))  # loads the compiler
    return measured(name, widths)


def measured(name, widths):
    operands = jax.block_until_ready(problem(widths, BATCH))

    def run():
        if name == NATIVE:
            return jax.jit(jax.value_and_grad(new_loss()))(*operands)
        if name == TRACE:
            return jaxgrad.trace_gradient(new_loss(), *operands).gradient
        report = jaxgrad.check_gradient(new_loss(), *operands)
        assert report.ok, report
        return None

    return beyond(run)
