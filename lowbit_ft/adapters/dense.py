"""Dense: what the methods share whose D is a trained tensor of its own, one number per weight, in grid steps.

`master` is what D is held in between the steps (the step itself: train/optimizers/masters.py):

    fp32    D [R, K] fp32: 16 bytes a weight with its gradient and AdamW's averages
    bf16    D and its gradient in bf16, 12 bytes; a step is rounded at random, so that none is lost on average
    none    no latent weight (ECO, arXiv 2601.22101): D counts whole steps, so the codes are all there is. A
            step is rounded onto them, and what the rounding threw away goes into Adam's first average

Whole steps lie in bf16 too, which holds them exactly up to 256, more than any grid has codes: autograd and
DDP want a floating type.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from .base import ScaledAdapter, ScaleOptions

Master = Literal["fp32", "bf16", "none"]


class DenseOptions(ScaleOptions):
    dense_delta: ClassVar[bool] = True
    code_parameters: ClassVar[frozenset[str]] = frozenset({"delta"})

    master: Master = Field(
        "fp32",
        description="what D is held in between the steps. fp32; bf16: rounded at random, 12 bytes a weight "
        "in place of 16; none: in whole grid steps, the remainder put back through AdamW's momentum (ECO)",
    )

    def fresh(self, shape: tuple[int, int], device: torch.device) -> nn.Parameter:
        """D of a new adapter."""
        dtype = torch.float32 if self.master == "fp32" else torch.bfloat16
        return nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))


def held_short(config: Any) -> Master | None:
    """What the D of this method is held in, where it has one and that is less than fp32: only our own AdamW
    steps on it."""
    return config.master if isinstance(config, DenseOptions) and config.master != "fp32" else None


class DenseAdapter(ScaledAdapter):
    config: DenseOptions
    delta: nn.Parameter | None

    def misfit(self, tensors: Mapping[str, Tensor]) -> str | None:
        """A file's D is of another master: reading it would round it."""
        delta = tensors.get("delta")
        if delta is None or self.delta is None or delta.dtype == self.delta.dtype:
            return None
        return (
            f"delta: got {delta.dtype}; adapter.master: {self.config.master} holds {self.delta.dtype}: set "
            "the master that it was trained with"
        )
