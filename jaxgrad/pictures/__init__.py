"""Pictures: a tangent as a limit, a descent over the loss, gradients layer by layer."""

from jaxgrad.pictures.descent import plot_descent
from jaxgrad.pictures.gradient_flow import plot_gradient_flow
from jaxgrad.pictures.tangent import plot_tangent

__all__ = ["plot_descent", "plot_gradient_flow", "plot_tangent"]
