"""gptq on single layers of 8B shapes: processor seconds of Hessian, factor and rounding, and the error.

    python benchmarks/gptq_layer.py --out benchmarks/results/gptq_layer.json
    python benchmarks/gptq_layer.py --shapes 4096x4096 --calibration act_order static_groups

Random weights; inputs with a few loud channels and 64 shared directions, of which --tokens are summed. error:
squared output error over the squared output. One thread unless --threads says otherwise; processor time, so
that a busy machine can be measured.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from lowbit_ft.grid import IntGrid
from lowbit_ft.grid.calibrate import CALIBRATORS, Curvature, Stats


def measure(n: int, k: int, o: argparse.Namespace) -> dict[str, Any]:
    """One layer [n, k]."""
    torch.manual_seed(0)
    weight = torch.randn(n, k) * 0.02
    x = torch.randn(o.tokens, 64) @ torch.randn(64, k) * 0.5 + torch.randn(o.tokens, k)
    x[:, ::97] *= 10
    grid = IntGrid(bits=o.bits, group_size=o.group_size, symmetric=not o.asymmetric)
    options: dict[str, Any] = dict.fromkeys(o.calibration, True)
    curvature, clock = Curvature(), [time.process_time()]
    curvature.add(x)
    clock.append(time.process_time())
    curvature.factor(Stats.damping, options.get("act_order", False))
    clock.append(time.process_time())
    packed = CALIBRATORS["gptq"].run(weight, grid, Stats(curvature=curvature, **options))
    clock.append(time.process_time())
    hessian, factor, rounding = (after - before for before, after in zip(clock, clock[1:], strict=False))
    error = (x @ (weight - packed.dequantize()).t()).square().sum() / (x @ weight.t()).square().sum()
    return {
        "shape": [n, k],
        "grid": str(grid),
        "tokens": o.tokens,
        "options": o.calibration,
        "hessian_s": hessian,
        "factor_s": factor,
        "rounding_s": rounding,
        "rounding_s_per_gb": rounding / (2e-9 * n * k),
        "error": error.item(),
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shapes", nargs="+", default=["4096x4096", "14336x4096", "4096x14336"])
    p.add_argument("--tokens", type=int, default=2048)
    p.add_argument("--bits", type=int, default=4)
    p.add_argument("--group-size", type=int, default=128)
    p.add_argument("--asymmetric", action="store_true")
    p.add_argument("--calibration", nargs="*", default=[], choices=["act_order", "static_groups"])
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--out", type=Path)
    o = p.parse_args()
    torch.set_num_threads(o.threads)
    rows = []
    for shape in o.shapes:
        n, k = map(int, shape.split("x"))
        rows.append(measure(n, k, o))
        print(json.dumps(rows[-1]), flush=True)
        if o.out:
            o.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
