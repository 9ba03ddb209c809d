"""Rotation: which sites of which layers are turned, from which seed, and what the norms are divided by.

rotation.json is this, as JSON; with the checkpoint it says everything that is needed to fold again.

    r1  residual stream     folded into what reads or writes it; norms lose their gain to the readers
    r2  heads of v          folded into v_proj (rows) and o_proj (columns)
    r3  keys behind rope    online, where they are rounded (model/kv_seam.py); nothing is folded
    r4  inputs of down_proj the weight is folded; the activation side is an online Hadamard
    smooth                  a factor per channel behind a norm: x / s, W s
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from .turn import Turn

FILE = "rotation.json"
Site = Literal["r2", "r3", "r4"]
SITES: tuple[Site, ...] = ("r2", "r3", "r4")  # that are chosen layer by layer


class SiteErrors(BaseModel):
    """Relative squared errors of a site in a layer, turned (on) and not: of its weights (r3 has none), and of
    its activation (its keys) where that is quantized."""

    model_config = ConfigDict(extra="forbid")
    layer: int
    site: Site
    weight_off: float | None
    weight_on: float | None
    activation_off: float | None
    activation_on: float | None
    on: bool


class RotationFile(BaseModel):
    """The content of rotation.json. smooth: norm -> factors, of three digits; errors: of kind adaptive."""

    model_config = ConfigDict(extra="forbid")
    seed: int
    r1: bool
    r2: list[bool]
    r3: list[bool]
    r4: list[bool]
    smooth: dict[str, list[float]]
    alphas: dict[str, float]
    errors: list[SiteErrors]
    criterion: str


@dataclass(frozen=True)
class Rotation:
    """r2, r3, r4: a bool per decoder layer. smooth: norm (its name in the model) -> factors [H], float64."""

    seed: int = 0
    r1: bool = False
    r2: tuple[bool, ...] = ()
    r3: tuple[bool, ...] = ()
    r4: tuple[bool, ...] = ()
    smooth: dict[str, Tensor] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    errors: tuple[SiteErrors, ...] = ()
    criterion: str = ""

    def stream(self, size: int, centered: bool) -> Turn:
        """r1 for a residual stream of that width; centered: its norms subtract the mean."""
        return Turn(size, self.seed, centered)

    def heads(self, size: int) -> Turn:
        """r2 for heads of that width."""
        return Turn(size, self.seed + 1)

    def to_json(self) -> dict[str, Any]:
        made = RotationFile(
            seed=self.seed,
            r1=self.r1,
            r2=list(self.r2),
            r3=list(self.r3),
            r4=list(self.r4),
            smooth={name: values.tolist() for name, values in self.smooth.items()},
            alphas=self.alphas,
            errors=list(self.errors),
            criterion=self.criterion,
        )
        return made.model_dump(mode="json")

    @classmethod
    def of(cls, file: RotationFile) -> "Rotation":
        return cls(
            seed=file.seed,
            r1=file.r1,
            r2=tuple(file.r2),
            r3=tuple(file.r3),
            r4=tuple(file.r4),
            smooth={name: torch.tensor(values, dtype=torch.float64) for name, values in file.smooth.items()},
            alphas=file.alphas,
            errors=tuple(file.errors),
            criterion=file.criterion,
        )
