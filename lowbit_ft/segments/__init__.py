"""Segments: which channels of a linear's input come from elsewhere than the others, which of its output go
elsewhere. `find_segments` reads it off a model that has no weights.

A linear's input is in segments where it was put together: heads side by side (an attention's output
projection), tensors that were concatenated. Its output is in segments where it is taken apart: q, k and v, or
gate and up, of one fused matrix. Nobody lists architectures: the model is traced (trace.py), and the numbers
of the channels are sent through its views and slices (channels.py).
"""

from ..model.fused import Segment, check_parts
from .channels import Segments
from .layout import Parts, is_segment, layout, read_layout
from .trace import find_segments, segments_in, segments_of

__all__ = [
    "Parts",
    "Segment",
    "Segments",
    "check_parts",
    "find_segments",
    "is_segment",
    "layout",
    "read_layout",
    "segments_in",
    "segments_of",
]
