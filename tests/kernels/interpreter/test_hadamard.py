"""hadamard_triton against a dense float64 product, for every kind of order and tile."""

import pytest
import torch
from lowbit_kernels import dispatch
from lowbit_kernels import hadamard as op
from lowbit_kernels.hadamard import factors, matrix
from lowbit_kernels.hadamard_triton import hadamard

CASES = [
    (1, -1),
    (2, -1),
    (12, -1),
    (16, 4),
    (24, -1),
    (64, -1),
    (96, 32),
    (192, -1),
    (256, -1),
    (448, -1),
    (640, 128),
    (2048, -1),
    (344 * 4, -1),
]


@pytest.mark.parametrize(("channels", "block"), CASES)
@pytest.mark.parametrize("rows", [16, 64])
def test_hadamard(channels, block, rows):
    size = channels if block == -1 else block
    m, power = factors(size)
    dense = torch.kron(matrix(m), matrix(power)).double() / size**0.5
    x = torch.randn(3, 2, channels + 8)[..., :channels]
    with dispatch.override("hadamard", {"ROWS": rows, "STEP": 16, "num_warps": 1, "num_stages": 1}):
        got = hadamard(x, block)
    want = (x.double().reshape(-1, size) @ dense).view(x.shape)
    assert ((got.double() - want).norm() / want.norm()).item() < 1e-6
    torch.testing.assert_close(got, op(x, block))


def test_no_rows():
    assert hadamard(torch.empty(0, 64), -1).shape == (0, 64)
