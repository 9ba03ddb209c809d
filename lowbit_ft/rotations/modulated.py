"""ModulatedStructure: the sites of one diffusion transformer, and the folds of its parameters; and
`structure_of`, of any model. It has no layers that are turned: quant.smooth is all that goes in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .families import Family
from .folds import BiasFold, Fold, WeightFold
from .modulation import MODULATED, Modulation, Place, modulated
from .plan import Rotation
from .sites import Layer, Structure, modulated_problems


@dataclass(frozen=True)
class Scaled:
    """A site: its name, its width, and linears with the first of their channels that belong to it: readers
    by inputs, shifts and scale by outputs. The scale stands as 1 + scale."""

    name: str
    width: int
    readers: tuple[tuple[str, int], ...]
    shifts: tuple[tuple[str, int], ...]
    scale: tuple[str, int] | None


@dataclass(frozen=True)
class ModulatedStructure:
    """What FoldedCheckpoint asks of a Structure, of a class of MODULATED."""

    name: str
    parameters: dict[str, torch.Size]
    scaled: tuple[Scaled, ...]
    layers: tuple[Layer, ...] = ()
    turned: frozenset[str] = frozenset()
    family: Family = field(default_factory=lambda: Family({}, (), ()))

    @classmethod
    def of(cls, model: nn.Module, name: str) -> ModulatedStructure:
        parameters = {key: p.shape for key, p in model.named_parameters(remove_duplicate=False)}
        found = []
        for site in MODULATED[name]:
            layers = {
                int(key.removeprefix(f"{site.layers}.").split(".")[0])
                for key in parameters
                if key.startswith(f"{site.layers}.")
            }
            found += [made for i in sorted(layers) if (made := _resolved(site, i, parameters)) is not None]
        return cls(name, parameters, tuple(found))

    def weight(self, name: str) -> str | None:
        return next((n for n in (f"{name}.weight", name) if n in self.parameters), None)

    def problems(self, r1: bool, r2: bool, r4: bool, smooth: bool) -> list[str]:
        return modulated_problems(self.name, r1 or r2 or r4)

    def folds(self, rotation: Rotation) -> dict[str, Fold]:
        """Parameter -> what becomes of it. ValueError for factors that are not those of this model."""
        turned = rotation.r1 or any((*rotation.r2, *rotation.r3, *rotation.r4))
        if problems := self.problems(turned, False, False, bool(rotation.smooth)):
            raise ValueError("\n".join(problems))
        sites = {site.name: site for site in self.scaled}
        columns: dict[str, Tensor] = {}
        over: dict[str, Tensor] = {}
        plus: dict[str, Tensor] = {}
        for name, factors in rotation.smooth.items():
            site = sites.get(name)
            sound = bool(((factors > 0) & factors.isfinite()).all())
            if site is None or len(factors) != site.width or not sound:
                raise ValueError(
                    f"quant.smooth: {len(factors)} factors of {name!r} are none of this {self.name}; remove "
                    "the folder with this rotation.json"
                )
            for linear, first in site.readers:
                self._whole(columns, linear, -1, 1.0)[first : first + site.width] *= factors
            for linear, first in (*site.shifts, *((site.scale,) if site.scale else ())):
                self._whole(over, linear, 0, 1.0)[first : first + site.width] *= factors
            if site.scale is not None:
                linear, first = site.scale
                self._whole(plus, linear, 0, 0.0)[first : first + site.width] = 1 / factors - 1
        made: dict[str, Fold] = {}
        for linear in {**columns, **over}:
            made[f"{linear}.weight"] = WeightFold(scale=columns.get(linear), over=over.get(linear))
            if linear in over and f"{linear}.bias" in self.parameters:
                made[f"{linear}.bias"] = BiasFold(over=over[linear], plus=plus.get(linear))
        return made

    def _whole(self, found: dict[str, Tensor], linear: str, side: int, value: float) -> Tensor:
        size = self.parameters[f"{linear}.weight"][side]
        return found.setdefault(linear, torch.full((size,), value, dtype=torch.float64))


def _resolved(site: Modulation, index: int, parameters: dict[str, torch.Size]) -> Scaled | None:
    """A site in one layer; None where it is not there."""
    prefix = f"{site.layers}.{index}."

    def shape(place: Place) -> torch.Size | None:
        return parameters.get(f"{prefix}{place.linear}.weight")

    writers = [shape(place) for place in (*site.shifts, *((site.scale,) if site.scale else ()))]
    readers = [place for place in site.readers if shape(place) is not None]
    of, first = site.shifts[0].of, writers[0]
    if not readers or None in writers or first is None or of is None or first[0] % of:
        return None
    width = first[0] // of
    if site.scale is not None and f"{prefix}{site.scale.linear}.bias" not in parameters:
        return None  # the 1 that is added to the scale has nowhere to go
    if any(rest is None or rest[0] != width * of for rest in writers):
        return None
    for place in readers:
        inputs = shape(place)
        assert inputs is not None
        if inputs[-1] < (place.chunk + 1) * width or (place.of and inputs[-1] != place.of * width):
            return None
    at = list(_at(prefix, width, (*readers, *site.shifts, *((site.scale,) if site.scale else ()))))
    cut = len(readers) + len(site.shifts)
    return Scaled(
        f"{prefix}{site.name}",
        width,
        tuple(at[: len(readers)]),
        tuple(at[len(readers) : cut]),
        at[cut] if site.scale else None,
    )


def _at(prefix: str, width: int, places: tuple[Place, ...]) -> Iterator[tuple[str, int]]:
    for place in places:
        yield f"{prefix}{place.linear}", place.chunk * width


def structure_of(model: nn.Module, config: Any) -> Structure | ModulatedStructure:
    """ValueError for an architecture that has no line."""
    name = modulated(config)
    return Structure.of(model, config) if name is None else ModulatedStructure.of(model, name)
