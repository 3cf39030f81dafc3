"""PyTorch's parameters, from a state dict or a file, laid into a JAX tree."""

from jaxgrad.comparing.loading.load import (
    LoadedParameter,
    LoadedParameters,
    load_torch_parameters,
)

__all__ = ["LoadedParameter", "LoadedParameters", "load_torch_parameters"]
