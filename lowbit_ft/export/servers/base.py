"""What a server is: the formats it reads, and why it would not load a folder that a format can hold."""

from abc import ABC
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from typing import ClassVar

from ...grid import Grid, IntGrid
from ...grid.integer import BITS, GROUP_SIZES
from ...kv_cache.config import KVConfig
from ..base import Exporter


class Server(ABC):
    """One server. Stateless: the members of SERVERS are instances without fields."""

    name: ClassVar[str]
    # Formats it reads, the usual one first; those of other members of EXPORTERS it does not.
    formats: ClassVar[tuple[str, ...]]

    def reject_format(self, exporter: Exporter) -> str | None:
        """Why it reads no folder of this format, with the way out; None when it does."""
        if exporter.name in self.formats:
            return None
        return f"{self.name} reads {', '.join(self.formats)}, not {exporter.name}"

    def reject(self, exporter: Exporter, grid: Grid) -> str | None:
        """Why it loads no layer on this grid, which the format holds; None when it does. The way out is
        looked for by the recipe check (`nearest`)."""
        return None

    def reject_cpu(self, exporter: Exporter, grid: Grid, integer_cache: bool) -> str | None:
        """Why it does not serve this grid on a CPU, or a cache of integers, where it does elsewhere; None
        when it does."""
        return None

    def reject_layers(self, exporter: Exporter, grids: Mapping[str, Grid | None]) -> str | None:
        """Why it does not load these linear layers together (None: dense), with the way out; None when it
        does."""
        return None

    def reject_activations(self, exporter: Exporter) -> str | None:
        """Why it does not compute quantized inputs of this format as training did, with the way out; None
        when it does."""
        return None

    def reject_kv_cache(self, exporter: Exporter, kv_cache: KVConfig) -> str | None:
        """Why it keeps keys and values in another way, with the way out; None when it has a flag for this
        one."""
        if exporter.carries_kv_cache or kv_cache.served(self.name, "")[0]:
            return None
        return f"{self.name} has no cache of {kv_cache}; set quant.kv_cache: null, or another kind or width"


def nearest(grid: Grid, fits: Callable[[Grid], bool]) -> str | None:
    """The keys of a recipe that make the nearest grid of integers that fits ("quant.bits: 4"); None: there is
    none. More bits before fewer, and a key changed only where it must be."""
    if not isinstance(grid, IntGrid):
        return None

    def distance(other: IntGrid) -> tuple[int, int, float]:
        size, wanted = (2**12 if g.group_size == -1 else g.group_size for g in (other, grid))
        changed = sum(
            getattr(other, key) != getattr(grid, key) for key in ("bits", "symmetric", "group_size")
        )
        bits = other.bits - grid.bits
        return changed, abs(bits) * 2 + (bits < 0), max(size / wanted, wanted / size)

    made = (
        replace(grid, bits=bits, symmetric=symmetric, group_size=size)
        for bits, symmetric, size in product(BITS, (True, False), GROUP_SIZES)
    )
    best = min((other for other in made if fits(other)), key=distance, default=None)
    if best is None:
        return None
    keys = [key for key in ("bits", "symmetric", "group_size") if getattr(best, key) != getattr(grid, key)]
    return ", ".join(f"quant.{key}: {str(getattr(best, key)).lower()}" for key in keys)
