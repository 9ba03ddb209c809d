"""Validation while training, saving, and the evaluation of a stage take less memory than the training step,
counted by storage.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from benchmarks.loss_memory import Counted
from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import attach
from lowbit_ft.data.batches import Batches
from lowbit_ft.data.windows import Example, Examples
from lowbit_ft.evaluate.perplexity import evaluate
from lowbit_ft.grid import IntGrid
from lowbit_ft.model import heads
from lowbit_ft.model.linear import PackedLinear
from lowbit_ft.signals import tokens as token_sums
from lowbit_ft.train import loop, losses
from lowbit_ft.train.loop import train
from lowbit_ft.train.run import Run
from tests.packed_tools import random_weights
from tests.toy import quiet, section

LENGTH, VOCABULARY, WIDTH = 96, 2048, 64


def model_of() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    model = transformers.LlamaForCausalLM(config)
    for name, weight in random_weights(model, IntGrid(bits=4, group_size=32)).items():
        model.set_submodule(name, PackedLinear(weight))
    attach(model, ADAPTERS["lr_qat"](rank=4))  # pyright: ignore[reportCallIssue]
    return model


def windows(count: int) -> Examples:
    g = torch.Generator().manual_seed(count)
    rows = [torch.randint(0, VOCABULARY, (LENGTH,), generator=g).tolist() for _ in range(count)]
    return Examples(
        [
            Example(row, [-100, *row[1:-3], -100, -100, -100], [LENGTH // 3, LENGTH - LENGTH // 3])
            for row in rows
        ]
    )


@pytest.mark.parametrize("whole", [False, True])
def test_measuring_and_saving_do_not_raise_the_peak(
    whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "LOGITS_AT_A_TIME", VOCABULARY * 16)
    monkeypatch.setattr(token_sums, "FLOATS_AT_A_TIME", VOCABULARY * 2)
    peaks: dict[str, list[int]] = {"step": []}
    model = model_of()
    with Counted([*model.parameters(), *model.buffers()]) as counted:

        def noted(owner: Any, name: str) -> None:
            plain = getattr(owner, name)

            def run(self: Run, *args: Any) -> None:
                peaks["step"].append(counted.peak)
                counted.peak = 0
                plain(self, *args)
                peaks.setdefault(name, []).append(counted.peak)
                counted.peak = 0

            monkeypatch.setattr(owner, name, run)

        noted(loop, "evaluate")
        noted(Run, "save")
        setting = section(
            max_steps=2,
            gradient_checkpointing=True,
            eval_every=1,
            save_every=1,
            gradient_accumulation_steps=1,
        )
        train(model, Batches(windows(4), 2, 0), Batches(windows(3), 2, 0), setting, tmp_path, console=quiet())
    assert len(peaks["evaluate"]) == len(peaks["save"]) == 2
    step = min(peaks["step"][::2])  # before each evaluation; the others are between it and a save
    assert max(peaks["evaluate"]) < step and max(peaks["save"]) < step, peaks
    if whole:  # as it would be with logits of all targets: this comparison can fail
        monkeypatch.setattr(losses, "find_head", lambda *_: (None, "a test"))
    with Counted([*model.parameters(), *model.buffers()]) as counted:
        row = evaluate(model, list(Batches(windows(3), 2, 0).one_epoch()), "trained")
    assert row.tokens == 3 * (LENGTH - 4) and (counted.peak < step) is not whole, (counted.peak, peaks)
