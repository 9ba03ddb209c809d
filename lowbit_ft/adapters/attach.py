"""attach: adapters into PackedLinears, everything else frozen, and the table that says what trains.

State is exchanged by layer name, in the key layout of PEFT
("base_model.model.<layer>.lowbit_adapters.<tensor>"), so the file a run writes is the file
`PeftModel.from_pretrained` reads.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import Activation
from ..activations.learned import learn_inputs
from ..activations.place import hosts, scheme_of
from ..kv_cache import kv_config_of
from ..model.fused import known_as, part_rows
from ..model.linear import PackedEmbedding, PackedLinear, in_memory, leave_out_of_ddp
from ..model.roles import is_head
from ..model.rows import PEFT_KEY, row_tables, train_rows
from ..model.whole import (
    masters_of,
    train_parameters,
    train_whole,
    untrained,
    whole_modules,
    whole_tensors,
)
from ..sparsity import Gradual
from . import Adapter, AdapterConfig
from .carry import Carried
from .masks import against_schedule
from .modules import modules_of
from .patterns import refuse_unmatched
from .pruned import Pruned
from .step_codes import StepCodes

PEFT_PREFIX, PEFT_SLOT = "base_model.model.", "lowbit_adapters"


@dataclass(frozen=True)
class TrainableRow:
    """One adapted layer: trainable numbers by tensor name, and the packed bytes below them."""

    layer: str
    grid: str
    tensors: dict[str, int]
    packed_bytes: int


@dataclass(frozen=True)
class TrainableTable:
    rows: list[TrainableRow]
    total_parameters: int

    @property
    def trainable(self) -> int:
        return sum(sum(row.tensors.values()) for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        return {
            "trainable": self.trainable,
            "total": self.total_parameters,
            "rows": [asdict(row) for row in self.rows],
        }

    def __str__(self) -> str:
        share = self.trainable / max(1, self.total_parameters)
        sums: dict[str, int] = {}
        for row in self.rows:
            for name, count in row.tensors.items():
                sums[name] = sums.get(name, 0) + count
        parts = ", ".join(f"{name} {count:,}" for name, count in sums.items())
        return (
            f"trainable: {self.trainable:,} ({share:.2%} of the model's weights) in {len(self.rows)} "
            f"layers: {parts}"
        )


def packed_layers(model: nn.Module) -> Iterator[tuple[str, PackedLinear]]:
    """(name, layer) of every PackedLinear, in model order."""
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            yield name, module


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, PackedLinear]]:
    """(name, layer) of every PackedLinear that has an adapter."""
    return ((name, layer) for name, layer in packed_layers(model) if layer.adapter is not None)


def attach(
    model: nn.Module, config: AdapterConfig, dense_weight: Callable[[str], Tensor] | None = None
) -> TrainableTable:
    """Give every PackedLinear (of config.targets) a fresh adapter and freeze the rest. dense_weight(layer) ->
    [N, K] is asked only when the config's start needs it (`init: loftq`), one layer at a time. ValueError
    naming every layer whose grid the method refuses."""
    # An embedding looks its rows up; there is no product for an adapter to be in.
    layers = [(name, layer) for name, layer in packed_layers(model) if not isinstance(layer, PackedEmbedding)]
    if not layers:
        raise ValueError("attach: the model has no packed layers; quantize it first")
    names = [name for name, _ in layers]
    packed = sum(layer.in_features * layer.out_features for _, layer in layers)
    parts = part_rows(model)
    layers = [(name, layer) for name, layer in layers if config.trains(*known_as(name, parts))]
    if not layers:
        raise ValueError(
            f"adapter.targets: {config.targets} match none of the {len(names)} packed layers "
            f"({', '.join(names[:4])}, ...)"
        )
    refuse_unmatched(config, [name for name, _ in layers], "adapter.")
    refused = [f"{name}: {reason}" for name, layer in layers if (reason := config.reject(layer.grid))]
    if refused:
        raise ValueError(f"adapter {config.method} cannot train this base:\n  " + "\n  ".join(refused))
    if config.wants_weight and dense_weight is None:
        raise ValueError(
            f"adapter {config.method}: this start reads the dense weights, and there is no checkpoint to read"
        )
    whole = modules_of(model, config.modules_to_save or [])
    model.requires_grad_(False)
    configs = config.over((name, layer.base) for name, layer in layers)
    for name, layer in layers:
        weight = dense_weight(name) if config.wants_weight and dense_weight else None
        layer.adapter = configs[name].of_layer(name).build(layer.base, weight)
    learn_inputs(model)
    rows = []
    for name, layer in layers:
        assert layer.adapter is not None
        tensors = {n: p.numel() for n, p in layer.adapter.named_parameters() if p.requires_grad}
        rows.append(TrainableRow(name, str(layer.grid), tensors, layer.base.nbytes))
    dense = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    rows += train_modules(model, whole) + train_tokens(model, config.token_rows, config.token_levels)
    leave_out_of_ddp(model)
    return TrainableTable(rows, packed + dense)


def train_modules(model: nn.Module, names: list[str]) -> list[TrainableRow]:
    """Let these dense modules, and what is tied to them, train whole; what trains of each (of a tensor that
    several share, nothing but at the first)."""
    return _rows_of(model, train_whole(model, names))


def train_head(model: nn.Module, parameters: Iterable[str]) -> list[TrainableRow]:
    """Let these dense parameters train whole, and no other of their modules: the head of a task, where a
    decoder that is tied to the embedding stays."""
    return _rows_of(model, train_parameters(model, parameters))


def _rows_of(model: nn.Module, found: Sequence[str]) -> list[TrainableRow]:
    rows: list[TrainableRow] = []
    seen: set[int] = set()
    for name, module, masters in whole_modules(model):
        if name in found:
            own = {key: p for key, p in masters.named_parameters(recurse=False) if id(p) not in seen}
            seen |= {id(p) for p in own.values()}
            sizes = {key: p.numel() for key, p in own.items()}
            if own:
                nbytes = sum(p.nbytes for p in module._parameters.values() if p is not None)
                rows.append(TrainableRow(name, "dense", sizes, nbytes))
    return rows


def train_tokens(
    model: nn.Module, tables: Mapping[str, Sequence[int]], levels: Sequence[int] = ()
) -> list[TrainableRow]:
    """Let these rows of these tables train (of one that trains whole, they do anyway). levels: of which the
    last are made (model/rows.py)."""
    modules = dict(model.named_modules())
    free = {name: ids for name, ids in tables.items() if masters_of(modules[name]) is None}
    train_rows(model, free, levels)
    return [
        TrainableRow(name, "rows of a dense table", {"rows": rows.rows.numel()}, rows.before.nbytes)
        for name, _, rows in row_tables(model)
    ]


def begin_step(model: nn.Module, step: int) -> list[Carried]:
    """Tell every adapter which optimizer step (0-based) comes next; the rows that have moved for it
    (carry.py).
    """
    carried = []
    for _, layer in adapted_layers(model):
        assert layer.adapter is not None
        carried += layer.adapter.begin_step(step, layer.base)
    drop_codes(model)
    return carried


def prune_by(model: nn.Module, gradual: Gradual) -> None:
    """From now on zeros come in all adapted layers but the head, by `begin_step`. ValueError for a method
    that cannot have them, and where the head is all there is."""
    layers = [(name, layer) for name, layer in adapted_layers(model) if not is_head(name)]
    if not layers:
        raise ValueError(
            "quant.sparsity.schedule: no packed layer but the head, which is not pruned; give quant.targets "
            "others, or remove schedule"
        )
    for name, layer in layers:
        if not isinstance(layer.adapter, Pruned):
            raise ValueError(f"{name}: {against_schedule(layer.adapter.config)}")  # pyright: ignore[reportOptionalMemberAccess]
        if "mask" in layer.packed_names:
            raise ValueError(f"{name}: its base has zeros that are locked, and keeps them: no others come")
        layer.adapter.prune_by(gradual)
    leave_out_of_ddp(model)


def zeros_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Layer -> (weights that are zero because they were chosen while it trained, weights)."""
    pruned = ((name, layer.adapter) for name, layer in adapted_layers(model))
    return {
        name: (one.zero_count, one.shape[0] * one.shape[1])
        for name, one in pruned
        if isinstance(one, Pruned) and one.mask is not None
    }


