"""What a run will hold in memory, worked out from config.json and the recipe; nothing is loaded.

    model.py     the model on the meta device, packed and adapted: bytes by part
    step.py      one step run on tensors without data: what is kept for backward, a layer's recompute, the
                 loss (around.py: the model around its layers; fake.py: tensors without data; counting.py)
    stages.py    the other stages: quantizing, evaluating; disk, RAM
    plan.py      all of it together, against a card
    fixes.py     what fits, and what to change when it does not
    cli/plan.py  how it is shown

The prediction is tested: benchmarks/plan_error.py counts the bytes of real steps beside it. Not in it:
fragmentation of the allocator, and what PyTorch's own operators take and give back inside themselves.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..model.attention import without_masks
from ..recipe.layers import local_folder
from ..recipe.recipe import Recipe
from ..train.memory import free_ram
from .costs import Setting, Step, attends, by_states
from .gradient import MASTERS, gradient_notes, kept_bytes, own_moments
from .model import PARTS, PlanRow, Skeleton, cache_line, skeleton
from .pruned import choice_moments
from .reconstruct import reconstruct_bytes
from .stages import (
    Needs,
    asking_bytes,
    evaluation_bytes,
    needs,
    optimizer_state,
    quantize_bytes,
    rough_step,
    synthesis_bytes,
)
from .step import step_costs
from .teacher import layer_bytes, measuring_bytes, teacher_costs, teacher_notes

CARD_GB = 24.0  # planned for when no GPU can be asked and none is named
# What a process on a GPU holds beside its tensors: the CUDA context, cuBLAS and its workspace. Seen as 0.3 to
# 0.6 GB on current drivers.
CUDA_CONTEXT = 500_000_000
PROCESS = 700_000_000  # Python, PyTorch, transformers and the tokenizer of a process on a CPU


@dataclass(frozen=True)
class Card:
    """Where the run is to fit: bytes, what it is called, and its kind (arch: 10 x compute capability, 0: a
    CPU).
    """

    nbytes: int
    name: str
    arch: int

    @property
    def context(self) -> int:
        return CUDA_CONTEXT if self.arch else PROCESS


@dataclass(frozen=True)
class Plan:
    """parts: bytes by name at the peak of a training step (they add up to stages["training"], which is not
    there when train.max_steps is 0); moments: what is largest at another moment; stages: peak by stage of the
    run, context included; notes: what is an estimate, and why; cache: what a token takes in the KV cache."""

    recipe: Recipe
    card: Card
    rows: list[PlanRow]
    parts: dict[str, int]
    moments: dict[str, int]
    stages: dict[str, int]
    peak_at: str
    trainable: int
    needs: Needs
    notes: list[str] = field(default_factory=list)
    processes: int = 1
    cache: str | None = None

    @property
    def total(self) -> int:
        """The largest of the stages."""
        return max(self.stages.values())

    @property
    def stage(self) -> str:
        return max(self.stages, key=lambda name: self.stages[name])

    @property
    def fits(self) -> bool:
        return self.total <= self.card.nbytes

    @property
    def certain(self) -> int:
        """Bytes that no estimate is in: the model, what trains, its optimizer."""
        return sum(self.parts[name] for name in (*PARTS, "optimizer states"))

    @property
    def base(self) -> int:
        """Bytes of what ships of the packed layers: codes, scales and zero points."""
        return self.parts["codes"] + self.parts["scales and zeros"]

    def kinds(self) -> Iterable[tuple[str, int, PlanRow]]:
        """Rows alike but for the layer number, once each: (name with * for the number, how many, one of
        them).
        """
        groups: dict[tuple[Any, ...], list[PlanRow]] = {}
        for row in self.rows:
            kind = ".".join("*" if part.isdecimal() else part for part in row.layer.split("."))
            groups.setdefault((kind, row.out_features, row.in_features, row.grid, row.reason), []).append(row)
        for key, rows in groups.items():
            yield (key[0] if len(rows) > 1 else rows[0].layer), len(rows), rows[0]


def find_card(recipe: Recipe, memory_gb: float | None = None, in_use: bool = False) -> Card:
    """Where the recipe will run: the GPU of this machine, its CPU when the recipe says so, else a card of
    `memory_gb` (default 24).

    in_use: the device that a run started here and now would take; never a card that is not there.
    """
    on_cpu = recipe.model.device == "cpu" or (in_use and not torch.cuda.is_available())
    if on_cpu:
        free = free_ram() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return Card(
            int(memory_gb * 1e9) if memory_gb else free, f"{(memory_gb or free / 1e9):.1f} GB of RAM", 0
        )
    if torch.cuda.is_available() and memory_gb is None:
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        return Card(found.total_memory, found.name, 10 * found.major + found.minor)
    arch = 10 * torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 89
    size = memory_gb or CARD_GB
    return Card(
        int(size * 1e9),
        f"a card of {size:g} GB" + ("" if memory_gb else " (no GPU here; --memory for another)"),
        arch,
    )


def plan_folder(recipe: Recipe) -> Path | None:
    """The folder with the config.json of a recipe's model, when it is on this disk."""
    return local_folder(recipe.model.path, recipe.model.revision)


