"""The slow reference: the equations of the methods in float64, dense, with torch autograd and an explicit
straight-through round.

Nothing here calls our ops. Codes are read out of the P16 buffers with the index formula of the format's
description, and every method is written from its paper's equation (see each adapter's docstring for the
citation), so an error in the packed code cannot hide in its own reference. Slow and N x K everywhere, on
purpose.

    Phi = (c - z0) + rho                  base in grid units, rho = (e + 1/2) / 2^f - 1/2
    lr_qat        W = S clip(round(Phi + sign(s0) g B A))                   S = s0 exp(t)
    dl_qat        W = m s0 clip(round(Phi + g B A / s0))
    l4q           W = S round(clip((s0 Phi + g B A - T) / S)) + T
    lota          W = s0 (clip(c + sign(P) [|P| > w]) - z0) + |s0| mu,  mu = mean of (P - w W') / w in a group
    scale         W = S (c - z0)
    full_qat      W = S clip(round(Phi + D))
    ef_qat        the same for some rows, scale for the others
    alpha_tuning  W = sum_k alpha_k b_k                                      alpha_k = alpha0_k exp(t_k)
    lora          y = x W0^T + g (x A^T) B^T
"""

from dataclasses import dataclass

import torch
from torch import Tensor

HALFWORD = 16


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """P16 by its definition: bit-field p of half-word j of superblock t is channel t * S + 32 p + j. int16
    [N, W] -> int64 [N, K]. Of 6 bits: three lines of half-words, the first two of 4 bits, the third of 2.
    """
    if bits == 6:
        lines = packed.view(len(packed), -1, 3, 32)
        low, high = lines[:, :, :2].reshape(len(packed), -1), lines[:, :, 2].reshape(len(packed), -1)
        return unpack(low, 4, columns) + 16 * unpack(high, 2, columns)
    per_word = HALFWORD // bits
    k = torch.arange(columns)
    block, inside = k // (32 * per_word), k % (32 * per_word)
    word, field = block * 32 + inside % 32, inside // 32
    words = packed.long() & 0xFFFF
    return (words[:, word] >> (bits * field)) & ((1 << bits) - 1)


def columns(groups: Tensor, k: int, group_size: int) -> Tensor:
    """[G, N] -> float64 [N, K]: every input sees its group's value."""
    index = torch.zeros(k, dtype=torch.long) if group_size == -1 else torch.arange(k) // group_size
    return groups.double()[index].t()


def ste(value: Tensor, used: Tensor) -> Tensor:
    """`used` forward, identity backward. float64, so the detour is exact for what is compared at 1e-5."""
    return value + (used - value).detach()


def ste_round(value: Tensor) -> Tensor:
    return ste(value, value.detach().round())


def ste_cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return ste(value, value.detach().float().to(dtype).double())


@dataclass
class Base:
    """A packed integer base, dense in float64."""

    code: Tensor
    rho: Tensor
    s0: Tensor  # [G, N]
    z0: Tensor  # [G, N]
    bits: int
    group_size: int
    scale_dtype: torch.dtype

    @classmethod
    def of(cls, weight) -> "Base":
        k, g = weight.shape[1], weight.grid
        rho = torch.zeros(weight.shape, dtype=torch.float64)
        if weight.residual is not None:
            rho = (unpack(weight.residual, g.residual_bits, k).double() + 0.5) / 2**g.residual_bits - 0.5
        z0 = torch.full_like(weight.scale, 2 ** (g.bits - 1), dtype=torch.float64)
        if weight.zero is not None:
            z0 = weight.zero.double()
        code = unpack(weight.codes, g.bits, k).double()
        return cls(code, rho, weight.scale.double(), z0, g.bits, g.group_size, getattr(torch, g.scale_dtype))

    @property
    def top(self) -> int:
        return 2**self.bits - 1

    def wide(self, groups: Tensor) -> Tensor:
        return columns(groups, self.code.shape[1], self.group_size)


