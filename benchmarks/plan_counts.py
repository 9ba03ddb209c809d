"""The bytes of training steps, counted: on a CPU, on tensors without data, on a GPU (plan_error.py)."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.plan_shapes import SHAPES
from lowbit_ft.activations.place import hosts, place_activations
from lowbit_ft.adapters.attach import adapted_layers, attach
from lowbit_ft.data.batches import Batches
from lowbit_ft.data.examples import load_examples
from lowbit_ft.data.windows import Example, Examples
from lowbit_ft.model.attention import Segments, switch
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.heads import LOGITS_AT_A_TIME
from lowbit_ft.model.load import load_tokenizer
from lowbit_ft.plan.counting import Counter
from lowbit_ft.plan.fake import fake, quiet, rules_of, targets_without_data
from lowbit_ft.plan.model import _asked, _bytes, _dense, _pack, _stamp, _start_free
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.quantize.table import plan_layers
from lowbit_ft.recipe.recipe import Recipe
from lowbit_ft.train import loop as train_loop
from lowbit_ft.train import run as train_run
from lowbit_ft.train.loop import train
from lowbit_ft.train.losses import ChunkedHead, next_token_loss
from lowbit_ft.train.setup import activation_checkpointing


def parts_of(model: nn.Module) -> dict[str, int]:
    """Bytes of a model's tensors: packed base, dense, adapters."""
    sums = {"packed base": 0, "dense": 0, "adapters": 0}
    for part, size in _bytes(model, lambda _: "norms and other"):
        sums[
            "adapters" if part == "adapters" else "dense" if part == "norms and other" else "packed base"
        ] += size
    return sums


def counted(model: nn.Module, optimizer: Any, count: Counter) -> dict[str, int]:
    parts = parts_of(model)
    states = sum(
        t.numel() * t.element_size()
        for s in optimizer.state.values()
        for t in s.values()
        if isinstance(t, torch.Tensor)
    )
    own = sum(parts.values())
    step, evaluation = count.peaks["step"], count.peaks.get("evaluation", 0)
    return parts | {
        "optimizer": states,
        "step": step - states,
        "evaluation": max(0, evaluation - states),
        "total": own + step,
    }


