"""PyTorch modules and their JAX ports: right ones, and wrong ones, to tell apart.

`PORTS` holds them all; `case.py` says what a port is.
"""

from ports import (
    ports_attention,
    ports_images,
    ports_layers,
    ports_losses,
    ports_models,
    ports_norms,
    ports_optimizers,
    ports_recurrent,
)
from ports.case import Port, Problem, compare

PORTS: tuple[Port, ...] = (
    *ports_layers.PORTS,
    *ports_norms.PORTS,
    *ports_losses.PORTS,
    *ports_recurrent.PORTS,
    *ports_attention.PORTS,
    *ports_images.PORTS,
    *ports_models.PORTS,
    *ports_optimizers.PORTS,
)

__all__ = ["PORTS", "Port", "Problem", "compare"]
