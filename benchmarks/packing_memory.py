"""Peak memory of loading a dense checkpoint in 4 bits: packed while it loads, by bitsandbytes, and dense.

    python -m benchmarks.packing_memory --gb 1 --out benchmarks/results/packing_memory.json

Writes a random Llama with the layer shapes of an 8B model (bf16, a shard per layer; load_memory.py), then
loads it by AutoModelForCausalLM.from_pretrained in a fresh process for each way, which resets its high-water
mark after the imports. Peak and what is held at the end are resident memory on a CPU: pages of files that are
mapped count, and the peak is above what is held by what the way needs to work with. A way that stands in the
file already is not measured again.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.load_memory import HIDDEN, LAYER_GB, ROOT, SMALL_VOCABULARY, write_checkpoint

WAYS = {
    "LowBitQuantConfig(bits=4, residual_bits=0)": "lowbit_ft.LowBitQuantConfig(bits=4, residual_bits=0)",
    "BitsAndBytesConfig(load_in_4bit=True)": (
        "transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4')"
    ),
    "no config (bf16)": "None",
}
CHILD = """
import json, sys, time
import bitsandbytes, torch, transformers
import transformers.models.llama.modeling_llama
import lowbit_ft
from lowbit_ft.train.memory import peak_gb, reset_peak
cpu = torch.device("cpu")
config = eval(sys.argv[2])  # one of WAYS

def rss():
    line = next(x for x in open("/proc/self/status") if x.startswith("VmRSS"))
    return int(line.split()[1]) * 1024 / 1e9

reset_peak(cpu)
before, began = rss(), time.perf_counter()
model = transformers.AutoModelForCausalLM.from_pretrained(
    sys.argv[1], quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"})
row = {"seconds": time.perf_counter() - began, "peak_gb": peak_gb(cpu) - before, "held_gb": rss() - before}
tensors = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
           for t in [*model.parameters(), *model.buffers()]}
print(json.dumps(row | {"tensors_gb": sum(tensors.values()) / 1e9}))
"""


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gb", type=float, default=1.0)
    p.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="for the checkpoint")
    p.add_argument("--out", type=Path)
    o = p.parse_args()
    layers = max(1, round((o.gb - 4 * SMALL_VOCABULARY * HIDDEN / 1e9) / LAYER_GB))
    result: dict[str, Any] = {"threads": torch.get_num_threads(), "layers": layers, "rows": []}
    if o.out and o.out.is_file() and (before := json.loads(o.out.read_text()))["layers"] == layers:
        result = before
    done = {row["way"] for row in result["rows"]}
    with tempfile.TemporaryDirectory(dir=o.folder) as folder:
        dense = Path(folder, "dense")
        write_checkpoint(dense, layers, SMALL_VOCABULARY)
        result["checkpoint_gb"] = sum(x.stat().st_size for x in dense.glob("*.safetensors")) / 1e9
        for name, config in WAYS.items():
            if name not in done:
                result["rows"].append({"way": name} | measured(dense, config))
                row = result["rows"][-1]
                print(
                    f"{name}: peak {row['peak_gb']:.2f} GB, held {row['held_gb']:.2f} GB (tensors "
                    f"{row['tensors_gb']:.2f}), {row['seconds']:.0f} s",
                    flush=True,
                )
            if o.out:
                o.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measured(dense: Path, config: str) -> dict[str, float]:
    """One way in a fresh process."""
    command = [sys.executable, "-c", CHILD, str(dense), config]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