def plan(
    recipe: Recipe,
    folder: Path | None = None,
    card: Card | None = None,
    processes: int | None = None,
    packed_rows: bool = True,
) -> Plan | None:
    """The plan of a recipe; None when its config.json is not on this disk (a hub id that was not fetched) and
    no folder is given.

    folder: where config.json is (default: model.path). processes: of a distributed run (default: WORLD_SIZE).
    packed_rows: rows shorter than a window share it, so that attention has a mask (the usual case, and the
    larger one).

    Raises:
        ValueError: config.json makes no model, or one that cannot be packed as the recipe says.
    """
    folder = folder or plan_folder(recipe)
    if folder is None:
        return None
    card = card or find_card(recipe)
    count = processes or int(os.environ.get("WORLD_SIZE", "1"))
    made = skeleton(recipe, folder)
    step, note = _step(recipe, made, str(folder), card.arch, packed_rows)
    parts, moments, peak_at = _training(recipe, made, step, card, count)
    context = parts["context"]
    stages = {"training": sum(parts.values())}
    held = sum(made.held.values())
    kept = sum(parts[name] for name in (*PARTS, "optimizer states") if name in parts)
    kept += teacher_costs(recipe, made).held + kept_bytes(recipe, made)
    layer = max(cost.evaluation for cost in step.layers)
    forward = kept + step.context + max(step.frame + layer, step.tail.evaluation)
    stages["evaluation while training"] = forward + context + parts.get("gathered layers", 0)
    per_token = layer / (recipe.train.micro_batch_size * recipe.data.sequence_len)
    if recipe.train.max_steps == 0:
        stages = {}  # parts and moments still say what a step would hold
    if recipe.train.reconstruct is not None:
        stages["reconstructing"] = held + reconstruct_bytes(recipe, made, step) + context
    stages["quantizing"] = quantize_bytes(recipe, made, step) + context
    if recipe.data.synthesis is not None:
        stages["writing rows"] = synthesis_bytes(recipe, made, card.nbytes - context) + context
    if recipe.eval.perplexity and (rows := recipe.task.measured) is not None:
        at_once = layer * rows // recipe.train.micro_batch_size
        stages["evaluation at the end"] = held + made.dense_bytes + at_once + context
    elif recipe.eval.perplexity:
        stages["evaluation at the end"] = held + evaluation_bytes(recipe, made, per_token) + context
    if teacher_costs(recipe, made).walks:
        stages["asking the teacher"] = held + asking_bytes(recipe, made, per_token) + context
    if recipe.train.max_steps != 0 and (more := measuring_bytes(recipe, made, layer)):
        stages["measuring the teacher"] = held + more + context
    wanted = needs(recipe, made, step, card.arch, count)
    if card.arch == 0:
        wanted = replace(wanted, ram=max(stages.values()))
    notes = [*step.notes, *note, *teacher_notes(recipe, made), *gradient_notes(recipe)]
    return Plan(
        recipe,
        card,
        made.rows,
        parts,
        moments,
        stages,
        peak_at,
        made.trainable,
        wanted,
        notes,
        count,
        cache_line(recipe, made),
    )


