"""vllm, on GPUs. Facts: the source of vLLM 0.32, and its CPU build run (benchmarks/serve.py).

compressed-tensors: 2, 3, 4 and 8 bits, symmetric or with zero points; 6 bits have no kernel. On CUDA: Marlin,
groups of 32, 64, 128 and rows, zero points at 4 bits only; 8 bits with zero points go to Machete, Conch or
Humming, 2 and 3 bits to Humming; groups of 256 to Triton (4 bits) or Humming. gptq and gptq_v2: 4 and 8 bits,
symmetric, in Marlin's groups (else "Unsupported quantization config"). awq: 4 bits, Triton where Marlin has
no such group. Layers that it runs as one must agree.

On CPUs: 4 bits only ("Quant type ... not supported by CPUWNA16"), no experts; int-quantized by oneDNN.
"""

from collections.abc import Mapping

from ...grid import Grid, IntGrid
from ..base import Exporter
from ..compressed_tensors import fused_conflict
from .base import Server

MARLIN_GROUPS = (32, 64, 128, -1)


class Vllm(Server):
    name = "vllm"
    formats = ("compressed-tensors", "int-quantized", "gptq", "gptq_v2", "awq")

    def reject(self, exporter: Exporter, grid: Grid) -> str | None:
        if isinstance(grid, IntGrid) and grid.bits == 6:
            return f"vllm has no kernel for 6 bits, and this grid is {grid}"
        if not isinstance(grid, IntGrid) or exporter.quant_method != "gptq":
            return None
        if grid.bits in (4, 8) and grid.symmetric and grid.group_size in MARLIN_GROUPS:
            return None
        return (
            f"vllm loads {exporter.name} files of 4 and 8 bits, symmetric, in groups of 32, 64, 128 or rows, "
            f"and this grid is {grid}"
        )

    def reject_cpu(self, exporter: Exporter, grid: Grid, integer_cache: bool) -> str | None:
        if integer_cache:
            return "vllm's attention reads an integer cache as fp8; leave its flag out"
        if exporter.name == "int-quantized" or (isinstance(grid, IntGrid) and grid.bits == 4):
            return None
        return f"vllm has a kernel for 4 bits only, and this grid is {grid}"

    def reject_layers(self, exporter: Exporter, grids: Mapping[str, Grid | None]) -> str | None:
        return fused_conflict(grids)
