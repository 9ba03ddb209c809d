"""How much a step of zeroth order can win, by kind of layer, and the learning rate that wins it.

    python benchmarks/zeroth_slopes.py --start mse --batch 4
    python benchmarks/zeroth_slopes.py --start mse --batch 4 --eps 0.1 --grid 3:128

Along one random direction u of the trained numbers (in grid steps, Adapter.one_step), a step of -a d u with d
the slope changes the loss by  -a |g|^2 + a^2 / 2 |g_b|^2 tr H,  at best by  -|g|^4 / (2 |g_b|^2 tr H), where

    g       the gradient; |g|^2 without bias, from products of different batches (by backprop)
    g_b     that of one batch, which is what a step sees
    tr H    2 (mean of both sides - loss) / eps^2 along random directions: what all other coordinates cost

A subset of the tensors has numbers of its own: one with much gradient and little tr H wins more in a step
than all of them together. `rate`: of AdamW, which moves every number by about that much, for scales. More
directions per step multiply the gain by their number, as more steps do.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from gradients import Table
from gradients import options as bench_options
from torch import Tensor
from torch.nn.functional import cross_entropy

from lowbit_ft.data.batches import Batches
from lowbit_ft.data.windows import Examples
from lowbit_ft.gradients.zeroth_order import steps_of

BATCHES, DIRECTIONS = 10, 3


class Slopes:
    """A student, its batches, and the numbers of some of its tensors."""

    def __init__(self, table: Table) -> None:
        self.model, self.eps = table.student("scale", 0).train(), table.o.eps
        rows = Batches(Examples(table.train), table.o.batch, 0, seed=0)
        self.batches = [next(rows) for _ in range(BATCHES)]
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.one = steps_of(self.model)
        self.gradients = [self.gradient(batch) for batch in self.batches]

    def loss(self, batch: dict[str, Any]) -> Tensor:
        out = self.model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
        return cross_entropy(out[:, :-1].float().flatten(0, 1), batch["labels"][:, 1:].flatten())

    def gradient(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Of one batch, fp64, in grid steps."""
        self.model.zero_grad()
        self.loss(batch).backward()
        return {n: (p.grad * self.one[n]).double().flatten() for n, p in self.trained.items()}  # pyright: ignore

    @torch.no_grad()
    def curvature(self, names: list[str]) -> float:
        """tr H of these tensors, on the first batch."""
        kept = {n: self.trained[n].clone() for n in names}
        here, found = float(self.loss(self.batches[0])), []
        for number in range(DIRECTIONS):
            torch.manual_seed(number)
            by = {n: torch.randn_like(p) * (self.eps * self.one[n]) for n, p in kept.items()}
            sides = []
            for sign in (1, -1):
                for n in names:
                    self.trained[n].copy_(kept[n] + sign * by[n])
                sides.append(float(self.loss(self.batches[0])))
            found.append(2 * (sum(sides) / 2 - here) / self.eps**2)
        for n in names:
            self.trained[n].copy_(kept[n])
        return sum(found) / len(found)

    def row(self, names: list[str]) -> dict[str, float]:
        flat = torch.stack([torch.cat([g[n] for n in names]) for g in self.gradients])
        products = flat @ flat.t()
        seen, trace = float(products.diag().mean()), self.curvature(names)
        g = float((products.sum() - products.diag().sum()) / (BATCHES * (BATCHES - 1)))
        step = sum(float(self.one[n]) for n in names) / len(names)
        return {
            "numbers": flat.shape[1],
            "g2": g,
            "gb2": seen,
            "trace": trace,
            "gain": g * g / (2 * seen * trace),
            "rate": step * g / (seen**0.5 * trace),
        }


def main() -> None:
    if "--start" not in sys.argv:
        sys.argv += ["--start", "mse"]
    o = bench_options()
    torch.set_num_threads(o.threads)
    slopes = Slopes(Table(o))
    kinds: dict[str, list[str]] = {"all": list(slopes.trained)}
    for name in slopes.trained:
        kinds.setdefault(name.removesuffix(".adapter.log_scale").rpartition(".")[2], []).append(name)
    kinds["q, k and v"] = [n for kind in ("q_proj", "k_proj", "v_proj") for n in kinds.get(kind, [])]
    print("| layers | numbers | g^2 | g_b^2 | tr H | gain of a step | rate |\n|---|--:|--:|--:|--:|--:|--:|")
    for kind, names in kinds.items():
        if names:
            r = slopes.row(names)
            print(
                f"| {kind} | {r['numbers']:.0f} | {r['g2']:.5f} | {r['gb2']:.5f} | {r['trace']:.3f} | "
                f"{r['gain']:.1e} | {r['rate']:.1g} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
