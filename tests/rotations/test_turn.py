"""Turns are orthogonal, the op's transform is one of them, and one that keeps means keeps them."""

import pytest
import torch
from lowbit_kernels import hadamard
from lowbit_kernels.hadamard import hadamard_problem

from lowbit_ft.rotations import OnlineHadamard, Turn


@pytest.mark.parametrize("size", [1, 2, 12, 16, 20, 36, 64, 88])
@pytest.mark.parametrize("keeps_mean", [False, True])
def test_orthogonal(size: int, keeps_mean: bool) -> None:
    matrix = Turn(size, 5, keeps_mean)(torch.eye(size))
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    if keeps_mean:
        ones = torch.ones(1, size, dtype=torch.float64)
        torch.testing.assert_close(ones @ matrix, ones, rtol=0, atol=1e-12)
        x = torch.randn(4, size, dtype=torch.float64)
        torch.testing.assert_close((x @ matrix).mean(-1), x.mean(-1), rtol=0, atol=1e-12)


def test_without_signs_it_is_what_the_online_op_computes() -> None:
    x = torch.randn(3, 48)
    torch.testing.assert_close(Turn(48)(x).float(), OnlineHadamard()(x))
    torch.testing.assert_close(Turn(24)(x).float(), hadamard(x, 24))


def test_seeds_make_different_turns_and_blocks_are_turned_alike() -> None:
    x = torch.randn(2, 32)
    assert not torch.allclose(Turn(16, 0)(x), Turn(16, 1)(x))
    torch.testing.assert_close(Turn(16, 0)(x)[:, 16:], Turn(16, 0)(x[:, 16:]))
    torch.testing.assert_close(Turn(16, 0)(x), Turn(16, 0)(x))


def test_an_outlier_is_spread() -> None:
    x = torch.zeros(1, 4096)
    x[0, 7] = 64.0
    for keeps_mean in (False, True):
        assert float(Turn(4096, 3, keeps_mean)(x).abs().max()) < 1.2


def test_sizes_without_a_matrix_are_named() -> None:
    assert hadamard_problem(64) is None
    assert "no Hadamard matrix for 9" in (hadamard_problem(9) or "")
