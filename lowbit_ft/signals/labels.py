"""labels: the cross entropy of the next token. What fine-tuning is for: only labels know the user's task."""

from typing import Any, ClassVar

from torch import Tensor

from .base import Given, Part, Signal
from .tokens import token_loss


class Labels(Signal):
    asks = False
    language: ClassVar[bool] = False

    def parts(self, options: Any) -> dict[str, Part]:
        return {"labels": Part(1.0)}

    def sums(
        self, options: Any, logits: Tensor, tokens: Tensor, counted: Tensor, given: Given | None
    ) -> tuple[Tensor, ...]:
        return (token_loss(logits, tokens),)
