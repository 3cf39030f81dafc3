"""Our gradient of the lesson's loss compiles to the operations of the plain one."""

import re

import jax
import jax.numpy as jnp

import jaxgrad


def operations(function, *operands):
    text = jax.jit(function).lower(*operands).compile().as_text()
    return sorted(re.findall(r"= (\S+ [\w-]+)\(", text))


def test_the_checks_leave_no_trace_in_the_program():
    def plain(params, x, y):
        return jnp.mean((x @ params.weight.T + params.bias - y) ** 2)

    params = jaxgrad.LinearParams(jnp.zeros((1, 128)), jnp.zeros(1))
    operands = params, jnp.zeros((1000, 128)), jnp.zeros((1000, 1))
    ours = operations(jaxgrad.grad(jaxgrad.linear_loss), *operands)
    assert ours == operations(jax.grad(plain), *operands)
    assert len(ours) > 10
