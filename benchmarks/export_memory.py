"""Peak memory and time of exporting a large checkpoint in each format: one layer at a time, whatever the
model's size.

    python benchmarks/export_memory.py --gb 2 --formats compressed-tensors,gguf

Writes a random Llama with layers of an 8B model (bf16, a few of them) and packed layers for it to a temporary
folder. Then a fresh process per format exports it and prints: the largest layer in bf16, peak over what the
process had before, and the difference, which must stay below 0.5 GB. `--bits`, `--group` and `--asymmetric`
choose the grid.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ASSET = Path(__file__).resolve().parents[1] / "recipes" / "assets" / "tiny-llama"
LIMIT_GB = 0.5

CHILD = """
import json, sys, time, torch
from pathlib import Path
from lowbit_ft.export import EXPORTERS
from lowbit_ft.export.reader import read_weights
from lowbit_ft.export.writer import write_model
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.train.memory import peak_gb, reset_peak
root, name = Path(sys.argv[1]), sys.argv[2]
torch.set_num_threads(2)
checkpoint = Checkpoint.open(root / "dense")
checkpoint.empty_model()
weights = read_weights(root / "packed")
largest = max(spec.elements for spec in weights.specs.values()) * 2 / 1e9
cpu = torch.device("cpu")
reset_peak(cpu)
before, start = peak_gb(cpu), time.monotonic()
write_model(root / name, checkpoint, weights, EXPORTERS[name])
seconds, peak = time.monotonic() - start, peak_gb(cpu) - before
size = sum(path.stat().st_size for path in (root / name).iterdir()) / 1e9
row = {"format": name, "checkpoint_gb": checkpoint.nbytes / 1e9, "largest_layer_gb": largest}
print(json.dumps(row | {"written_gb": size, "peak_gb": peak, "over_gb": peak - largest, "seconds": seconds}))
"""


def write_dense(folder: Path, gigabytes: float) -> None:
    """A Llama of about `gigabytes` in bf16 with the layer shapes of Llama 3.1 8B and the tokenizer of the
    small asset.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, vocab = 4096, 14336, 8192
    per_layer = 2 * ((2 + 2 * 8 / 32) * hidden * hidden + 3 * hidden * inner)
    layers = max(1, round((gigabytes * 1e9 - 4 * vocab * hidden) / per_layer))
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=vocab,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.uniform_(-0.05, 0.05, generator=generator)
    model.save_pretrained(folder, max_shard_size="500MB")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(ASSET / name, folder / name)


def write_packed(root: Path, bits: int, group: int, symmetric: bool) -> None:
    """Random codes and scales for every linear but the head, in the native format."""
    import lowbit_kernels as kernels

    from lowbit_ft.export import EXPORTERS, LayerSpec, Weights
    from lowbit_ft.export.writer import write_model
    from lowbit_ft.grid import IntGrid, PackedWeight
    from lowbit_ft.model.checkpoint import Checkpoint

    grid = IntGrid(bits=bits, group_size=group, symmetric=symmetric, residual_bits=0)
    checkpoint = Checkpoint.open(root / "dense")
    model = checkpoint.empty_model()
    specs = {
        name: LayerSpec((layer.out_features, layer.in_features), grid)
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and name != "lm_head"
    }

    def make(name: str) -> PackedWeight:
        n, k = specs[name].shape
        groups = kernels.group_count(k, group)
        return PackedWeight(
            codes=kernels.pack(torch.randint(0, grid.levels, (n, k), dtype=torch.uint8), bits),
            scale=(torch.rand(groups, n) * 0.02 + 0.001).bfloat16(),
            zero=None if symmetric else torch.randint(0, grid.levels, (groups, n), dtype=torch.uint8),
            shape=(n, k),
            grid=grid,
        )

    write_model(root / "packed", checkpoint, Weights(specs, make), EXPORTERS["native"])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gb", type=float, default=2.0)
    p.add_argument("--formats", default="compressed-tensors,gguf,gptq,awq,mlx")
    p.add_argument("--bits", type=int, default=4)
    p.add_argument("--group", type=int, default=128)
    p.add_argument("--asymmetric", action="store_true")
    p.add_argument("--out", type=Path)
    o = p.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_dense(root / "dense", o.gb)
        write_packed(root, o.bits, o.group, not o.asymmetric)
        for name in o.formats.split(","):
            done = subprocess.run(
                [sys.executable, "-c", CHILD, folder, name], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise SystemExit(done.stderr)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            shutil.rmtree(root / name)
            row = rows[-1]
            print(
                f"{name:<20} checkpoint {row['checkpoint_gb']:.2f} GB, written {row['written_gb']:.2f} GB "
                f"in {row['seconds']:.0f} s; peak "
                f"{row['peak_gb']:.3f} GB = largest layer {row['largest_layer_gb']:.3f} GB + "
                f"{row['over_gb']:.3f} GB",
                flush=True,
            )
    if o.out:
        o.out.write_text(json.dumps(rows, indent=1) + "\n")
    if any(row["over_gb"] >= LIMIT_GB for row in rows):
        raise SystemExit(f"more than {LIMIT_GB} GB over the largest layer")


if __name__ == "__main__":
    main()
