"""MODULATED: where diffusion transformers take smoothing factors in, by class of diffusers.

Their norms have no gain: a linear of the time makes one, and a shift, for every picture (AdaLN).

    x = norm(h) (1 + scale) + shift        (shift, scale, gate, ..) = chunks of  W e + b

    x / s    rows of shift:  W / s,  b / s
             rows of scale:  W / s,  b / s + 1 / s - 1        1 + scale' = (1 + scale) / s

and attention hands every channel of v on by itself, so rows of to_v take a 1 / s that the columns of to_out
undo; joint attention has two of each, which share their factors. Between ff.net.0 and ff.net.2 stands a GELU,
between an embedding of the time and AdaLN's linear a SiLU: nothing goes through those.

The layout of the chunks is the class's own (diffusers' AdaLayerNormZero and its kin), written down here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Place:
    """Channels of a linear: the `chunk`-th stretch as wide as the site, of `of` that it has; None: of any
    number, and the rest as wide as it is."""

    linear: str
    chunk: int = 0
    of: int | None = 1


@dataclass(frozen=True)
class Modulation:
    """A site, by names within a layer of the list `layers`. readers: inputs whose columns are multiplied;
    shifts, scale: outputs that are divided, the last one where 1 is added to it. It is there where all
    writers are, in that number of chunks."""

    name: str
    layers: str
    readers: tuple[Place, ...]
    shifts: tuple[Place, ...]
    scale: Place | None = None


DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"


def _adaln(
    norm: str, of: int, what: str, shift: int, scale: int, *readers: str, layers: str = DOUBLE
) -> Modulation:
    made = Place(f"{norm}.linear", shift, of), Place(f"{norm}.linear", scale, of)
    return Modulation(f"{norm}.{what}", layers, tuple(map(Place, readers)), made[:1], made[1])


def _values(attention: str, *outputs: str, made_by: tuple[str, ...] = ("to_v",)) -> Modulation:
    writers = tuple(Place(f"{attention}.{name}") for name in made_by)
    readers = tuple(Place(f"{attention}.{name}") for name in outputs)
    return Modulation(f"{attention}.values", DOUBLE, readers, writers)


def _qkv(attention: str) -> tuple[str, ...]:
    return tuple(f"{attention}.to_{part}" for part in "qkv")


_ADDED = tuple(f"attn.add_{part}_proj" for part in "qkv")
_JOINT = (
    _adaln("norm1", 6, "attention", 0, 1, *_qkv("attn")),
    _adaln("norm1", 6, "mlp", 3, 4, "ff.net.0.proj"),
    _adaln("norm1_context", 6, "attention", 0, 1, *_ADDED),
    _adaln("norm1_context", 6, "mlp", 3, 4, "ff_context.net.0.proj"),
    _values("attn", "to_out.0", "to_add_out", made_by=("to_v", "add_v_proj")),
)

MODULATED: dict[str, tuple[Modulation, ...]] = {
    "DiTTransformer2DModel": (
        _adaln("norm1", 6, "attention", 0, 1, *_qkv("attn1")),
        _adaln("norm1", 6, "mlp", 3, 4, "ff.net.0.proj"),
        _values("attn1", "to_out.0"),
    ),
    "SD3Transformer2DModel": (
        *_JOINT,
        _adaln("norm1", 9, "attention", 0, 1, *_qkv("attn")),  # SD3.5's, with a second attention
        _adaln("norm1", 9, "mlp", 3, 4, "ff.net.0.proj"),
        _adaln("norm1", 9, "attention2", 6, 7, *_qkv("attn2")),
        _values("attn2", "to_out.0"),
        _adaln("norm1_context", 2, "attention", 1, 0, *_ADDED),  # of the last block
    ),
    "FluxTransformer2DModel": (
        *_JOINT,
        _adaln("norm", 3, "both", 0, 1, *_qkv("attn"), "proj_mlp", layers=SINGLE),
        Modulation("attn.values", SINGLE, (Place("proj_out", 0, None),), (Place("attn.to_v"),)),
    ),
}


def modulated(config: Any) -> str | None:
    """The key of MODULATED that a configuration, or its dict, is of."""
    name = config.get("_class_name") if isinstance(config, Mapping) else getattr(config, "class_name", None)
    return name if name in MODULATED else None
