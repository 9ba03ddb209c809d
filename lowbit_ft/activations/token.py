"""token: one scale per token, made of the token itself: absmax / (2^(b-1) - 1), or min and max with a zero.

What servers compute before an integer product (vLLM: absmax / 127), and what LLM-QAT (arXiv 2305.17888) and
RoSTE (arXiv 2502.09003) train with; the clip factor on the range is RoSTE's.
"""

from typing import ClassVar

from torch import Tensor

from .base import Activation


class Token(Activation):
    kind: ClassVar[str] = "token"

    def scales(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[..., K] -> [..., 1]."""
        low, high = x.aminmax(dim=-1, keepdim=True)
        return self.cover(low, high)
