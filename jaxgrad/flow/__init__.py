"""What flows through a loss: where it goes bad, and where it dies."""

from jaxgrad.flow.blocks import Block, DeadEntries, Reason, blocks_of, dead_entries_of
from jaxgrad.flow.frames import Frame, backward_of, forward_of, frame_of, opens
from jaxgrad.flow.nonfinite import all_nonfinite, first_nonfinite
from jaxgrad.flow.places import Spot, operation_of, scope_of, spot_of, text_of
from jaxgrad.flow.reasons import NonfiniteKind, Origin
from jaxgrad.flow.summaries import Summary, is_number, summary_of

__all__ = [
    "Block",
    "DeadEntries",
    "Frame",
    "NonfiniteKind",
    "Origin",
    "Reason",
    "Spot",
    "Summary",
    "all_nonfinite",
    "backward_of",
    "blocks_of",
    "dead_entries_of",
    "first_nonfinite",
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
