"""BinaryGrid: a weight as a sum of sign planes, W = sum_k alpha_k b_k with b_k in {-1, +1}. A fact without
tensors.

    weight [N, K], q planes, group_size g  ->  planes: q x N x K bits, scale [q, G, N]

Binary-coding quantization (Xu et al. 2018, arXiv 1802.00150), the grid of AlphaTuning and LUT-GEMM. With q
planes a group has 2^q levels, symmetric about 0 and not equally spaced.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from .integer import GROUP_SIZES, SCALE_DTYPES, require

PLANES = (1, 2, 3, 4)


@dataclass(frozen=True, kw_only=True)
class BinaryGrid:
    """`bits` sign planes with one scale per plane and group."""

    name: ClassVar[str] = "binary"
    kind: ClassVar[str] = "binary"  # see IntGrid
    widths: ClassVar[tuple[int, ...]] = PLANES
    start: ClassVar[str] = "greedy"
    text_start: ClassVar[str] = "greedy"
    text_bits: ClassVar[tuple[int, ...]] = ()
    packs_tables: ClassVar[bool] = False

    bits: int = 3
    group_size: int = 128
    scale_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        require("bits", self.bits, PLANES)
        require("group_size", self.group_size, GROUP_SIZES)
        require("scale_dtype", self.scale_dtype, SCALE_DTYPES)

    @classmethod
    def refuses(cls, settings: Mapping[str, Any]) -> tuple[str, str] | None:
        if settings["symmetric"]:
            return None
        return "symmetric", "got false; sign planes have no zero point; remove it, or use quant.grid: integer"

    def to_json(self) -> dict[str, Any]:
        return {"grid": self.name, **asdict(self)}

    def __str__(self) -> str:
        group = "row" if self.group_size == -1 else f"g{self.group_size}"
        return f"B{self.bits} {group}"
