"""A model small enough to train in milliseconds, with the parameter names of the adapters, and data for
it.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from lowbit_ft.data.batches import Batches
from lowbit_ft.data.windows import Example, Examples
from lowbit_ft.recipe.sections.train import TrainSection

VOCABULARY, WIDTH = 23, 12


class Toy(nn.Module):
    """Frozen embedding and head, always the same; trained: A, B (low rank) and log_scale (scale group).

    start: seed of A, so that a resumed run can be given tensors that it must not keep.
    """

    def __init__(self, start: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.register_buffer("embedding", torch.randn(VOCABULARY, WIDTH, generator=g))
        self.register_buffer("head", torch.randn(VOCABULARY, WIDTH, generator=g) / 4)
        self.register_buffer("codes", torch.zeros(4, 4, dtype=torch.int16))  # as a packed base has
        self.A = nn.Parameter(torch.randn(4, WIDTH, generator=g.manual_seed(start)) / 4)
        self.B = nn.Parameter(torch.zeros(VOCABULARY, 4))
        self.log_scale = nn.Parameter(torch.zeros(VOCABULARY))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids: Tensor, position_ids: Tensor, use_cache: bool = True, **_: Any) -> Any:
        assert not use_cache and position_ids.shape == input_ids.shape
        x = self.dropout(self.embedding[input_ids])
        y = x @ self.head.T + x @ self.A.T @ self.B.T
        return SimpleNamespace(logits=y * self.log_scale.exp())


def examples(n: int = 13, seed: int = 0, length: int | None = None) -> Examples:
    """n windows of 6 to 16 tokens (or of `length`) in which the next token is a fixed function of the last;
    half are not targets.
    """
    rng = random.Random(seed)
    windows = []
    for _ in range(n):
        ids = [rng.randrange(VOCABULARY)]
        while len(ids) < (length or rng.randrange(6, 17)):
            ids.append((3 * ids[-1] + 1) % VOCABULARY)
        labels = [-100 if i < len(ids) // 3 else t for i, t in enumerate(ids)]
        windows.append(Example(ids, labels, [len(ids)]))
    return Examples(windows)


def batches(rank: int = 0, world: int = 1, seed: int = 0, n: int = 13, size: int = 2) -> Batches:
    return Batches(examples(n, seed), size, 0, seed, rank, world)


def section(**changes: Any) -> TrainSection:
    values = {"max_steps": 8, "learning_rate": 0.02, "gradient_accumulation_steps": 2, "warmup_ratio": 0.25}
    values |= changes
    if "epochs" in changes:
        values.pop("max_steps")
    return TrainSection(**values)


def quiet() -> Console:
    return Console(quiet=True)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
