"""Starts on sign planes and 2-bit integers beside LLM-QAT's `mean`: untrained, on the tiny Llama.

    python -m benchmarks.mean_levels

Loss of 4096 tokens of its own text, and KL to full precision; about a minute.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.load import load_model, load_tokenizer
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.sections.quant import QuantSection

ASSETS = Path(__file__).parents[1] / "recipes" / "assets"
TOKENS, WINDOW, ROWS = 4096, 256, 60
PLANES = [("binary", bits, name) for bits in (1, 2) for name in ("mean", "greedy", "alternating")]
CASES = [*PLANES, ("integer", 2, "absmax"), ("integer", 2, "mse")]


@torch.no_grad()
def log_p(model: Any, ids: Tensor) -> Tensor:
    return torch.cat([model(part).logits.log_softmax(-1) for part in ids.split(4)])


def loss(log_p: Tensor, ids: Tensor) -> float:
    return float(-log_p[:, :-1].gather(-1, ids[:, 1:, None]).mean())


def main() -> None:
    checkpoint = Checkpoint.open(ASSETS / "tiny-llama", dtype="float32")
    lines = (ASSETS / "text" / "train.jsonl").read_text().splitlines()[:ROWS]
    text = " ".join(json.loads(line)["text"] for line in lines)
    ids = torch.tensor(load_tokenizer(checkpoint)(text)["input_ids"][:TOKENS]).view(-1, WINDOW)
    dense = log_p(load_model(checkpoint).eval(), ids)
    print(f"full precision: loss {loss(dense, ids):.4f}")
    for grid, bits, name in CASES:
        for group in (-1, 64):
            keys = {"grid": grid, "bits": bits, "group_size": group, "calibrate": name}
            model, _ = quantize(checkpoint, QuantSection.model_validate(keys))
            found = log_p(model, ids)
            kl = float((dense.exp() * (dense - found)).sum(-1).mean())
            print(f"{grid} {bits} g{group} {name}: loss {loss(found, ids):.4f}, KL {kl:.4f}", flush=True)


if __name__ == "__main__":
    main()
