"""binary_triton against float64: every regime, ragged shapes, poisoned pads, 1-4 planes, all kinds of
groups.
"""

import pytest
import torch
from lowbit_kernels import binary_gradients_triton, binary_triton, dispatch, group_count, pack
from torch import Tensor

from tests import reference
from tests.kernels.common import error

CASES = [
    # (M, N, K), planes, group size, offset
    ((1, 16, 512), 1, 512, False),
    ((3, 20, 576), 1, 32, True),
    ((2, 20, 1100), 3, 128, True),
    ((5, 17, 200), 2, -1, True),
    ((4, 9, 31), 2, 32, False),
    ((7, 33, 1024), 4, -1, False),
    ((6, 20, 700), 2, 96, True),
]
REGIMES = {
    "decode": {
        "regime": "decode",
        "BLOCK_M": 16,
        "BLOCK_N": 16,
        "SPLIT_K": 2,
        "num_warps": 1,
        "num_stages": 1,
    },
    "whole": {"regime": "decode", "BLOCK_M": 8, "BLOCK_N": 32, "SPLIT_K": 1, "num_warps": 1, "num_stages": 1},
    "fused": {"regime": "fused", "BLOCK_M": 4, "BLOCK_N": 16, "num_warps": 1, "num_stages": 1},
    "two_stage": {"regime": "two_stage", "CHUNK_MB": 1},
}
FORMS = {
    "chunked": {
        "form": "chunked",
        "BLOCK_M": 16,
        "BLOCK_N": 16,
        "BLOCK_K": 128,
        "CHUNK_MB": 1,
        "num_warps": 1,
        "num_stages": 1,
    },
    "fused": {"form": "fused", "BLOCK_M": 4, "BLOCK_N": 16, "BLOCK_K": 128, "num_warps": 1, "num_stages": 1},
}


def problem(shape: tuple[int, int, int], q: int, g: int, offset: bool) -> tuple[Tensor, ...]:
    """x, dy, planes, alpha, offset, and +-1 and W in float64. Rows of x and dy are views into NaN."""
    m, n, k = shape
    groups = group_count(k, g)
    bits = torch.randint(0, 2, (q, n, k), dtype=torch.uint8)
    planes = torch.stack([pack(plane, 1) for plane in bits])
    # Pad bits may hold anything: nothing may depend on them.
    if k % 512:
        lanes = torch.zeros(q, n, -(-k // 512) * 512, dtype=torch.uint8)
        lanes[:, :, :k] = 1
        pad = torch.stack([pack(1 - plane, 1) for plane in lanes])
        planes = planes | (pad & torch.randint(-(1 << 15), 1 << 15, pad.shape, dtype=torch.int16))
    alpha = torch.rand(q, groups, n) + 0.1
    t = torch.randn(groups, n) if offset else None
    x, dy = torch.full((m, k + 40), torch.nan), torch.full((m, n + 24), torch.nan)
    x[:, :k], dy[:, :n] = torch.randn(m, k), torch.randn(m, n)
    signs = bits.double() * 2 - 1
    weight = sum(signs[i] * reference.columns(alpha[i], k, g) for i in range(q))
    weight = weight if t is None else weight + reference.columns(t, k, g)
    return x[:, :k], dy[:, :n], planes, alpha, t, signs, weight


def close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert error(got, want) < 2e-6


def test_the_pads_are_garbage():
    _, _, planes, *_ = problem((1, 4, 31), 1, -1, False)
    assert (reference.unpack(planes[0], 1, 512)[:, 31:] == 1).any()


@pytest.mark.parametrize(("shape", "q", "g", "offset"), CASES)
@pytest.mark.parametrize("regime", REGIMES)
def test_forward(shape, q, g, offset, regime):
    x, _, planes, alpha, t, _, weight = problem(shape, q, g, offset)
    with dispatch.override("binary_matmul", REGIMES[regime]):
        close(binary_triton.binary_matmul(x, planes, alpha, t, g), x.double() @ weight.t())


@pytest.mark.parametrize("m", [1, 16, 17])
def test_forward_by_the_table(m):
    x, _, planes, alpha, t, _, weight = problem((m, 20, 520), 3, 64, True)
    got = binary_triton.binary_matmul(x.view(1, m, 520), planes, alpha, t, 64)
    close(got, (x.double() @ weight.t())[None])


@pytest.mark.parametrize(("shape", "q", "g", "offset"), CASES)
def test_dequantize_and_dx(shape, q, g, offset):
    _, dy, planes, alpha, t, _, weight = problem(shape, q, g, offset)
    k = shape[2]
    close(binary_triton.binary_dequantize(planes, alpha, t, k, g, torch.float32), weight)
    # 512 channels at a time: the smallest chunk, so that a chunk's first block and its ragged end are seen.
    with dispatch.override("binary_matmul_dx", {"regime": "two_stage", "CHUNK_MB": 0}):
        close(binary_triton.binary_matmul_dx(dy, planes, alpha, t, k, g), dy.double() @ weight)


@pytest.mark.parametrize(("shape", "q", "g", "offset"), CASES)
@pytest.mark.parametrize("form", FORMS)
def test_gradients(shape, q, g, offset, form):
    x, dy, planes, _, _, signs, _ = problem(shape, q, g, offset)
    k, groups = shape[2], group_count(shape[2], g)
    dw = dy.double().t() @ x.double()
    index = torch.zeros(k, dtype=torch.long) if g == -1 else torch.arange(k) // g

    def sums(values: Tensor) -> Tensor:
        return torch.zeros(groups, shape[1], dtype=torch.float64).index_add_(0, index, values.t())

    with dispatch.override("binary_gradients", FORMS[form]):
        for trained in {0, 1, q}:
            da, dt = binary_gradients_triton.binary_gradients(x, dy, planes, g, trained)
            close(dt, sums(dw))
            close(
                da,
                torch.stack([sums(dw * signs[i]) for i in range(trained)])
                if trained
                else torch.empty(0, groups, shape[1]),
            )


def test_the_last_to_arrive_adds_in_order():
    """Split sums are the same bits whichever way K is split, twice over."""
    x, _, planes, alpha, _, _, _ = problem((2, 16, 2048), 2, 128, False)
    runs = []
    for _ in range(2):
        with dispatch.override("binary_matmul", {**REGIMES["decode"], "SPLIT_K": 4}):
            runs.append(binary_triton.binary_matmul(x, planes, alpha, None, 128))
    assert torch.equal(*runs)
