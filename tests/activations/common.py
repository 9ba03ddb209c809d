"""Schemes of every kind, static ones with a scale, and the integer product that a server makes."""

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowbit_ft.activations import ACTIVATIONS, Activation, Scheme
from lowbit_ft.activations.place import hosts, place_activations
from lowbit_ft.adapters.attach import attach
from lowbit_ft.grid import PackedWeight
from lowbit_ft.recipe.sections.activations import shared_input
from tests.packed_tools import adapter_config

SEGMENTS = ((64, 64), (32, 64, 32))
BLOCK = 32  # divides every group of the tests, so sums over blocks are sums of any group
ENDS = {"tensor": (0.03125,), "dual": (0.0078125, 0.0390625)}

CLIPS = [
    Scheme(kind="token", bits=4, clip=0.8, learn="layer"),
    Scheme(kind="token", bits=8, symmetric=False, clip=0.7, learn="layer"),
    Scheme(kind="group", bits=4, group_size=32, clip=0.8, learn="layer"),
    Scheme(kind="tensor", bits=4, clip=0.6, learn="layer"),
    Scheme(kind="dual", bits=4, clip=0.8, learn="layer"),
    Scheme(kind="token", bits=4, clip=0.8, segments=(64, 64), learn="layer"),
    Scheme(kind="dual", bits=8, clip=(0.7, 0.8, 0.9), segments=(32, 64, 32), learn="layer"),
]

LEARNED = Scheme(kind="tensor", bits=8, dynamic=False, scale=(0.03125,), learn="layer")


def learning(model: Any, scheme: Scheme = LEARNED, seed: int = 1) -> Any:
    """Fresh adapters on a Llama whose inputs learn: one scale for q, k and v, and for gate and up."""
    names = [name for name, _ in hosts(model) if "lm_head" not in name]
    place_activations(model, {name: replace(scheme, learn=shared_input(name)) for name in names})
    torch.manual_seed(seed)
    attach(model, adapter_config("lr_qat"))
    return model


def schemes() -> list[Scheme]:
    """Every kind at 4 and 8 bits, symmetric and not, dynamic and static, with and without a clip factor; at 3
    bits symmetric and at 6 not, where the kind has zero points."""
    found = []
    for name, bits, symmetric, dynamic, clip in itertools.product(
        ACTIVATIONS, (8, 4, 3, 6), (True, False), (True, False), (1.0, 0.8)
    ):
        kind = ACTIVATIONS[name]
        if bits in (3, 6) and (clip < 1 or symmetric == (bits == 6 and kind.can_be_asymmetric)):
            continue
        if symmetric or kind.can_be_asymmetric:
            if dynamic:
                group = 32 if name == "group" else -1
                found.append(Scheme(kind=name, bits=bits, symmetric=symmetric, clip=clip, group_size=group))
            elif kind.static_scales and clip == 1.0:
                scale = tuple(value * 2 ** (8 - bits) for value in ENDS[name])
                zero = () if symmetric else (-3,)
                found.append(
                    Scheme(kind=name, bits=bits, symmetric=symmetric, dynamic=False, scale=scale, zero=zero)
                )
    return found


def segmented() -> list[Scheme]:
    """Every kind that has segments, of 128 inputs: of one width and of several, dynamic and static."""
    found = []
    for scheme in schemes():
        if ACTIVATIONS[scheme.kind].in_segments and scheme.clip == 1.0:
            for segments in SEGMENTS if scheme.bits in (4, 8) else SEGMENTS[1:]:
                factors = range(1, len(segments) + 1)  # a scale of its own for each
                scale = tuple(value * factor for factor in factors for value in scheme.scale)
                zero = tuple(value + factor for factor in factors for value in scheme.zero)
                found.append(replace(scheme, segments=segments, scale=scale, zero=zero))
        if scheme.kind in ("token", "dual") and scheme.symmetric and scheme.dynamic and scheme.clip != 1.0:
            found += [replace(scheme, segments=s, clip=(0.9, 0.6, 0.8)[: len(s)]) for s in SEGMENTS]
    return found


def integer_product(activation: Activation, x: Tensor, weight: PackedWeight) -> Tensor:
    """x [T, K] -> [T, N] float64: codes times codes, summed in int32 block by block along K, then scaled."""
    (n, k), t = weight.shape, len(x)
    assert k % BLOCK == 0
    codes, scale, zero = activation.codes(x)
    shift = torch.zeros(()) if zero is None else activation.spread(zero.float(), x)
    centred = codes.to(torch.int32) - shift.to(torch.int32)
    g = weight.grid.group_size
    groups = torch.arange(k) // (k if g == -1 else g)
    offset = weight.grid.levels // 2 if weight.zero is None else weight.zero.t()[:, groups].to(torch.int32)
    w = weight.unpack_codes().to(torch.int32) - offset
    weight_scale = weight.scale.t().double()[:, groups][:, ::BLOCK]  # [N, blocks]
    total = torch.zeros(t, n, dtype=torch.float64)
    # dual makes two products, of what lies below zero and of the rest, each with a scale of its own
    everywhere = [(torch.ones_like(x), activation.spread(scale, x))]
    ones = torch.ones_like(x)
    sides = [(x < 0, activation.spread(scale, -ones)), (x >= 0, activation.spread(scale, ones))]
    for part, own in sides if activation.scheme().kind == "dual" else everywhere:
        blocks = (centred * part.int()).unflatten(1, (-1, BLOCK)).transpose(0, 1)  # [blocks, T, BLOCK]
        sums = torch.bmm(blocks, w.unflatten(1, (-1, BLOCK)).permute(1, 2, 0))  # [blocks, T, N]
        assert sums.dtype == torch.int32
        by_block = own.double().expand(t, k)[:, ::BLOCK]
        total += torch.einsum("btn,tb,nb->tn", sums.double(), by_block, weight_scale)
    return total
