"""Tests the package as a whole: its imports, its names and its documentation."""

import importlib.resources
import inspect
import json
import subprocess
import sys

import pytest

import jaxgrad


def in_a_fresh_python(code):
    """What a program prints as JSON, run on its own."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_import_brings_jax_and_leaves_its_settings():
    modules, before, after = in_a_fresh_python(
        "import json, jax, sys\n"
        "before = {k: repr(v) for k, v in jax.config.values.items()}\n"
        "import jaxgrad\n"
        "after = {k: repr(v) for k, v in jax.config.values.items()}\n"
        "print(json.dumps([list(sys.modules), before, after]))"
    )
    later = {"optax", "rich", "torch", "matplotlib", "flax", "chex", "equinox"}
    assert not later & set(modules)
    assert {"jax", "jaxgrad.gradients"} <= set(modules)
    assert "jax_enable_x64" in before
    assert after == before


def test_what_is_handed_on():
    public = {
        name
        for name, value in vars(jaxgrad).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == set(jaxgrad.__all__)
    assert jaxgrad.__all__ == sorted(jaxgrad.__all__)


@pytest.mark.parametrize("name", jaxgrad.__all__)
def test_every_public_name_is_documented(name):
    public = getattr(jaxgrad, name)
    assert public.__module__.startswith("jaxgrad.")
    sections = inspect.getdoc(public)
    if inspect.isclass(public):
        assert not sections.startswith(f"{name}(")  # what Python writes by itself
        return
    assert "Example:\n  >>> import" in sections
    assert "Args:" in sections
    assert "Returns:" in sections
    for argument in inspect.signature(public).parameters:
        assert f"  {argument}" in sections or f"*{argument}" in sections
    assert public.__annotations__["return"] is not None


def test_it_is_typed():
    assert importlib.resources.files("jaxgrad").joinpath("py.typed").is_file()
