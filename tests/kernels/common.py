"""Arguments of the ops, ragged, with values that move codes and clip some; and the equations in float64."""

import math

import lowbit_kernels as kernels
import torch
from torch import Tensor

from tests import reference

N, K, R = 13, 200, 3


def integer_args(
    bits: int = 4,
    group_size: int = 32,
    f: int = 4,
    units: str = "grid",
    *,
    zero: bool = True,
    offset: bool = False,
    low_rank: bool = True,
    clip_first: bool = False,
    lowest: int = 0,
    shape: tuple[int, int] = (N, K),
) -> dict:
    """Arguments of grid_linear (x aside), by name, with values that move codes and clip some."""
    n, k = shape
    groups = (kernels.group_count(k, group_size), n)
    signs = torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0)  # of a scale: either, as on symmetric grids
    return {
        "codes": kernels.pack(torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8), bits),
        "residual": kernels.pack(torch.randint(0, 1 << f, (n, k), dtype=torch.uint8), f) if f else None,
        "scale0": ((torch.rand(groups) + 0.5) * signs).bfloat16(),
        "zero0": torch.randint(0, 1 << bits, groups, dtype=torch.uint8) if zero else None,
        "a": torch.randn(R, k) if low_rank else None,
        "b": torch.randn(n, R) * 0.5 if low_rank else None,
        "delta": None,
        "rows": None,
        "scale": (torch.rand(groups) + 0.5) * signs,
        "zero": torch.randint(0, 1 << bits, groups).float() if zero else None,
        "offset": torch.randn(groups) * 0.3 if offset else None,
        "mask": None,
        "gain": 0.7,
        "units": units,
        "bits": bits,
        "residual_bits": f,
        "lowest": lowest,
        "group_size": group_size,
        "clip_first": clip_first,
    }


def dense(args: dict, k: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(v, W, leaves): the equations of codes.py and grid_linear.py in float64, straight-through, leaves a, b,
    scale, offset.
    """
    bits, g = args["bits"], args["group_size"]
    half, top = 2.0 ** (bits - 1), 2**bits - 1
    leaves = {
        n: args[n].double().requires_grad_() for n in ("a", "b", "scale", "offset") if args[n] is not None
    }

    def wide(t):
        return reference.columns(t, k, g)

    value = reference.unpack(args["codes"], bits, k).double()
    if args["residual_bits"]:
        f = args["residual_bits"]
        value = value + (reference.unpack(args["residual"], f, k).double() + 0.5) / 2**f - 0.5
    z0 = half if args["zero0"] is None else wide(args["zero0"])
    z = half if args["zero"] is None else wide(args["zero"])
    s0, s = wide(args["scale0"]), wide(leaves["scale"])
    t = wide(leaves["offset"]) if "offset" in leaves else 0.0
    d = args["gain"] * leaves["b"] @ leaves["a"] if "a" in leaves else 0.0
    if args["units"] == "grid":
        value = value + d
    elif args["units"] == "weight":
        value = value + d / s0
    else:
        value = (s0 * (value - z0) + d - t) / s + z
    low, high = torch.full_like(s0, float(args["lowest"])), torch.full_like(s0, float(top))
    order = "clip_then_round" if args["clip_first"] else "round_then_clip"
    code = reference.quantized(value, low, high, order)
    return value.detach(), s * (code - z) + t, leaves


def untied(**kwargs) -> tuple[dict, Tensor, Tensor, dict[str, Tensor]]:
    """Arguments for which no value lies within fp32 error of a rounding tie."""
    for _ in range(10):
        args = integer_args(**kwargs)
        value, weight, leaves = dense(args, K)
        if ((value % 1) - 0.5).abs().min() > 2e-5:
            return args, value, weight, leaves
    raise AssertionError("ten draws with a tie")


def error(got: Tensor, want: Tensor) -> float:
    """Relative error; infinite where anything is not finite, because max() of several errors would pass over
    a NaN.
    """
    value = ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()
    return value if math.isfinite(value) else math.inf


def codes_of(args: dict, k: int) -> Tensor:
    names = [n for n in args if n not in ("group_size", "clip_first")]
    return kernels.grid_codes(**{n: args[n] for n in names}, in_features=k, group_size=args["group_size"])


def binary_args(
    q: int = 3, group_size: int = 32, offset: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    groups = (kernels.group_count(K, group_size), N)
    planes = torch.stack([kernels.pack(torch.randint(0, 2, (N, K), dtype=torch.uint8), 1) for _ in range(q)])
    return planes, torch.rand(q, *groups) + 0.1, torch.randn(groups) if offset else None
