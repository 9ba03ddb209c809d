"""Starting a Triton kernel that was started before, without Triton's search for it.

`launch(kernel, grid, *args, **constants)` is `kernel[grid](*args, **constants)`. Triton finds the compiled
kernel of a call by binding the arguments, specializing each and printing all of it into a key: about 30 us of
Python, measured on a CPU with a pretended driver; a whole call took 240 to 290 us on an H200. Here the key is
what Triton specializes on and nothing is printed: dtype and 16-byte alignment of a tensor, whether an
integer is 1, a multiple of 16, beyond 32 bits, and the constants as they are. It is never coarser than
Triton's, so a key that is known names one compiled kernel; an unknown one goes through Triton, which compiles
or finds it.
"""

# Triton's types know nothing of a compiled kernel's call.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false

from typing import Any

import torch
from torch import Tensor

from .triton_common import INTERPRETED

# Call -> (compiled kernel, the values of its constants in the order of its signature).
_KNOWN: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; triton.cdiv is a traced function, which costs microseconds."""
    return -(-a // b)


def _kinds(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What Triton specializes a kernel on, per argument."""
    out: list[Any] = []
    for value in args:
        if isinstance(value, Tensor):
            out.append((value.dtype, value.data_ptr() & 15 == 0))
        elif type(value) is int:
            # 1 is compiled in; the rest are told apart by divisibility and width.
            out.append(1 if value == 1 else (value & 15 == 0, -(1 << 31) <= value < 1 << 31, value < 1 << 63))
        else:
            out.append(None if value is None else type(value))
    return tuple(out)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """kernel[grid](*args, **constants); args: all parameters that are no constexprs, in order."""
    if INTERPRETED:
        kernel[grid](*args, **constants)
        return
    key = (id(kernel), torch.cuda.current_device(), *_kinds(args), *constants.items())
    known = _KNOWN.get(key)
    if known is None:
        compiled = kernel[grid](*args, **constants)
        names = kernel.arg_names[len(args) :]
        _KNOWN[key] = (compiled, tuple(constants[name] for name in names))
        return
    compiled, tail = known
    compiled[(*grid, 1, 1)[:3]](*args, *tail)
