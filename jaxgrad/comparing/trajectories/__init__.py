"""Do the optimizers of both sides move the parameters alike, and if not, why?"""

from jaxgrad.comparing.trajectories.compare import (
    Trajectory,
    check_optimizers,
    trajectories,
)
from jaxgrad.comparing.trajectories.running import JaxMover, TorchMover

__all__ = [
    "JaxMover",
    "TorchMover",
    "Trajectory",
    "check_optimizers",
    "trajectories",
]
