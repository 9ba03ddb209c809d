"""The MLP of a decoder layer, and its norms, some tokens at a time: train.mlp_chunk.

An MLP looks at one token at a time, and its inner width is the largest of a layer: at 65,536 tokens and
14,336 channels each of the six tensors alive in its backward is 1.9 GB, more than the packed weights of the
model together. Cut along the tokens,

    forward     for each chunk: y = mlp(x)                          nothing of inner width outlives it
    backward    for each chunk: mlp(x) again, then its gradients    x is all that was kept

which is what gradient checkpointing does to the layer, and must not be done twice. So x is kept by a node of
its own that comes before the products: when the layer is recomputed, checkpointing stops at the last tensor
that was kept (early stop), which is x where nothing behind the MLP keeps anything (a residual sum does not, a
norm does), and the products run once, here.

Norms are next in size: the backward of an RMSNorm holds seven float32 copies of the hidden states at once
(7.5 GB at that length).

Gradients of the trained tensors are summed over the chunks and handed on once, as DDP and FSDP expect.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .shards import is_sharded

NAMES = ("mlp", "feed_forward", "ffn")  # what decoder layers call it


class _Kept(torch.autograd.Function):
    """x -> x. Keeps x, takes the gradient of mlp(x) for that of its output (see _Made), and turns it into
    those of x and the tensors.
    """

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], chunk: int, x: Tensor, *trained: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x)
        ctx.run, ctx.chunk, ctx.trained = run, chunk, trained
        device = x.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        dx, sums = torch.empty_like(x), [torch.zeros_like(t) for t in ctx.trained]
        device, dtype, enabled = ctx.autocast
        for part, dy, out in zip(_cut(x, ctx.chunk), _cut(grad, ctx.chunk), _cut(dx, ctx.chunk), strict=True):
            with torch.enable_grad(), torch.autocast(device, dtype, enabled):
                y = ctx.run(part := part.detach().contiguous().requires_grad_())  # experts view what they get
            grads = torch.autograd.grad(y, [part, *ctx.trained], dy, allow_unused=True)
            out.copy_(grads[0])
            for total, one in zip(sums, grads[1:], strict=True):
                if one is not None:
                    total += one
        return None, None, dx, *sums


class _Made(torch.autograd.Function):
    """x -> mlp(x), without keeping anything: the gradient goes back to _Kept as it comes."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], chunk: int, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        parts = iter(_cut(x, chunk))
        first = run(next(parts).contiguous())
        out = torch.empty_like(x, dtype=first.dtype)
        target = _cut(out, chunk)
        target[0].copy_(first)
        del first
        for to, part in zip(target[1:], parts, strict=True):
            to.copy_(run(part.contiguous()))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, None, grad


def _cut(x: Tensor, chunk: int) -> tuple[Tensor, ...]:
    """x [B, L, H] along its tokens, in views of at most `chunk` of them (of all rows together, one of each at
    least).
    """
    return x.split(max(1, chunk // len(x)), dim=1)


def cut_mlps(model: Any, layers: nn.ModuleList, chunk: int) -> Callable[[], None]:
    """From here on the MLPs of `layers`, and the norms there and of the decoder, run `chunk` tokens at a
    time; returns what ends that.

    Raises ValueError when there is no MLP that can be cut (`refuses` says why).
    """
    norms = [
        m for owner in (*layers, model.get_decoder()) for m in owner.children() if "Norm" in type(m).__name__
    ]
    found = [
        mlp for layer in layers for name in NAMES if isinstance(mlp := getattr(layer, name, None), nn.Module)
    ]
    reasons = {id(mlp): refuses(mlp, model) for mlp in found}
    cut = [mlp for mlp in found if not reasons[id(mlp)]]
    if not cut:
        why = next(iter(reasons.values()), f"its layers have none of {', '.join(NAMES)}")
        raise ValueError(
            f"train.mlp_chunk: got {chunk}, but no MLP of {type(model).__name__} can be cut "
            f"({why}); set it to null"
        )
    # torch's own LayerNorm is one operator and holds no copies
    return run_in_chunks(
        [*cut, *(m for m in norms if not isinstance(m, nn.LayerNorm) and not refuses(m, model))], chunk
    )


def run_in_chunks(mlps: list[nn.Module], chunk: int) -> Callable[[], None]:
    """From here on these modules, each a function of one token at a time, take `chunk` tokens at a time;
    returns what ends that.
    """
    for mlp in mlps:
        assert "forward" not in vars(mlp), "somebody else replaces its forward"
        mlp.forward = MethodType(_in_chunks(mlp.forward, chunk), mlp)

    def restore() -> None:
        for mlp in mlps:
            del mlp.forward

    return restore


def _in_chunks(plain: Callable[[Tensor], Tensor], chunk: int) -> Callable[..., Tensor]:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        if x.shape[0] * x.shape[1] <= chunk:
            return plain(x)
        if not torch.is_grad_enabled():
            return _Made.forward(None, plain, chunk, x)
        trained = [p for p in self.parameters() if p.requires_grad]
        return _Made.apply(plain, chunk, _Kept.apply(plain, chunk, x, *trained))  # pyright: ignore[reportReturnType]

    return forward


def cuttable(owner: nn.Module) -> list[nn.Module]:
    """The children of a decoder layer, or of the decoder, that `cut_mlps` cuts, by what can be told without
    running them.
    """
    named = [
        child for name, child in owner.named_children() if name in NAMES or "Norm" in type(child).__name__
    ]
    return [child for child in named if not isinstance(child, nn.LayerNorm) and not _at_sight(child)]


def _at_sight(mlp: nn.Module) -> str:
    if len([p for p in inspect.signature(mlp.forward).parameters.values() if p.default is p.empty]) != 1:
        return "it takes more than hidden states"
    return "it has dropout" if any(isinstance(m, nn.Dropout) and m.p > 0 for m in mlp.modules()) else ""


@torch.no_grad()
def refuses(mlp: nn.Module, model: Any) -> str:
    """Why an MLP cannot be cut; "" when it can: it takes x alone, draws no random numbers, and on five tokens
    gives what it gives on two and three."""
    if reason := _at_sight(mlp):
        return reason
    if is_sharded(mlp):
        return ""  # it cannot be asked outside of its layer, whose forward gathers it
    width = model.config.get_text_config().hidden_size
    x = torch.sin(torch.arange(5 * width, device=model.device)).to(model.dtype).view(1, 5, width)
    try:
        whole, parts = mlp(x), torch.cat([mlp(x[:, :2]), mlp(x[:, 2:])], 1)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        return f"it does not run by itself ({error})"
    if whole.shape != x.shape:
        return f"it makes {tuple(whole.shape)} of {tuple(x.shape)}"
    close = (whole - parts).abs().max() <= 2e-2 * whole.abs().max()
    return "" if close else "it looks at more than one token"
