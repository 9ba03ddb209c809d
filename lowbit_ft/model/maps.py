"""maps: attention that writes out its scores and its probabilities, for who looks at them or changes them.

    scores = q k^T scaling (+ mask)  ->  probabilities  ->  dropout  ->  context = probabilities v

transformers' own eager attention gives the probabilities of all layers at the end of a forward; here a `Seat`
on the attention module is asked while they are there, and may answer with others. Everything of length x
length is as large as in eager attention, and kept for the backward: for encoders and short windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .attention import NAME as SEGMENTS

NAME = "lowbit_maps"
SEAT = "lowbit_seat"  # the attribute of a module that is looked at
HIDDEN = -1e2  # what a mask adds to a score that nobody sees is below it


class Seat:
    """Looks at one layer's attention."""

    def maps(self, scores: Tensor, visible: Tensor | None, probabilities: Tensor) -> Tensor:
        """scores [B, H, L, L] before the mask; visible bool, broadcast to them (None: all); probabilities
        [B, H, L, L]; returns the probabilities to go on with."""
        raise AssertionError(f"{type(self).__name__} looks at nothing")


def take_seat(block: nn.Module, seat: Seat | None) -> None:
    """From here on the attention inside `block` is looked at by `seat`; None: by nobody."""
    for module in block.modules():
        vars(module).pop(SEAT, None)
        if seat is not None:
            vars(module)[SEAT] = seat


def why_no_maps(model: Any) -> str:
    """Why the attention of this model cannot be looked at; "" when it can."""
    from transformers import PreTrainedModel  # slow: seconds

    if not isinstance(model, PreTrainedModel):
        return f"{type(model).__name__} is no model of transformers"
    body: Any = model.base_model
    if not body._can_set_attn_implementation():
        return (
            f"{type(model).__name__} computes its scores in code of its own, not through transformers' "
            "attention interface"
        )
    chosen = body.config._attn_implementation
    if chosen not in ("sdpa", "eager", SEGMENTS, NAME):
        return f"its attention is {chosen}, which never has its scores in memory (set model.attention: sdpa)"
    return ""


@contextmanager
def map_attention(model: Any) -> Iterator[None]:
    """Inside, `model` attends by `attend`. ValueError where it cannot (`why_no_maps`)."""
    from transformers import AttentionInterface, AttentionMaskInterface  # slow: seconds
    from transformers.masking_utils import eager_mask

    if reason := why_no_maps(model):
        raise ValueError(f"attention maps: {reason}")
    before = model.base_model.config._attn_implementation
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [B, H, L, D], key and value [B, H / n, L, D] -> [B, L, H, D], as transformers' attention
    functions. The mask is additive (or bool: True is seen)."""
    if s_aux is not None:
        raise ValueError(f"{type(module).__name__} has attention sinks, a score beside those of the keys")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible, masked = None, scores
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            visible = attention_mask
            masked = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        else:
            visible, masked = attention_mask > HIDDEN, scores + attention_mask
    exact = torch.promote_types(scores.dtype, torch.float32)
    probabilities = torch.softmax(masked, -1, dtype=exact).to(value.dtype)
    seat = vars(module).get(SEAT)
    if seat is not None:
        probabilities = seat.maps(scores, visible, probabilities)
    probabilities = nn.functional.dropout(probabilities, dropout, module.training)
    return (probabilities @ value).transpose(1, 2).contiguous(), None
