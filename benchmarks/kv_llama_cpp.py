"""Why a 4-bit cache of llama.cpp gives other numbers than the training forward: its inputs have 8 bits.

    python -m benchmarks.serve --llama-cpp VENV --only "llama.cpp | llama | gguf | W4 g128 KV4"
    python -m benchmarks.kv_llama_cpp --llama-cpp VENV --run runs/serve/llama-W4-g128-KV4-...

llama.cpp multiplies a matrix with inputs rounded to Q8_0. Keys and values come from such products, so they
differ from training's in the third digit, and where one lies between two steps of a 4-bit cache it falls on
the other. For a cache of keys, of values, of both, the mean distance of log-probabilities (random tokens):

    file      this project to llama.cpp
    rounded   this project, its inputs in Q8_0 too, to llama.cpp
    itself    this project to itself with its inputs in Q8_0: what the rounding of inputs alone does
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import lowbit_ft  # noqa: F401  (its folders load)
from benchmarks.serve import HERE, asked
from lowbit_ft.kv_cache import Codec, KVConfig
from lowbit_ft.model.kv_seam import seams

# name -> bits of keys, of values (0: as they come)
CACHES = {"none": (0, 0), "keys, 4": (4, 0), "values, 4": (0, 4), "both, 4": (4, 4), "both, 8": (8, 8)}


class AsTheyCome:
    """In the place of a grid, where only the other of keys and values has one."""

    def fake(self, x: torch.Tensor) -> torch.Tensor:
        return x


def job(run: Path, prompts: list[list[int]], keys: int, values: int) -> dict[str, Any]:
    flags = ["--flash-attn", "on"]
    for letter, bits in (("k", keys), ("v", values)):
        flags += [f"--cache-type-{letter}", f"q{bits}_0"] if bits else []
    environment = {"LLAMA_ATTN_ROT_DISABLE": "1"}
    folder = str((run / "as-gguf").resolve())
    return {"folder": folder, "prompts": prompts, "new_tokens": 1, "flags": flags, "environment": environment}


def in_q8_0(_module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """A forward pre-hook of a matrix: its input as llama.cpp multiplies it."""
    codec = KVConfig.of(8, "block").codec(args[0].shape[-1])
    return codec.round(args[0][:, None])[:, 0], *args[1:]


@torch.no_grad()
def ours(model: Any, ids: torch.Tensor, keys: int, values: int, rounded: bool) -> torch.Tensor:
    """Log-probabilities [rows, tokens - 1] with these caches."""

    def grid(bits: int) -> Codec | AsTheyCome:
        return KVConfig.of(bits, "block").codec(64) if bits else AsTheyCome()

    for _, seam in seams(model):
        k: Any = grid(keys)
        seam.keys = k.of_keys(model.config.model_type) if keys else k
        seam.values, seam.layer = grid(values), None  # pyright: ignore[reportAttributeAccessIssue]
    matrices = [m for m in model.modules() if type(m).__name__ in ("PackedLinear", "Linear")]
    hooks = [m.register_forward_pre_hook(in_q8_0) for m in matrices] if rounded else []
    scores = model(ids, use_cache=False).logits.double().log_softmax(-1)
    for hook in hooks:
        hook.remove()
    return scores[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--llama-cpp", type=Path, required=True, help="its environment")
    p.add_argument("--run", type=Path, required=True, help="a run of benchmarks.serve with a block cache")
    p.add_argument("--rows", type=int, default=8)
    p.add_argument("--out", type=Path, default=HERE / "results" / "kv_llama_cpp.json")
    o = p.parse_args()
    o.venvs = {"llama.cpp": o.llama_cpp}
    model: Any = AutoModelForCausalLM.from_pretrained(o.run / "merged", dtype=torch.float32)
    ids = torch.randint(5, model.config.vocab_size, (o.rows, 60), generator=torch.Generator().manual_seed(0))
    jobs = {name: job(o.run, ids.tolist(), *bits) for name, bits in CACHES.items()}
    rows: dict[str, Any] = {}
    for name, answer in asked("llama.cpp", jobs, o):
        theirs = torch.tensor(answer["logprobs"], dtype=torch.float64)
        plain, rounded = (ours(model, ids, *CACHES[name], rounded) for rounded in (False, True))
        far = {"file": plain - theirs, "rounded": rounded - theirs, "itself": rounded - plain}
        rows[name] = {key: round(float(value.abs().mean()), 4) for key, value in far.items()}
        print(f"{name:10}", rows[name], flush=True)
        o.out.write_text(json.dumps({"model": model.config.model_type, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
