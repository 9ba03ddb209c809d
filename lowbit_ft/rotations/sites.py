"""Structure: the sites of one model, found by the line of its family; and the folds of all its parameters.

Every name of the line is looked up in the model (on the meta device). A parameter of which the line says
nothing is an error that names it: a variant of a known architecture is refused, not rotated in part.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field
from typing import Any

import torch
from lowbit_kernels.hadamard import hadamard_problem
from torch import Tensor, nn

from ..model.config import head_width
from ..model.matrices import find_matrices
from .families import FAMILIES, Family
from .folds import Fold, GainFold, ShiftFold, VectorFold, WeightFold
from .modulation import MODULATED
from .plan import Rotation
from .turn import Turn


@dataclass(frozen=True)
class Norm:
    """A norm before linears: its module's name and those of its readers, as they are called in the model."""

    name: str
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Layer:
    """A decoder layer. values and outputs are None where it has no attention (a hybrid's)."""

    norms: tuple[Norm, ...]
    writers: tuple[str, ...]
    down: tuple[str, ...]
    values: str | None
    outputs: str | None


@dataclass(frozen=True)
class Structure:
    """The sites of a model. parameters: all names, with shapes; head_dim: of v."""

    model_type: str
    family: Family
    layers: tuple[Layer, ...]
    parameters: dict[str, torch.Size]
    hidden: int
    head_dim: int | None
    config: Any = field(repr=False)
    turned: frozenset[str] = frozenset()  # parameters that are kept as [.., K, N]

    @classmethod
    def of(cls, model: nn.Module, config: Any) -> Structure:
        """ValueError for an architecture that has no line."""
        family = family_of(config.model_type)
        parameters = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
        count = 1 + max(
            (
                int(name.removeprefix(f"{family.layers}.").split(".")[0])
                for name in parameters
                if name.startswith(f"{family.layers}.")
            ),
            default=-1,
        )
        found = cls(
            config.model_type,
            family,
            (),
            parameters,
            parameters[f"{family.embeddings[0]}.weight"][-1],
            _head_dim(config, family),
            config,
            frozenset(m.parameter for m in find_matrices(model).values() if m.transposed),
        )
        layers = tuple(found._layer(f"{family.layers}.{index}") for index in range(count))
        object.__setattr__(found, "layers", layers)
        return found

    def weight(self, name: str) -> str | None:
        """The weight parameter of a module, or the parameter of that name; None: the model has neither."""
        return next((n for n in (f"{name}.weight", name) if n in self.parameters), None)

    def bias(self, name: str) -> str | None:
        return next((n for n in (f"{name}.bias", f"{name}_bias") if n in self.parameters), None)

    def has(self, name: str) -> bool:
        return self.weight(name) is not None

    def _layer(self, prefix: str) -> Layer:
        family = self.family
        claimed: set[str] = set()
        norms = []
        modules = {name.rpartition(".")[0] for name in self.parameters}
        weightless = not any(f"{prefix}.{norm}" in modules for norm in family.norms)  # OLMo's
        for norm, readers in family.norms.items():
            if f"{prefix}.{norm}" not in modules and not weightless:
                continue
            own = tuple(
                f"{prefix}.{name}" for name in readers if self.has(f"{prefix}.{name}") and name not in claimed
            )
            claimed |= {name.removeprefix(f"{prefix}.") for name in own}
            norms.append(Norm(f"{prefix}.{norm}", own))

        def there(name: str) -> str | None:
            return f"{prefix}.{name}" if self.has(f"{prefix}.{name}") else None

        values, outputs = there(family.values), there(family.outputs)
        attends = values is not None and outputs is not None
        return Layer(
            tuple(norms),
            tuple(f"{prefix}.{name}" for name in family.writers if self.has(f"{prefix}.{name}")),
            tuple(f"{prefix}.{name}" for name in family.down if self.has(f"{prefix}.{name}")),
            values if attends else None,
            outputs if attends else None,
        )

    def problems(self, r1: bool, r2: bool, r4: bool, smooth: bool) -> list[str]:
        """Why these sites of this model cannot be turned, with the way out; empty when they can."""
        found = family_problems(self.model_type, self.hidden, self.head_dim, r1, r2, smooth)
        if (r1 or r2 or r4 or smooth) and (strange := self.unknown()):
            found.append(
                f"quant.rotation: this {self.model_type} has {strange[0]}"
                f"{f' and {len(strange) - 1} more' * (len(strange) > 1)}, of which nothing is known here; "
                "set quant.rotation.kind: none and quant.smooth: null"
            )
        if r4:
            if any("experts" in name.split(".") for layer in self.layers for name in layer.writers):
                found.append(
                    "quant.rotation.sites.r4: the inputs of a mixture's experts are not rotated; set r4: "
                    "false"
                )
            elif not any(layer.down for layer in self.layers):
                found.append(f"quant.rotation.sites.r4: {self.model_type} has no MLP; set r4: false")
            for width in sorted({self.width(name) for layer in self.layers for name in layer.down}):
                if reason := hadamard_problem(width):
                    found.append(f"quant.rotation.sites.r4: {reason}; set r4: false")
        return found

    def width(self, name: str) -> int:
        """Inputs of a linear."""
        weight = self.weight(name)
        assert weight is not None
        return self.parameters[weight][-2 if weight in self.turned else -1]

    def unknown(self) -> list[str]:
        """Parameters that the family's line does not account for."""
        family, known = self.family, set()
        roles = [*family.embeddings, family.final, family.head]
        for layer in self.layers:
            roles += [n.name for n in layer.norms] + [r for n in layer.norms for r in n.readers]
            roles += layer.writers
        for name in roles:
            known |= {self.weight(name), self.bias(name)}
        inner = (*family.inner, *(() if family.heads != "latent" else (family.values,)))
        globs = [
            f"{prefix}{name}{end}"
            for name in inner
            for prefix in (f"{family.layers}.*.", "")
            for end in ("", ".*")
        ]
        return [
            name
            for name in self.parameters
            if name not in known and not any(fnmatch.fnmatchcase(name, glob) for glob in globs)
        ]

    def folds(self, rotation: Rotation) -> dict[str, Fold]:
        """Parameter -> what becomes of it. ValueError for sites that this model has not."""
        if problems := self.problems(rotation.r1, any(rotation.r2), any(rotation.r4), bool(rotation.smooth)):
            raise ValueError("\n".join(problems))
        return _Folds(self, rotation).made


