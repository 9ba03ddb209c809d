"""PATTERNS: where the zeros of a matrix [N, K] may lie, and which weights are chosen there.

unstructured   anywhere
2:4            two of every four consecutive inputs of a row, which sparse tensor cores could skip
1x4            four consecutive inputs of a row together
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor


class Pattern(ABC):
    """One choice of quant.sparsity.pattern."""

    name: ClassVar[str]
    width: ClassVar[int] = 4  # inputs that are chosen together; K has to be a multiple
    amount: ClassVar[float | None] = None  # the only share there can be; None: any

    @abstractmethod
    def lowest(self, score: Tensor, amount: float, by_row: bool = False) -> Tensor:
        """The weights with the lowest scores, `amount` of all [N, K], or of each row: bool [N, K]."""

    @abstractmethod
    def holds(self, zeros: Tensor) -> bool:
        """Whether these zeros, bool [N, K], lie so."""

    def reject_width(self, in_features: int) -> str | None:
        """Why a matrix of so many inputs cannot be so, with the way out; None when it can."""
        if in_features % self.width == 0:
            return None
        return (
            f"{in_features} inputs are no multiple of {self.width}; set pattern: unstructured, or exclude it"
        )


class Unstructured(Pattern):
    name = "unstructured"
    width = 1

    def lowest(self, score: Tensor, amount: float, by_row: bool = False) -> Tensor:
        return fewest(score, amount) if by_row else fewest(score.reshape(1, -1), amount).view_as(score)

    def holds(self, zeros: Tensor) -> bool:
        return True


class TwoOfFour(Pattern):
    name = "2:4"
    amount = 0.5

    def lowest(self, score: Tensor, amount: float, by_row: bool = False) -> Tensor:
        four = score.reshape(-1, 4)
        return (
            torch.zeros_like(four, dtype=torch.bool)
            .scatter_(1, four.argsort(dim=1, stable=True)[:, :2], True)
            .view_as(score)
        )

    def holds(self, zeros: Tensor) -> bool:
        return zeros.shape[1] % 4 == 0 and bool((zeros.reshape(-1, 4).sum(1) >= 2).all())


class OneByFour(Pattern):
    name = "1x4"

    def lowest(self, score: Tensor, amount: float, by_row: bool = False) -> Tensor:
        blocks = score.reshape(len(score), -1, 4).sum(-1)
        chosen = fewest(blocks if by_row else blocks.reshape(1, -1), amount).view_as(blocks)
        return chosen.repeat_interleave(4, dim=1)

    def holds(self, zeros: Tensor) -> bool:
        counts = zeros.reshape(-1, 4).sum(1) if zeros.shape[1] % 4 == 0 else zeros.new_ones(1)
        return bool(((counts == 0) | (counts == 4)).all())


def fewest(score: Tensor, amount: float) -> Tensor:
    """round(amount n) of each row of [R, n], those with the lowest scores; of equal ones the first."""
    count = round(amount * score.shape[1])
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    last = score.kthvalue(count, dim=1, keepdim=True).values
    below, equal = score < last, score == last
    return below | (equal & (equal.cumsum(1) <= count - below.sum(1, keepdim=True)))


PATTERNS: dict[str, Pattern] = {"unstructured": Unstructured(), "2:4": TwoOfFour(), "1x4": OneByFour()}
