"""Two elementwise ops that a compiler must leave alone: rounding a scale to its shipping dtype, and exp of
its master.

TorchInductor computes chains of elementwise ops in fp32 and drops a rounding to bfloat16 in their middle; its
exp may differ from eager's in the last bit. Either would make the scale of a compiled forward another number
than the one merge() ships. As torch.library ops they are opaque: compiled or not, the same code runs.
"""

import torch
from torch import Tensor


@torch.library.custom_op("lowbit::round_values", mutates_args=())
def round_values(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` rounded to the values of `dtype`, in its own dtype. Straight-through: the gradient is the
    identity.
    """
    return value.to(dtype).to(value.dtype) if dtype != value.dtype else value.clone()


@round_values.register_fake
def _(value, dtype):
    return torch.empty_like(value)


round_values.register_autograd(lambda ctx, grad: (grad, None))


@torch.library.custom_op("lowbit::exact_exp", mutates_args=())
def exact_exp(value: Tensor) -> Tensor:
    """torch.exp, never fused or approximated."""
    return torch.exp(value)


@exact_exp.register_fake
def _(value):
    return torch.empty_like(value)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(output)


def _backward(ctx, grad):
    return grad * ctx.saved_tensors[0]


exact_exp.register_autograd(_backward, setup_context=_setup)
