"""Gemms: counts matrix products, those inside our ops too, which torch.utils.flop_counter does not look
into.
"""

from __future__ import annotations

from typing import Any

import lowbit_kernels
import torch
from lowbit_kernels import dispatch
from torch.utils._python_dispatch import TorchDispatchMode

# Those with a kernel, and those made of them
_OPS = {f"lowbit::{op}": dispatch.definition(op) for op in dispatch.KERNELS}
_OPS |= {
    "lowbit::grid_linear": lowbit_kernels.grid_linear,
    "lowbit::grid_estimates": lowbit_kernels.grid_estimates,
}


def reference_of(func: Any) -> Any:
    """The reference implementation of one of our ops; None for other ops."""
    name = func._schema.name
    return _OPS[name]._init_fn if name in _OPS else None


class Gemms(TorchDispatchMode):
    """Inside the block: `flops` of all products (two per multiplication and addition), `calls` their (rows,
    inner, columns).
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.calls: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (inside := reference_of(func)) is not None:
            with self:
                return inside(*args, **kwargs)
        with self:  # matmul and linear are made of what is counted below
            if (done := func.decompose(*args, **kwargs)) is not NotImplemented:
                return done
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            left, right = args[:2]
            rows, inner, columns = left.shape[-2], left.shape[-1], right.shape[-1]
            self.calls.append((rows, inner, columns))
            self.flops += 2 * rows * inner * columns * (left.shape[0] if left.dim() == 3 else 1)
        if func is torch.ops.aten.addmm.default:
            self.calls.append((args[1].shape[0], args[1].shape[1], args[2].shape[1]))
            self.flops += 2 * args[1].shape[0] * args[1].shape[1] * args[2].shape[1]
        return func(*args, **kwargs)
