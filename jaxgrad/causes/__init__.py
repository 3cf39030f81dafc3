"""Two gradients differ: the likely mistake."""

from jaxgrad.causes.find import find_cause
from jaxgrad.causes.guesses import KINDS, Cause
from jaxgrad.causes.sums import Sums, find_cause_by_sums

__all__ = ["KINDS", "Cause", "Sums", "find_cause", "find_cause_by_sums"]
