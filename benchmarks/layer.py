"""One layer, forward and backward, at a size where its products are what counts: the options of docs/speed.md
in products of that size.

    python benchmarks/layer.py --shape 2048 2048 --tokens 1024

Variants are named as in step.py, interleaved in one process; processor time of one thread, which other work
on the machine does not change much. Everything is counted, the packing and unpacking of codes too, which a
GPU does beside its products and a CPU before and after them: read ratios, not times.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch
from step import adapter_of, products

from lowbit_ft.adapters.attach import keep_codes
from lowbit_ft.grid import IntGrid
from lowbit_ft.grid.calibrate import CALIBRATORS, Stats
from lowbit_ft.model.linear import PackedLinear
from lowbit_ft.rundir import environment

VARIANTS = [
    "lr_qat",
    "lr_qat+keep",
    "lr_qat+factorised+tokens=0.25",
    "lr_qat+keep+factorised+tokens=0.25",
    "lr_qat+keep+factorised+tokens=0.125",
    "lr_qat+keep+corrected+tokens=0.25",
    "l4q",
    "l4q+keep+corrected+tokens=0.25",
    "scale",
    "scale+tokens=0.25",
    "full_qat",
    "ef_qat+share=0.25",
    "ef_qat+share=0.1",
    "ef_qat+share=0.05",
]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--methods", nargs="+", default=VARIANTS)
    p.add_argument("--shape", nargs=2, type=int, default=[2048, 2048], help="out and in features")
    p.add_argument("--tokens", type=int, default=1024)
    p.add_argument("--bits", type=int, default=4)
    p.add_argument("--group-size", type=int, default=128)
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--out", type=Path)
    o = p.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    n, k = o.shape
    weight = torch.randn(n, k)
    x, dy = torch.randn(o.tokens, k, requires_grad=True), torch.randn(o.tokens, n)
    a, b = torch.randn(o.rank, k, requires_grad=True), torch.randn(n, o.rank, requires_grad=True)
    runs = {
        "one product": lambda: x.detach() @ weight.t(),
        "dense LoRA": lambda: (x @ weight.t() + (x @ a.t()) @ b.t()).backward(dy),
    }
    counted: dict[str, float | None] = {"one product": 1.0, "dense LoRA": 2.0}
    base = CALIBRATORS["absmax"].run(weight, IntGrid(bits=o.bits, group_size=o.group_size), Stats())
    for spec in o.methods:
        config, switches = adapter_of(spec, o.rank)
        layer = PackedLinear(base)
        layer.adapter = config.build(base)
        keep_codes(layer.train(), "keep" in switches)
        runs[spec] = lambda layer=layer: layer(x).backward(dy)
        counted[spec] = products(config, o.bits, o.group_size)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(o.rounds + 1):
        for name, run in runs.items():
            began = time.process_time()
            run()
            if round_number:  # the first warms up, and makes the codes that are kept
                times[name].append(time.process_time() - began)
    unit, lora = median(times["one product"]), median(times["dense LoRA"])
    rows = [
        {
            "method": m,
            "seconds": median(t),
            "products": median(t) / unit,
            "counted": counted[m],
            "lora": median(t) / lora,
        }
        for m, t in times.items()
    ]
    for row in rows:
        gemms = "" if row["counted"] is None else f"{row['counted']:>8.3g} of them counted"
        print(
            f"{row['method']:<38}{row['seconds'] * 1e3:>9.1f} ms{row['products']:>7.2f} "
            f"products{row['lora']:>7.2f}x LoRA{gemms}"
        )
    if o.out:
        o.out.write_text(
            json.dumps(
                {
                    "environment": environment(),
                    "options": {k: str(v) for k, v in vars(o).items()},
                    "rows": rows,
                },
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
