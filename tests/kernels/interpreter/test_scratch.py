"""What scratch.py says a launcher holds is what it holds: launchers run on CPU tensors, their allocations
counted. What the kernels would write is nobody's question here, so no program of theirs is interpreted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from lowbit_kernels import (
    binary_triton,
    codes_triton,
    dispatch,
    gradients_triton,
    grid_rows_triton,
    matmul_triton,
    packed_width,
)
from lowbit_kernels.grid import GridWeight
from lowbit_kernels.scratch import scratch
from triton.runtime.interpreter import GridExecutor

from lowbit_ft.plan.counting import Counter


@pytest.fixture(autouse=True)
def launched_and_not_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A launch of a kernel is counted, and does nothing."""
    launches: list[object] = []
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *args, **kwargs: launches.append(self))
    yield
    assert launches, "no kernel was launched"


def _codes(n: int, k: int, bits: int) -> torch.Tensor:
    return torch.zeros(n, packed_width(k, bits), dtype=torch.int16)


def _held(launch, args) -> int:
    with Counter() as count:
        launch(*args)
    return count.peak


@pytest.mark.parametrize("m", [40, 80])
def test_matmul_and_its_gradient(m: int) -> None:
    """The table for the interpreter has fused kernels below M 65 and scratch of 1 MB at most above."""
    n, k = 256, 256
    scale = torch.ones(k // 128, n)
    args = (torch.randn(m, k), _codes(n, k, 4), scale, None, None, 4, 128)
    assert _held(matmul_triton.packed_matmul, args) == pytest.approx(
        scratch("packed_matmul", args, 0), rel=0.05
    )
    args = (torch.randn(m, n), _codes(n, k, 4), scale, None, None, 4, k, 128)
    assert _held(matmul_triton.packed_matmul_dx, args) == pytest.approx(
        scratch("packed_matmul_dx", args, 0), rel=0.05
    )


@pytest.mark.parametrize(
    ("rank", "m", "form"),
    [(0, 12, ""), (8, 12, ""), (80, 12, ""), (8, 40, ""), (8, 12, "blas"), (80, 12, "blas")],
)
def test_gradients(rank: int, m: int, form: str) -> None:
    n, k = 128, 256
    scale = torch.ones(k // 32, n)
    a, b = (torch.randn(rank, k), torch.randn(n, rank)) if rank else (None, None)
    args = (
        torch.randn(m, k),
        torch.randn(m, n),
        _codes(n, k, 4),
        None,
        scale,
        None,
        a,
        b,
        None,
        None,
        scale,
        None,
        None,
        None,
        1.0,
        "grid",
        4,
        0,
        0,
        32,
        False,
    )
    blas = {"form": "blas", "BLOCK_N": 16, "CHUNK_MB": 0.05, "SPAN": 4, "num_warps": 1, "num_stages": 1}
    with dispatch.override("grid_gradients", blas) if form else contextlib.nullcontext():
        assert _held(gradients_triton.grid_gradients, args) == pytest.approx(
            scratch("grid_gradients", args, 0), rel=0.15
        )


@pytest.mark.parametrize("some", [False, True])
def test_a_dense_part(some: bool) -> None:
    n, k, m = 512, 1024, 96
    moved = n // 2 if some else n
    grid = GridWeight(
        codes=_codes(n, k, 4),
        residual=None,
        scale0=torch.ones(k // 64, n),
        zero0=None,
        a=None,
        b=None,
        delta=torch.randn(moved, k),
        rows=torch.arange(0, n, 2) if some else None,
        scale=torch.ones(k // 64, n),
        zero=None,
        offset=None,
        mask=_codes(n, k, 1),
        gain=1.0,
        units="grid",
        bits=4,
        residual_bits=0,
        lowest=0,
    )
    calls = {
        "grid_codes": (codes_triton.grid_codes, (*grid, k, 64)),
        "grid_row_gradients": (
            grid_rows_triton.grid_row_gradients,
            (torch.randn(m, k), torch.randn(m, n), *grid, 64, False),
        ),
    }
    for op, (launch, args) in calls.items():
        assert _held(launch, args) == pytest.approx(scratch(op, args, 0), rel=0.02), op
    # A lowest code that is not used costs nothing.
    args = calls["grid_row_gradients"][1]
    ternary = (*args[:2], *grid._replace(lowest=1), 64, False)
    assert scratch("grid_row_gradients", ternary, 0) == scratch("grid_row_gradients", args, 0) > 0


def test_binary() -> None:
    n, k, m = 96, 512, 40
    planes, alpha = torch.stack([_codes(n, k, 1)] * 2), torch.ones(2, k // 128, n)
    args = (torch.randn(m, k), planes, alpha, None, 128)
    assert _held(binary_triton.binary_matmul, args) == pytest.approx(
        scratch("binary_matmul", args, 0), rel=0.05
    )
    args = (torch.randn(m, n), planes, alpha, None, k, 128)
    assert _held(binary_triton.binary_matmul_dx, args) == pytest.approx(
        scratch("binary_matmul_dx", args, 0), rel=0.05
    )
