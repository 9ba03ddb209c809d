"""adapter.modules_to_save against the modules of the checkpoint, what is packed of them, and the loop."""

from __future__ import annotations

from typing import Any

from ...adapters.modules import chosen
from ...model.checkpoint import Checkpoint
from ...model.shipped import unexchangeable
from ...model.whole import dense_modules, tied_to
from ...train.optimizers import OPTIMIZERS
from ..layers import local_folder
from ..yaml import Problem
from .base import Problems

HERE = ("adapter", "modules_to_save")


def modules_here(r: Any) -> tuple[Checkpoint, Any, list[str], list[str]] | None:
    """(the checkpoint, its model without weights, its dense modules, those that the recipe packs); None when
    it is not on this disk, or makes no model (check_model tells)."""
    folder = local_folder(r.model.path, r.model.revision)
    if folder is None:
        return None
    try:
        checkpoint = Checkpoint.open(folder)
        model = checkpoint.empty_model("eager")
    except (OSError, ValueError):
        return None
    packed = {
        matrix.parameter.rpartition(".")[0]
        for name, matrix in checkpoint.matrices.items()
        if r.quant.skip_reason(name, matrix.embedding, matrix.conv) is None
    }
    dense = list(dense_modules(model))
    return checkpoint, model, [n for n in dense if n not in packed], [n for n in dense if n in packed]


def check_modules(r: Any) -> Problems:
    """Patterns that mean no dense module, or a packed one; what cannot train or ship a dense module."""
    if not (patterns := r.adapter.modules_to_save):
        return
    if (found := modules_here(r)) is not None:
        checkpoint, model, dense, packed = found
        wanted: list[str] = []
        for i, pattern in enumerate(patterns):
            try:
                wanted += chosen(pattern, dense, packed)
            except ValueError as error:
                yield Problem((*HERE, i), f"got {error}")
        modules = dict(model.named_modules())
        for name in dict.fromkeys(wanted):
            for key, _ in modules[name].named_parameters(recurse=False):
                if reason := unexchangeable(checkpoint, f"{name}.{key}"):
                    yield Problem(HERE, f"got {name}, whose {key}: {reason}; leave it out")
        if hasattr(r, "train") and r.train.loss == "liger":
            head = model.get_output_embeddings()
            if any(modules[n] is head and n in dense for n in tied_to(model, wanted)):
                yield Problem(
                    ("train", "loss"),
                    "got 'liger', which makes the gradient of a plain 16-bit head, and the head is trained "
                    "in fp32 (adapter.modules_to_save); set loss: chunked",
                )
    if hasattr(r, "train"):
        yield from _against_loop(r.train)


def against_masters(train: Any, key: str, part: str) -> Problems:
    """What trains no dense tensors beside the adapters; they are there because of `key`, which names each
    `part` of them."""
    name = key.rpartition(".")[2]
    if OPTIMIZERS[train.optimizer].ternary:
        yield Problem(
            ("train", "optimizer"),
            f"got {train.optimizer!r}, whose numbers are -1, 0 and 1, with {key}; leave {name} out, or "
            "choose another adapter.method",
        )
    if not train.gradient.backward:
        yield Problem(
            ("train", "gradient", "kind"),
            f"got {train.gradient.kind!r}, which knows the step of a grid and none of a dense {part}, with "
            f"{key}; set kind: backprop, or leave {name} out",
        )
    if train.sharding == "fsdp":
        yield Problem(
            ("train", "sharding"),
            f"got 'fsdp' with {key}, whose masters are whole on every process; set sharding: none (DDP)",
        )


def _against_loop(train: Any) -> Problems:
    yield from against_masters(train, ".".join(HERE), "module")
    if train.max_steps == 0:
        yield Problem(
            HERE,
            "got modules, but train.max_steps 0 only fits adapters (train.reconstruct), so they would ship "
            "as they are; leave modules_to_save out, or train for some steps",
        )


def module_notes(r: Any) -> list[str]:
    """What is tied, and so trained and shipped once."""
    if not r.adapter.modules_to_save or (found := modules_here(r)) is None:
        return []
    _, model, dense, _ = found
    wanted = [n for pattern in r.adapter.modules_to_save for n in chosen(pattern, dense, [])]
    turned = r.quant.rotation.turns and r.quant.rotation.sites.r1  # which unties
    tied = [] if turned else [n for n in tied_to(model, wanted) if n in dense]
    table, modules = model.get_input_embeddings().weight, dict(model.named_modules())
    ends = [n for n in tied if modules[n]._parameters.get("weight") is table]
    if len(ends) < 2:
        return []
    return [f"{' and '.join(ends)} are tied: one tensor is trained, and it ships as both"]
