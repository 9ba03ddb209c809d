"""One recipe trained by one process, by two with DDP and by two with FSDP2: losses, bytes of the base per
process, merged hash.

    python benchmarks/processes.py recipes/quickstart.yaml train.max_steps=6 train.micro_batch_size=2
    data.sequence_len=128

Two processes take half the micro-batches each, so every step sees the same windows. A sum of two gradients
has no order, so the losses and the merged integers must be the same to the last bit; the script fails when
they are not, when FSDP2 holds more than 0.55 of the packed base on a process, or when the processes did not
train the way they were told to. The CPU's processes talk through gloo; --device cuda needs two GPUs.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def train(recipe: str, overrides: list[str], output: Path, processes: int, sharding: str) -> None:
    """`lowbit-ft train` by so many processes, 2 micro-batches per step in all."""
    launch = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        if processes > 1
        else []
    )
    keys = [
        f"train.gradient_accumulation_steps={2 // processes}",
        f"train.sharding={sharding}",
        f"output={output}",
    ]
    command = [sys.executable, *launch, "-m", "lowbit_ft", "train", recipe, *overrides, *keys]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])


def result(output: Path) -> dict[str, Any]:
    """Losses of all steps, one hash over the merged tensors, and what each process held."""
    sha = hashlib.sha256()
    for file in sorted((output / "merged").glob("*.safetensors")):
        sha.update(file.read_bytes())
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    held = output / "processes.json"
    return {
        "losses": [row["loss"] for row in rows if "loss" in row],
        "merged": sha.hexdigest(),
        "processes": json.loads(held.read_text(encoding="utf-8")) if held.is_file() else None,
    }


def show(name: str, found: dict[str, Any]) -> None:
    print(
        f"{name:24s} losses {' '.join(f'{loss:.6f}' for loss in found['losses'])}  merged "
        f"{found['merged'][:16]}",
        flush=True,
    )
    if found["processes"] is None:
        return
    for rank, row in enumerate(found["processes"]["ranks"]):
        share = row["base"] / row["whole_base"]
        print(
            f"    rank {rank} ({found['processes']['type']}): base {row['base']:,} of "
            f"{row['whole_base']:,} bytes ({share:.3f}), "
            f"the rest {row['rest']:,} of {row['whole_rest']:,}",
            flush=True,
        )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("recipe")
    p.add_argument("overrides", nargs="*")
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    p.add_argument("--json", type=Path, help="write the numbers there too")
    o = p.parse_args()
    fixed = [*o.overrides, f"model.device={o.device}"]
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, processes, sharding in (("one", 1, "none"), ("ddp", 2, "none"), ("fsdp", 2, "fsdp")):
            train(o.recipe, fixed, Path(folder) / name, processes, sharding)
            found[name] = result(Path(folder) / name)
            show(f"{name}, {processes} process{'es' * (processes > 1)}", found[name])
    if o.json is not None:
        o.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    same = all(
        found[name][key] == found["one"][key] for name in ("ddp", "fsdp") for key in ("losses", "merged")
    )
    types = [found[name]["processes"]["type"] for name in ("ddp", "fsdp")]
    shares = [row["base"] / row["whole_base"] for row in found["fsdp"]["processes"]["ranks"]]
    print(
        f"same losses and merged bytes: {same}; types {types}; largest share of the packed base "
        f"{max(shares):.3f}"
    )
    raise SystemExit(0 if same and max(shares) <= 0.55 and types == ["DDP", "FSDP2"] else 1)


if __name__ == "__main__":
    main()
