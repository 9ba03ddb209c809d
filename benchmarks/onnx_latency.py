"""Latency of our ONNX exports in ONNX Runtime on a CPU, beside the same model in fp32.

    python benchmarks/onnx_latency.py    # two minutes, mostly of tracing; writes its rows to --out

A transformer with the matrices of MiniLM (width 384, 1536 in the middle, 12 heads; a GPT-2, random weights)
is written in fp32 and on every grid by the same exporter, so that the graphs differ in their packed layers
only. All sessions are open at once and called in turn, so that what else the machine does falls on all alike;
medians of the rounds, in milliseconds, for one text of so many tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from lowbit_ft.activations import Scheme
from lowbit_ft.export import EXPORTERS, LayerSpec, Weights
from lowbit_ft.export.layout import Layout
from lowbit_ft.export.onnx import FILE
from lowbit_ft.export.onnx_file import OnnxFiles
from lowbit_ft.export.onnx_session import OnnxModel
from lowbit_ft.files.atomic import write_text
from lowbit_ft.grid import IntGrid, PackedWeight
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.rundir import environment

TOKEN = Scheme(kind="token", bits=8)
STATIC = Scheme(kind="tensor", bits=8, dynamic=False, scale=(0.05,))
ARMS: dict[str, tuple[int, int, Scheme | None] | None] = {
    "fp32": None,
    "W8 row, A8 static": (8, -1, STATIC),
    "W8 row, A8 token": (8, -1, TOKEN),
    "W8 g128": (8, 128, None),
    "W4 g128": (4, 128, None),
    "W4 g128, A8 token": (4, 128, TOKEN),
    "W2 g64": (2, 64, None),
}


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--layers", type=int, default=2)
    p.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 128])
    p.add_argument("--rounds", type=int, default=21)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "onnx_latency.json")
    return p.parse_args()


def write(checkpoint: Checkpoint, arm: tuple[int, int, Scheme | None] | None, folder: Path) -> int:
    """The model on the grid of an arm; returns the bytes of its two files."""
    folder.mkdir()
    specs: dict[str, LayerSpec] = {}
    if arm is not None:
        bits, group, scheme = arm
        grid = IntGrid(bits=bits, group_size=group, residual_bits=0)
        specs = {
            name: LayerSpec(matrix.shape, grid, activation=scheme)
            for name, matrix in checkpoint.matrices.items()
            if ".h." in name
        }

    def make(name: str) -> PackedWeight:
        dense, grid = checkpoint.matrix(name), specs[name].grid
        assert isinstance(grid, IntGrid)
        size = dense.shape[1] if grid.group_size == -1 else grid.group_size
        scale = dense.view(len(dense), -1, size).abs().amax(-1).t() / (grid.levels // 2)
        return PackedWeight.quantize(dense, scale, None, grid)

    exporter = EXPORTERS["onnx"]
    files = OnnxFiles(Layout(checkpoint, specs, exporter), checkpoint, exporter, 0)
    files.write(folder, Weights(specs, make))
    return sum(path.stat().st_size for path in folder.iterdir())


def main() -> None:
    o = options()
    torch.set_num_threads(o.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        config = transformers.GPT2Config(
            vocab_size=4096,
            n_embd=384,
            n_layer=o.layers,
            n_head=12,
            n_positions=512,
            bos_token_id=1,
            eos_token_id=2,
        )
        source = Path(place) / "source"
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(source)
        checkpoint = Checkpoint.open(source, dtype="float32")
        checkpoint.empty_model("eager")
        sizes = {
            name: write(checkpoint, arm, Path(place) / str(at)) for at, (name, arm) in enumerate(ARMS.items())
        }
        models = {name: OnnxModel(Path(place) / str(at) / FILE, []) for at, name in enumerate(ARMS)}
        rows: list[dict[str, Any]] = []
        for tokens in o.tokens:
            ids = torch.arange(tokens)[None]
            times: dict[str, list[float]] = {name: [] for name in models}
            for turn in range(o.rounds + 2):
                for name, model in models.items():
                    began = time.perf_counter()
                    model.logits(ids)
                    if turn > 1:  # the first two warm up
                        times[name].append(1e3 * (time.perf_counter() - began))
            for name, found in times.items():
                row = {"arm": name, "tokens": tokens, "bytes": sizes[name]}
                row |= {"milliseconds": statistics.median(found), "least": min(found), "most": max(found)}
                rows.append(row)
                print(
                    f"{tokens:4} tokens  {name:18} {row['milliseconds']:8.2f} ms  {sizes[name] / 1e6:.1f} MB"
                )
    facts = {
        "environment": environment(),
        "options": {k: str(v) for k, v in vars(o).items() if k != "out"},
        "rows": rows,
    }
    o.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(o.out, json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