class _Folds:
    """The folds of a structure, put together per weight: a linear may have a fold on either side."""

    def __init__(self, structure: Structure, rotation: Rotation):
        self.of, self.rotation = structure, rotation
        self.family = family = structure.family
        self.sides: dict[str, dict[str, Any]] = {}
        self.made: dict[str, Fold] = {}
        self.stream = rotation.stream(structure.hidden, family.centered) if rotation.r1 else None
        if self.stream is not None:
            for name in family.embeddings:
                self._side(name, right=self.stream)
            self._norm(Norm(family.final, (family.head,)))
        for index, layer in enumerate(structure.layers):
            for norm in layer.norms:
                self._norm(norm)
            if self.stream is not None:
                for name in layer.writers:
                    self._side(name, left=self.stream)
                    if (bias := structure.bias(name)) is not None:
                        self.made[bias] = VectorFold(left=self.stream)
            if rotation.r2 and rotation.r2[index]:
                self._heads(layer)
            if rotation.r4 and rotation.r4[index]:
                for name in layer.down:
                    self._side(name, right=Turn(structure.width(name)))  # what the online op computes
        for weight, sides in self.sides.items():
            self.made[weight] = WeightFold(turned=weight in structure.turned, **sides)

    def _side(self, name: str, **sides: Any) -> None:
        weight = self.of.weight(name)
        assert weight is not None, name
        self.sides.setdefault(weight, {}).update(sides)

    def _norm(self, norm: Norm) -> None:
        """A norm and what reads it: its gain goes into them, they are turned, and smoothed."""
        scale, weight = self.rotation.smooth.get(norm.name), self.of.weight(norm.name)
        if self.stream is None and scale is None:
            return
        for reader in norm.readers:
            gain = norm.name if self.stream is not None and weight is not None else None
            self._side(reader, norm=gain, right=self.stream, scale=scale)
        if weight is not None:
            fused = self.stream is not None
            self.made[weight] = GainFold(
                norm=norm.name, fused=fused, one_plus=self.family.one_plus, scale=scale
            )
            if (bias := self.of.bias(norm.name)) is not None:
                self.made[bias] = ShiftFold(norm=norm.name, stream=self.stream, scale=scale)

    def _heads(self, layer: Layer) -> None:
        if layer.values is None or layer.outputs is None:
            return
        size = self.of.head_dim
        assert size is not None
        turn, weight = self.rotation.heads(size), self.of.weight(layer.values)
        assert weight is not None
        count = self.of.parameters[weight][-1 if weight in self.of.turned else -2]
        rows = value_rows(self.family.heads, count, self.of.config, size)
        self._side(layer.values, left=turn, rows=rows)
        if (bias := self.of.bias(layer.values)) is not None:
            self.made[bias] = VectorFold(left=turn, rows=rows)
        self._side(layer.outputs, right=turn)


