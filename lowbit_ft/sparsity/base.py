"""What a sparsity is: of a dense matrix, which weights are zero, and what the others start from."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..grid.calibrate import Curvature
from .patterns import PATTERNS, Pattern


@dataclass(frozen=True)
class Asked:
    """How much (of the weights of a matrix, in 0..1) and where. curvature: of the matrix' inputs, for those
    with needs_text; damping and act_order: as it is factored (grid/calibrate/curvature.py)."""

    amount: float = 0.5
    pattern: Pattern = PATTERNS["unstructured"]
    curvature: Curvature | None = None
    damping: float = 0.01
    act_order: bool = False


class Sparsity(ABC):
    """One choice of quant.sparsity.kind. Stateless."""

    locks: ClassVar[bool] = True  # there is a mask
    prunes: ClassVar[bool] = True  # makes zeros by `amount` and `pattern`, of the whole matrix at once
    grows: ClassVar[bool] = False  # `zeros` can be asked again while the weights train (gradual.py)
    needs_text: ClassVar[bool] = False  # looks at the curvature of calibration text

    @abstractmethod
    def zeros(self, weight: Tensor, asked: Asked) -> Tensor:
        """Which weights of [N, K] are zero: bool [N, K]. ValueError where the matrix cannot be so."""

    def start(self, weight: Tensor, asked: Asked) -> tuple[Tensor, Tensor]:
        """(zeros, the weights [N, K] that are rounded): those that are left, as they came."""
        zeros = self.zeros(weight, asked)
        return zeros, weight.masked_fill(zeros, 0)
