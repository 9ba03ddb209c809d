"""A low-rank pair beside the integers (SVDQuant, arXiv 2411.05007; SegQuant's branch) on the small diffusion
transformer: what it is worth, and costs. Nothing ships beside the integers here: it is measured, not offered.

    python -m benchmarks.svd_branch        # a row for each grid, input and rank, into --out as it comes

W ~ Q(W - U V) + U V, U V the best pair of that rank (torch.linalg.svd), in full precision and on inputs that
are not rounded; the rest on the grid, its scales by `mse`, its inputs per token. bits: of a weight, with the
pair in 16 bits, over all packed weights. error = |v - v_full| / |v_full|, as in benchmarks/segquant.py.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.segquant import ASSETS, GRIDS, HERE, Bed
from lowbit_ft.files.atomic import write_text
from lowbit_ft.grid.calibrate import CALIBRATORS, Stats
from lowbit_ft.grid.integer import IntGrid
from lowbit_ft.model.linear import PackedLinear
from lowbit_ft.model.load import load_model
from lowbit_ft.rundir import environment

RANKS = (0, 4, 8, 16)
KEYS = ("weights", "input_bits", "rank")


class Beside(nn.Module):
    """A linear of [N, K] as a rounded rest and a pair U [N, r], V [r, K]. bits: of the rest's inputs, per
    token; None: as they are."""

    def __init__(self, plain: nn.Linear, grid: IntGrid, rank: int, bits: int | None) -> None:
        super().__init__()
        weight = plain.weight.detach()
        u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
        self.up, self.down = (u[:, :rank] * s[:rank]).float(), v[:rank].float()
        rest = CALIBRATORS["mse"].run(weight - self.up @ self.down, grid, Stats())
        self.rest, self.bias, self.bits = rest.dequantize(torch.float32), plain.bias, bits

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.rounded(x), self.rest, self.bias) + x @ self.down.T @ self.up.T

    def rounded(self, x: Tensor) -> Tensor:
        if self.bits is None:
            return x
        most = 2 ** (self.bits - 1) - 1
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / most
        return (x / scale).round().clamp(-most - 1, most) * scale


def measured(bed: Bed, grid: IntGrid, rank: int, bits: int | None, names: list[str]) -> dict[str, Any]:
    model: Any = load_model(bed.checkpoint).eval()
    pair = weights = 0
    for name in names:
        linear = model.get_submodule(name)
        n, k = linear.weight.shape
        pair, weights = pair + 16 * rank * (n + k), weights + n * k
        model.set_submodule(name, Beside(linear, grid, rank, bits))
    return {"error": bed.error(model), "bits": grid.bits + pair / weights}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, default=ASSETS / "tiny-dit")
    p.add_argument("--rows", type=Path, default=ASSETS / "small-shapes")
    p.add_argument("--out", type=Path, default=HERE / "results" / "svd_branch.json")
    o = p.parse_args()
    bed = Bed(o.model, o.rows)
    names = [name for name, part in bed.packed(4, -1).named_modules() if isinstance(part, PackedLinear)]
    rows: list[dict[str, Any]] = json.loads(o.out.read_text())["rows"] if o.out.is_file() else []
    for weights, bits, rank in product(("W4 rows", "W4 g32", "W6 rows", "W8 rows"), (None, 8), RANKS):
        key = dict(zip(KEYS, (weights, bits, rank), strict=True))
        if any(key.items() <= row.items() for row in rows):
            continue
        width, group = GRIDS[weights]
        grid = IntGrid(bits=width, group_size=group, residual_bits=0)
        rows.append(key | measured(bed, grid, rank, bits, names))
        print(json.dumps(rows[-1]), flush=True)
        facts = {"model": "recipes/assets/tiny-dit", "environment": environment()}
        write_text(o.out, json.dumps(facts | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