def settle(model: nn.Module) -> None:
    """What adapters have seen so far, made the same on all processes: before it is saved. Collective."""
    for _, layer in adapted_layers(model):
        if isinstance(layer.adapter, Adapter):
            layer.adapter.settle()


def keep_codes(model: nn.Module, on: bool) -> None:
    """Whether every adapter keeps the codes of an optimizer step (adapters/step_codes.py)."""
    for _, layer in adapted_layers(model):
        assert layer.adapter is not None
        layer.adapter.kept = StepCodes() if on else None


def drop_codes(model: nn.Module) -> None:
    """Let go of the codes that are kept: an optimizer step is over."""
    for _, layer in adapted_layers(model):
        if layer.adapter is not None and layer.adapter.kept is not None:
            layer.adapter.kept.drop()


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Every trained tensor under its PEFT key: adapters, then dense modules that train whole (of tied ones
    each, as PEFT has them), then rows of tables."""
    return {
        f"{PEFT_PREFIX}{name}.{PEFT_SLOT}.{key}": tensor
        for name, layer in adapted_layers(model)
        if layer.adapter is not None
        for key, tensor in layer.adapter.state_dict().items()
    } | beside_state(model)


def beside_state(model: nn.Module) -> dict[str, Tensor]:
    """What trains beside the packed layers, under its PEFT key."""
    found: dict[str, Tensor] = {
        f"{PEFT_PREFIX}{name}": master for name, (master, _) in whole_tensors(model, True).items()
    }
    return found | {f"{PEFT_PREFIX}{name}.{PEFT_KEY}": r.each for name, _, r in row_tables(model)}


def adapted_names(state: Iterable[str]) -> list[str]:
    """The layers whose tensors these PEFT keys name, in their order."""
    slot = f".{PEFT_SLOT}."
    names = (key.removeprefix(PEFT_PREFIX).partition(slot)[0] for key in state if slot in key)
    return list(dict.fromkeys(names))


def whole_parameters(state: Iterable[str]) -> list[str]:
    """The dense parameters that these PEFT keys name, in their order."""
    others = (key for key in state if f".{PEFT_SLOT}." not in key and not key.endswith(f".{PEFT_KEY}"))
    return [key.removeprefix(PEFT_PREFIX) for key in others]


def whole_names(state: Iterable[str]) -> list[str]:
    """The dense modules whose tensors these PEFT keys name, in their order."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in whole_parameters(state)))


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """The inverse of adapter_state. ValueError naming missing, unknown and misshapen tensors, before anything
    is copied.
    """
    misfits = []
    for name, layer in adapted_layers(model):
        prefix = f"{PEFT_PREFIX}{name}.{PEFT_SLOT}."
        if isinstance(layer.adapter, Adapter) and (said := layer.adapter.misfit(own_of(state, prefix))):
            misfits.append(prefix + said)
    if not misfits:
        resize(model, state, PEFT_SLOT, PEFT_PREFIX)
    if made := [name for name, _, rows in row_tables(model) if rows.levels]:
        raise ValueError(
            f"{', '.join(made)}: rows are made of vectors here, and a state has rows: attach without levels"
        )
    current = adapter_state(model)
    problems = misfits or [f"missing: {key}" for key in current.keys() - state.keys()]
    problems += [f"unknown: {key}" for key in state.keys() - current.keys()]
    problems += [
        f"{key}: got shape {tuple(state[key].shape)}, the adapter has {tuple(tensor.shape)}"
        for key, tensor in current.items()
        if key in state and state[key].shape != tensor.shape
    ]
    if problems:
        raise ValueError(
            "these adapter tensors do not fit the model:\n  " + "\n  ".join(sorted(problems)[:20])
        )
    for key, tensor in current.items():
        tensor.copy_(state[key])


