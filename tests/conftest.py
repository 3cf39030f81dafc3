"""Checks shape annotations while the tests run; 8 devices for the sharding tests."""

import os

import pytest

# A script that the test starts in processes of its own.
collect_ignore = ["processes/worker.py"]

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

if not os.environ.get("JAXGRAD_WITHOUT_HOOK"):
    from jaxtyping import install_import_hook

    install_import_hook("jaxgrad", "beartype.beartype")


@pytest.fixture
def neuron():
    """The lesson's neuron: parameters, input and target."""
    import jax.numpy as jnp

    import jaxgrad

    params = jaxgrad.LinearParams(jnp.array([[0.5, 0.4, 0.3]]), jnp.array([0.3]))
    return params, jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[5.0]])