def _step(recipe: Recipe, made: Skeleton, folder: str, arch: int, masked: bool) -> tuple[Step, list[str]]:
    """The traced step, or an estimate and the note that says so."""
    train, model = recipe.train, recipe.model
    setting = Setting(
        train.micro_batch_size,
        recipe.data.sequence_len,
        model.dtype,
        train.mixed_precision,
        train.gradient_checkpointing,
        train.gradient_accumulation_steps > 1,
        masked and not without_masks(made.model),
        attends(recipe),
        arch,
        train.mlp_chunk,
        by_states(recipe),
    )
    whole = f"{folder} {model.add_tokens} {recipe.task}"
    key = (whole, recipe.quant.model_dump_json(), recipe.adapter.model_dump_json(), setting)
    if key not in _TRACED:
        if len(_TRACED) > 512:
            _TRACED.clear()
        try:
            quant, adapter = recipe.quant, recipe.adapter.model_dump_json()
            ends = (whole, quant.lm_head, quant.embeddings, quant.group_size, adapter)
            _TRACED[key] = step_costs(made, setting, _TAILS.setdefault(ends, {}))
        # whatever a model's own code raises without data: the plan becomes an estimate, never an error
        except Exception as error:
            _TRACED[key] = (
                f"{type(error).__name__}: "
                f"{str(error).strip().splitlines()[0][:90] if str(error).strip() else ''}"
            )
    found = _TRACED[key]
    if isinstance(found, Step):
        return found, []
    return rough_step(recipe, made), [
        f"the activations are an estimate: {type(made.model).__name__} does not run without data ({found})"
    ]


_TRACED: dict[Any, Step | str] = {}
_TAILS: dict[Any, dict[Any, Any]] = {}


def _training(
    recipe: Recipe, made: Skeleton, step: Step, card: Card, processes: int
) -> tuple[dict[str, int], dict[str, int], str]:
    """Bytes by part at the peak of a step, what is largest at another moment, and when the peak is."""
    train = recipe.train
    away = train.offload != "no" and card.arch > 0  # on a CPU the inputs are where they would be sent
    moments = own_moments(recipe, step, made) + choice_moments(recipe, made.largest)
    if train.gradient.backward:
        moments += _moments(recipe, step, made.trained_bytes, away and train.gradient_checkpointing)
        if table := made.table_bytes:
            own = {"gradients": made.trained_bytes, "saved layer inputs": 0, "one layer": table}
            moments.append((sum(own.values()), "the backward of the embedding", own))
    teacher = teacher_costs(recipe, made)
    beside = step.hidden if teacher.live else 0  # its final hidden states wait for the loss
    if teacher.live:  # in eval mode, before the student has kept anything
        work = max(step.frame + max(cost.evaluation for cost in step.layers) - beside, 0)
        gradients = made.trained_bytes if train.gradient_accumulation_steps > 1 else 0
        own = {"gradients": gradients, "saved layer inputs": 0, "one layer": work}
        moments.append((gradients + work, "the forward of the teacher", own))
    _, peak_at, at_peak = max(moments, key=lambda m: m[0])

    optimizer, _ = optimizer_state(train.optimizer, made.trained)
    parts = dict(made.held)
    parts |= {
        "gradients": at_peak["gradients"],
        "optimizer states": optimizer,
        "batch and masks": step.context,
    }
    if train.keep_codes:
        parts["kept codes"] = parts["codes"]
    if train.gradient.masters:
        parts[MASTERS] = at_peak.get(MASTERS, 0)
    if average := kept_bytes(recipe, made):
        parts["average of gradients"] = average
    if teacher.asked:
        parts["teacher"] = teacher.held + beside + layer_bytes(recipe, made, step.states)
    parts["saved layer inputs"] = at_peak["saved layer inputs"]
    parts |= {
        "one layer": at_peak.get("one layer", 0),
        "loss": at_peak.get("loss", 0),
        "workspace": at_peak.get("workspace", 0),
    }
    batch = 3 * 8 * train.micro_batch_size * recipe.data.sequence_len
    parts["batch and masks"] += batch * (1 if card.arch else train.gradient_accumulation_steps)
    if processes > 1 and train.sharding == "fsdp":
        parts = _sharded(parts, made, processes)
    elif processes > 1:
        parts["gradient buckets"] = made.trained_bytes  # DDP's own copies
    parts["context"] = card.context
    other = {name: max(m[2].get(name, 0) for m in moments) for name in ("one layer", "loss")}
    return parts, {name: size for name, size in other.items() if not at_peak.get(name)}, peak_at


