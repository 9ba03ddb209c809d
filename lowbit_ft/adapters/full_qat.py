"""full_qat: every weight trains, in grid steps, behind the rounding. The ceiling of the other methods, and
the home of methods that need a latent weight.

    W^ = S * clip(round(Phi0 + D))        D [N, K] starts at 0;    S = s0 * exp(log_scale)

Phi0 = code + residual is the packed base in grid units, so step 0 is round-to-nearest, as for lr_qat; D is
its own master (dense.py). Gradients: dD = S M dW, dS = sum dW q, both from the one dW that a step of full QAT
costs. LSQ (arXiv 1902.08153) trains the weight in its own units and lets the trained scale move codes; here
the scale multiplies codes that D alone moves, so every layer learns at one rate (measured against it:
LOG.md).

It costs 16 bytes a weight beside the base (D, its gradient, two averages of Adam; 12 where D is held in less
than fp32): for small models. `ef_qat` is the same for some of the rows.
"""

from typing import ClassVar, Literal

from pydantic import model_validator
from torch import Tensor, nn

from ..grid import GridArgs, IntGrid, PackedWeight, Weight
from .dense import DenseAdapter, DenseOptions
from .pruned import Pruned


class FullQATConfig(DenseOptions):
    prunes: ClassVar[bool] = True

    method: Literal["full_qat"] = "full_qat"

    def build(self, base: Weight, weight: Tensor | None = None) -> "FullQAT":
        assert isinstance(base, PackedWeight)
        return FullQAT(self, base)

    def gradient_cost(self, grid: IntGrid) -> float:
        """Products of the layer's size that the gradients of D and the scales cost: dW."""
        return 1.0

    @model_validator(mode="after")
    def _all_tokens(self) -> "FullQATConfig":
        if self.scale_grad_tokens < 1:
            raise ValueError(
                f"scale_grad_tokens {self.scale_grad_tokens:g}: the gradient of D is a product of all "
                "tokens, which gives the scales' too; set scale_grad_tokens: 1, or method: ef_qat"
            )
        return self


class FullQAT(Pruned, DenseAdapter):
    delta: nn.Parameter

    def __init__(self, config: FullQATConfig, base: PackedWeight):
        super().__init__(config, base)
        self.delta = config.fresh(base.shape, base.codes.device)

    @property
    def shape(self) -> tuple[int, int]:
        return self.delta.shape[0], self.delta.shape[1]

    def grid_args(self, base: PackedWeight) -> GridArgs:
        return GridArgs(scale=self.scale(base), zero=base.zero, delta=self.delta, mask=self.mask)
