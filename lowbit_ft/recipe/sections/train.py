"""train: how it is trained, and what its options need: a validation set, a known length, a package, room on
the disk.
"""

from __future__ import annotations

import importlib.util
import shutil
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ...adapters.dense import held_short
from ...gradients import GRADIENTS, USUAL, BackpropConfig, GradientConfig
from ...names import listed
from ...signals import TEACHERS
from ...train.losses import LOSSES
from ...train.optim import unheld
from ...train.optimizers import OPTIMIZERS
from ...train.schedulers import SCHEDULERS
from ...train.sharding import unshardable
from ..layers import shapes_here
from ..paths import path_is
from ..values import Among, OneKind, OneOf
from ..yaml import Problem
from .base import Count, Positive, Problems, Section, Unit
from .reconstruct import ReconstructSection
from .signal import SignalSection

AUTO = "auto"


class TrainSection(Section):
    """How it is trained."""

    max_steps: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="optimizer steps; give this or epochs. 0: reconstruct only"
    )
    epochs: Positive | None = Field(
        default=None, description="passes over data.train; give this or max_steps"
    )
    micro_batch_size: Count = Field(default=1, description="windows per forward; raise while memory lasts")
    gradient_accumulation_steps: Count = Field(default=8, description="forwards per optimizer step")
    learning_rate: Positive | Literal["auto"] = Field(
        default=AUTO,
        description="of the low-rank matrices A and B; auto: by method and bits, from adapters/rates.py. "
        "What a LoRA takes (2e-4) moves few codes or none",
    )
    scale_learning_rate: Positive | None = Field(
        default=None, description="of scales, magnitudes and offsets; null: learning_rate"
    )
    modules_learning_rate: Positive = Field(
        default=1e-4,
        description="of the dense modules of adapter.modules_to_save, which train whole; left out, the head "
        "of a task takes learning_rate",
    )
    reconstruct: ReconstructSection | None = Field(
        default=None,
        description="fit the adapters to the dense layers first, one by one; null: start as attached",
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.0, description="decoupled weight decay")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), description="of Adam"
    )
    eps: Positive = Field(default=1e-8, description="of Adam")
    optimizer: Annotated[str, OneOf(OPTIMIZERS)] = Field(
        default="adamw",
        description="adamw (torch, fused) or a bitsandbytes optimizer such as paged_adamw8bit",
    )
    scheduler: Annotated[str, OneOf(SCHEDULERS)] = Field(
        default="cosine", description="learning-rate curve after the warm-up"
    )
    warmup_ratio: Unit = Field(default=0.05, description="fraction of the steps spent warming up")
    min_lr_ratio: Unit = Field(default=0.0, description="last learning rate over the peak")
    decay_ratio: Unit = Field(default=0.2, description="wsd: fraction of the steps spent decaying at the end")
    max_grad_norm: Positive = Field(default=1.0, description="gradients are clipped to this norm")
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations: about 30 % slower, much less memory"
    )
    offload: Literal["no", "cpu", "disk"] = Field(
        default="no",
        description="where what gradient_checkpointing keeps, the input of every layer, waits: no, on the "
        "device; cpu, in CPU memory; "
        "disk, in a file of the run folder: for long sequences on a GPU",
    )
    loss: Annotated[str, OneOf(LOSSES)] = Field(
        default="chunked",
        description="chunked: logits in chunks through the model's own head; liger: Liger's fused kernel "
        "(extra liger, a GPU, a plain head)",
    )
    signal: SignalSection = Field(
        default_factory=SignalSection, description="what the loss compares the model with"
    )
    gradient: Annotated[GradientConfig, OneKind(GRADIENTS, USUAL)] = Field(
        default_factory=BackpropConfig,
        description="how the gradient of a step is made, and what is done to the weights behind it",
    )
    teacher: Annotated[str, Among(TEACHERS)] | None = Field(
        default=None,
        description="who is asked by signal.kind logits and mix. residual: the base before rounding, from "
        "its codes and residual, no second copy; cached: the full-precision model, asked once before "
        "training, its likeliest tokens kept on the disk; a folder or hub id: that model, packed to 8 bits "
        "(the run's own model.path: full precision at 8 bits)",
    )
    teacher_dir: str | None = Field(
        default=None,
        description="cached: folder that keeps the answers, for other runs on the same windows too; null: "
        "teacher/ of the run",
    )
    start_from: str | None = Field(
        default=None,
        description="the folder of another run on the same base: what it trained, unrounded, is where this "
        "one begins, with an optimizer of its own (a run with an intervention, then one without)",
    )
    mlp_chunk: Annotated[int, Field(ge=16)] | None = Field(
        default=None,
        description="tokens that go through the MLP and the norms of a layer at a time; null: all. For "
        "long sequences: they hold most of what "
        "a layer needs, and its products run no more often than under gradient_checkpointing",
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = Field(
        default="no", description="autocast; 'no' computes in model.dtype"
    )
    sharding: Literal["none", "fsdp"] = Field(
        default="none",
        description="with several processes: none, each holds the whole base (DDP); fsdp, "
        "they share one (FSDP2)",
    )
    keep_codes: bool = Field(
        default=False,
        description="keep the trained integers of every layer for the whole optimizer step instead of "
        "making them anew in each forward and "
        "backward: bits per trained weight of memory",
    )
    compile: bool = Field(
        default=False,
        description="torch.compile of the decoder layers; the same integers, see "
        "docs/speed.md for where it helps",
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        default=0, description="of the start of A, the data order and dropout"
    )
    log_every: Count = Field(default=1, description="steps between lines of metrics.jsonl")
    eval_every: Count | None = Field(
        default=None, description="steps between validation losses; null: only at the end"
    )
    save_every: Count | None = Field(
        default=None, description="steps between checkpoints; null: only at the end and on a signal"
    )
    keep_checkpoints: Count = Field(default=2, description="newest checkpoints kept")
    keep_best: bool = Field(
        default=False, description="ship the checkpoint of the lowest validation loss, not the last"
    )
    stop_after: Count | None = Field(
        default=None,
        description="end after so many evaluations in a row without a lower validation loss; with keep_best",
    )
    neftune_alpha: Positive | None = Field(
        default=None,
        description="NEFTune: noise on the embeddings while training, of this size over sqrt(tokens x width)",
    )
    max_bad_steps: Count = Field(
        default=5, description="stop after this many NaN or infinite losses in a row"
    )
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default=[], description="besides metrics.jsonl, which is always written"
    )

    @field_validator("mixed_precision", "offload", mode="before")
    @classmethod
    def _no_is_a_word(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads an unquoted no as false

    @model_validator(mode="after")
    def _offload(self) -> TrainSection:
        if self.offload != "no" and not self.gradient_checkpointing:
            raise ValueError(
                f"offload {self.offload} moves what gradient_checkpointing keeps, and that is off; set "
                "gradient_checkpointing: true, "
                "or offload: no"
            )
        return self

    @model_validator(mode="after")
    def _compile(self) -> TrainSection:
        if self.compile and self.mlp_chunk is not None:
            raise ValueError(
                f"compile and mlp_chunk {self.mlp_chunk} do not go together: the chunks run their own "
                "backward, which is not for a compiler; set "
                "compile: false, or mlp_chunk: null"
            )
        return self

    @model_validator(mode="after")
    def _length(self) -> TrainSection:
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError(
                f"max_steps {self.max_steps} and epochs {self.epochs}; allowed: exactly one of them; set "
                "max_steps or epochs"
            )
        if self.max_steps == 0 and self.reconstruct is None:
            raise ValueError(
                "max_steps 0 without reconstruct trains nothing; set max_steps: 1 or more, or "
                "reconstruct: {} (then the run is a post-training quantizer)"
            )
        return self


def check_train(r: Any) -> Problems:
    """Training options that need something else: a validation set, a known length, a package."""
    train = r.train
    package = OPTIMIZERS[train.optimizer].package
    if package is not None and importlib.util.find_spec(package) is None:
        message = (
            f"got {train.optimizer!r}, from {package}, which is not installed; run pip install "
            f"{package}, or set adamw"
        )
        yield Problem(("train", "optimizer"), message)
    if reasons := LOSSES[train.loss].problems(r):
        yield Problem(
            ("train", "loss"),
            f"got {train.loss!r}, but {'; '.join(reasons)}; set loss: chunked, which holds as little",
        )
    if train.sharding == "fsdp":
        for key, message in unshardable(train, getattr(r, "adapter", None)):
            yield Problem(key, f"got {message}")
    adapter = getattr(r, "adapter", None)
    if (master := held_short(adapter)) is not None:
        yield from _short_masters(train, master)
    if adapter is not None and adapter.changes_rows and OPTIMIZERS[train.optimizer].bits < 32:
        yield Problem(
            ("train", "optimizer"),
            f"got {train.optimizer!r}, whose averages in blocks of 8 bits cannot follow the rows that "
            f"adapter {adapter.method} chooses anew; set optimizer: adamw, or adapter.refresh_steps: null "
            "and importance: weight",
        )
    if adapter is not None and adapter.changes_rows and train.max_steps is not None:
        yield from _too_short_for_rows(train.max_steps, adapter)
    if adapter is not None:
        yield from _ternary(r, adapter)
    if train.keep_codes and adapter is not None and not adapter.rounds_codes:
        yield Problem(
            ("train", "keep_codes"),
            f"got true, but {adapter.method} rounds nothing while it trains: there are no codes to keep; "
            "remove it",
        )
    if r.data.streaming and train.max_steps is None:
        yield Problem(
            ("train", "epochs"),
            f"got {train.epochs:g} with data.streaming, whose length is unknown; set train.max_steps",
        )
    written = r.data.synthesis.valid if r.data.synthesis is not None else 0
    if train.eval_every is not None and r.data.valid is None and not written:
        fix = "add data.valid" if r.data.synthesis is None else "set data.synthesis.valid: 32, add data.valid"
        yield Problem(
            ("train", "eval_every"),
            f"got {train.eval_every}, but there is no data.valid; {fix} or set eval_every: null",
        )
    if train.keep_best and train.eval_every is None:
        yield Problem(
            ("train", "keep_best"), "got true, but nothing is evaluated while training; set train.eval_every"
        )
    if train.stop_after is not None and not train.keep_best:
        yield Problem(
            ("train", "stop_after"),
            f"got {train.stop_after}, and what it waits for is a better checkpoint; set keep_best: true and "
            "eval_every, or remove it",
        )
    if train.neftune_alpha is not None and train.max_steps == 0:
        yield Problem(
            ("train", "neftune_alpha"),
            f"got {train.neftune_alpha:g} with max_steps 0: there is no step to make noise in; remove it",
        )
    if train.keep_best and train.max_steps == 0:
        yield Problem(
            ("train", "keep_best"), "got true with max_steps 0: there is one state; set it to false"
        )
    for chosen in (SCHEDULERS[train.scheduler], OPTIMIZERS[train.optimizer]):
        if wrong := chosen.problem(train):
            yield Problem(("train", wrong[0]), wrong[1])
    for i, tracker in enumerate(train.trackers):
        package = "tensorboard" if tracker == "tensorboard" else tracker
        if importlib.util.find_spec(package) is None:
            yield Problem(
                ("train", "trackers", i),
                f"got {tracker!r}, which is not installed; run pip install {package}, or remove it",
            )


def _short_masters(train: TrainSection, master: str) -> Problems:
    """A D that is held in less than fp32, and what only steps on fp32."""
    if problem := unheld(train.optimizer, master):
        yield Problem(("train", "optimizer"), f"got {train.optimizer!r}{problem}")
    if train.mixed_precision == "fp16":
        yield Problem(
            ("train", "mixed_precision"),
            f"got 'fp16', whose loss scaler is for fp32, and adapter.master is {master}; set bf16 or no, or "
            "adapter.master: fp32",
        )
    if train.reconstruct is not None:
        yield Problem(
            ("train", "reconstruct"),
            f"got a fit, whose optimizer steps on fp32 alone, and adapter.master is {master}; set "
            "reconstruct: null, or adapter.master: fp32",
        )
    if master == "none" and train.betas[0] == 0:
        yield Problem(
            ("train", "betas"),
            "got a first of 0 with adapter.master none, which puts what rounding throws away into that "
            "average; set it to 0.9, or adapter.master: bf16",
        )


def _too_short_for_rows(steps: int, adapter: Any) -> Problems:
    """Rows that are to be chosen anew while it trains, and no step before which that is done."""
    if steps < 2:
        yield Problem(
            ("train", "max_steps"),
            f"got {steps}, but adapter {adapter.method} chooses its rows anew between steps of training; set "
            "max_steps: 2 or more, or adapter.refresh_steps: null and importance: weight",
        )
    elif (every := getattr(adapter, "refresh_steps", None)) is not None and every >= steps:
        yield Problem(
            ("adapter", "refresh_steps"),
            f"got {every} with train.max_steps {steps}: the rows would never be chosen anew; set it below "
            f"{steps}, or to null",
        )


def _ternary(r: Any, adapter: Any) -> Problems:
    """Numbers of -1, 0 and 1 and the optimizer that keeps them there go together, and with nothing else."""
    name, chosen = r.train.optimizer, OPTIMIZERS[r.train.optimizer]
    if adapter.ternary and not chosen.ternary:
        fit = listed([key for key, one in OPTIMIZERS.items() if one.ternary])
        yield Problem(
            ("train", "optimizer"),
            f"got {name!r}, which would leave the numbers of adapter {adapter.method}: they are -1, 0 and 1; "
            f"set optimizer: {fit}",
        )
    if chosen.ternary and not adapter.ternary:
        yield Problem(
            ("train", "optimizer"),
            f"got {name!r}, which steps between -1, 0 and 1: adapter {adapter.method} has numbers of any "
            "size; set optimizer: adamw, or adapter.method: lota",
        )
    inputs = r.quant.activations if hasattr(r, "quant") else None
    if chosen.ternary and inputs is not None and inputs.learn:
        yield Problem(
            ("train", "optimizer"),
            f"got {name!r}, which has no steps for what quant.activations.learn trains; set learn: false",
        )


def check_offload(r: Any) -> Problems:
    """Room on the disk for the inputs of all layers, which train.offload: disk writes at every step."""
    shapes = shapes_here(r.model.path, r.model.revision) if r.train.offload == "disk" else None
    if shapes is None:
        return
    layers, width = (
        shapes.number("num_hidden_layers", "n_layer") or 0,
        shapes.number("hidden_size", "n_embd") or 0,
    )
    tokens, size = r.train.micro_batch_size * r.data.sequence_len, {"float32": 4}.get(r.model.dtype, 2)
    needed = layers * tokens * width * size
    folder = next((p for p in (r.output, *r.output.absolute().parents) if path_is(p, "dir")), None)
    free = shutil.disk_usage(folder).free if folder is not None else needed
    if free < needed:
        yield Problem(
            ("train", "offload"),
            f"got 'disk', which needs {needed / 1e9:.3g} GB ({layers} layers x {tokens} tokens x {width} x "
            f"{size} bytes), and "
            f"{str(folder)!r} has {free / 1e9:.3g} GB free; choose another `output`, or "
            "set train.offload: cpu",
        )
