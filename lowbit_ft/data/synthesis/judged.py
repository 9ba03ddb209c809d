"""What a model says of rows that it wrote: how likely every token of them is, and what becomes of an answer.

    confidence of an answer a to x   c(a) = exp( 1/|a| sum_t log p(a_t | x, a_<t) )       its end token counts
    of the answers of a label space  p(a) = c(a) / sum of the c of all of them
    perplexity of an input x         exp( - 1/|x| sum_t log p(x_t | head, x_<t) )

The mean over the tokens is there so that a long answer is not less believed than a short one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

TOGETHER = 8  # rows of a forward: fixed, for a product's last bits may go by it

SURE, RELABELLED, DOUBTFUL, UNLIKELY = "sure", "relabelled", "doubtful", "unlikely answer"


@torch.no_grad()
def token_log_p(model: Any, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """log p of every token but the first of each row, given those before it: fp32 [length - 1] on the CPU.
    Rows are padded on the right, where a causal model does not look."""
    device, found = next(model.parameters()).device, list[torch.Tensor]()
    for at in range(0, len(rows), TOGETHER):
        some = rows[at : at + TOGETHER]
        longest = max(map(len, some))
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in some], device=device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        for row, values, tokens in zip(some, logits, ids, strict=True):
            values = values.float().log_softmax(-1)  # a row at a time: [L, V] in fp32
            found.append(values.gather(-1, tokens[1:, None])[: len(row) - 1, 0].cpu())
    return found


def mean_log_p(log_p: torch.Tensor, start: int, end: int) -> float:
    """The mean of log p over the tokens [start, end) of a row; start is at least 1."""
    return float(log_p[start - 1 : end - 1].double().mean())


def among(log_c: Sequence[float]) -> list[float]:
    """log c of the answers of a space -> p of each."""
    return torch.tensor(log_c, dtype=torch.float64).softmax(-1).tolist()


def fate(p: Sequence[float], own: int, p_high: float, p_low: float, relabel: bool) -> tuple[str, int | None]:
    """What becomes of a row with the answer `own` of those with probabilities p: (sure, relabelled or
    doubtful; its answer), or (unlikely answer, None), dropped."""
    best = max(range(len(p)), key=lambda i: (p[i], -i))
    if p[own] >= p_high:
        return SURE, own
    if relabel and p[best] >= p_high:
        return RELABELLED, best
    return (UNLIKELY, None) if p[own] < p_low else (DOUBTFUL, own)


class Overlap:
    """Which texts are nearly one: the share of their n-grams that both have, |A n B| / |A u B|, is above
    `most`."""

    def __init__(self, n: int, most: float):
        self.n, self.most = n, most
        self.sizes = list[int]()
        self.places = dict[tuple[int, ...], list[int]]()  # an n-gram -> the texts that have it

    def grams(self, ids: Sequence[int]) -> set[tuple[int, ...]]:
        """The n-grams of a text; of a shorter one all of it."""
        return {tuple(ids[i : i + self.n]) for i in range(max(1, len(ids) - self.n + 1))}

    def add(self, ids: Sequence[int]) -> None:
        grams = self.grams(ids)
        for gram in grams:
            self.places.setdefault(gram, []).append(len(self.sizes))
        self.sizes.append(len(grams))

    def repeats(self, ids: Sequence[int]) -> bool:
        """Whether a text that was added is nearly this one."""
        grams, shared = self.grams(ids), dict[int, int]()
        for gram in grams:
            for text in self.places.get(gram, ()):
                shared[text] = shared.get(text, 0) + 1
        return any(both > self.most * (len(grams) + self.sizes[text] - both) for text, both in shared.items())
