"""The product of a packed layer with quantized inputs on a CPU: as int8 x int8 -> int32 against today's path.

    python benchmarks/int8_cpu.py                                # 40 minutes; writes its rows to --out
    python benchmarks/int8_cpu.py --shapes 512x256 --rows 1 256  # a look

Per shape N x K, rows M of x, bits and group of the weight, and dtype of the model; each with what is done to
x first, in processor milliseconds, the least of many calls, interleaved:

    packed     x^ of the quantizer through the packed op (dequantizes on every call): what every stage runs
    int4       x^ through PyTorch's int4 kernel (decode_cpu.py): what `generate` runs in bfloat16 up to 4 rows
    unpacked   codes of x times codes that are unpacked to int8 on every call: no memory beyond the packed one
    kept       the same with the int8 codes kept beside the packed ones: a byte per weight more

The int32 sums are scaled per token and per weight group: with groups the product goes group by group. What
the integers give is compared with the packed op in float32 before anything is timed (1e-5). Weights pass in
turn through copies of --megabytes, so that a layer is not found in the cache that the one before left it in.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lowbit_kernels as kernels
import torch
from torch import Tensor

from lowbit_ft.activations import Scheme, activation_of
from lowbit_ft.files.atomic import write_text
from lowbit_ft.grid import IntGrid, PackedWeight
from lowbit_ft.rundir import environment

SHAPES = ("512x256", "2048x2048", "4096x4096", "14336x4096", "4096x14336")  # N x K
GRIDS = ("4:128", "4:-1", "2:64", "8:-1")


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shapes", nargs="+", default=list(SHAPES), help="N x K")
    p.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 256])
    p.add_argument("--grids", nargs="+", default=list(GRIDS), help="bits:group_size, symmetric")
    p.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    p.add_argument("--bits", type=int, default=8, choices=[4, 8], help="of x")
    p.add_argument("--megabytes", type=int, default=64, help="of packed copies, passed through in turn")
    p.add_argument("--seconds", type=float, default=0.3, help="of calls per contender, three at least")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "int8_cpu.json")
    return p.parse_args()


def int8_of(weight: PackedWeight) -> kernels.Int8Weight:
    grid = weight.grid
    return kernels.int8_weight(
        weight.codes, weight.scale, weight.zero, grid.bits, weight.shape[1], grid.group_size
    )


def contenders(
    weights: list[PackedWeight], x: Tensor, bits: int
) -> dict[str, Callable[[PackedWeight], Tensor]]:
    activation = activation_of(Scheme(kind="token", bits=bits))
    kept = {id(weight): int8_of(weight) for weight in weights}

    def integers(held: kernels.Int8Weight) -> Tensor:
        return kernels.int8_linear(*activation.codes(x)[:2], held, x.dtype)

    made: dict[str, Callable[[PackedWeight], Tensor]] = {
        "packed": lambda weight: weight.linear(activation.quantize(x)),
        "unpacked": lambda weight: integers(int8_of(weight)),
        "kept": lambda weight: integers(kept[id(weight)]),
    }
    first, grid = weights[0], weights[0].grid
    held = kernels.fits_int4(first.shape, grid.bits, grid.group_size, first.scale.dtype, False)
    if x.dtype == torch.bfloat16 and len(x) <= kernels.DECODE_ROWS and held:
        int4 = {
            id(w): kernels.int4_weight(w.codes, w.scale, w.zero, grid.bits, w.shape[1], grid.group_size)
            for w in weights
        }
        made["int4"] = lambda weight: kernels.int4_linear(activation.quantize(x), int4[id(weight)])
    return made


@torch.no_grad()
def measure(
    o: argparse.Namespace, shape: str, grid: IntGrid, rows: int, dtype: torch.dtype
) -> dict[str, Any]:
    n, k = (int(part) for part in shape.split("x"))
    torch.manual_seed(0)
    dense = torch.randn(n, k) / k**0.5
    size = k if grid.group_size == -1 else grid.group_size
    scale = dense.view(n, -1, size).abs().amax(-1).t() / (1 << (grid.bits - 1))
    one = PackedWeight.quantize(dense, scale, None, grid)
    copies = max(1, min(16, (o.megabytes << 20) // one.codes.nbytes))
    weights = [one] + [replace(one, codes=one.codes.clone()) for _ in range(copies - 1)]
    wide = torch.randn(rows, k)
    exact = contenders([one], wide, o.bits)
    off = (exact["kept"](one) - exact["packed"](one)).abs().max() / exact["packed"](one).abs().max()
    assert off < 1e-5, f"{shape} {grid}: the integers are off by {off:.1e}"
    made = contenders(weights, wide.to(dtype), o.bits)
    best, calls = dict.fromkeys(made, float("inf")), 0
    began = time.process_time()
    while calls < 3 or time.process_time() - began < o.seconds * len(made):
        for name, call in made.items():
            start = time.process_time()
            call(weights[calls % copies])
            best[name] = min(best[name], time.process_time() - start)
        calls += 1
    return {"relative_difference": float(off), "calls": calls} | {
        "milliseconds": {name: 1e3 * value for name, value in best.items()}
    }


def main() -> None:
    o = options()
    torch.set_num_threads(o.threads)
    rows: list[dict[str, Any]] = []
    print("| N x K | grid | dtype | M | packed | int4 | unpacked | kept |\n|---|---|---|--:|--:|--:|--:|--:|")
    for shape in o.shapes:
        for text in o.grids:
            bits, group = (int(part) for part in text.split(":"))
            grid = IntGrid(bits=bits, group_size=group, symmetric=True, residual_bits=0)
            for dtype in o.dtypes:
                for count in o.rows:
                    row = {"shape": shape, "grid": text, "dtype": dtype, "rows": count, "input_bits": o.bits}
                    row |= measure(o, shape, grid, count, getattr(torch, dtype))
                    rows.append(row)
                    times = row["milliseconds"]
                    cells = [
                        f"{times[k]:.3f}" if k in times else ""
                        for k in ("packed", "int4", "unpacked", "kept")
                    ]
                    print(f"| {shape} | {grid} | {dtype} | {count} | " + " | ".join(cells) + " |", flush=True)
                    o.out.parent.mkdir(parents=True, exist_ok=True)
                    facts = {"environment": environment(), "threads": o.threads, "rows": rows}
                    write_text(o.out, json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