def _moments(
    recipe: Recipe, step: Step, all_gradients: int, inputs_away: bool
) -> list[tuple[int, str, dict[str, int]]]:
    """(bytes, when, bytes by part) of each moment of a step that can be its peak: through the layers, the
    loss, and back. all_gradients: bytes of every gradient; inputs_away: saved layer inputs wait in CPU
    memory.
    """
    train = recipe.train
    several = train.gradient_accumulation_steps > 1
    # train/offload.py fetches the next layer's input early
    ahead = step.hidden if inputs_away else 0
    kept = [cost.kept - ahead for cost in step.layers]
    later = [0] * (len(kept) + 1)  # gradients of the layers behind i, and of the head
    later[-1] = step.tail.gradients
    for i in reversed(range(len(kept))):
        later[i] = later[i + 1] + step.layers[i].gradients

    moments: list[tuple[int, str, dict[str, int]]] = []

    def moment(name: str, saved: int, gradients: int, own: dict[str, int]) -> None:
        parts = {
            "gradients": all_gradients if several else gradients,
            "saved layer inputs": saved + ahead,
            **own,
        }
        moments.append((sum(parts.values()), name, parts))

    before = 0
    for i, cost in enumerate(step.layers):
        inside = cost.forward_ops
        moment(
            f"the forward of layer {i}", before, 0, {"one layer": cost.forward - inside, "workspace": inside}
        )
        before += kept[i]
    tail = step.tail
    moment("the loss", before, 0, {"loss": tail.forward - tail.forward_ops, "workspace": tail.forward_ops})
    made_by_tail = 0 if several else tail.gradients
    moment(
        "the loss",
        before,
        0,
        {
            "loss": tail.backward - tail.backward_ops - made_by_tail,
            "workspace": tail.backward_ops,
            "gradients": all_gradients if several else made_by_tail,
        },
    )
    for i in reversed(range(len(kept))):
        cost, saved = step.layers[i], sum(kept[:i])
        fresh = 0 if several else cost.gradients
        own = cost.kept if not train.gradient_checkpointing else 0
        inside = cost.backward_ops
        moment(
            f"the backward of layer {i}",
            saved + own,
            later[i],
            {"one layer": cost.backward - own - inside - fresh, "workspace": inside},
        )
    return moments


def _sharded(parts: dict[str, int], made: Skeleton, processes: int) -> dict[str, int]:
    """FSDP2: everything of the model and what trains divided, the layer at work and the one fetched ahead
    gathered, and what lies around the layers (embeddings, head) gathered from forward to backward."""
    spread = {*PARTS, "gradients", "optimizer states", "kept codes"}
    out = {name: -(-size // processes) if name in spread else size for name, size in parts.items()}
    block = max((frozen + 4 * masters for frozen, masters in made.block_bytes.values()), default=0)
    gradients = max((4 * masters for _, masters in made.block_bytes.values()), default=0)
    inside = sum(
        (frozen + 4 * masters) * len(b.indices)
        for b in made.blocks
        for frozen, masters in (made.block_bytes[b.name],)
    )
    root = sum(made.held.values()) - inside
    out["gathered layers"] = 2 * block + gradients + root
    return out


@functools.cache
def no_card() -> Card:
    """A card of the default size, for planning where nothing is to be refused."""
    return Card(int(CARD_GB * 1e9), f"a card of {CARD_GB:g} GB", 89)
