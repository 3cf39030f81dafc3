"""What PyTorch might have to compute otherwise, so that it gives what JAX does.

Each hypothesis changes one recorded call: another epsilon, the other gelu, no dropout.
They are tested elsewhere, by what the changed call gives.
"""

from jaxgrad.comparing.hypotheses.base import Context, Hypothesis
from jaxgrad.comparing.hypotheses.table import hypotheses, rewrite

__all__ = ["Context", "Hypothesis", "hypotheses", "rewrite"]
