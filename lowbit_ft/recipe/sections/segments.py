"""quant.activations.segments and adapter.segments: whether the model can be traced, and whether anything is
in segments. Only config.json is read; the trace takes seconds, and is made only where it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...segments import Segments, segments_in
from ..layers import Shapes, shapes_here
from ..yaml import KeyPath, Problem
from .base import Problems


def asking(r: Any) -> Iterator[KeyPath]:
    """The keys that ask for segments."""
    for path, section in ((("quant", "activations"), r.quant.activations), (("adapter",), r.adapter)):
        if getattr(section, "segments", "none") == "auto":
            yield (*path, "segments")


def segments_of_shapes(shapes: Shapes | None) -> dict[str, Segments]:
    """Of the model that is here; {} where it is not, or cannot be traced, which check_segments tells."""
    try:
        return {} if shapes is None else segments_in(shapes.folder)
    except ValueError:
        return {}


def check_segments(r: Any) -> Problems:
    """A model that cannot be traced has no plan."""
    asked = list(asking(r))
    shapes = shapes_here(r.model.path, r.model.revision) if asked else None
    if shapes is None:
        return
    try:
        segments_in(shapes.folder)
    except ValueError as error:
        for path in asked:
            yield Problem(path, f"got 'auto': {error}; set segments: none")


def segment_notes(r: Any) -> Iterator[str]:
    """Where `auto` finds nothing."""
    asked = list(asking(r))
    shapes = shapes_here(r.model.path, r.model.revision) if asked else None
    if shapes is None:
        return
    found = segments_of_shapes(shapes)
    for path in asked:
        packed = [
            found[x.name] for x in shapes.linears if x.name in found and not r.quant.skip_reason(x.name)
        ]
        inputs = path[0] == "quant"
        if not any(one.widths if inputs else one.outputs for one in packed):
            what = (
                "input of a packed layer is put together of segments" if inputs else "packed matrix is fused"
            )
            yield f"{'.'.join(map(str, path))}: auto changes nothing here: no {what}"
