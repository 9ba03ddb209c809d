"""What a training run refuses: sections that its model or data cannot be trained by, and layers that the
model's forward passes by."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from ..adapters import Adapter, AdapterConfig
from ..adapters.attach import adapted_layers
from ..adapters.dense import held_short
from ..model.walk import decoder_layers
from ..model.whole import SLOT
from .processes import world
from .setup import TrainError, ValidBatches
from .sharding import unshardable


def refuse(section: Any, model: nn.Module, valid: ValidBatches | None, sharded: bool) -> None:
    """TrainError for a section that this model, or this data, cannot be trained by."""
    if section.keep_best and valid is None:
        raise TrainError("train.keep_best needs validation data: set data.valid, or keep_best: false")
    adapter = config_of(model)
    if sharded and (problems := unshardable(section, adapter)):
        raise TrainError("\n".join(f"{'.'.join(key)}: got {message}" for key, message in problems))
    if problems := list(section.gradient.problems(SimpleNamespace(train=section, adapter=adapter))):
        raise TrainError("\n".join(f"{'.'.join(key)}: {message}" for key, message in problems))
    if sharded and section.gradient.needs_whole:
        raise TrainError(
            f"train.gradient: got {section.gradient.kind!r}, which moves whole tensors, and the model is "
            "sharded; leave it whole (DDP)"
        )
    if section.sharding == "fsdp" and world() > 1 and not sharded:
        raise TrainError(
            "train.sharding: got 'fsdp', but the model is whole; call "
            "lowbit_ft.train.sharding.shard(model, device) first"
        )
    if section.compile:
        try:
            decoder_layers(model)
        except ValueError as error:
            raise TrainError(f"train.compile: got true, but {error}; set compile: false") from error


def config_of(model: nn.Module) -> AdapterConfig | None:
    """What the adapters of the model are built from, where attach gave it some."""
    adapters = (layer.adapter for _, layer in adapted_layers(model))
    return next((adapter.config for adapter in adapters if isinstance(adapter, Adapter)), None)


def master_of(model: nn.Module) -> str | None:
    """What its adapters' dense parts are held in, where that is less than fp32."""
    return held_short(config_of(model))


def refuse_unreached(names: Mapping[Tensor, str]) -> None:
    """TrainError when the first backward passed layers by: they would ship as they are, and nobody would
    know. names: of all that trains."""
    layers: dict[str, bool] = {}  # layer -> whether one of its tensors has a gradient
    for parameter, name in names.items():
        layer = name.rpartition(".")[0]
        layers[layer] = layers.get(layer, False) or parameter.grad is not None
    missed = [layer for layer, reached in layers.items() if not reached]
    if whole := [layer.removesuffix(f".{SLOT}") for layer in missed if layer.endswith(f".{SLOT}")]:
        raise TrainError(
            f"adapter.modules_to_save: {whole[0]} got no gradient: this model's forward goes past it, so it "
            "would not be trained; leave it out"
        )
    if missed := [layer.removesuffix(".adapter") for layer in missed]:
        raise TrainError(
            f"{len(missed)} layers with adapters got no gradient ({', '.join(missed[:3])}, ...): this "
            "model's forward goes past "
            "them, so they would not be trained. Leave them in full precision: quant.exclude: "
            f"['*.{missed[0].rpartition('.')[2]}']"
        )
