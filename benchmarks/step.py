"""Training step of each method against a dense LoRA (peft) of the same rank, dtype and length, interleaved in one process.

    python benchmarks/step.py --methods lr_qat dl_qat l4q scale lora

Prints the median step and its ratio to LoRA's. A grid-aware backward has three GEMMs per layer (forward, dX, dW) against LoRA's two,
so 1.5 is the floor of the plain form where the model is all linears.
"""

import argparse
import copy
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.attach import attach
from lowbit_ft.load import Checkpoint, load_model
from lowbit_ft.losses import next_token_loss
from lowbit_ft.quantize import quantize
from lowbit_ft.recipe import QuantSection
from lowbit_ft.rundir import environment

ASSETS = Path(__file__).resolve().parent.parent / "recipes" / "assets"


def stepper(model: Any, ids: torch.Tensor) -> Any:
    """One optimizer step on fixed tokens, as a function."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    model.train()

    def step() -> None:
        loss = next_token_loss(model(input_ids=ids, use_cache=False).logits, ids) / ids.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=str(ASSETS / "tiny-llama"))
    p.add_argument("--methods", nargs="+", default=["lr_qat", "dl_qat", "l4q", "scale", "lora", "alpha_tuning"])
    p.add_argument("--bits", type=int, default=4)
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--window", type=int, default=256)
    p.add_argument("--dtype", default="float32")
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--out", type=Path)
    o = p.parse_args()
    torch.set_num_threads(o.threads)
    torch.manual_seed(0)
    checkpoint = Checkpoint.open(o.model, dtype=o.dtype)
    dtype = getattr(torch, o.dtype)
    ids = torch.randint(0, checkpoint.config.vocab_size, (o.batch, o.window))

    from peft import LoraConfig, get_peft_model

    dense = load_model(checkpoint, dtype=dtype)
    peft_config = LoraConfig(r=o.rank, lora_alpha=o.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    steps = {"dense LoRA (peft)": stepper(get_peft_model(dense, peft_config), ids)}
    packed = {
        grid: quantize(
            checkpoint, QuantSection(grid=grid, bits=o.bits if grid == "integer" else min(o.bits, 4)), dtype=dtype
        )[0]
        for grid in ("integer", "binary")
    }  # pyright: ignore[reportArgumentType]
    for method in o.methods:
        config = ADAPTERS[method]
        given = {"rank": o.rank, "alpha": o.rank} if "rank" in config.model_fields else {}
        model = copy.deepcopy(packed[config.grid_name])
        attach(model, config.model_validate({"method": method, **given}))
        steps[method] = stepper(model, ids)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(o.rounds + 2):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if round_number >= 2:  # two rounds to warm up
                times[name].append(time.perf_counter() - began)
    base = median(times["dense LoRA (peft)"])
    rows = [{"method": n, "seconds": median(t), "ratio": median(t) / base} for n, t in times.items()]
    for row in rows:
        print(f"{row['method']:<20}{row['seconds'] * 1e3:>10.1f} ms{row['ratio']:>8.2f}x")
    if o.out:
        o.out.write_text(json.dumps({"environment": environment(), "options": {k: str(v) for k, v in vars(o).items()}, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
