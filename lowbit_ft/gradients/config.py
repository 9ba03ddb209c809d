"""The section train.gradient: what all kinds share of it, and what a kind says of itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import BaseModel, Field

from .base import Gradient, Making
from .cage import CLOSED, Cage, CageConfig
from .refusals import Problem


class GradientConfig(BaseModel):
    """The section train.gradient. Subclasses add their own keys; unknown keys are refused."""

    model_config = CLOSED

    kind: str
    cage: CageConfig | None = Field(
        default=None, description="pull the weights to their codes, beside any kind (CAGE); null: no pull"
    )

    backward: ClassVar[bool] = True  # it runs one: activations are kept for it
    clips: ClassVar[bool] = True  # train.max_grad_norm is for it
    estimates: ClassVar[bool] = False  # from losses of forwards, which know not where a backward would stop
    whole: ClassVar[bool] = False  # it reads or moves whole tensors, which shards are not

    def make(self, making: Making) -> Gradient:
        """The kind at work, with its pull. ValueError where this model cannot be trained so."""
        made = self.build(making)
        return made if self.cage is None else Cage(self.cage, made, making)

    def build(self, making: Making) -> Gradient:
        raise AssertionError(f"{type(self).__name__} must define build")

    def problems(self, recipe: Any) -> Iterator[Problem]:
        """What of the recipe it does not go with; recipe.train is there, recipe.adapter perhaps."""
        if self.needs_whole and recipe.train.sharding == "fsdp":
            what = self.kind if self.whole else "cage"
            yield (
                ("train", "sharding"),
                f"got 'fsdp' with gradient: {what}, which reads whole tensors between forward and step; set "
                "sharding: none (DDP)",
            )
        if self.cage is not None:
            yield from self.cage.problems(recipe, self.kind)

    @property
    def needs_whole(self) -> bool:
        return self.whole or self.cage is not None

    @property
    def masters(self) -> int:
        """Bytes per trained number that it holds beside the gradient while forwards without gradient run."""
        return 0

    @property
    def kept(self) -> int:
        """Bytes per trained number that it holds between the steps."""
        return 0

    def told(self, checkpointing: bool) -> str | None:
        """A line for plan: what a step of it costs; None for backprop alone."""
        return None
