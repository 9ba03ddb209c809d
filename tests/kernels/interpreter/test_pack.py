"""pack_triton, bit for bit against the reference ops (which test_pack.py one folder up holds to the
formulas).
"""

import itertools

import lowbit_kernels as kernels
import pytest
import torch
from lowbit_kernels import group_count, pack_triton

N = 19
SHAPES = (200, 700, 33, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [
    (bits, f, (32, 128, -1)[i % 3], bool(i % 2), SHAPES[(i + bits) % 4], DTYPES[i // 2 % 3])
    for i, (bits, f) in enumerate(itertools.product((2, 3, 4, 8, 6), (0, 1, 2, 4)))
]


@pytest.mark.parametrize(("bits", "f", "group_size", "asymmetric", "k", "dtype"), CASES)
def test_quantize_pack(bits: int, f: int, group_size: int, asymmetric: bool, k: int, dtype: torch.dtype):
    groups = (group_count(k, group_size), N)
    weight = torch.randn(N, k).to(dtype)
    scale = ((torch.rand(groups) + 0.5) * 4 / (1 << bits)).bfloat16()
    zero = torch.randint(0, 1 << bits, groups, dtype=torch.uint8) if asymmetric else None
    got = pack_triton.quantize_pack(weight, scale, zero, bits, group_size, f)
    want = kernels.quantize_pack(weight, scale, zero, bits, group_size, f)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    codes = kernels.unpack(got[0], bits, k)
    assert codes.min() == 0 and codes.max() == (1 << bits) - 1


def test_ties_and_weights_far_outside():
    weight = torch.tensor([[-1e30, -7.5, -0.5, 0.5, 1.5, 6.5, 7.5, 1e30] * 5])
    scale = torch.ones(2, 1)
    for f in (0, 4):
        got = pack_triton.quantize_pack(weight, scale, None, 4, 32, f)
        want = kernels.quantize_pack(weight, scale, None, 4, 32, f)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
        assert kernels.unpack(got[0], 4, 8).tolist() == [[0, 0, 8, 8, 10, 14, 15, 15]]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_pack_and_unpack(bits: int):
    for k in (1, 100, kernels.superblock(bits), 600):
        codes = torch.arange(N * k).view(N, k).remainder(1 << bits).to(torch.uint8)
        packed = pack_triton.pack(codes, bits)
        assert torch.equal(packed, kernels.pack(codes, bits))
        assert torch.equal(pack_triton.unpack(packed, bits, k), codes)


def test_strided_rows():
    weight = torch.full((N, 300), torch.nan)
    weight[:, :200] = torch.randn(N, 200)
    scale = torch.full((2, N), 0.3)
    got = pack_triton.quantize_pack(weight[:, :200], scale, None, 4, 128, 4)
    want = kernels.quantize_pack(weight[:, :200].contiguous(), scale, None, 4, 128, 4)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    assert torch.equal(pack_triton.unpack(got[0][:, :32], 4, 128), kernels.unpack(want[0], 4, 200)[:, :128])
