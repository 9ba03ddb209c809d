"""Calibrators: from a dense weight to a base on its grid. One file per family; the tables are the list.

A calibrator is a function (weight [N, K] fp32, grid, stats) -> PackedWeight or BinaryWeight. `stats` carries
what calibration text told about the layer's inputs (only `gptq` needs it) and the options of the recipe. To
add one: write the function, add one line to CALIBRATORS, and the recipe, the tests and the quality benchmark
know it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ..binary import BinaryGrid
from ..integer import IntGrid
from ..packed import Weight
from .gptq import gptq
from .planes import alternating, greedy
from .ranges import Stats, absmax, minmax, mse


@dataclass(frozen=True)
class Calibrator:
    """run(weight, grid, stats); grid kind it serves; whether it needs the Hessian of calibration text."""

    run: Callable[..., Weight]  # (weight: Tensor [N, K], grid of the kind below, stats: Stats)
    grid: str
    needs_text: bool = False
    symmetric: bool | None = None  # None: both

    def reject(self, grid: IntGrid | BinaryGrid) -> str | None:
        """Why this calibrator cannot start this grid, with the way out; None when it can."""
        if grid.name != self.grid:
            fits = [name for name, c in CALIBRATORS.items() if c.grid == grid.name]
            return f"works on {self.grid} grids; for quant.grid: {grid.name} use one of {', '.join(fits)}"
        if self.symmetric is not None and isinstance(grid, IntGrid) and grid.symmetric != self.symmetric:
            wanted = "true" if self.symmetric else "false"
            other = "minmax" if self.symmetric else "absmax"
            return f"needs quant.symmetric: {wanted}; on this grid use {other} or mse"
        return None


CALIBRATORS: dict[str, Calibrator] = {
    "absmax": Calibrator(absmax, "integer", symmetric=True),
    "minmax": Calibrator(minmax, "integer", symmetric=False),
    "mse": Calibrator(mse, "integer"),
    "gptq": Calibrator(gptq, "integer", needs_text=True),
    "greedy": Calibrator(greedy, "binary"),
    "alternating": Calibrator(alternating, "binary"),
}

__all__ = ["CALIBRATORS", "Calibrator", "Stats"]
