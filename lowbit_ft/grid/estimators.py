"""Straight-through estimators: the forward rounds, the backward is the identity.

`cast` is why a scale that ships is the scale that trained: the master copy stays fp32 (a bfloat16 scale does
not move under a learning rate of 1e-5: the step is below half an ulp), the forward sees the value rounded to
the shipping dtype.
"""

import torch
from lowbit_kernels import round_values
from torch import Tensor

# The smallest scale whose bfloat16 value is still exact in float16 (formats such as GGUF and GPTQ keep
# float16 scales).
SMALLEST_SCALE = 2.0**-17


def straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` in the forward, gradient to `value`. The sum of value and (rounded - value) would not be
    exactly rounded.
    """
    return _StraightThrough.apply(value, rounded)  # pyright: ignore[reportReturnType]  autograd.Function is untyped


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, rounded):  # pyright: ignore[reportIncompatibleMethodOverride]
        return rounded.detach().clone()

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None


def cast(value: Tensor, dtype: str) -> Tensor:
    """fp32 -> fp32 rounded to the values of `dtype` ("bfloat16", ...), straight-through."""
    return round_values(value, getattr(torch, dtype))


def cast_scale(value: Tensor, dtype: str) -> Tensor:
    """`cast` for scales: also kept at least SMALLEST_SCALE away from zero, on their own side of it."""
    return cast(away_from_zero(value), dtype)


def away_from_zero(value: Tensor) -> Tensor:
    """Scales of either sign, |s| at least SMALLEST_SCALE; zero becomes positive."""
    return torch.where(value < 0, value.clamp_max(-SMALLEST_SCALE), value.clamp_min(SMALLEST_SCALE))


def round_clip(value: Tensor, low: float, high: float) -> Tensor:
    """Nearest integer in low..high, straight-through; the gradient stops where the clip is active."""
    return straight_through(value.clamp(low, high), value.detach().round().clamp(low, high))


def scale_gradient(value: Tensor, factor: float) -> Tensor:
    """`value` unchanged in the forward, its gradient times `factor` (LSQ's gradient scale, arXiv 1902.08153,
    section 2.2).
    """
    return _ScaleGradient.apply(value, factor)  # pyright: ignore[reportReturnType]  autograd.Function is untyped


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, factor):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad * ctx.factor, None
