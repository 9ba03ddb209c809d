"""locked: the zeros of the checkpoint stay (Prune Once for All, arXiv 2111.05754, stage C).

Taken from the weights as they are stored, before rounding, so that a small weight which rounds to zero is not
taken for a pruned one. A weight that happens to be zero in a dense checkpoint is: there is no telling them
apart. A pattern other than unstructured is a promise that is checked.
"""

from torch import Tensor

from .base import Asked, Sparsity


class Locked(Sparsity):
    prunes = False

    def zeros(self, weight: Tensor, asked: Asked) -> Tensor:
        zeros = weight == 0
        if not asked.pattern.holds(zeros):
            raise ValueError(
                f"its zeros ({zeros.float().mean():.1%} of it) do not lie as quant.sparsity.pattern: "
                f"{asked.pattern.name} says; set pattern: unstructured"
            )
        return zeros
