"""Attention over packed windows without a mask: every segment is attended by itself.

    row     | segment 1 | segment 2       | segment 3 (and the padding behind it) |
    calls     sdpa        sdpa              sdpa                 causal, no mask

transformers answers position_ids that restart with a dense mask [B, 1, L, L] for sdpa (4.3 GB at L = 65,536,
beside which only slower kernels run), and finds the restarts on the device, which the host then waits for.
Here the lengths are read off the position_ids while those are on the CPU (`segment_inputs`), travel through
the model's forward as a keyword, as transformers' lengths for flash attention do, and a registered attention
function cuts queries, keys and values at them. flash_attention_2 gets the same lengths as cu_seq_lens.

A function registered without a mask function is given no mask, so it must know all that a mask says: that is
the contract which a model keeps for flash attention (`_supports_flash_attn`): causal, `sliding_window`,
`softcap`, sinks. `why_not` asks the class, and then the model itself on six tokens. Where a segment is longer
than its window, or scores are capped, attention runs in tiles

    rows [q0, q1) x keys [k0, q1)        each made again in the backward

so that nothing of length x length exists there either.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention as sdpa

NAME = "lowbit_segments"
SCORES_AT_A_TIME = 1 << 25  # float32 elements of a tile whose scores are written out (134 MB)
WINDOW_TILE = (
    512  # rows of a tile, at least, where a sliding window ends: smaller ones would be many launches
)


class Segments:
    """rows: the lengths of the segments of each row of a batch. An object, not a tuple: wrappers that move
    and compilers that guard their inputs leave it alone."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows


def segment_lengths(position_ids: Tensor) -> list[list[int]]:
    """position_ids [B, L] on the CPU, 0 at the start of every segment -> lengths, L in sum, of each row."""
    assert position_ids.device.type == "cpu", "read before the batch moves, or the host waits for the device"
    ends = position_ids.shape[1]
    starts = [(row == 0).nonzero()[:, 0].tolist() or [0] for row in position_ids]
    return [[b - a for a, b in zip(row, [*row[1:], ends], strict=True)] for row in starts]


def segment_inputs(model: Any, position_ids: Tensor | None) -> dict[str, Any]:
    """What the attention of `model` is to be told beside position_ids [B, L] (on the CPU): keywords for its
    forward.
    """
    chosen = _chosen(model)
    if position_ids is None:
        return {}
    if chosen == NAME:
        return {"segments": Segments(segment_lengths(position_ids))}
    if chosen.startswith("flash_attention"):
        flat = [length for row in segment_lengths(position_ids) for length in row]
        ends = torch.tensor([0, *flat]).cumsum(0, dtype=torch.int32)
        return {
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": max(flat),
            "max_length_k": max(flat),
        }
    return {}


@contextmanager
def segment_attention(model: Any) -> Iterator[None]:
    """Inside, `model` attends segment by segment if it can; its forward then needs `segment_inputs`."""
    if why_not(model):
        yield
        return
    decoder, before = model.get_decoder(), _chosen(model)
    switch(decoder)
    try:
        yield
    finally:
        _set(decoder, before)


def switch(decoder: Any) -> None:
    """From here on this decoder attends segment by segment."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _outside_of_graphs())
    _set(decoder, NAME)


@functools.cache
def _outside_of_graphs() -> Any:
    """`attend`, called from compiled code as Python: its loop over lengths is not for a compiler. The one
    break train/compiling.py allows.
    """
    called = torch.compiler.disable(attend)

    def from_anywhere(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            return attend(*args, **kwargs)
        with torch._dynamo.error_on_graph_break(False):
            return called(*args, **kwargs)

    return from_anywhere


def without_masks(model: Any) -> bool:
    """Whether a model of this class trains without masks over pairs of tokens, by what its class says: for
    planning, where nothing runs. flash and flex attention have none anyway."""
    chosen = _chosen(model)
    if chosen not in ("sdpa", "eager"):
        return True
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return (
        chosen == "sdpa"
        and decoder is not None
        and decoder._supports_flash_attn
        and decoder._can_set_attn_implementation()
    )


def why_not(model: Any) -> str:
    """Why this model cannot be made to attend segment by segment; "" when it can. Runs a few forwards of six
    tokens.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return f"{type(model).__name__} is no model of transformers"
    decoder, chosen = model.get_decoder(), _chosen(model)
    if not isinstance(decoder, PreTrainedModel):
        return f"the decoder of {type(model).__name__} is no model of its own"
    # Eager is what a model that knows no sdpa (soft caps, sinks) is left with; elsewhere somebody wants it.
    if chosen not in ("sdpa", NAME) and not (chosen == "eager" and not decoder._supports_sdpa):
        return f"its attention is {chosen}"
    if not (decoder._supports_flash_attn and decoder._can_set_attn_implementation()):
        return f"{type(model).__name__} builds masks of its own"
    return "" if chosen == NAME else _differs(model, decoder, chosen)


