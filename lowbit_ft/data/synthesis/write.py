"""The model writes a batch of rows, token by token, with its own cache of keys and values.

All rows of a batch begin with the same number of tokens and each step appends one token to every row that is
not finished, so they are at one position all the time: no padding and no mask, and a row sees what it would
see alone. Finished rows leave the batch once half of it is finished, at the same steps whenever the same rows
are written together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .draw import take, uniforms
from .voice import Row


@torch.no_grad()
def write_rows(
    model: Any,
    rows: Sequence[Row],
    numbers: Sequence[int],
    *,
    seed: int,
    max_len: int,
    temperature: float,
    top_p: float | None,
    drawable: Callable[[int], torch.Tensor],
    tell: Callable[[int], None] = lambda tokens: None,
) -> None:
    """Write the rows to their end. numbers: of the rows, for their draws. drawable(V): bool [V], the tokens
    of V logits that may be taken. tell(n) after every step: n tokens more."""
    device = next(model.parameters()).device
    first = {len(row.ids) for row in rows}
    assert len(first) == 1, "rows of a batch begin at one length"
    steps = max_len - first.pop()
    draws = torch.stack([torch.from_numpy(uniforms(seed, number, steps)) for number in numbers])
    inputs = torch.tensor([row.ids for row in rows], device=device)
    here = list(range(len(rows)))  # which row each line of the batch is
    going = [True] * len(rows)
    cache, banned = None, None
    for step in range(steps):
        out = model(input_ids=inputs, past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[:, -1]
        if banned is None:
            banned = ~drawable(logits.shape[-1]).to(device)
        likeliest, drawn = take(
            logits, draws[here, step], temperature=temperature, top_p=top_p, banned=banned
        )
        wrote = 0
        for line, row in enumerate(here):
            if going[row]:
                going[row] = rows[row].take(likeliest[line], drawn[line])
                wrote += 1
        tell(wrote)
        left = [line for line, row in enumerate(here) if going[row]]
        if not left:
            return
        if 2 * len(left) <= len(here) and hasattr(cache, "batch_select_indices"):
            cache.batch_select_indices(torch.tensor(left, device=device))
            here = [here[line] for line in left]
        inputs = torch.tensor([[rows[row].ids[-1]] for row in here], device=device)
    assert not any(going), "a row is longer than max_len"