def clamp(value: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Clip whose gradient is 1 on the closed range (maximum/minimum would halve it where they are equal)."""
    inside = ((value >= low) & (value <= high)).detach()
    return torch.where(inside, value, torch.where(value < low, low, high))


def quantized(value: Tensor, low: Tensor, high: Tensor, order: str) -> Tensor:
    """q = clip(round(Z)) or round(clip(Z)), straight-through on round, true gradient of clip."""
    if order == "round_then_clip":
        return clamp(ste_round(value), low, high)
    return ste_round(clamp(value, low, high))


def weight_of(
    base: Base, method: str, p: dict[str, Tensor], *, gain: float, order: str, offset: str
) -> Tensor:
    """W^ [N, K] in float64 from the trained tensors p (float64, requiring grad), for every method on an
    integer grid.
    """
    phi = base.code - base.wide(base.z0) + base.rho
    low, high = -base.wide(base.z0), base.top - base.wide(base.z0)
    s0 = base.wide(base.s0)
    product = gain * (p["B"] @ p["A"]) if "A" in p else None
    if method == "lota":
        return ternary(base, p["B"] @ p["A"], gain, offset)
    if method == "dl_qat":
        scale = ste_cast(p["magnitude"] * base.s0, base.scale_dtype)
        return base.wide(scale) * quantized(phi + product / s0, low, high, order)
    scale = base.wide(ste_cast(base.s0 * torch.exp(p["log_scale"]), base.scale_dtype))
    if method == "scale":
        return scale * (base.code - base.wide(base.z0))
    if method == "lr_qat":
        return scale * quantized(phi + product * s0.sign(), low, high, order)  # steps of |s0|
    if method == "full_qat":
        return scale * quantized(phi + p["delta"], low, high, "round_then_clip")
    if method == "ef_qat":
        delta = torch.zeros_like(phi).index_copy(0, p["rows"], p["delta"])
        moved = torch.zeros(len(phi), 1, dtype=torch.bool).index_fill(0, p["rows"], True)
        frozen = base.code - base.wide(base.z0)
        return scale * torch.where(moved, quantized(phi + delta, low, high, "round_then_clip"), frozen)
    assert method == "l4q", method
    wanted = s0 * phi + product
    if offset == "none":
        return scale * quantized(wanted / scale, low, high, order)
    if offset == "float":
        beta = base.wide(ste_cast(base.s0 * p["offset"], base.scale_dtype))
        return scale * quantized((wanted - beta) / scale, low, high, order) + beta
    zero = base.z0 - p["offset"]  # beta = -S z: the zero point is what is rounded
    zero = base.wide(
        ste(
            clamp(zero, torch.zeros_like(zero), torch.full_like(zero, base.top)),
            zero.detach().round().clamp(0, base.top),
        )
    )
    code = quantized(wanted / scale + zero, torch.zeros_like(scale), torch.full_like(scale, base.top), order)
    return scale * (code - zero)


def ternary(base: Base, product: Tensor, gain: float, offset: str) -> Tensor:
    """lota: gain is that of its straight-through threshold, 1 / (2 w + 1); P counts steps of |s0|."""
    omega, s0 = round((1 / gain - 1) / 2), base.wide(base.s0)
    wanted = torch.where(product.detach().abs() > omega, product.detach().sign(), 0.0) * s0.sign()
    free = base.code + wanted
    inside = ((free >= 0) & (free <= base.top)).double()
    moved = wanted * inside  # at the bounds nothing moves
    through = ste(product * gain * s0.sign() * inside, moved)
    weight = s0 * (base.code + through - base.wide(base.z0))
    if offset == "none":
        return weight
    k, size = base.code.shape[1], base.code.shape[1] if base.group_size == -1 else base.group_size
    rest = (product - omega * moved * s0.sign()) / omega
    mean = torch.stack([rest[:, i : i + size].mean(1) for i in range(0, k, size)])  # [G, N]
    return weight + base.wide(ste_cast(base.s0.abs() * mean, base.scale_dtype))


def binary_weight(planes: Tensor, alpha: Tensor, offset: Tensor | None, k: int, group_size: int) -> Tensor:
    """sum_k alpha_k b_k + offset, float64 [N, K]."""
    total = torch.zeros(planes.shape[1], k, dtype=torch.float64)
    for plane, scale in zip(planes, alpha, strict=True):
        total = total + columns(scale, k, group_size) * (2.0 * unpack(plane, 1, k).double() - 1.0)
    return total if offset is None else total + columns(offset, k, group_size)
