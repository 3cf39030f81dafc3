"""What flows through a loss: where it goes bad, and where it dies."""

from jaxgrad.flow.frames import Frame, backward_of, forward_of, frame_of, opens
from jaxgrad.flow.places import Spot, operation_of, scope_of, spot_of, text_of
from jaxgrad.flow.summaries import Summary, is_number, summary_of

__all__ = [
    "Frame",
    "Spot",
    "Summary",
    "backward_of",
    "forward_of",
    "frame_of",
    "is_number",
    "opens",
    "operation_of",
    "scope_of",
    "spot_of",
    "summary_of",
    "text_of",
]
