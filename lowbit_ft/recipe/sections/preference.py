"""Rows of two answers and the signals that learn from them: what goes with them, and what does not."""

from __future__ import annotations

from typing import Any

from ...data.formats import FORMATS
from ...names import listed
from ...signals import REFERENCES, SIGNALS
from ...train.losses import LOSSES
from ..yaml import Problem
from .base import Problems
from .data import sources_at

PAIRS = "preference"


def check_preference(r: Any) -> Problems:
    """A signal of pairs has rows of pairs, and rows of pairs have such a signal."""
    kind, data = r.train.signal.kind, r.data
    pairs = SIGNALS[kind].pairs
    learn = listed(name for name, signal in SIGNALS.items() if signal.pairs)
    if pairs and data.train is None:
        yield Problem(
            ("train", "signal", "kind"),
            f"got {kind!r}, which learns from pairs of answers, and there is no data.train; add one of "
            f"format: {PAIRS}, or set signal.kind: labels",
        )
    sources = sources_at(("data", "train"), data.train) + sources_at(("data", "valid"), data.valid)
    for where, source in sources:
        if source.format is None or FORMATS[source.format].pairs == pairs:
            continue
        way_out = (
            f"train.signal.kind: {kind} learns from pairs; set format: {PAIRS} (columns prompt, chosen, "
            "rejected), or signal.kind: labels"
            if pairs
            else f"has two answers a row, and train.signal.kind: {kind} does not compare them; set "
            f"signal.kind (with pairs: {learn}), or format: {FORMATS[source.format].alone}, "
            "which learns the better ones"
        )
        yield Problem((*where, "format"), f"got {source.format!r}: {way_out}")
    if pairs:
        yield from _pairs(r)


def _pairs(r: Any) -> Problems:
    kind, train = r.train.signal.kind, r.train
    if r.data.train_on == "all":
        yield Problem(
            ("data", "train_on"),
            f"got 'all' with train.signal.kind: {kind}, which compares answers to one prompt; set assistant",
        )
    if LOSSES[train.loss].fuse is not None:
        yield Problem(
            ("train", "loss"),
            f"got {train.loss!r}, which makes the loss of labels and of nothing else; set loss: chunked, or "
            "train.signal.kind: labels",
        )
    if train.max_steps == 0:
        yield Problem(
            ("train", "signal", "kind"),
            f"got {kind!r} with max_steps 0: no step is trained; set max_steps: 1 or more, or remove "
            "train.signal",
        )
    if not SIGNALS[kind].refers:
        return
    first = "run that as a recipe of its own and set model.path to its export (compressed-tensors, gptq, awq)"
    if train.reconstruct is not None:
        yield Problem(
            ("train", "reconstruct"),
            f"given with train.signal.kind: {kind}, whose reference is the base without adapters, and a "
            f"fit would move the start away from it; remove it, or {first}",
        )
    if getattr(r.adapter, "init_from", None) is not None:
        yield Problem(
            ("adapter", "init_from"),
            f"given with train.signal.kind: {kind}, whose reference is the base without adapters and not the "
            f"adapters that it starts from; remove it, or {first}",
        )
    if warm := getattr(r.adapter, "warmup_steps", 0):
        yield Problem(
            ("adapter", "warmup_steps"),
            f"got {warm} with train.signal.kind: {kind}: a warm-up trains unrounded weights against a "
            "rounded reference; set it to 0",
        )
    name = train.signal.reference
    for reason in REFERENCES[name].problems(r, name):
        yield Problem(("train", "signal", "reference"), f"got {name!r}, but {reason}")
