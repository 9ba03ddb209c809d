"""mix: label_weight x labels + (1 - label_weight) x logits, each a mean over the positions it counts."""

from typing import Any, ClassVar

from torch import Tensor

from .base import Given, Part, Signal
from .logits import Logits, compared
from .tokens import token_loss


class Mix(Signal):
    language: ClassVar[bool] = False
    keys = Logits.keys | {"label_weight"}

    def parts(self, options: Any) -> dict[str, Part]:
        weight = options.label_weight
        return {"labels": Part(weight), "logits": Part(1 - weight, options.on)}

    def sums(
        self, options: Any, logits: Tensor, tokens: Tensor, counted: Tensor, given: Given | None
    ) -> tuple[Tensor, ...]:
        return token_loss(logits, tokens), compared(options, logits, tokens, counted, given)