def resize(model: nn.Module, state: Mapping[str, Tensor], slot: str = "adapter", prefix: str = "") -> None:
    """Give adapters whose buffers grow while they train the sizes of a state that is about to be read; its
    keys are prefix + layer + slot + tensor, joined by dots."""
    for name, layer in adapted_layers(model):
        if isinstance(layer.adapter, Adapter):
            own = own_of(state, f"{prefix}{name}.{slot}.")
            layer.adapter.resize({key: tuple(value.shape) for key, value in own.items()})


def own_of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """By tensor name, the state's tensors whose keys begin so."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def base_digest(model: nn.Module) -> str:
    """sha256 over every packed base by name, and over what inputs, keys and values are on where they are on a
    grid: an adapter trained on one base refuses another."""
    sha = hashlib.sha256()
    for name, layer in packed_layers(model):
        with in_memory(layer):
            sha.update(f"{name}:{layer.base.digest()};".encode())
        if (scheme := scheme_of(layer)) is not None:
            sha.update(f"input {json.dumps(scheme.to_json(), sort_keys=True)};".encode())
    if (kv_cache := kv_config_of(model)) is not None:
        sha.update(f"kv_cache {json.dumps(kv_cache.to_json(), sort_keys=True)};".encode())
    return sha.hexdigest()


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the packed base alone, its inputs on the scales and its dense modules with the
    values that they came with."""
    held = [(layer, layer.adapter) for _, layer in adapted_layers(model)]
    inputs = [layer.activation for _, layer in hosts(model) if isinstance(layer.activation, Activation)]
    learned = [activation.learned for activation in inputs]
    for layer, _ in held:
        layer.adapter = None
    for activation in inputs:
        activation.learn(None)
    try:
        with untrained(model):
            yield
    finally:
        for layer, adapter in held:
            layer.adapter = adapter
        for activation, scale in zip(inputs, learned, strict=True):
            activation.learn(scale)
