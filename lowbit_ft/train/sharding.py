"""Sharding: one packed base spread over all processes (FSDP2, torch's `fully_shard`).

    each decoder layer             a group: gathered before its forward and before its backward, dropped after
                                   each
    embeddings, last norm, head    a group that stays gathered from the forward to the end of the backward

fully_shard spreads Parameters and leaves buffers whole on every process, so the packed tensors of a
PackedLinear become frozen integer Parameters under the names they had. What is gathered has the bytes it had,
and with them the forward of every method is what it is in one process; what trains (A, B, scales), its
gradients and AdamW's averages are spread too.

A tensor is cut along its first dimension that the number of processes divides: scales [G, N] along N where G
is small. The model may lie on the CPU: each layer goes to `device` when it is its turn to be cut, so no
device ever holds more than its share and one layer. Sharding is not undone; who needs the whole model reads
the packed base again and loads what trained.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from ..adapters import AdapterConfig
from ..adapters.attach import packed_layers
from ..adapters.dense import held_short
from ..model.walk import decoder_layers
from .optimizers import OPTIMIZERS
from .processes import world


@dataclass(frozen=True)
class Held:
    """Bytes that this process holds between steps, and bytes of the whole model: packed base and everything
    else.
    """

    base: int
    whole_base: int
    rest: int
    whole_rest: int


def unshardable(train: Any, adapter: AdapterConfig | None = None) -> list[tuple[tuple[str, str], str]]:
    """Why a sharded run cannot have these settings: ((section, key), message) each; empty when it can."""
    problems = []
    if not (chosen := OPTIMIZERS[train.optimizer]).shards:
        why = chosen.package or ("it looks at whole tensors" if chosen.ternary else "one process")
        other = "" if chosen.ternary else "optimizer: adamw, whose averages are sharded, or "
        message = f"{train.optimizer!r} ({why}) cannot step on shards; set {other}sharding: none"
        problems.append((("train", "optimizer"), message))
    if train.mixed_precision == "fp16":
        message = (
            "'fp16' scales its loss per process, shards would disagree; set mixed_precision: bf16, "
            "or sharding: none"
        )
        problems.append((("train", "mixed_precision"), message))
    if getattr(train, "keep_codes", False):
        message = (
            "true with train.sharding: fsdp, where no process holds whole layers between their "
            "turns; set keep_codes: false, or sharding: none"
        )
        problems.append((("train", "keep_codes"), message))
    if adapter is not None and adapter.changes_rows:
        key = "refresh_steps" if getattr(adapter, "refresh_steps", None) else "importance"
        message = (
            f"{getattr(adapter, key)!r} with train.sharding: fsdp, where no process holds the rows and "
            "averages that would move; set refresh_steps: null and importance: weight, or sharding: none"
        )
        problems.append((("adapter", key), message))
    if (master := held_short(adapter)) is not None:
        message = (
            f"{master!r} with train.sharding: fsdp, which gathers gradients of one type; set "
            "master: fp32, or sharding: none"
        )
        problems.append((("adapter", "master"), message))
    if steps := getattr(adapter, "warmup_steps", 0):
        message = (
            f"{steps} with train.sharding: fsdp: the end of the warm-up reads whole layers "
            "between steps; "
            "set warmup_steps: 0, or sharding: none"
        )
        problems.append((("adapter", "warmup_steps"), message))
    return problems


def shard(model: nn.Module, device: torch.device) -> None:
    """Spread `model` (adapters attached, the same on every process) over all processes, in place. Collective.

    What trains starts as it is on rank 0. Every process must call this, and from then on run the same number
    of forwards.
    """
    assert world() > 1 and torch.distributed.is_initialized(), "join() first, under torchrun"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                start = parameter.detach().to(device)
                torch.distributed.broadcast(start, 0)
                parameter.copy_(start)
    for _, layer in packed_layers(model):
        layer.freeze_into_parameters()
    mesh = init_device_mesh(device.type, (world(),))
    options: dict[str, Any] = {"mesh": mesh, "shard_placement_fn": _cut}
    for block in decoder_layers(model)[1]:
        fully_shard(block, **options)
    fully_shard(model, **options)
    for name, layer in packed_layers(model):
        tensors = layer.base.to_tensors()
        assert all(isinstance(t, DTensor) for t in tensors.values()), f"{name}: still whole on this process"


def _cut(parameter: nn.Parameter) -> Shard:
    """Along the first dimension that divides; else along the first, where fully_shard pads."""
    return Shard(next((d for d, size in enumerate(parameter.shape) if size and size % world() == 0), 0))


def held(model: nn.Module) -> Held:
    """What this process holds of the model now, counted from its tensors."""
    packed = [t for _, layer in packed_layers(model) for t in layer.base.to_tensors().values()]
    base, whole_base = _count(packed)
    everything, whole_everything = _count([*model.parameters(), *model.buffers()])
    return Held(base, whole_base, everything - base, whole_everything - whole_base)


def held_by_rank(model: nn.Module, device: torch.device) -> list[dict[str, int]]:
    """`held` of every process, by rank. Collective when there are several."""
    mine = asdict(held(model))
    if world() == 1:
        return [mine]
    numbers = torch.tensor(list(mine.values()), dtype=torch.int64, device=device)
    all_of_them = [torch.empty_like(numbers) for _ in range(world())]
    torch.distributed.all_gather(all_of_them, numbers)
    return [dict(zip(mine, each.tolist(), strict=True)) for each in all_of_them]


def _count(tensors: list[Any]) -> tuple[int, int]:
    """(bytes on this process, bytes of the whole)."""
    local = sum((t.to_local() if isinstance(t, DTensor) else t).numel() * t.element_size() for t in tensors)
    return local, sum(t.numel() * t.element_size() for t in tensors)
