"""SmoothQuant beside SegQuant's other choices on the small diffusion transformer: `quant.smooth: auto` with
one scale, with any of these, and with scales per token. docs/diffusion.md shows the table.

    python -m benchmarks.segquant_smooth           # all rows, kept in --out as they come; resumable

Cases, pictures and error are those of benchmarks/segquant.py; the factors of every site are chosen for the
weights' grid and for inputs of that width, one scale for all tokens or one for each, as in a run.
sites: how many took factors, by alpha.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.segquant import ASSETS, GRIDS, HERE, RULE, SAMPLES, Bed
from lowbit_ft.activations import Scheme, activation_of
from lowbit_ft.files.atomic import write_text
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.quantize.rotate import plan_rotation
from lowbit_ft.recipe.sections.quant import QuantSection
from lowbit_ft.rotations import FoldedCheckpoint
from lowbit_ft.rundir import environment

WEIGHTS, BITS = ("W8 rows", "W4 rows"), (8, 4)
CASES = ("base", "all", "token", "token all")
KEYS = ("weights", "input_bits", "smooth", "case")


def packed(bed: Bed, grid: str, bits: int, dynamic: bool, smooth: str | None) -> tuple[Any, dict[str, int]]:
    """(the packed model, how many sites have which alpha)."""
    width, group = GRIDS[grid]
    values = {"bits": width, "group_size": group, "residual_bits": 0, "calibrate": "mse", "smooth": smooth}
    section, checkpoint, sites = QuantSection.model_validate(values), bed.checkpoint, Counter[str]()
    if smooth is not None:
        one = Scheme(kind="token" if dynamic else "tensor", bits=bits, dynamic=True)
        rotation = plan_rotation(
            checkpoint,
            section,
            calibration=lambda: bed.calibration(None),
            pad_id=0,
            activation=lambda _: activation_of(one),
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        checkpoint = FoldedCheckpoint(checkpoint, rotation)
        sites = Counter(f"{alpha:g}" for alpha in rotation.alphas.values())
    return quantize(checkpoint, section, dtype=torch.float32)[0], dict(sites)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=ASSETS / "tiny-dit")
    parser.add_argument("--rows", type=Path, default=ASSETS / "small-shapes")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "segquant_smooth.json")
    given = parser.parse_args()
    torch.manual_seed(0)
    bed = Bed(given.model, given.rows)
    kept = json.loads(given.out.read_text())["rows"] if given.out.is_file() else []
    facts = {"model": "recipes/assets/tiny-dit", "samples": SAMPLES, "environment": environment()}
    for grid, bits, dynamic, smooth in product(WEIGHTS, BITS, (False, True), (None, "auto")):
        cases = [case for case in CASES if case.startswith("token") == dynamic]
        keys: list[dict[str, Any]] = [
            dict(zip(KEYS, (grid, bits, smooth, case), strict=True)) for case in cases
        ]
        if not (todo := [key for key in keys if not any(key.items() <= row.items() for row in kept)]):
            continue
        model, sites = packed(bed, grid, bits, dynamic, smooth)
        for key in todo:
            found = bed.measured(model, key["case"], bits, None, RULE)
            kept.append(key | found | {"sites": sites})
            print(json.dumps(kept[-1]), flush=True)
            write_text(given.out, json.dumps(facts | {"rows": kept}, indent=1) + "\n")
    table(kept)


def table(rows: list[dict[str, Any]]) -> None:
    for grid, bits, smooth in product(WEIGHTS, BITS, (None, "auto")):
        wanted = ({"weights": grid, "input_bits": bits, "smooth": smooth, "case": case} for case in CASES)
        cells = [
            next((f"{100 * row['error']:.2f}" for row in rows if key.items() <= row.items()), "")
            for key in wanted
        ]
        print(f"| {grid}, A{bits} | {smooth or ''} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
