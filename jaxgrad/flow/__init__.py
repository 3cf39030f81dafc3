"""What flows through a loss: where it goes bad, and where it dies."""

from jaxgrad.flow.blocks import Block, DeadEntries, blocks_of, dead_entries_of
from jaxgrad.flow.frames import Frame, frame_of
from jaxgrad.flow.nonfinite import all_nonfinite, first_nonfinite
from jaxgrad.flow.opening import backward_of, forward_of, opens
from jaxgrad.flow.places import Line, line_of
from jaxgrad.flow.reasons import Origin
from jaxgrad.flow.summaries import Summary, is_number

__all__ = [
    "Block",
    "DeadEntries",
    "Frame",
    "Line",
    "Origin",
    "Summary",
    "all_nonfinite",
    "backward_of",
    "blocks_of",
    "dead_entries_of",
    "first_nonfinite",
    "forward_of",
    "frame_of",
    "is_number",
    "line_of",
    "opens",
]
