"""IntGrid: b-bit integers with one scale (and zero point) per group of inputs. A fact about a layer, without
tensors.

weight [N, K], group_size g  ->  scale [G, N], zero [G, N] | None, G = ceil(K / g)
    IntGrid(group_size=128): [4096, 4096] -> scale [32, 4096]
    IntGrid(group_size=-1):  [4096, 4096] -> scale [1, 4096]        one group per row
    IntGrid(group_size=64):  [256, 100]   -> scale [2, 256]         the last group has 36 inputs
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

BITS = (2, 3, 4, 6, 8)
GROUP_SIZES = (32, 64, 128, 256, -1)
RESIDUAL_BITS = (0, 1, 2, 4)
SCALE_DTYPES = ("bfloat16", "float16", "float32")


def require(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """ValueError unless value is allowed (True is not 1, and 4.0 not 4: YAML and JSON tell them apart)."""
    if value not in allowed or type(value) is not type(allowed[0]):
        raise ValueError(f"{name}: got {value!r}; allowed are {', '.join(map(str, allowed))}")


@dataclass(frozen=True, kw_only=True)
class IntGrid:
    """W = scale * (code - zero), code in 0..2^bits-1; zero is 2^(bits-1) when symmetric.

    residual_bits f keeps f more bits of every weight during training (the fraction that rounding threw away);
    they never ship. scale_dtype is the dtype scales are rounded to in the forward and shipped in: bfloat16
    values are exact in every format we export. mask: a bit per weight says which ones are zero and stay it
    (sparsity/); it is kept while training and never ships, because the codes say it. narrow: the lowest code
    stays unused while codes train, so that the levels are the same to either side of 0 (at 2 bits -s, 0, s);
    it is for training too, and does not ship.
    """

    name: ClassVar[str] = "integer"
    kind: ClassVar[str] = "integer"  # what its weights are (WEIGHTS); calibrators and adapters serve a kind
    widths: ClassVar[tuple[int, ...]] = BITS
    start: ClassVar[str] = "mse"  # quant.calibrate: auto, without text or at other bits than text_bits
    text_start: ClassVar[str] = "gptq"  # the same where there is calibration text, at
    text_bits: ClassVar[tuple[int, ...]] = (2, 3, 4)  # 6 and 8 bits round to nothing worth the time (LOG.md)
    packs_tables: ClassVar[bool] = True  # quant.lm_head and quant.embeddings

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    residual_bits: int = 4
    scale_dtype: str = "bfloat16"
    mask: bool = False
    narrow: bool = False

    def __post_init__(self) -> None:
        require("bits", self.bits, BITS)
        require("group_size", self.group_size, GROUP_SIZES)
        require("symmetric", self.symmetric, (True, False))
        require("residual_bits", self.residual_bits, RESIDUAL_BITS)
        require("scale_dtype", self.scale_dtype, SCALE_DTYPES)
        require("mask", self.mask, (True, False))
        require("narrow", self.narrow, (True, False))
        if self.narrow and not self.symmetric:
            raise ValueError(
                "narrow: got true on an asymmetric grid, whose zero points are anywhere; needs symmetric"
            )

    @classmethod
    def refuses(cls, settings: Mapping[str, Any]) -> tuple[str, str] | None:
        """(key, why) of a key of the quant section that this grid cannot have; None when there is none."""
        return None

    @property
    def levels(self) -> int:
        """Number of codes, 2^bits."""
        return 1 << self.bits

    @property
    def lowest(self) -> int:
        """The first code that is used."""
        return int(self.narrow)

    @property
    def deployed(self) -> "IntGrid":
        """The grid without what only training reads."""
        return replace(self, residual_bits=0, mask=False, narrow=False)

    def to_json(self) -> dict[str, Any]:
        values = {"grid": self.name, **asdict(self)}
        for late in ("mask", "narrow"):  # a folder without them is what it was before there were any
            if not values[late]:
                del values[late]
        return values

    def __str__(self) -> str:
        group = "row" if self.group_size == -1 else f"g{self.group_size}"
        kept = " narrow" * self.narrow + " masked" * self.mask
        return f"W{self.bits} {group} {'sym' if self.symmetric else 'asym'}{kept}"
