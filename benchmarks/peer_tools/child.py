"""What the process of a peer is given and what it leaves: the checkpoint and token ids in, weights with their
grid out.

It runs in the environment of the peer, so it imports torch, safetensors and the standard library only. A peer
is

    python benchmarks/peer_tools/<peer>.py <spec.json> <folder>

spec.json: model (folder), rows (safetensors with ids [R, L] int32), samples (the first of them that are
used), bits, group_size (-1: the row), symmetric, seed, threads, options (of the peer). The folder gets
weights.safetensors (for each layer `<name>.weight` [N, K] as the peer computes with it, `<name>.scale` [N,
G], `<name>.zero` [N, G] where there is one: weight = scale * (code - zero)) and facts.json (versions,
seconds).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# name, weight [N, K], scale [N, G], zero [N, G] or None (the middle of the codes)
Layer = tuple[str, Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Spec:
    """One row that is asked for; see the head of the file."""

    model: str
    rows: str
    samples: int
    bits: int
    group_size: int
    symmetric: bool
    seed: int
    threads: int
    options: dict[str, Any]

    def ids(self) -> Tensor:
        """[samples, L] int64."""
        ids = load_file(self.rows)["ids"]
        if self.samples > len(ids):
            raise ValueError(f"samples {self.samples}; {self.rows} has {len(ids)} rows")
        return ids[: self.samples].long()


def dense_model(spec: Spec, dtype: torch.dtype = torch.float32) -> Any:
    """The checkpoint on the CPU."""
    from transformers import AutoModelForCausalLM  # of the peer's environment

    return AutoModelForCausalLM.from_pretrained(spec.model, dtype=dtype).eval()


def decoder_linears(model: Any) -> dict[str, Any]:
    """The linears of the decoder layers by their name in the checkpoint."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and any(part.isdecimal() for part in name.split("."))
    }


def main(
    packages: Iterable[str], quantize: Callable[[Spec], tuple[Any, Callable[[], Iterable[Layer]]]]
) -> None:
    """Run one peer. quantize(spec) loads what it needs and returns (work, layers): work() is what is
    timed.
    """
    spec = Spec(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    out = Path(sys.argv[2])
    torch.set_num_threads(spec.threads)
    torch.manual_seed(spec.seed)
    work, layers = quantize(spec)
    began, cpu = time.perf_counter(), time.process_time()
    work()
    facts: dict[str, Any] = {
        "work_seconds": time.perf_counter() - began,
        "work_cpu_seconds": time.process_time() - cpu,
        "versions": {name: version(name) for name in ("torch", "transformers", *packages)},
        "threads": torch.get_num_threads(),
    }
    tensors: dict[str, Tensor] = {}
    for name, weight, scale, zero in layers():
        tensors[f"{name}.weight"] = weight.detach().contiguous().clone()
        tensors[f"{name}.scale"] = scale.detach().contiguous().clone()
        if zero is not None:
            tensors[f"{name}.zero"] = zero.detach().contiguous().clone()
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "weights.safetensors")
    (out / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    os.sync()
