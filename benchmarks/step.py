"""Training step of each method against a dense LoRA (peft) of the same rank, dtype and length, interleaved in
one process.

    python benchmarks/step.py --methods lr_qat dl_qat l4q scale lora
    python benchmarks/step.py --methods lr_qat lr_qat+keep lr_qat+factorised+tokens=0.25 lr_qat+compile
    --accumulate 2 --checkpointing

Prints the median step and its ratio to LoRA's. A grid-aware backward has three GEMMs per layer (forward, dX,
dW) against LoRA's two, so 1.5 is the floor of the plain form where the model is all linears. Behind a
method's name, each after a +:

    factorised, corrected    adapter.low_rank_gradient
    tokens=0.25              adapter.scale_grad_tokens
    keep                     train.keep_codes
    compile                  train.compile

The GEMMs of a column are products of a layer's size, counted by tests/kernels/test_estimates.py; without
recomputation.
"""

import argparse
import copy
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lowbit_ft.adapters import ADAPTERS, AdapterConfig
from lowbit_ft.adapters.attach import attach, keep_codes
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.load import load_model
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.sections.quant import QuantSection
from lowbit_ft.rundir import environment
from lowbit_ft.train.compiling import compile_layers
from lowbit_ft.train.losses import next_token_loss
from lowbit_ft.train.setup import activation_checkpointing

ASSETS = Path(__file__).resolve().parent.parent / "recipes" / "assets"


def stepper(model: Any, ids: torch.Tensor, o: argparse.Namespace, switches: set[str] = frozenset()) -> Any:  # pyright: ignore
    """One optimizer step on fixed tokens, as a function."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    model.train()
    if o.checkpointing:
        activation_checkpointing(model, True)
    if "keep" in switches:
        keep_codes(model, True)
    if "compile" in switches:
        compile_layers(model)

    def step() -> None:
        for _ in range(o.accumulate):
            loss = next_token_loss(model(input_ids=ids, use_cache=False).logits, ids) / ids.numel()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def adapter_of(spec: str, rank: int) -> tuple[AdapterConfig, set[str]]:
    """ "lr_qat+factorised+tokens=0.25+keep" -> its config, and the switches of the training loop."""
    method, *parts = spec.split("+")
    config, switches = ADAPTERS[method], {part for part in parts if part in ("keep", "compile")}
    given: dict[str, Any] = {"rank": rank, "alpha": rank} if "rank" in config.model_fields else {}
    for part in parts:
        if part.startswith("tokens="):
            given["scale_grad_tokens"] = float(part.removeprefix("tokens="))
        elif part.startswith("share="):
            given["share"] = float(part.removeprefix("share="))
        elif part not in switches:
            given["low_rank_gradient"] = part
    return config.model_validate({"method": method, **given}), switches


def products(config: AdapterConfig, bits: int, group_size: int = 128) -> float | None:
    """GEMMs of a layer's size per forward and backward."""
    grid = QuantSection(bits=bits, group_size=group_size).grid_for("")  # pyright: ignore[reportArgumentType]
    if config.method == "scale":
        return 2 + config.scale_grad_tokens  # pyright: ignore[reportAttributeAccessIssue]
    cost = getattr(config, "gradient_cost", None)
    return None if cost is None else 2 + cost(grid)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=str(ASSETS / "tiny-llama"))
    p.add_argument(
        "--methods", nargs="+", default=["lr_qat", "dl_qat", "l4q", "scale", "lora", "alpha_tuning"]
    )
    p.add_argument("--bits", type=int, default=4)
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--window", type=int, default=256)
    p.add_argument("--dtype", default="float32")
    p.add_argument("--accumulate", type=int, default=1, help="micro-batches per step")
    p.add_argument("--checkpointing", action="store_true", help="recompute the layers in the backward")
    p.add_argument(
        "--processor-time",
        action="store_true",
        help="with --threads 1 on a busy machine: time of this process, not of the clock",
    )
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
    steps = {"dense LoRA (peft)": stepper(get_peft_model(dense, peft_config), ids, o)}
    packed = {
        grid: quantize(
            checkpoint,
            QuantSection(grid=grid, bits=o.bits if grid == "integer" else min(o.bits, 4)),
            dtype=dtype,
        )[0]
        for grid in ("integer", "binary")
    }  # pyright: ignore[reportArgumentType]
    counted: dict[str, float | None] = {"dense LoRA (peft)": 2.0}
    for spec in o.methods:
        config, switches = adapter_of(spec, o.rank)
        model = copy.deepcopy(packed[config.grid_name])
        attach(model, config)
        steps[spec], counted[spec] = stepper(model, ids, o, switches), products(config, o.bits)
    times: dict[str, list[float]] = {name: [] for name in steps}
    clock = time.process_time if o.processor_time else time.perf_counter
    for round_number in range(o.rounds + 2):
        for name, step in steps.items():
            began = clock()
            step()
            if round_number >= 2:  # two rounds to warm up
                times[name].append(clock() - began)
    base = median(times["dense LoRA (peft)"])
    rows = [
        {"method": n, "seconds": median(t), "ratio": median(t) / base, "products": counted[n]}
        for n, t in times.items()
    ]
    for row in rows:
        gemms = "" if row["products"] is None else f"{row['products']:>8.3g} GEMMs"
        print(f"{row['method']:<36}{row['seconds'] * 1e3:>10.1f} ms{row['ratio']:>8.2f}x{gemms}")
    if o.out:
        o.out.write_text(
            json.dumps(
                {
                    "environment": environment(),
                    "options": {k: str(v) for k, v in vars(o).items()},
                    "rows": rows,
                },
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
