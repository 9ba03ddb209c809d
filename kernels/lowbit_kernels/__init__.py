"""Packed low-bit linear algebra for PyTorch: P16 packing, matmul from packed codes, gradients on the grid.

Plain tensors, ints and strings only; nothing here knows about models. Every op is a torch.library op
(namespace `lowbit`): reference implementation for any device, fake for torch.compile, autograd where it has a
gradient, and a Triton kernel for CUDA tensors that is imported at the first call (dispatch.py).
"""

from . import dispatch
from .binary import binary_dequantize, binary_gradients, binary_matmul, binary_matmul_dx
from .codes import UNITS, grid_codes
from .decode_cpu import DECODE_ROWS, Int4Weight, fits_int4, int4_linear, int4_weight
from .estimates import grid_estimates
from .grid_linear import grid_gradients, grid_linear
from .grid_rows import grid_row_gradients
from .hadamard import hadamard
from .int8_cpu import Int8Weight, fits_int8, has_int8, int8_linear, int8_weight
from .layout import group_count, packed_width, superblock
from .matmul import packed_matmul, packed_matmul_dx
from .pack import dequantize, pack, quantize_pack, unpack
from .rounding import exact_exp, round_values
from .sums import group_sums

__all__ = [
    "DECODE_ROWS",
    "Int4Weight",
    "Int8Weight",
    "UNITS",
    "binary_dequantize",
    "binary_gradients",
    "binary_matmul",
    "binary_matmul_dx",
    "dequantize",
    "exact_exp",
    "fits_int4",
    "fits_int8",
    "grid_codes",
    "grid_estimates",
    "grid_gradients",
    "grid_linear",
    "grid_row_gradients",
    "group_count",
    "group_sums",
    "hadamard",
    "has_int8",
    "int4_linear",
    "int4_weight",
    "int8_linear",
    "int8_weight",
    "pack",
    "packed_matmul",
    "packed_matmul_dx",
    "packed_width",
    "quantize_pack",
    "round_values",
    "superblock",
    "unpack",
]

dispatch.register()
