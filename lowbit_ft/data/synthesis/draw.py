"""What is taken of a distribution: its likeliest token, and one drawn by the row's own numbers.

A draw is the inverse of the cumulative distribution at a uniform number that belongs to (seed, row, step): a
counter, not a stream, so a row is drawn alike in any company and after any restart. The sum runs over whole
numbers, p in units of 2^-40: it is exact in any order, on any device (a floating cumsum on a GPU is not the
same twice). What is less likely than 2^-40 is never drawn.

The logits themselves come out of matrix products, whose last bits may differ between batches of another size.
So the promise of bytes is for one batch_size; with another one a row may differ from where a draw falls
between two such sums, which is rare.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

UNIT = float(1 << 40)


def uniforms(seed: int, row: int, count: int) -> np.ndarray:
    """The uniform numbers of a row, [count] float64 in [0, 1): 53 bits each of Philox with the key (seed,
    row), whose raw stream numpy keeps from version to version."""
    raw = np.random.Philox(key=np.array([seed, row], dtype=np.uint64)).random_raw(count)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def take(
    logits: Tensor, uniform: Tensor, *, temperature: float, top_p: float | None, banned: Tensor
) -> tuple[list[int], list[int]]:
    """logits [B, V]; uniform [B] float64; banned [V] bool, tokens that cannot be taken -> per row the
    likeliest token (of equals the first), and the drawn one."""
    logits = logits.float().masked_fill(banned, float("-inf"))
    weights = (torch.softmax(logits / temperature, -1).double() * UNIT).round().long()
    order = None
    if top_p is not None:
        weights, order = torch.sort(weights, dim=-1, descending=True, stable=True)
        before = weights.cumsum(-1) - weights
        weights = weights.masked_fill(before.double() >= top_p * weights.sum(-1, keepdim=True).double(), 0)
    sums = weights.cumsum(-1)
    wanted = (uniform.to(logits.device)[:, None] * sums[:, -1:].double()).floor().long()
    drawn = torch.searchsorted(sums, wanted, right=True)
    if order is not None:
        drawn = order.gather(-1, drawn)
    return logits.argmax(-1).tolist(), drawn[:, 0].tolist()
