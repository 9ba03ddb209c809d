"""Calibrators: from a dense weight to a base on its grid. One file per family; the tables are the list.

A calibrator is a function (weight [N, K] fp32, grid, stats) -> PackedWeight or BinaryWeight. `stats` carries
what calibration text told about the layer's inputs (for those with `needs_text`) and the options of the
recipe. One that rounds the linears of a decoder layer together (`signround`) has a second function, `block`,
which is given the layer (signround.Block) and packs all of it; the first one is then for a linear alone. To
add one: write the function, add one line to CALIBRATORS, and the recipe, the tests and the quality benchmark
know it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ..binary import BinaryGrid
from ..integer import IntGrid
from ..packed import Weight
from .curvature import Curvature
from .gptq import gptq
from .mean import MEAN_BITS, mean
from .narrow_range import narrow_range
from .planes import alternating, greedy
from .ranges import Stats, absmax, minmax, mse
from .recover import Missed, OffGridError, recover
from .signround import Block, signround, signround_block
from .ternary import TERNARY_BITS, ternary


@dataclass(frozen=True)
class Calibrator:
    """run(weight, grid, stats); the kind of grid it serves; whether it needs the Hessian of calibration
    text; block(layer, stats): the linears of a decoder layer at once, (weights by name, loss before and
    after), with block_bytes of the device's memory for each of their weights meanwhile.
    """

    run: Callable[..., Weight]  # (weight: Tensor [N, K], grid of the kind below, stats: Stats)
    grid: str
    needs_text: bool = False
    symmetric: bool | None = None  # None: both
    bits: tuple[int, ...] | None = None  # None: all of the grid's
    block: Callable[[Block, Stats], tuple[dict[str, Weight], tuple[float, float]]] | None = None
    block_bytes: int = 0
    makes_up: bool = (
        False  # for weights that are locked at zero, which it is given as they came, with Stats.zeros
    )
    narrow: bool = False  # its grid's lowest code stays unused, while codes train too (IntGrid.narrow)
    exact: bool = False  # of weights that lie on the grid already; run raises OffGridError where one does not

    def reject(self, grid: IntGrid | BinaryGrid) -> str | None:
        """Why this calibrator cannot start this grid, with the way out; None when it can."""
        fits = calibrators_of(grid.kind)
        if grid.kind != self.grid:
            return f"works on {self.grid} grids; for quant.grid: {grid.name} use one of {', '.join(fits)}"
        if self.symmetric is not None and isinstance(grid, IntGrid) and grid.symmetric != self.symmetric:
            wanted = "true" if self.symmetric else "false"
            others = [name for name in fits if CALIBRATORS[name].symmetric in (None, grid.symmetric)]
            return f"needs quant.symmetric: {wanted}; on this grid use one of {', '.join(others)}"
        if self.bits is not None and grid.bits not in self.bits:
            wanted = " or ".join(map(str, self.bits))
            signs = (None, getattr(grid, "symmetric", None))
            others = [n for n in fits if CALIBRATORS[n].bits is None and CALIBRATORS[n].symmetric in signs]
            return f"needs quant.bits: {wanted}; at {grid.bits} use one of {', '.join(others)}"
        return None


CALIBRATORS: dict[str, Calibrator] = {
    "absmax": Calibrator(absmax, "integer", symmetric=True),
    "narrow_range": Calibrator(narrow_range, "integer", symmetric=True),
    "ternary": Calibrator(ternary, "integer", symmetric=True, bits=TERNARY_BITS, narrow=True),
    "minmax": Calibrator(minmax, "integer", symmetric=False),
    "mse": Calibrator(mse, "integer"),
    "gptq": Calibrator(gptq, "integer", needs_text=True, makes_up=True),
    # fp32: the weight, V, its gradient, the best V, W^ and its gradient; 16 bits: W^ and its gradient
    "signround": Calibrator(signround, "integer", needs_text=True, block=signround_block, block_bytes=28),
    "recover": Calibrator(recover, "integer", exact=True),
    "greedy": Calibrator(greedy, "binary"),
    "alternating": Calibrator(alternating, "binary"),
    "mean": Calibrator(mean, "binary", bits=MEAN_BITS),
}


def calibrators_of(kind: str) -> list[str]:
    """The calibrators that serve a kind of grid."""
    return [name for name, calibrator in CALIBRATORS.items() if calibrator.grid == kind]


__all__ = [
    "CALIBRATORS",
    "Block",
    "Calibrator",
    "Curvature",
    "Missed",
    "OffGridError",
    "Stats",
    "calibrators_of",
]
