"""quant.overrides: another grid for some layers, or for a part of a fused matrix (`*.qkv_proj.v`).

A pattern is one of whole layers where it matches any. One that matches none is looked for among the parts of
the matrices that are several in one: only then is the model traced, and only the matrices that such a pattern
names are taken apart.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from ...model.fused import Fusion
from ...names import did_you_mean, listed, matches, nearest, nearest_layers
from ...segments import Segments, segments_in
from ..layers import Layer, Shapes
from ..yaml import Problem
from .base import GroupSize, Problems, Section


class OverrideSection(Section):
    """Another grid for what matches."""

    match: str = Field(
        min_length=1,
        description="glob over layer names, for example '*.down_proj', or over the parts of fused ones: "
        "'*.qkv_proj.v', '*.gate_up_proj.up'",
    )
    bits: Literal[1, 2, 3, 4, 6, 8] | None = Field(default=None, description="bits for these layers")
    group_size: GroupSize | None = Field(default=None, description="group size for these layers")
    symmetric: bool | None = Field(default=None, description="no zero points in these layers, or some")

    @model_validator(mode="after")
    def _says_something(self) -> OverrideSection:
        if not self.given:
            raise ValueError(
                "an override that changes nothing; set bits, group_size or symmetric, or drop it"
            )
        return self

    @property
    def given(self) -> dict[str, Any]:
        """The keys of the quant section that it changes."""
        return {key: value for key, value in self if key != "match" and value is not None}

    def means(self, names: Iterable[str]) -> bool:
        """Whether it is for a layer that is known by one of these names."""
        return any(matches(self.match, name) for name in names)


def fusions(
    overrides: Iterable[OverrideSection],
    layers: Collection[str],
    segments: Callable[[], Mapping[str, Segments]],
) -> dict[str, Fusion]:
    """The matrices that overrides take apart, with their parts. layers: names of the packed ones; segments()
    is asked for those of the model where an override means no whole layer. ValueError as `find_segments`."""
    inner = [one for one in overrides if not one.means(layers)]
    if not inner:
        return {}
    found = segments()
    apart = {name: own.fusion for name in layers if (own := _own(found, name)) is not None and own.outputs}
    return {
        name: fusion
        for name, fusion in apart.items()
        if any(one.means(f"{name}.{part}" for part in fusion) for one in inner)
    }


def layers_apart(quant: Any, layers: list[Layer], shapes: Shapes) -> list[Layer]:
    """The packed layers of a checkpoint, with the parts of those that overrides take apart in their places.
    All whole where the model cannot be traced, which `check_overrides` tells."""
    try:
        apart = fusions(quant.overrides, [x.name for x in layers], lambda: segments_in(shapes.folder))
    except ValueError:
        return layers
    return [part for x in layers for part in (x.apart(apart[x.name]) if x.name in apart else [x])]


def check_overrides(quant: Any, layers: list[Layer], names: list[str], shapes: Shapes) -> Problems:
    """Overrides that mean none of the packed layers, and no part of one. names: of all linears."""
    whole = [layer.name for layer in layers]
    for i, override in enumerate(quant.overrides):
        if override.means(whole):
            continue
        here, got = ("quant", "overrides", i, "match"), f"got {override.match!r}"
        try:
            found = segments_in(shapes.folder)
        except ValueError as error:
            found, untraced = {}, f"; nor is it known as a part of one: {error}"
        else:
            untraced = ""
        parts = {name: own for name in whole if (own := _own(found, name)) is not None and own.outputs}
        if override.means(f"{name}.{part}" for name, own in parts.items() for part in own.names):
            if quant.from_checkpoint:
                yield Problem(
                    here,
                    f"{got}, a part of a matrix that is packed in the checkpoint, whose codes are taken as "
                    "they are; remove it",
                )
            continue
        stem, _, last = override.match.rpartition(".")
        says = stem.rpartition(".")[2].strip("*")  # a glob for everything names no matrix
        met = next((name for name in whole if says and matches(stem, name)), None)
        if met in parts:
            known = parts[met].names
            yield Problem(
                here,
                f"{got}, but the parts of {met} are {listed(known)}{did_you_mean(last, known)}",
            )
        elif met is not None and not untraced:
            yield Problem(
                here,
                f"{got}, but {met} is no fused matrix, it has no parts; use {stem!r} for the whole layer",
            )
        else:
            ends = [f"{name.rpartition('.')[2]}.{part}" for name, own in parts.items() for part in own.names]
            close = nearest(".".join(override.match.split(".")[-2:]), ends, cutoff=0.8)
            near = f"; did you mean '{close}'?" if close else nearest_layers(override.match, names)
            yield Problem(here, f"{got}, which matches no quantized layer{near}{untraced}")


def _own(found: Mapping[str, Segments], name: str) -> Segments | None:
    """The segments of a layer, whose name in the files may lack the model's prefix."""
    if name in found:
        return found[name]
    return next((own for other, own in found.items() if other.endswith(f".{name}")), None)
