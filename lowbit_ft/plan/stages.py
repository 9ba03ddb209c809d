"""The stages of a run beside the training step: what they hold, and what a run needs of disk and RAM.

Optimizer states and files are counted exactly; quantizing and evaluating are estimates on the safe side.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..files.jsonfile import parse_json
from ..files.regular import read_regular
from ..model.heads import LOGITS_AT_A_TIME
from ..quantize.memory import quantize_memory
from ..recipe.recipe import Recipe
from ..report.files import MAX_TEXT
from ..rotations import modulated
from ..signals.tokens import FLOATS_AT_A_TIME
from ..stages.answers import windows_per_forward
from ..train.optimizers import OPTIMIZERS
from .costs import Cost, Step, by_states
from .exported import exported_bytes
from .model import Skeleton
from .teacher import teacher_costs

# bitsandbytes: tensors of fewer elements keep 32-bit states, or are not paged; 8-bit states have a float per
# block of this many.
_SMALLEST_8BIT, _SMALLEST_PAGED, _BLOCK = 4096, 100_000, 256


@dataclass(frozen=True)
class Needs:
    """Bytes on the disk by folder of the run, and of RAM beside the device's memory; steps (None: unknown
    before the data is read) and what a step counts by the pace of its task (None: as unknown); offloaded: of
    the RAM, what waits there between forward and backward."""

    disk: dict[str, int]
    ram: int
    offloaded: int
    steps: int | None
    counted_per_step: int | None

    @property
    def on_disk(self) -> int:
        return sum(self.disk.values())


def optimizer_bytes(name: str) -> int:
    """Bytes of optimizer state per trained parameter."""
    return OPTIMIZERS[name].states * OPTIMIZERS[name].bits // 8


def optimizer_state(name: str, counts: list[int]) -> tuple[int, int]:
    """Bytes of the states of tensors of these sizes: (on the device, in CPU memory: paged ones)."""
    kind = OPTIMIZERS[name]
    eight = kind.bits == 8
    here = kind.states * 4 * 256 if eight else 0  # what the 8-bit codes mean
    away = 0
    for n in counts:
        size = kind.states * (n + 4 * -(-n // _BLOCK) if eight and n >= _SMALLEST_8BIT else 4 * n)
        size += kind.counter
        if kind.paged and n >= _SMALLEST_PAGED:
            away += size
        else:
            here += size
    return here, away


def walk_activations(per_token: float, windows: int, length: int, batch: int = 4096) -> int:
    """What LayerWalk holds of activations on the device: one batch through one layer; the hidden states of
    all wait on the CPU. batch: tokens that pass a layer at a time, in whole windows.
    """
    return round(per_token * max(length, min(windows * length, max(batch // length, 1) * length)))


def quantize_bytes(recipe: Recipe, made: Skeleton, step: Step) -> int:
    """Peak of quantizing on the device; no packed layer stays there (quantize/memory.py). With text: a batch
    of activations too, and back where whole layers are rounded together; smoothed where norms are modulated:
    the whole dense model.
    """
    device = quantize_memory(recipe, made.shapes).device
    if recipe.quant.smooth is not None and modulated(made.model.config) is not None:
        device = max(device, made.dense_bytes)
    if not recipe.quant.reads_rows:
        return device
    text, tokens = recipe.quant.calibration, recipe.train.micro_batch_size * recipe.data.sequence_len
    largest = max(cost.backward if recipe.quant.by_block else cost.evaluation for cost in step.layers)
    return device + walk_activations(largest / tokens, text.samples, text.sequence_len, text.batch_tokens)


def synthesis_bytes(recipe: Recipe, made: Skeleton, room: int) -> int:
    """Of data.synthesis: the dense model that writes, or the packed one where the dense does not fit
    `room`."""
    config = recipe.data.synthesis
    assert config is not None
    size, longest = getattr(torch, recipe.model.dtype).itemsize, config.longest(recipe.data.sequence_len)
    linears = sum(r.out_features * r.in_features for r in made.rows if r.reason is None)
    # packed to 8 bits: a byte, and a scale of 2 for 128 of them
    sizes = made.dense_bytes, made.dense_bytes - size * linears + linears * (128 + 2) // 128
    dense, packed = (config.working_bytes(weights, made.model.config, size, longest) for weights in sizes)
    return dense if config.writer == "dense" or (config.writer == "auto" and dense < room) else packed


def evaluation_bytes(recipe: Recipe, made: Skeleton, per_token: float) -> int:
    """Beyond the trained model: a chunk of logits (of model and reference), some rows in fp32, and the
    reference's own embedding, head and one dense layer."""
    size = getattr(torch, recipe.model.dtype).itemsize
    window, windows = recipe.eval.window, recipe.eval.windows or 1 << 30
    tokens = window * max(1, min(windows, 4096 // window))
    elements = tokens * getattr(made.model.config.get_text_config(), "vocab_size", 0)
    logits, rows = min(elements, LOGITS_AT_A_TIME) * size, 4 * 4 * min(elements, FLOATS_AT_A_TIME)
    activations = walk_activations(per_token, windows, window)
    if not recipe.eval.kl:
        return max(logits + rows, activations)
    walk = quantize_memory(recipe, made.shapes)
    return walk.outside + max(walk.layer + activations, 2 * logits + rows, activations)


def asking_bytes(recipe: Recipe, made: Skeleton, per_token: float) -> int:
    """Peak on the device while the full-precision model is asked (stages/answers.py): its embedding and head,
    one dense layer and a batch through it; then a chunk of logits, some rows of which are put in order in
    fp32."""
    walk = quantize_memory(recipe, made.shapes)
    length, size = recipe.data.sequence_len, getattr(torch, recipe.model.dtype).itemsize
    tokens = windows_per_forward(recipe) * length
    elements = tokens * getattr(made.model.config.get_text_config(), "vocab_size", 0)
    logits, rows = min(elements, LOGITS_AT_A_TIME) * size, 5 * 4 * min(elements, FLOATS_AT_A_TIME)
    return walk.outside + max(walk.layer + round(per_token * tokens), logits + rows)


def rough_step(recipe: Recipe, made: Skeleton) -> Step:
    """The step of a model that does not run without data: the sum over the shapes of a Llama-like layer."""
    config, size = made.model.config.get_text_config(), getattr(torch, recipe.model.dtype).itemsize

    def number(*keys: str) -> int:
        return next((int(v) for v in (getattr(config, key, None) for key in keys) if isinstance(v, int)), 0)

    hidden = number("hidden_size", "n_embd", "d_model")
    inner = number("intermediate_size", "ffn_dim", "n_inner") or 4 * hidden
    experts = number("num_experts_per_tok", "num_experts_per_token") or 1
    tokens = recipe.train.micro_batch_size * recipe.data.sequence_len
    inputs = tokens * hidden * size
    # norms, q k v o, attention, residuals; gate, up, product, activation; norms are computed in fp32
    one = tokens * (10 * hidden + 4 * inner * experts) * size + tokens * hidden * 8
    logits = min(tokens * number("vocab_size"), LOGITS_AT_A_TIME)
    tail = Cost(
        inputs + logits * size,
        3 * inputs,
        4 * inputs + 2 * logits * size + 12 * min(logits, FLOATS_AT_A_TIME),
        0,
        inputs + logits * size,
    )
    kept = inputs if recipe.train.gradient_checkpointing else one
    count = max(1, made.layers)
    gradients = made.trained_bytes // count
    layer = Cost(one, kept, 2 * one + gradients, gradients, one)
    states = (count + 1) * tokens * hidden if by_states(recipe) else 0
    return Step(0, inputs, inputs, (layer,) * count, tail, states=states)


def needs(recipe: Recipe, made: Skeleton, step: Step, arch: int, processes: int) -> Needs:
    """Disk, RAM beside a GPU, steps and tokens."""
    train, held = recipe.train, made.held
    here, paged = optimizer_state(train.optimizer, made.trained)
    states = here + paged
    masters = made.trained_bytes
    packed = sum(size for part, size in held.items() if part != "adapters")
    shipped = packed - held["residual"] - held["mask"]
    steps = train.max_steps
    saved = (
        1
        if not train.save_every
        else min(train.keep_checkpoints, max(1, (steps or 1 << 30) // train.save_every))
    )
    checkpoints = (saved + int(train.keep_best)) * (masters + states)
    disk = {"base/": packed, "checkpoints/": checkpoints, "adapter/": masters, "merged/": shipped}
    if recipe.export.format != "native":
        disk["exported/"] = exported_bytes(recipe, made)
    if train.reconstruct is not None:
        disk["reconstruct/"] = masters
    if steps == 0:
        del disk["checkpoints/"]
    if (teacher := teacher_costs(recipe, made)).disk:
        disk[recipe.train.teacher_dir or "teacher/"] = teacher.disk * processes
    if (rows := recipe.data.synthesis) is not None:
        disk["synthesis/"] = rows.disk_bytes(made.model.config, rows.longest(recipe.data.sequence_len))
    if train.offload == "disk" and arch:
        disk["layer inputs"] = len(step.layers) * step.hidden
    away = len(step.layers) * step.hidden if train.offload == "cpu" and arch else 0
    waiting = quantize_memory(recipe, made.shapes).cpu  # hidden states of a walk's windows
    # While a checkpoint is written, adapters and states are copied; a tensor is read through a buffer of its
    # own size.
    ram = 3_000_000_000 + away + paged + max(masters + states, waiting, 4 * made.largest)
    counted = recipe.task.pace.planned(train.micro_batch_size, recipe.data.sequence_len)
    more = train.gradient_accumulation_steps * processes
    return Needs(disk, ram, away, steps, None if counted is None else counted * more)


def throughput(run: Path, counted: str = "tokens") -> float | None:
    """How many a second an earlier run of the recipe had of what it counts (Pace.key): the median of the
    second half of its metrics.jsonl; None without one.
    """
    try:
        lines = read_regular(run / "metrics.jsonl", MAX_TEXT).decode().splitlines()
        rows = [parse_json(line.encode(), "metrics.jsonl", dict[str, Any]) for line in lines]
    except (OSError, ValueError):
        return None
    found = [row.get(f"{counted}_per_s") for row in rows]
    rates = [rate for rate in found if isinstance(rate, int | float) and not isinstance(rate, bool)]
    return statistics.median(rates[len(rates) // 2 :]) if rates else None
