"""reading: a scheme from the configuration of a folder, which may be a stranger's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from .base import BITS, Activation, Scheme


def scheme_from_json(entry: Any, kinds: Mapping[str, type[Activation]]) -> Scheme:
    """The inverse of `Scheme.to_json`. ValueError naming what is wrong."""
    known = {field.name for field in fields(Scheme)}
    if not isinstance(entry, dict) or not {"kind", "bits"} <= set(entry) <= known:
        raise ValueError(f"got {entry!r}; needs an object with kind and bits, of {', '.join(sorted(known))}")
    kind, bits, group = entry["kind"], entry["bits"], entry.get("group_size", -1)
    if kind not in kinds:
        raise ValueError(f"kind: got {kind!r}; allowed: {', '.join(kinds)}")
    if type(bits) is not int or bits not in BITS:
        raise ValueError(f"bits: got {bits!r}; allowed: {', '.join(map(str, BITS))}")
    if type(group) is not int or group < 1 and group != -1:
        raise ValueError(f"group_size: got {group!r}; needs a positive number, or -1")
    for key in ("symmetric", "dynamic"):
        if not isinstance(entry.get(key, True), bool):
            raise ValueError(f"{key}: got {entry[key]!r}; allowed: true, false")
    segments, clip = entry.get("segments", []), entry.get("clip", 1.0)
    if not _positive(entry.get("mask", 1.0)):
        raise ValueError(f"mask: got {entry['mask']!r}; needs a positive number")
    if not (all(map(_positive, clip)) if isinstance(clip, list) else _positive(clip)):
        raise ValueError(f"clip: got {clip!r}; needs a positive number, or one for each segment")
    if not _numbers(segments, int) or not all(size > 0 for size in segments) or len(segments) == 1:
        raise ValueError(f"segments: got {segments!r}; needs a list of two or more numbers of channels")
    if segments and not kinds[kind].in_segments:
        raise ValueError(f"segments: got {segments!r}; kind {kind} has none")
    if isinstance(clip, list) and len(clip) != len(segments):
        raise ValueError(
            f"clip: got {len(clip)} for {len(segments)} segments; needs one for each, or one for all"
        )
    scale, zero = entry.get("scale", []), entry.get("zero", [])
    if not _numbers(scale, float) or not all(0 < value < float("inf") for value in scale):
        raise ValueError(f"scale: got {scale!r}; needs a list of positive numbers")
    if not isinstance(entry.get("learn", ""), str):
        raise ValueError(f"learn: got {entry['learn']!r}; needs the name of a layer")
    if "learn" in entry and segments and not entry.get("dynamic", True):
        raise ValueError("learn: the static scales of segments do not learn; drop one of both")
    if not _numbers(zero, int):
        raise ValueError(f"zero: got {zero!r}; needs a list of integers")
    lists = {"scale": tuple(scale), "zero": tuple(zero), "segments": tuple(segments)}
    made = Scheme(**{**entry, **lists, "clip": tuple(clip) if isinstance(clip, list) else clip})
    if not all(made.lowest <= value <= made.highest for value in made.zero):
        raise ValueError(f"zero: got {zero!r}; needs {made.lowest} to {made.highest}")
    if not made.dynamic and not kinds[kind].static_scales:
        raise ValueError(f"dynamic: got false; kind {kind} is dynamic")
    each = max(1, len(segments))
    if len(scale) != (0 if made.dynamic else kinds[kind].static_scales * each):
        count = kinds[kind].static_scales * each
        raise ValueError(f"scale: got {scale!r}; kind {kind} takes {count} where it is static, else none")
    if len(zero) != (0 if made.dynamic or made.symmetric else each):
        raise ValueError(f"zero: got {zero!r}; a static scheme that is not symmetric takes one, others none")
    if not made.symmetric and not kinds[kind].can_be_asymmetric:
        raise ValueError(f"symmetric: got false; kind {kind} has no zero point")
    return made


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _numbers(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)
