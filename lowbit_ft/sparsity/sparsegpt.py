"""sparsegpt: prune column after column, and let the columns not yet looked at make up for what is gone
(Frantar and Alistarh, arXiv 2301.00774).

With H = X^T X = L L^T as in grid/calibrate/gptq.py, which has the recursion, columns are taken from the last
to the first; w' is a weight with what the columns behind it owe it,

    score = (w' L_ii)^2        the loss of putting it to zero with columns up to i free: L_ii^-2 = [H^-1]_ii
                               of those

Unstructured: of every BLOCK columns, when their turn comes, `amount` of the weights with the lowest scores,
over all rows; 2:4 and 1x4 in the same way, 2:4 four columns at a time.

What is left are the moved weights: a range calibrator rounds those. `calibrate: gptq` begins again from the
original weights with the zeros that were found, and makes up for pruning and rounding together. The paper
chooses zeros and rounds in one pass; here a zero is chosen before anything is rounded, for every calibrator
alike.
"""

import torch
from torch import Tensor

from ..grid.calibrate.gptq import from_the_end
from .base import Asked, Sparsity

BLOCK = 128  # columns whose zeros are chosen together


class SparseGPT(Sparsity):
    needs_text = True

    def zeros(self, weight: Tensor, asked: Asked) -> Tensor:
        return self.start(weight, asked)[0]

    def start(self, weight: Tensor, asked: Asked) -> tuple[Tensor, Tensor]:
        assert asked.curvature is not None
        factor = asked.curvature.factor(asked.damping, asked.act_order)
        lower, order = factor.lower, factor.order
        columns = weight.t() if order is None else weight.t()[order]
        w = columns.float().contiguous()  # [K, N]: a column is contiguous
        w = w.clone() if w.data_ptr() == weight.data_ptr() else w
        zeros, moved = (
            torch.zeros_like(w, dtype=torch.bool),
            torch.empty_like(w),
        )  # moved: w - what it becomes
        pivots = lower.diagonal()
        width = 4 if asked.pattern.amount is not None else BLOCK
        for block in from_the_end(0, len(w), BLOCK):
            owed = lower[block.stop :, block].t() @ moved[block.stop :]
            for span in from_the_end(block.start, block.stop, width):
                mine = owed[span.start - block.start : span.stop - block.start]
                mine += lower[span.stop : block.stop, span].t() @ moved[span.stop : block.stop]
                change = torch.linalg.solve_triangular(lower[span, span].t(), mine, upper=True)
                score = ((w[span] + change) * pivots[span, None]).square()
                zeros[span] = asked.pattern.lowest(score.t(), asked.amount).t()
                for i in reversed(range(span.start, span.stop)):
                    due = mine[i - span.start] + moved[i + 1 : span.stop].t() @ lower[i + 1 : span.stop, i]
                    now = (w[i] + due / pivots[i]).masked_fill_(zeros[i], 0)
                    moved[i] = w[i] - now
                    w[i] = now
        back = slice(None) if order is None else order.argsort()
        return zeros[back].t().contiguous(), w[back].t().contiguous()