def family_of(model_type: str) -> Family:
    """ValueError naming an architecture that has no line."""
    if (family := FAMILIES.get(model_type)) is None:
        raise ValueError(
            f"quant.rotation: {model_type} is no architecture whose residual stream and heads are known "
            f"here; known: {', '.join(FAMILIES)}; set quant.rotation.kind: none and quant.smooth: null"
        )
    return family


def modulated_problems(name: str, turns: bool) -> list[str]:
    """Why a class of MODULATED cannot be turned."""
    return [f"quant.rotation: {name} is modulated by the time; set quant.rotation.kind: none"] * turns


def family_problems(
    model_type: str, hidden: int | None, head_dim: int | None, r1: bool, r2: bool, smooth: bool
) -> list[str]:
    """What config.json alone tells against these sites. None: a size that is not known."""
    if model_type in MODULATED:
        return modulated_problems(model_type, r1 or r2)
    try:
        family = family_of(model_type)
    except ValueError as error:
        return [str(error)]
    found = []
    if r1 and family.no_r1:
        found.append(f"quant.rotation.sites.r1: {model_type}: {family.no_r1}; set r1: false")
    elif r1 and hidden is not None and (reason := hadamard_problem(hidden)):
        found.append(f"quant.rotation.sites.r1: {reason}; set r1: false")
    if r2 and family.no_r2:
        found.append(f"quant.rotation.sites.r2: {model_type}: {family.no_r2}; set r2: false")
    elif r2 and head_dim is not None and (reason := hadamard_problem(head_dim)):
        found.append(f"quant.rotation.sites.r2: heads: {reason}; set r2: false")
    if smooth and family.no_smooth:
        found.append(f"quant.smooth: {model_type}: {family.no_smooth}; set quant.smooth: null")
    return found


def _head_dim(config: Any, family: Family) -> int | None:
    """Channels of a head of v."""
    return None if family.no_r2 else head_width(lambda key: getattr(config, key, None), values=True)


def value_rows(heads: str, count: int, config: Any, size: int) -> Tensor | None:
    """The output features of a matrix of `count` that are v, head by head; None: all of them."""
    at = torch.arange(count)
    number = config.num_attention_heads
    many = getattr(config, "multi_query", True)
    if heads == "plain":
        return None
    if heads == "last":  # q, k, v, one after the other
        groups = getattr(config, "num_key_value_heads", None) or number
        return at[-groups * size :]
    if heads == "query":  # gpt_bigcode: one k and one v behind all q, or as gpt_neox
        return at[-size:] if many else at.view(number, 3, size)[:, 2].reshape(-1)
    if heads == "interleaved":  # q, k, v of each head
        return at.view(number, 3, size)[:, 2].reshape(-1)
    if heads == "grouped":  # falcon: some q, then k and v of each group; its first models as above
        if config.new_decoder_architecture:
            return at.view(config.num_kv_heads, -1, size)[:, -1].reshape(-1)
        return at[-size:] if many else at.view(number, 3, size)[:, 2].reshape(-1)
    if heads == "codegen":  # four blocks of q, v, k
        return at.view(4, 3, -1)[:, 1].reshape(-1)
    assert heads == "latent", heads  # deepseek: k without positions, then v, of each head
    return at.view(number, -1)[:, -size:].reshape(-1)
