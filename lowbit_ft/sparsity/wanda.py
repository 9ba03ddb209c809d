"""wanda: the weights of a row that matter least to its output are zero (Sun et al., arXiv 2306.11695).

    score = |w_ij| |x_j|        |x_j| over the tokens of the calibration text, from the diagonal of X^T X

compared within each row, so every output keeps as many inputs. The others are left as they are.
"""

from torch import Tensor

from .base import Asked, Sparsity


class Wanda(Sparsity):
    needs_text = True

    def zeros(self, weight: Tensor, asked: Asked) -> Tensor:
        assert asked.curvature is not None
        size = asked.curvature.diagonal().sqrt()
        return asked.pattern.lowest(weight.float().abs() * size, asked.amount, by_row=True)
