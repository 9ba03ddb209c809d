"""quant.sparsity: which weights are zero and stay it, from the base to what ships.

Acts while a matrix is packed (quantize/): a member says which of its weights are zero, before anything is
rounded. From there on they are locked: a bit per weight beside the codes (IntGrid.mask) holds their codes at
the zero point in every forward, in merge and so in every export, and no gradient comes from them. It may
touch the dense matrix that it is given and nothing else.

    SPARSITY       the table: a choice of quant.sparsity.kind is a file here
    gradual.py     Gradual: how many zeros when, where they come while a model trains
    patterns.py    PATTERNS: where zeros may lie, and which of some scores are the lowest there

The bit is its own, and not read off the codes: a weight that is small, and not pruned, rounds to the zero
point too, and training has to be able to move it away again.
"""

from .base import Asked, Sparsity
from .gradual import Gradual
from .locked import Locked
from .magnitude import Magnitude
from .none import Dense
from .patterns import PATTERNS, Pattern
from .sparsegpt import SparseGPT
from .wanda import Wanda

SPARSITY: dict[str, Sparsity] = {
    "none": Dense(),
    "locked": Locked(),
    "magnitude": Magnitude(),
    "wanda": Wanda(),
    "sparsegpt": SparseGPT(),
}

__all__ = ["PATTERNS", "SPARSITY", "Asked", "Gradual", "Pattern", "Sparsity"]
