"""Tensors without data: a shape, a dtype and a storage of the right size, but no memory.

Autograd, checkpointing and every operator of a model run on PyTorch's fake tensors as they do for real, and
counting.py counts. Here is what a stretch of a step needs to run that way by itself: a module made fake, a
tensor to begin at and a scalar to end at, and what packed ops hold inside.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lowbit_kernels.scratch import scratch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.utils import logging

from ..model.experts import Experts
from ..train.losses import Targets
from .costs import Setting
from .counting import reference_workspace


def fake(module: Any) -> Any:
    """All tensors of a module as fake tensors on the CPU, in place; tied ones stay one."""
    made: dict[int, Any] = {}
    for owner in module.modules():
        for name, p in list(owner._parameters.items()):
            if p is not None:
                if id(p) not in made:
                    made[id(p)] = nn.Parameter(
                        torch.empty(p.shape, dtype=p.dtype, device="cpu"), requires_grad=p.requires_grad
                    )
                owner._parameters[name] = made[id(p)]
        for name, b in list(owner._buffers.items()):
            if b is not None:
                owner._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device="cpu")
    for owner in module.modules():
        if isinstance(owner, Experts):
            owner.counts = functools.partial(_evenly, owner.num_experts)  # pyright: ignore[reportAttributeAccessIssue]
    return module


def _evenly(experts: int, chosen: Tensor) -> list[int]:
    each, more = divmod(chosen.numel(), experts)
    return [each + (i < more) for i in range(experts)]


class Begin(torch.autograd.Function):
    """A tensor that needs a gradient and lets it go."""

    @staticmethod
    def forward(ctx: Any, root: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:  # pyright: ignore
        return root.new_empty(shape, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        return _.new_empty(()).float(), None, None


class End(torch.autograd.Function):
    """A scalar whose backward makes the gradient of the tensor, which nobody else holds then."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:  # pyright: ignore
        ctx.shape, ctx.dtype = value.shape, value.dtype
        return value.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore
        return grad.new_empty(ctx.shape, dtype=ctx.dtype)


def targets_without_data(windows: int, length: int) -> Targets:
    """Every position a target, as fake tensors: the most that a batch can have."""
    targets = Targets.__new__(Targets)
    targets.batch = None
    targets.where = [i for i in range(windows * length) if (i + 1) % length]
    targets.positions, targets.tokens = (torch.empty(len(targets.where), dtype=torch.int64) for _ in range(2))
    targets.counted = torch.empty(len(targets.where), dtype=torch.bool)
    targets.labels = torch.empty((windows, length), dtype=torch.int64)
    return targets


def tensors_in(values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


def autocast(s: Setting) -> Any:
    return torch.autocast(
        "cpu", dtype=torch.bfloat16 if s.mixed == "bf16" else torch.float16, enabled=s.mixed != "no"
    )


@functools.cache
def rules_of(arch: int) -> Callable[[str, tuple[Any, ...]], int]:
    """What packed ops hold inside: the Triton launchers' rules for a GPU, the reference implementation on a
    CPU.
    """
    return reference_workspace((lambda name, args: scratch(name, args, arch)) if arch else None)


@contextmanager
def quiet() -> Iterator[None]:
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.set_verbosity(level)
