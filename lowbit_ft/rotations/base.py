"""What a kind of rotation is: of the sites that the recipe asks for, which are turned in which layer.

Sites are r1 (the residual stream, all layers or none), and r2 (heads of v), r3 (q and k behind their rotary
embedding) and r4 (input of down_proj), each in some layers. A kind that wants the errors of the sites says so
(`needs_rows`): they are measured on calibration rows before anything is packed (quantize/rotate.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .plan import SITES, Site, SiteErrors

Chosen = dict[Site, tuple[bool, ...]]


@dataclass(frozen=True)
class Asked:
    """layers: of the model; r1 and sites: as the recipe has them; errors: a line per layer and site."""

    layers: int
    r1: bool
    sites: dict[Site, bool]
    errors: Sequence[SiteErrors] = field(default=())


@dataclass(frozen=True)
class Kind:
    """choose(asked) -> (whether the stream is turned, layer by layer which sites are)."""

    choose: Callable[[Asked], tuple[bool, Chosen]]
    needs_rows: bool = False
    turns: bool = True


def nowhere(asked: Asked) -> Chosen:
    return {site: (False,) * asked.layers for site in SITES}
