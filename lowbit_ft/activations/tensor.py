"""tensor: one scale for all tokens, static (from calibration rows, perhaps trained: learned.py), or made of
the tensor that is there."""

from typing import ClassVar

from torch import Tensor

from .base import Activation


class PerTensor(Activation):
    kind: ClassVar[str] = "tensor"
    static_scales: ClassVar[int] = 1
    by_rows: ClassVar[bool] = False

    def scales(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[..., K] -> [1]."""
        scheme = self._scheme
        if scheme.dynamic:
            low, high = x.flatten().aminmax(dim=0)  # with dim: ONNX has no other
            return self.cover(low[None], high[None])
        return self.static(x.device), self.static_zero(x.device)