@torch.no_grad()
def _differs(model: Any, decoder: Any, chosen: str) -> str:
    """Whether six tokens in two segments have other logits than with the explicit mask, or see each other."""
    device, training = model.device, [(module, module.training) for module in model.modules()]
    ids = (
        torch.tensor([[0, 1, 2, 3, 4, 5], [5, 4, 3, 3, 4, 5]], device=device)
        % model.config.get_text_config().vocab_size
    )
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2, device=device)

    def logits(**options: Any) -> Tensor:
        return model(input_ids=ids, position_ids=positions, use_cache=False, **options).logits.double()

    def spread(both: Tensor) -> Tensor:  # how much the second segments, which are alike, differ
        return (both[0] - both[1])[3:].abs().max()

    model.eval()
    try:
        want = logits(attention_mask=block_diagonal_mask(positions, model.dtype))
        switch(decoder)
        got, joined = logits(segments=Segments([[3, 3], [3, 3]])), logits(segments=Segments([[6], [6]]))
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        return f"it does not run without a mask ({error})"
    finally:
        _set(decoder, chosen)
        for module, mode in training:
            module.training = mode
    if (
        (got - want).abs().max() > 2e-2 * want.abs().max()
    ):  # the same numbers in another order of sums, 8 bits of them in bf16
        return f"{type(model).__name__} attends otherwise without a mask"
    # Experts may round otherwise beside other tokens: that is not nothing, but nothing like what a joined
    # segment does.
    apart = spread(got) <= 1e-2 * spread(joined)
    return "" if apart else f"{type(model).__name__} mixes segments in other layers than attention"


