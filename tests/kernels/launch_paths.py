"""What Triton's launcher is given by `launch`, the first time (Triton's own path) and the second (ours): run
by test_launch.py in a process of its own, on a machine without a GPU. The driver is replaced by one that
compiles for sm_90 and records instead of launching."""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

RECORDED: list[tuple[Any, ...]] = []


class Driver:
    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def plain(value: Any) -> Any:
    """Something to compare: of a tensor its type (outputs are new every time), of metadata that they are."""
    if isinstance(value, torch.Tensor):
        return value.dtype
    return type(value).__name__ if type(value).__module__.startswith("triton.compiler") else value


def main() -> None:
    driver.set_active(Driver())
    patched: Any = CompiledKernel
    patched.run = property(lambda self: lambda *args: RECORDED.append((self.hash, *map(plain, args))))
    patched._init_handles = lambda self: None
    patched.function = None
    torch.cuda.current_device = lambda: 0

    import lowbit_kernels as lk
    from lowbit_kernels import (
        binary_triton,
        codes_triton,
        dispatch,
        gradients_triton,
        grid_rows_triton,
        hadamard_triton,
        launch,
        matmul_triton,
        matmul_weight_triton,
        pack_triton,
    )
    from lowbit_kernels.grid import GridWeight

    n, k, g, rank = 256, 512, 128, 16
    codes = lk.pack(torch.randint(0, 16, (n, k), dtype=torch.uint8), 4)  # before the device is pretended
    dispatch.architecture = lambda: 90
    dispatch.processors = lambda arch=None: 132
    zeros = torch.zeros(1 << 12, dtype=torch.int32)
    for module in (matmul_weight_triton, binary_triton):
        module.counters = lambda count, device: zeros
    torch.mm = lambda a, b, out=None, **options: (
        out if out is not None else a.new_zeros(a.shape[0], b.shape[1], dtype=torch.float32)
    )
    x, dy, scale = (
        torch.randn(64, k).bfloat16(),
        torch.randn(64, n).bfloat16(),
        torch.rand(k // g, n).bfloat16(),
    )
    zero, planes, alpha = (
        torch.zeros(k // g, n, dtype=torch.uint8),
        torch.zeros(2, n, 32, dtype=torch.int16),
        torch.rand(2, k // g, n).bfloat16(),
    )
    a, b, wide = torch.randn(rank, k), torch.randn(n, rank), scale.float()
    grid = (codes, None, scale, None, a, b, None, None, wide, None, None, None, 1.0, "grid", 4, 0, 0)
    # Of every second row, each of them half masked: what codes and gradients ask for beside the base.
    some = {"a": None, "b": None, "delta": torch.randn(n // 2, k), "rows": torch.arange(0, n, 2)}
    some |= {"mask": torch.full((n, 32), 0x5555, dtype=torch.int16)}
    dense = GridWeight(*grid)._replace(**some)
    calls = {
        "decode": lambda: matmul_triton.packed_matmul(x[:1], codes, scale, zero, None, 4, g),
        "fused": lambda: matmul_triton.packed_matmul(x, codes, scale, None, None, 4, g),
        "two stages": lambda: matmul_triton.packed_matmul(x.repeat(16, 1), codes, scale, None, None, 4, g),
        "dx": lambda: matmul_triton.packed_matmul_dx(dy, codes, wide, None, None, 4, k, g),
        "one row": lambda: matmul_triton.packed_matmul(
            x[:1], codes[:1].clone(), scale[:, :1].clone(), None, None, 4, g
        ),
        "codes": lambda: codes_triton.grid_codes(*grid, k, g),
        "gradients": lambda: gradients_triton.grid_gradients(x, dy, *grid, g, False),
        "dense codes": lambda: codes_triton.grid_codes(*dense, k, g),
        "dense gradients": lambda: grid_rows_triton.grid_row_gradients(x, dy, *dense, g, False),
        "quantize": lambda: pack_triton.quantize_pack(torch.zeros(n, k).bfloat16(), scale, None, 4, g, 4),
        "unpack": lambda: pack_triton.unpack(codes, 4, k),
        "hadamard": lambda: hadamard_triton.hadamard(x, -1),
        "sign planes": lambda: binary_triton.binary_matmul(x[:1], planes, alpha, None, g),
    }
    for name, call in calls.items():
        runs = []
        launch._KNOWN.clear()
        for _ in range(2):
            RECORDED.clear()
            call()
            runs.append(list(RECORDED))
        first, second = runs
        assert first and len(first) == len(second) and launch._KNOWN, name
        for one, two in zip(first, second, strict=True):
            assert one == two, f"{name}:\n{one}\n{two}"
        print(f"{name}: {len(first)} launches alike")
    print(f"triton {triton.__version__}: alike")


if __name__ == "__main__":
    sys.exit(main())
