"""train.signal: what the loss compares the model with, and what its options go with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ...names import did_you_mean, nearest
from ...signals import REFERENCES, SIGNALS, TEACHERS, teacher_kind
from ...signals.dpo import DPO_LOSSES
from ...train.losses import LOSSES
from ..layers import shapes_here
from ..paths import path_is
from ..values import OneOf
from ..yaml import Problem
from .base import Count, Positive, Problems, Section, Unit


class SignalSection(Section):
    """What the loss compares the model with."""

    kind: Annotated[str, OneOf(SIGNALS)] = Field(
        default="labels",
        description="labels: the tokens of the data; logits: the teacher's next-token distribution; "
        "mix: both; dpo, orpo: of two answers the chosen one (data.train.format: preference)",
    )
    temperature: Positive = Field(
        default=1.0, description="of both distributions; the divergence is multiplied with its square"
    )
    label_weight: Unit = Field(default=0.5, description="mix: of the labels; the teacher has the rest")
    top_k: Count | None = Field(
        default=None,
        description="compare the k most likely tokens of the teacher and the mass of all others; null: all "
        "that the teacher has (cached: 64)",
    )
    on: Literal["all", "targets"] = Field(
        default="targets",
        description="where the teacher is asked: at the labels' targets, or everywhere but padding",
    )
    divergence: Literal["forward", "reverse", "symmetric"] = Field(
        default="forward", description="KL(teacher, model), KL(model, teacher), or their mean"
    )

    beta: Positive = Field(
        default=0.1, description="dpo: how near to the reference it stays; orpo: weight of the odds ratio"
    )
    loss_type: Annotated[str, OneOf(DPO_LOSSES)] = Field(
        default="sigmoid", description="dpo: the loss of a pair; robust expects wrong labels"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        default=0.0, description="dpo, loss_type robust: the share of pairs that are the wrong way round"
    )
    reference: Annotated[str, OneOf(REFERENCES)] = Field(
        default="step",
        description="dpo: the packed base without adapters. step: run in every micro-batch; cached: asked "
        "once before training, 16 bytes per pair in reference/ of the run",
    )

    @model_validator(mode="after")
    def _smooth(self) -> SignalSection:
        if self.label_smoothing and self.loss_type != "robust":
            raise ValueError(
                f"label_smoothing {self.label_smoothing:g}, which loss_type: {self.loss_type} does not read; "
                "remove it, or set loss_type: robust"
            )
        return self

    @model_validator(mode="after")
    def _read(self) -> SignalSection:
        unread = self.model_fields_set - {"kind"} - SIGNALS[self.kind].keys
        changed = sorted(k for k in unread if getattr(self, k) != type(self).model_fields[k].default)
        if changed:
            readers = [name for name, signal in SIGNALS.items() if changed[0] in signal.keys]
            raise ValueError(
                f"{changed[0]} {getattr(self, changed[0])!r}, which kind: {self.kind} does not read; "
                f"remove it, or set kind: {' or '.join(readers)}"
            )
        return self


def check_signal(r: Any) -> Problems:
    """A signal that asks a teacher has one that this recipe can have, and nothing beside it that cannot."""
    train = r.train
    signal = SIGNALS[train.signal.kind]
    if train.teacher_dir is not None and not (signal.asks and train.teacher == "cached"):
        yield Problem(
            ("train", "teacher_dir"),
            f"got {train.teacher_dir!r}, which only teacher: cached reads; remove it, or set teacher: cached",
        )
    if not signal.asks:
        if train.teacher is not None:
            asking = ", ".join(name for name, s in SIGNALS.items() if s.asks)
            yield Problem(
                ("train", "teacher"),
                f"got {train.teacher!r}, but train.signal.kind: {train.signal.kind} asks no teacher; remove "
                f"it, or set train.signal.kind (with a teacher: {asking})",
            )
        return
    if train.teacher is None:
        yield Problem(
            ("train", "teacher"),
            f"missing, and train.signal.kind: {train.signal.kind} asks a teacher; set one of "
            f"{', '.join(TEACHERS)}, or the folder or hub id of a model with the same tokens",
        )
        return
    name = train.teacher
    if name not in TEACHERS and not path_is(Path(name), "any") and nearest(name, TEACHERS):
        yield Problem(
            ("train", "teacher"),
            f"got {name!r}, which is no folder here{did_you_mean(name, TEACHERS)}; allowed: "
            f"{', '.join(TEACHERS)}, or the folder or hub id of a model with the same tokens",
        )
        return
    for reason in teacher_kind(train.teacher).problems(r, train.teacher):
        yield Problem(("train", "teacher"), f"got {train.teacher!r}, but {reason}")
    if train.max_steps == 0:
        yield Problem(
            ("train", "signal", "kind"),
            f"got {train.signal.kind!r} with max_steps 0: no step is trained, and no teacher asked; set "
            "max_steps: 1 or more, or remove train.signal and train.teacher",
        )
    shapes = shapes_here(r.model.path, r.model.revision)
    tokens = shapes.number("vocab_size") if shapes is not None else None
    if tokens is not None and (train.signal.top_k or 0) > tokens:
        yield Problem(
            ("train", "signal", "top_k"),
            f"got {train.signal.top_k}; allowed: at most the {tokens} tokens of the model, or null",
        )
    if LOSSES[train.loss].fuse is not None:
        yield Problem(
            ("train", "loss"),
            f"got {train.loss!r}, which makes the loss of labels and of nothing else; set loss: chunked, or "
            "train.signal.kind: labels",
        )