def block_diagonal_mask(position_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """position_ids [B, L] that restart at 0 per segment -> additive mask [B, 1, L, L]: 0 where query i may
    see key j (same segment, j <= i), else the dtype's lowest value."""
    segment = (position_ids == 0).cumsum(-1)
    seen = (segment[:, :, None] == segment[:, None, :]).tril()
    mask = torch.zeros(seen.shape, dtype=dtype, device=position_ids.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def _chosen(model: Any) -> str:
    """The attention implementation of the decoder; "" for what is no model of transformers."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return getattr(getattr(decoder, "config", None), "_attn_implementation", None) or ""


def _set(decoder: Any, name: str) -> None:
    decoder.set_attn_implementation(name)
    assert decoder.config._attn_implementation == name


# ---------------------------------------------------------------- the attention function


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    segments: Segments | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [B, H, L, D], key and value [B, H / n, L, D] -> [B, L, H, D], as transformers' attention
    functions.

    sliding_window: a query sees that many keys, itself among them. s_aux [H]: a sink per head, a score beside
    the keys'.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is not None:  # somebody has made one after all
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, softcap=softcap
        )
    length = query.shape[2]
    assert key.shape[2] == length, "segments are for training: there is no cache"
    rows = [[length]] * len(query) if segments is None else segments.rows
    assert len(rows) == len(query) and all(sum(row) == length for row in rows), (
        f"segments {rows} of {tuple(query.shape)}"
    )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling

    def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        size = q.shape[2]
        window = None if sliding_window is None or sliding_window >= size else sliding_window
        if window is None and softcap is None and s_aux is None:
            return sdpa_attention_forward(
                module, q, k, v, None, dropout=dropout, scaling=scaling, is_causal=True
            )[0]
        if dropout:
            raise ValueError(
                f"attention_dropout {dropout} with a sliding window or capped scores: set it to 0 in the "
                "model's config.json"
            )
        return _Tiled.apply(q, k, v, s_aux, window, softcap, scale).transpose(1, 2)  # pyright: ignore[reportAttributeAccessIssue]

    if all(len(row) == 1 for row in rows):
        return one(query, key, value), None
    # split, not slices: its backward joins the gradients once; every slice would make a whole one.
    parts = [
        one(*part)
        for row, *qkv in zip(rows, query.split(1), key.split(1), value.split(1), strict=True)
        for part in zip(*(t.split(row, dim=2) for t in qkv), strict=True)
    ]
    return torch.cat(parts, dim=1).view(len(query), length, *parts[0].shape[2:]), None


class _Tiled(torch.autograd.Function):
    """One segment per row, q [B, H, n, D], k and v [B, H / groups, n, D] -> [B, H, n, Dv], tile by tile;
    keeps its inputs only.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        window: int | None,
        softcap: float | None,
        scale: float,
    ) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(q, k, v, sinks)
        ctx.how = (window, softcap, scale)
        out = v.new_empty((*q.shape[:3], v.shape[-1]))
        for rows, keys in _tiles(q, window, softcap is not None or sinks is not None):
            out[:, :, rows] = _tile(
                q[:, :, rows],
                k[:, :, keys],
                v[:, :, keys],
                sinks,
                rows.start - keys.start,
                window,
                softcap,
                scale,
            )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, sinks = ctx.saved_tensors
        window, softcap, scale = ctx.how
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        ds = None if sinks is None else torch.zeros_like(sinks)
        for rows, keys in _tiles(q, window, softcap is not None or sinks is not None):
            cut = [q[:, :, rows], k[:, :, keys], v[:, :, keys], *([] if sinks is None else [sinks])]
            cut = [t.detach().requires_grad_() for t in cut]
            with torch.enable_grad():
                out = _tile(
                    cut[0],
                    cut[1],
                    cut[2],
                    None if sinks is None else cut[3],
                    rows.start - keys.start,
                    window,
                    softcap,
                    scale,
                )
            grads = torch.autograd.grad(out, cut, grad[:, :, rows])
            dq[:, :, rows] = grads[0]
            dk[:, :, keys] += grads[1]
            dv[:, :, keys] += grads[2]
            if ds is not None:
                ds += grads[3]
        return dq, dk, dv, ds, None, None, None


def _tiles(q: Tensor, window: int | None, written: bool) -> list[tuple[slice, slice]]:
    """(rows, the keys they see) of one segment. written: the scores of a tile will be in memory."""
    batch, heads, size, _ = q.shape
    step = max(window, WINDOW_TILE) if window is not None else size
    if written:
        widest = size if window is None else min(size, window + step)
        step = max(1, min(step, SCORES_AT_A_TIME // (batch * heads * widest)))
    starts = range(0, size, step)
    return [
        (
            slice(i, min(i + step, size)),
            slice(0 if window is None else max(0, i - window + 1), min(i + step, size)),
        )
        for i in starts
    ]


def _tile(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    offset: int,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> Tensor:
    """q [B, H, r, D] against k, v [B, H / groups, m, D]; query 0 is at key `offset`. -> [B, H, r, Dv]."""
    gap = torch.arange(offset, offset + q.shape[2], device=q.device)[:, None] - torch.arange(
        k.shape[2], device=q.device
    )
    seen = gap >= 0 if window is None else (gap >= 0) & (gap < window)
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, 1) if groups > 1 else t for t in (k, v))
    if softcap is None and sinks is None:
        return sdpa(q, k, v, attn_mask=seen, scale=scale)
    scores = (q @ k.mT) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat(
            [scores, sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1
        )
    p = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
    return p[..., : k.shape[2]].to(v.dtype) @ v
