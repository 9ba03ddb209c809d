"""Peak memory of quantizing a checkpoint, over the packed size: the full-precision model must never be whole in memory.

    python benchmarks/load_memory.py --gb 1

Writes a random Llama of about that size in bf16 to a temporary folder (in shards), quantizes it in a fresh process that resets its
high-water mark after the imports, and prints: checkpoint, packed model (everything the quantized model holds), peak, peak - packed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

CHILD = """
import json, sys, torch
from lowbit_ft.load import Checkpoint
from lowbit_ft.memory import peak_gb, reset_peak
from lowbit_ft.quantize import quantize
from lowbit_ft.recipe import QuantSection
from transformers import AutoModelForCausalLM
folder, bits, residual = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(2)
checkpoint = Checkpoint.open(folder)
checkpoint.empty_model()
cpu = torch.device("cpu")
reset_peak(cpu)
before = peak_gb(cpu)
model, table = quantize(checkpoint, QuantSection(bits=bits, residual_bits=residual, calibrate="absmax"), dtype=torch.bfloat16)
held = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]) / 1e9
packed = sum(r.packed_bytes for r in table.rows) / 1e9
print(json.dumps({"checkpoint_gb": checkpoint.nbytes / 1e9, "packed_layers_gb": packed, "model_gb": held,
                  "before_gb": before, "peak_gb": peak_gb(cpu), "over_gb": peak_gb(cpu) - before - held}))
"""


def write_random_llama(folder: Path, gigabytes: float) -> None:
    """A Llama with random bf16 weights, about `gigabytes` in all, in shards of 200 MB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, vocab = 2048, 5632, 8192
    per_layer = 2 * (4 * hidden * hidden + 3 * hidden * inner)
    layers = max(1, round((gigabytes * 1e9 - 4 * vocab * hidden) / per_layer))
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=16,
        vocab_size=vocab, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    config.dtype = torch.bfloat16
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="200MB")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gb", type=float, default=1.0)
    p.add_argument("--bits", type=int, default=4)
    p.add_argument("--residual-bits", type=int, default=4)
    p.add_argument("--out", type=Path)
    o = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_random_llama(Path(folder), o.gb)
        command = [sys.executable, "-c", CHILD, folder, str(o.bits), str(o.residual_bits)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    row = json.loads(done.stdout.splitlines()[-1])
    for name, value in row.items():
        print(f"{name:<18}{value:8.3f}")
    if o.out:
        o.out.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