def real_data(recipe: Recipe, shape: str) -> tuple[Batches, Batches, bool]:
    """(training batches, validation batches, whether rows share windows)."""
    size, length = recipe.train.micro_batch_size, recipe.data.sequence_len
    shape_keys = SHAPES[shape][0]
    if shape_keys is None:
        tokenizer = load_tokenizer(Checkpoint.open(recipe.model.path, dtype=recipe.model.dtype))
        rows = [
            load_examples(source, recipe.data, tokenizer)
            for source in (recipe.data.train, recipe.data.valid)
            if source is not None
        ]
        rows = [Examples(examples[i] for i in range(4 * size)) for examples in rows]
        return Batches(rows[0], size, 0, 0), Batches(rows[1], size, 0, 1), True
    generator, vocabulary = torch.Generator().manual_seed(0), shape_keys["vocab_size"]
    made = []
    for _ in range(2):
        ids = torch.randint(0, vocabulary, (4 * size, length), generator=generator).tolist()
        made.append(Examples([Example(row, row, [length // 2, length - length // 2]) for row in ids]))
    return Batches(made[0], size, 0, 0), Batches(made[1], size, 0, 1), True


def real_model(recipe: Recipe, shape: str, folder: Path, device: str) -> nn.Module:
    """The packed, adapted model, from random weights where the shape has none."""
    if SHAPES[shape][0] is not None and not list(folder.glob("*.safetensors")):
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), dtype=torch.bfloat16
        ).save_pretrained(folder)
    checkpoint = Checkpoint.open(recipe.model.path, dtype=recipe.model.dtype)
    model, _ = quantize(
        checkpoint,
        recipe.quant.model_copy(
            update={"calibrate": "greedy" if recipe.quant.grid == "binary" else "absmax"}
        ),
        device=device,
    )
    if (section := recipe.quant.activations) is not None:
        planned = {name: section.planned(name) for name, _ in hosts(model)}
        place_activations(model, {name: scheme for name, scheme in planned.items() if scheme is not None})
    attach(model, recipe.adapter)
    return model


def count_real(recipe: Recipe, shape: str, folder: Path) -> dict[str, int]:
    """Three steps and an evaluation of real training, counted."""
    model = real_model(recipe, shape, folder, "cpu")
    batches, valid, _ = real_data(recipe, shape)
    section = recipe.train.model_copy(
        update={"max_steps": 3, "eval_every": 2, "save_every": None, "keep_best": False, "trackers": []}
    )
    seen: dict[str, Any] = {}
    build, evaluate = train_run.build_optimizer, train_loop.evaluate
    with Counter() as count, tempfile.TemporaryDirectory() as run, count.phase("step"):

        def watched_build(*args: Any) -> Any:
            seen["optimizer"] = build(*args)
            return seen["optimizer"]

        def watched_evaluate(self: Any, log: Any, stop: Any) -> None:
            with count.phase("evaluation"):
                evaluate(self, log, stop)

        def first_batch(step: int) -> None:
            if step == 0:
                count.peaks.clear()  # the trial of the loss on a few tokens, before the first step

        train_run.build_optimizer, train_loop.evaluate = watched_build, watched_evaluate
        try:
            train(model, batches, valid, section, run, on_step=first_batch, console=Console(quiet=True))
        finally:
            train_run.build_optimizer, train_loop.evaluate = build, evaluate
        return counted(model, seen["optimizer"], count)


def count_fake(recipe: Recipe, masked: bool) -> dict[str, int]:
    """The same without data: every layer of the model, two steps."""
    folder = Path(recipe.model.path)
    import copy

    dense = _dense(str(folder), _stamp(folder), recipe.model.dtype, recipe.model.attention, None, recipe.task)
    targets, _ = plan_layers(dense, recipe.quant, folder)
    model, config = copy.deepcopy(dense), _start_free(recipe.adapter)
    _pack(
        model,
        [_asked(recipe, config, n, matrix, {}) for n, matrix in targets.items()],
        getattr(torch, recipe.model.dtype),
    )
    windows, length, train_section = recipe.train.micro_batch_size, recipe.data.sequence_len, recipe.train
    vocabulary = dense.config.vocab_size
    with FakeTensorMode(allow_non_fake_inputs=True), quiet():
        fake(model)
        switch(model.get_decoder())
        if train_section.gradient_checkpointing:
            activation_checkpointing(model, True)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
        plain = model.forward
        head = (
            ChunkedHead(model.model, plain, vocabulary)
            if windows * length > LOGITS_AT_A_TIME // vocabulary
            else None
        )

        def forward(_: nn.Module, labels: torch.Tensor, **inputs: Any) -> torch.Tensor:
            inputs["segments"] = Segments([[length // 2, length - length // 2]] * windows)
            if head is not None:
                return head.loss(head.base(**inputs, use_cache=False), targets_without_data(windows, length))
            return next_token_loss(plain(**inputs, use_cache=False).logits, labels)

        model.forward = MethodType(forward, model)

        def batch() -> dict[str, torch.Tensor]:
            return {
                name: torch.empty((windows, length), dtype=torch.int64)
                for name in ("input_ids", "position_ids", "labels")
            }

        with Counter(rules_of(0)) as count:
            for step in range(2):
                model.train()
                with count.phase("step"):
                    micro = [batch() for _ in range(train_section.gradient_accumulation_steps)]
                    for one in micro:
                        (model(**one) * 1.0).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    del micro, one
                if step == 1:
                    model.eval()
                    with torch.no_grad(), count.phase("evaluation"):
                        model(**batch())
            return counted(model, optimizer, count)


def count_cuda(recipe: Recipe, shape: str, folder: Path) -> dict[str, int]:
    """Real training on the GPU, by PyTorch's allocator."""
    model = real_model(recipe, shape, folder, "cuda")
    batches, valid, _ = real_data(recipe, shape)
    section = recipe.train.model_copy(
        update={"max_steps": 3, "eval_every": 2, "save_every": None, "keep_best": False, "trackers": []}
    )
    with tempfile.TemporaryDirectory() as run:
        train(
            model,
            batches,
            valid,
            section,
            run,
            on_step=lambda s: torch.cuda.reset_peak_memory_stats() if s == 0 else None,
            console=Console(quiet=True),
        )
    assert next(adapted_layers(model))[1].adapter is not None
    return parts_of(model) | {"total": torch.cuda.max_memory_allocated()}
