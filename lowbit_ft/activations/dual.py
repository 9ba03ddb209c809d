"""dual: SegQuant's two scales, one for negative and one for positive values (arXiv 2507.14811).

    x^ = s_- q  where x < 0,  s_+ q  where x > 0        s_- = |min| / 2^(b-1),  s_+ = max / (2^(b-1) - 1)

Two integer products with the same weight codes, so it pays only where most values are of one sign: behind a
GELU or SiLU without a gate. A gated product (Llama's down_proj) is balanced, and min-max costs one product.
"""

from typing import ClassVar

import torch
from torch import Tensor

from .base import Activation, positive


class Dual(Activation):
    kind: ClassVar[str] = "dual"
    static_scales: ClassVar[int] = 2
    can_be_asymmetric: ClassVar[bool] = False
    products: ClassVar[int] = 2

    def scales(self, x: Tensor) -> tuple[Tensor, None]:
        """[..., K] -> [..., 2]: of the negative and the positive values."""
        scheme = self._scheme
        if not scheme.dynamic:
            return self.static(x.device), None
        low, high = x.aminmax(dim=-1, keepdim=True)
        clip = self.clip(x.device)
        below = low.clamp(max=0) * _over(clip, scheme.lowest)
        above = high.clamp(min=0) * _over(clip, scheme.highest)
        return positive(torch.cat((below, above), dim=-1)), None

    def spread(self, values: Tensor, x: Tensor) -> Tensor:
        return torch.where(x < 0, values[..., :1], values[..., 1:])

    def first(self, x: Tensor) -> Tensor:
        return x < 0


def _over(clip: Tensor | float, end: int) -> Tensor | float:
    """clip / end, rounded to fp32 once."""
    return (clip / end).float() if isinstance(clip, Tensor) else clip / end
