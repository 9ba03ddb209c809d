"""lora: the baseline. A plain side product on the packed base, as QLoRA trains it (arXiv 2305.14314).

    y = x W_base^T + alpha/r * (x A^T) B^T

Its merge is NOT exact, and says so: W_base + alpha/r * B A is rounded again (mse search), which throws away
most of what a small update changed. `merge` warns and keeps the measured loss (`rounding_loss`: the size of
the rounding error over the size of the update, often above 1); the methods next to this file exist because of
that number.
"""

import math
import warnings
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..grid import PackedWeight, Weight
from ..grid.calibrate import CALIBRATORS, Stats
from .base import Adapter, AdapterConfig, init_from_field
from .latent import steps_of_product
from .patterns import AlphaPattern


class LoraConfig(AdapterConfig, AlphaPattern):
    exact_merge: ClassVar[bool] = False
    keeps_zeros: ClassVar[bool] = False
    rounds_codes: ClassVar[bool] = False
    delta_unit: ClassVar[Literal["weight", "grid"] | None] = "weight"

    method: Literal["lora"] = "lora"
    rank: int = Field(16, ge=1, le=1024)
    alpha: float = Field(16.0, gt=0)
    dropout: float = Field(
        0.0, ge=0, lt=1, description="share of the inputs that A does not see in training; the base sees all"
    )
    init_from: str | None = init_from_field()

    @property
    def trains_scales(self) -> bool:
        return False

    @property
    def gain(self) -> float:
        return self.alpha / self.rank

    def of_layer(self, layer_name: str) -> "LoraConfig":
        return self.model_copy(update=self.at(layer_name))

    def build(self, base: Weight, weight: Tensor | None = None) -> "Lora":
        assert isinstance(base, PackedWeight)
        return Lora(self, base)


class Lora(Adapter):
    def __init__(self, config: LoraConfig, base: PackedWeight):
        super().__init__(config)
        (n, k), device = base.shape, base.codes.device
        a = torch.empty(config.rank, k, dtype=torch.float32, device=device)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        self.A = nn.Parameter(a)
        self.B = nn.Parameter(torch.zeros(n, config.rank, dtype=torch.float32, device=device))

    def forward(self, x: Tensor, base: Weight) -> Tensor:
        seen = nn.functional.dropout(x, self.config.dropout, self.training) if self.config.dropout else x
        side = (seen @ self.A.to(x.dtype).t()) @ self.B.to(x.dtype).t()
        return base.linear(x) + self.config.gain * side

    def one_step(self, base: Weight) -> dict[str, Tensor | float]:
        return dict(steps_of_product(self.A, self.B, self.config.gain, base.scale))

    @torch.no_grad()
    def merge(self, base: Weight) -> Weight:
        assert isinstance(base, PackedWeight)
        update = self.config.gain * (self.B @ self.A)
        wanted = base.dequantize() + update
        merged = CALIBRATORS["mse"].run(wanted, base.without_residual().grid, Stats())
        self.rounding_loss = float((merged.dequantize() - wanted).norm() / update.norm().clamp_min(1e-12))
        # One text for all layers, so that Python shows it once; the numbers are in rounding_loss.
        warnings.warn(
            "lora: the merge rounds again, so what ships is not what was trained; lr_qat merges exactly",
            stacklevel=2,
        )
        return merged
