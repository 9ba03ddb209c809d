"""How far the cheaper gradients are from the exact ones, on a model that has trained a while, and how many
weights are clipped there.

    python benchmarks/gradient_error.py --method lr_qat --grid 2:64 --steps 40

One batch of training text, gradients of A and B (together) and of the scales by every choice of
low_rank_gradient and scale_grad_tokens: relative error ||g - g_exact|| / ||g_exact|| and cosine. What is
drawn is drawn --draws times and the mean over the draws is shown. quality.py says what the difference does to
a run; this says what it is.
"""

import argparse
import sys
import tempfile
from statistics import mean
from typing import Any

import torch
from quality import ADAPTERS, Bench, attach, options
from rich.console import Console

from lowbit_ft.adapters import SCALE_PARAMETERS
from lowbit_ft.adapters.attach import adapted_layers, begin_step
from lowbit_ft.data.batches import Batches
from lowbit_ft.data.windows import Examples
from lowbit_ft.recipe.sections.quant import QuantSection
from lowbit_ft.recipe.sections.train import TrainSection
from lowbit_ft.train.loop import train
from lowbit_ft.train.losses import next_token_loss

CHOICES = [
    ("factorised", 1.0),
    ("factorised", 0.25),
    ("factorised", 0.125),
    ("corrected", 0.25),
    ("corrected", 0.125),
]


def clipped_share(model: Any) -> float:
    """The share of weights whose gradient the clip cuts."""
    from lowbit_kernels.codes import grid_values
    from lowbit_kernels.layout import row_chunks, ungrouped

    clipped = total = 0
    for _, layer in adapted_layers(model):
        base: Any = layer.base
        g, args = base.grid, layer.adapter.grid_args(base)  # pyright: ignore
        for rows in row_chunks(*base.shape):
            value = grid_values(rows, base.on_grid(args), base.shape[1], g.group_size)
            value = ungrouped(value if args.clip_first else value.round(), base.shape[1])
            clipped += int(((value < 0) | (value > (1 << g.bits) - 1)).sum())
            total += value.numel()
    return clipped / total


def gradients(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(of A and B, of the scales) in one row each."""
    model.train()
    model.zero_grad()
    labels = batch["labels"]
    next_token_loss(model(input_ids=batch["input_ids"], use_cache=False).logits, labels).backward()
    parts: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parts[name.rpartition(".")[2] in SCALE_PARAMETERS].append(parameter.grad.flatten().double())
    return torch.cat(parts[False]), torch.cat(parts[True])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--method", default="lr_qat", choices=["lr_qat", "dl_qat", "l4q"])
    p.add_argument("--grid", default="2:64")
    p.add_argument("--steps", type=int, default=40, help="of training before the gradients are looked at")
    p.add_argument("--draws", type=int, default=4)
    mine = p.parse_args()
    sys.argv = sys.argv[:1]
    o = options()  # the model, text and sizes of quality.py
    torch.set_num_threads(1)
    bench = Bench(o)
    bits, group = (int(v) for v in mine.grid.split(":"))
    model = bench.base(
        QuantSection.model_validate(
            {"bits": bits, "group_size": group, "symmetric": False, "calibrate": "gptq"}
        )
    )
    torch.manual_seed(0)
    attach(model, ADAPTERS[mine.method].model_validate({"method": mine.method}))
    section = TrainSection(
        max_steps=mine.steps, micro_batch_size=o.batch, gradient_accumulation_steps=1, learning_rate=1e-3
    )
    print(f"clipped before training: {clipped_share(model):.2%}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        train(
            model,
            Batches(Examples(bench.train), o.batch, 0, seed=0),
            None,
            section,
            folder,
            on_step=lambda step: begin_step(model, step),
            console=Console(quiet=True),
        )
    print(f"clipped after {mine.steps} steps: {clipped_share(model):.2%}", flush=True)
    batch = next(Batches(Examples(bench.train), o.batch, 0, seed=9))
    exact = gradients(model, batch)
    print(f"{'low rank':<12}{'tokens':>8}{'A, B error':>12}{'cosine':>8}{'scale error':>13}{'cosine':>8}")
    for low_rank, tokens in CHOICES:
        for _, layer in adapted_layers(model):
            changed = {"low_rank_gradient": low_rank, "scale_grad_tokens": tokens}
            layer.adapter.config = layer.adapter.config.model_copy(update=changed)  # pyright: ignore
        rows = [gradients(model, batch) for _ in range(mine.draws if tokens < 1 else 1)]
        cells = []
        for i in (0, 1):
            cells.append(mean(((r[i] - exact[i]).norm() / exact[i].norm()).item() for r in rows))
            cells.append(
                mean(torch.nn.functional.cosine_similarity(r[i], exact[i], dim=0).item() for r in rows)
            )
        print(
            f"{low_rank:<12}{tokens:>8g}{cells[0]:>12.4f}{cells[1]:>8.4f}{cells[2]:>13.4f}{cells[3]:>8.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
