"""train.signal: what the loss compares the model with, and what its options go with."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ...names import did_you_mean, nearest
from ...signals import REFERENCES, SIGNALS, TEACHERS, teacher_kind
from ...signals.dpo import DPO_LOSSES
from ...signals.intervention import MODES
from ...train.losses import LOSSES
from ..layers import shapes_here
from ..paths import path_is
from ..values import OneOf
from ..yaml import Problem
from .base import Count, Positive, Problems, Section, Unit


def _fraction(value: Any) -> Any:
    """1/6 as people write it."""
    try:
        return float(Fraction(value)) if isinstance(value, str) and "/" in value else value
    except (ValueError, ZeroDivisionError):
        return value


Share = Annotated[float, BeforeValidator(_fraction), Field(gt=0, le=1)]
Weight = Annotated[float, Field(ge=0)]


class LossesSection(Section):
    """The weights of what layers compares; 0: it is left out (of logits: told and not learned)."""

    labels: Weight = Field(default=0.0, description="the loss of the rows' own answers")
    logits: Weight = Field(default=1.0, description="the distribution of the answers")
    hidden: Weight = Field(default=1.0, description="the output of every layer")
    scores: Weight = Field(
        default=1.0, description="of attention before its softmax, which is then computed as eager's is"
    )
    outputs: Weight = Field(default=1.0, description="the output of every layer's attention")


class InterventionSection(Section):
    """Tensors of the teacher in the student's attention, for the first part of the run."""

    mode: Annotated[str, OneOf(MODES)] = Field(
        default="gradual",
        description="what is the teacher's. map: the probabilities; context: their product with v; output: "
        "the result of the output matrix; gradual: output, context, map; inverted: the other way round; "
        "stochastic: one of the three, drawn in every step",
    )
    boundaries: tuple[Share, Share] | None = Field(
        default=None,
        description="gradual, inverted: the shares of the intervened steps at which it goes on; null: 1/6 "
        "and 1/3, or 1/3 and 2/3",
    )
    share: Share = Field(default=0.5, description="of the steps that it intervenes in, the first ones")

    @model_validator(mode="after")
    def _ordered(self) -> InterventionSection:
        if self.boundaries is None:
            return self
        readers = [name for name, mode in MODES.items() if mode.boundaries]
        if self.mode not in readers:
            raise ValueError(
                f"boundaries {list(self.boundaries)}, which mode: {self.mode} does not read; remove it, or "
                f"set mode: {' or '.join(readers)}"
            )
        if self.boundaries[0] > self.boundaries[1]:
            raise ValueError(f"boundaries {list(self.boundaries)}; allowed: two shares that do not fall")
        return self


class SignalSection(Section):
    """What the loss compares the model with."""

    kind: Annotated[str, OneOf(SIGNALS)] = Field(
        default="labels",
        description="labels: the tokens of the data; logits: the teacher's next-token distribution; "
        "mix: both; layers: its logits and what its layers make; dpo, orpo: of two answers the chosen one "
        "(data.train.format: preference)",
    )
    losses: LossesSection | None = Field(
        default=None, description="layers: the weights of its parts; null: 1 each"
    )
    intervention: InterventionSection | None = Field(
        default=None, description="layers: what of the teacher takes the student's place; null: nothing"
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

    @property
    def weights(self) -> dict[str, float]:
        """Of the parts of layers."""
        return dict(self.losses or LossesSection())

    @property
    def learns_labels(self) -> bool:
        """Whether the loss has a part of the rows' own answers."""
        return "labels" in SIGNALS[self.kind].parts(self)

    @model_validator(mode="after")
    def _compares(self) -> SignalSection:
        if not any(self.weights.values()):
            raise ValueError("losses are all 0, so nothing is learned; give one of them a weight above 0")
        return self

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
    if signal.of_layers and not r.task.states:
        yield from _by_layers(r, train)
    if LOSSES[train.loss].fuse is not None:
        yield Problem(
            ("train", "loss"),
            f"got {train.loss!r}, which makes the loss of labels and of nothing else; set loss: chunked, or "
            "train.signal.kind: labels",
        )


def _by_layers(r: Any, train: Any) -> Problems:
    """What runs beside a walk through the layers of student and teacher."""
    kind, signal = train.signal.kind, SIGNALS[train.signal.kind]
    if train.teacher == "cached":
        yield Problem(
            ("train", "teacher"),
            f"got 'cached', which keeps answers and no layers, and train.signal.kind: {kind} compares "
            "layers; set teacher: residual, or a model of the same depth and width (model.path: itself at 8 "
            "bits)",
        )
    for key, usual, why in (
        ("gradient_checkpointing", False, "a layer that is run again would ask the teacher's layer again"),
        ("compile", False, "the hooks that meet the teacher are no code for a compiler"),
        ("sharding", "none", "its layers are called beside the hooks that gather them"),
    ):
        if (got := getattr(train, key)) != usual:
            told = str(usual).lower()
            yield Problem(("train", key), f"got {got!r} with signal.kind: {kind}: {why}; set {told}")
    if train.signal.intervention is not None and train.gradient.estimates:
        yield Problem(
            ("train", "gradient", "kind"),
            f"got {train.gradient.kind!r} with an intervention, which says where a backward stops; set "
            "backprop",
        )
    chosen = r.model.attention
    if signal.reads_maps(train.signal) and chosen not in ("sdpa", "eager"):
        yield Problem(
            ("model", "attention"),
            f"got {chosen!r}, which never has the scores of attention in memory, and train.signal compares "
            "or replaces them; set sdpa, or losses.scores: 0 and an intervention by context or output",
        )
    quant = getattr(r, "quant", None)
    if quant is not None and quant.folds and train.teacher != "residual":
        yield Problem(
            ("train", "teacher"),
            f"got {train.teacher!r}, whose layers are in the basis of the files, and quant.rotation or "
            "smooth turns the model's; set teacher: residual, or rotation.kind: none",
        )
