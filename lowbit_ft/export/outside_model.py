"""What a reader that is not torch has to give, to be asked like a model: logits of one text."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


class OutsideModel(nn.Module):
    """Takes and gives torch tensors. Inference only; no cache between calls."""

    def __init__(self, stops: Sequence[int]):
        super().__init__()
        self.stops = frozenset(stops)
        self.nothing = nn.Parameter(torch.empty(0), requires_grad=False)  # callers ask a model for its device

    def logits(self, ids: Tensor) -> Tensor:
        """ids [1, L] of one text -> fp32 [1, L, V]."""
        raise AssertionError(f"{type(self).__name__} has no logits")

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **_: Any) -> SimpleNamespace:
        """.logits fp32 [B, L, V]. Where position_ids restart in a row, another text begins, which does not
        see the one before.
        """
        rows = []
        for i, ids in enumerate(input_ids):
            starts = (
                [0]
                if position_ids is None
                else sorted({0, *(position_ids[i] == 0).nonzero().flatten().tolist()})
            )
            texts = zip(starts, [*starts[1:], len(ids)], strict=True)
            rows.append(torch.cat([self.logits(ids[None, a:b])[0] for a, b in texts]))
        return SimpleNamespace(logits=torch.stack(rows))

    def generate(self, ids: Tensor, *, max_new_tokens: int, do_sample: bool = False, **_: Any) -> Tensor:
        """Greedy, ids [1, L] -> [1, L + new], to the first stop token or max_new_tokens. ValueError for
        sampling, which is the business of the format's own tools.
        """
        if do_sample:
            raise ValueError("sampling from a folder that torch does not run: use the format's own tools")
        for _step in range(max_new_tokens):
            ids = torch.cat([ids, self(ids).logits[:, -1:].argmax(-1)], dim=1)
            if int(ids[0, -1]) in self.stops:
                break
        return ids
