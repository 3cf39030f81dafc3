"""Which JAX leaf is made of which PyTorch parameters, and how: by content."""

from jaxgrad.comparing.matching.content import Differing
from jaxgrad.comparing.matching.match import Matches, match
from jaxgrad.comparing.matching.record import Ambiguity

__all__ = ["Ambiguity", "Differing", "Matches", "match"]
