"""quant.sparsity: which weights are zero and stay it, and what that goes with."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from ...adapters.masks import against_schedule
from ...grid import GRIDS
from ...grid.calibrate import CALIBRATORS
from ...names import listed
from ...sparsity import PATTERNS, SPARSITY, Gradual, Pattern, Sparsity
from ..layers import shapes_here
from ..values import OneOf
from ..yaml import Problem
from .base import Count, Problems, Section

HERE = ("quant", "sparsity", "kind")
SCHEDULE = ("quant", "sparsity", "schedule")
AMOUNT = 0.5


class ScheduleSection(Section):
    """Zeros that come while the run trains, instead of before it (sparsity/gradual.py)."""

    start: float = Field(default=0.0, ge=0, lt=1, description="share of the steps before the first zeros")
    end: float = Field(default=0.5, gt=0, le=1, description="share of the steps at which all are there")
    every: Count = Field(default=10, description="optimizer steps from one choice of zeros to the next")

    @model_validator(mode="after")
    def _forwards(self) -> ScheduleSection:
        if self.start > self.end:
            raise ValueError(f"start {self.start:g} is behind end {self.end:g}; set start below end")
        return self


class SparsitySection(Section):
    """Weights that are zero in the base, in every forward, in merged/ and in the export: docs/sparsity.md."""

    kind: Annotated[str, OneOf(SPARSITY)] = Field(
        default="none",
        description="locked: the zeros of the checkpoint stay; or prune now, and lock: magnitude (the "
        "smallest weights), wanda (weight times input, by calibration text), sparsegpt (by its Hessian, the "
        "weights that are left make up)",
    )
    amount: float | None = Field(
        default=None, gt=0, lt=1, description="share of each matrix that is pruned; null: 0.5"
    )
    pattern: Annotated[str, OneOf(PATTERNS)] = Field(
        default="unstructured",
        description="where zeros may lie: unstructured, 2:4 (two of four consecutive inputs), 1x4 (four "
        "together)",
    )

    schedule: ScheduleSection | None = Field(
        default=None,
        description="kind: magnitude: zeros come while the run trains, from the weights as they are then; "
        "null: all at once, while packing",
    )

    @property
    def at_once(self) -> Sparsity:
        """What chooses zeros while a matrix is packed."""
        return SPARSITY[self.kind if self.schedule is None else "none"]

    def gradual(self, total: int) -> Gradual | None:
        """How zeros come in a run of so many steps; None: they are there from the start."""
        if self.schedule is None:
            return None
        return Gradual.of(self.kind, self.share, self.pattern, total, **dict(self.schedule))

    @property
    def share(self) -> float:
        return AMOUNT if self.amount is None else self.amount

    @property
    def said(self) -> str:
        """What is zero, to be said behind what the weights are on."""
        kind = SPARSITY[self.kind]
        if not kind.locks:
            return ""
        if self.schedule is not None:
            return f", up to {self.share:.0%} zeros {self.pattern} by {self.kind} while it trains"
        return (
            f", {self.share:.0%} zeros {self.pattern} by {self.kind}"
            if kind.prunes
            else f", zeros {self.kind}"
        )


def check_sparsity(r: Any) -> Problems:
    """What stands against these zeros, before anything is loaded."""
    quant, section = r.quant, r.quant.sparsity
    kind, pattern = SPARSITY[section.kind], PATTERNS[section.pattern]
    if section.amount is not None and not kind.prunes:
        yield Problem(
            ("quant", "sparsity", "amount"),
            f"got {section.amount:g}, and kind: {section.kind} prunes nothing; remove it, or set kind: "
            f"{listed(name for name, one in SPARSITY.items() if one.prunes)}",
        )
    elif section.amount is not None and pattern.amount not in (None, section.amount):
        yield Problem(
            ("quant", "sparsity", "amount"),
            f"got {section.amount:g}; pattern {pattern.name} is {pattern.amount:g}",
        )
    if section.schedule is not None:
        yield from _against_growth(kind, pattern, section)
    if not kind.locks:
        if section.pattern != "unstructured":
            yield Problem(
                ("quant", "sparsity", "pattern"),
                f"got {section.pattern!r}, and kind: {section.kind} has no zeros; remove it",
            )
        return
    yield from _against(quant, section)
    if kind.prunes and pattern.width > 1 and (text := _ragged(r, pattern)):
        yield Problem(("quant", "sparsity", "pattern"), f"got {pattern.name!r}: {text}")


def check_schedule(r: Any) -> Problems:
    """Zeros that come while the run trains, against what trains and how."""
    if r.quant.sparsity.schedule is None:
        return
    if (reason := against_schedule(r.adapter)) is not None:
        yield Problem(SCHEDULE, f"got a section, and {reason}")
    if r.train.max_steps == 0:
        yield Problem(SCHEDULE, "got a section, but train.max_steps is 0, so nothing prunes; remove it")
    if r.train.sharding != "none":
        yield Problem(
            SCHEDULE,
            f"got a section with train.sharding: {r.train.sharding}, where no process holds a whole matrix "
            "to choose its smallest weights from; set sharding: none",
        )


def _against_growth(kind: Sparsity, pattern: Pattern, section: SparsitySection) -> Problems:
    """A schedule, against the other keys of its section."""
    if not kind.grows:
        fits = listed(name for name, one in SPARSITY.items() if one.grows)
        yield Problem(
            SCHEDULE,
            f"got a section with kind: {section.kind}, which looks at the model once; set kind: {fits}, or "
            "remove it",
        )
    if pattern.amount is not None:
        yield Problem(
            ("quant", "sparsity", "pattern"),
            f"got {section.pattern!r} with a schedule; {section.pattern} is {pattern.amount:g} of the "
            "weights from the start: set pattern: unstructured or 1x4, or remove schedule",
        )


def _against(quant: Any, section: SparsitySection) -> Problems:
    """Other keys of quant."""
    kind = section.at_once
    if GRIDS[quant.grid].kind != "integer":
        yield Problem(
            HERE,
            f"got {section.kind!r}, and quant.grid: {quant.grid} has no zero: its levels are sums of plus "
            "and minus; set quant.grid: integer",
        )
        return
    if quant.rotation.turns:
        yield Problem(
            HERE,
            f"got {section.kind!r} with rotation.kind: {quant.rotation.kind}, whose fold mixes weights and "
            "leaves no zero; set rotation: {kind: none} (quant.smooth keeps zeros)",
        )
    if quant.from_checkpoint and kind.prunes:
        yield Problem(
            HERE,
            f"got {section.kind!r}, but the checkpoint comes quantized, and pruning would round what is left "
            "anew; set kind: locked (its codes at the zero point stay), or give the full-precision one",
        )
        return
    calibrator = CALIBRATORS.get(quant.calibrate)
    if calibrator is None:
        return
    if kind.needs_text and calibrator.block is not None:
        yield Problem(
            HERE,
            f"got {section.kind!r}, which prunes matrix by matrix as text passes, and calibrate: "
            f"{quant.calibrate} rounds a decoder layer at once; set calibrate: gptq, or kind: magnitude",
        )
    if kind.prunes and calibrator.exact:
        yield Problem(
            HERE,
            f"got {section.kind!r} with calibrate: {quant.calibrate}, whose weights lie on the grid as they "
            "are; set kind: locked",
        )
    if section.kind == "sparsegpt" and section.pattern != "unstructured" and quant.calibration.act_order:
        yield Problem(
            ("quant", "calibration", "act_order"),
            f"got true, which takes inputs out of their order, and pattern {section.pattern} is of "
            "neighbours; set false",
        )


def _ragged(r: Any, pattern: Any) -> str | None:
    """The first matrix whose inputs the pattern does not divide."""
    shapes = shapes_here(r.model.path, r.model.revision) if hasattr(r, "model") else None
    for layer in [] if shapes is None else shapes.packed(r.quant):
        if text := pattern.reject_width(layer.in_features):
            return f"{layer.name}: {text}"
    return None
