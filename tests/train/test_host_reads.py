"""The host reads the device once per optimizer step, however many micro-batches it has: counted on a CPU,
refused on a GPU.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit_ft.adapters.attach import begin_step
from lowbit_ft.data.batches import Batches
from lowbit_ft.data.windows import Example, Examples
from lowbit_ft.grid import BinaryGrid, IntGrid
from lowbit_ft.model import heads
from lowbit_ft.train.loop import train
from tests.host_reads import HostReads
from tests.packed_tools import adapted_llama, adapter_config
from tests.toy import examples, quiet, section

# Where a batch is read before it moves: both functions refuse tensors that are not on the CPU.
BATCH_ON_THE_CPU = ("attention.py:segment_lengths", "attention.py:<listcomp>", "losses.py:__init__")
CHEAP = {"low_rank_gradient": "corrected", "scale_grad_tokens": 0.3}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "lr_qat": ("lr_qat", {}, {}),
    "dl_qat, recomputed, offloaded": ("dl_qat", {}, {"gradient_checkpointing": True, "offload": "cpu"}),
    "l4q, kept codes, bf16": (
        "l4q",
        {},
        {"keep_codes": True, "mixed_precision": "bf16", "gradient_accumulation_steps": 3},
    ),
    "lr_qat, cheaper gradients": ("lr_qat", CHEAP, {"gradient_checkpointing": True}),
    "l4q, cheaper gradients": ("l4q", CHEAP, {}),
    "scale, drawn tokens": ("scale", {"scale_grad_tokens": 0.3}, {}),
    "alpha_tuning": ("alpha_tuning", {}, {}),
    "lora, no log": ("lora", {}, {"log_every": 100, "gradient_accumulation_steps": 1}),
}


def llama(method: str, options: dict[str, Any], device: str = "cpu") -> Any:
    grid = (
        BinaryGrid(bits=2, group_size=32)
        if method == "alpha_tuning"
        else IntGrid(bits=3, group_size=32, residual_bits=4)
    )
    return adapted_llama(adapter_config(method, rank=3, **options), grid, vocab_size=600).to(device)


def packed() -> Examples:
    """Windows of several segments, whose lengths attention needs."""
    return Examples(
        [
            Example([*e.input_ids, *e.input_ids], [*e.labels, *e.labels], [len(e.input_ids)] * 2)
            for e in examples(9)
        ]
    )


# Every case with segments; without them one adapter of each way to step.
@pytest.mark.parametrize(
    ("case", "rows"),
    [(case, "packed") for case in CASES] + [(case, "plain") for case in ("lr_qat", "l4q, cheaper gradients")],
)
def test_one_read_per_step_and_none_per_micro_batch(
    case: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(heads, "LOGITS_AT_A_TIME", 600 * 7)  # in chunks, as a real vocabulary has it
    method, options, changes = CASES[case]
    model, reads, marks = llama(method, options), HostReads(), []

    def on_step(step: int) -> None:
        marks.append(len(reads.seen))
        begin_step(model, step)

    data = Batches(packed() if rows == "packed" else examples(9), 2, 0, 0)
    setting = {"max_steps": 3, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1} | changes
    setting.pop("offload", None)  # without a GPU it copies by .cpu(), with one it does not
    with reads:
        result = train(model, data, None, section(**setting), tmp_path, on_step=on_step, console=quiet())
    assert result.steps == len(marks) == 3 and result.bad_steps == 0
    for first, last in zip(marks, marks[1:], strict=False):
        seen = [(what, where) for what, where in reads.seen[first:last] if where not in BATCH_ON_THE_CPU]
        assert Counter(seen) == {("tolist", "run.py:read"): 1}


def test_the_count_would_notice():
    with HostReads() as reads:
        t = torch.arange(3.0)
        float(t.sum()), bool(t.any()), t.tolist(), t.nonzero(), t.cpu(), t[t > 1]
    want = {
        "_local_scalar_dense.default": 2,
        "tolist": 1,
        "nonzero.default": 1,
        "cpu": 1,
        "mask as an index": 1,
    }
    assert Counter(what for what, _ in reads.seen) == want


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: a CPU never waits for itself")
@pytest.mark.parametrize("case", CASES)
def test_no_wait_around_the_micro_batches_on_a_gpu(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """CUDA's own check: any synchronization between the first forward and the one read is an error."""
    from lowbit_ft.train.run import Run

    method, options, changes = CASES[case]
    loss, read = Run.loss, Run.read

    def watched(self: Run, batch: Any, model: Any = None) -> Any:
        if self.now.step:  # the first step may build kernels and handles
            torch.cuda.set_sync_debug_mode("error")
        return loss(self, batch, model)

    def reading(self: Run, *args: Any) -> Any:
        torch.cuda.set_sync_debug_mode("default")
        return read(self, *args)

    monkeypatch.setattr(Run, "loss", watched)
    monkeypatch.setattr(Run, "read", reading)
    model = llama(method, options, "cuda")
    try:
        result = train(
            model,
            Batches(packed(), 2, 0, 0),
            None,
            section(**({"max_steps": 3} | changes)),
            tmp_path,
            on_step=lambda step: begin_step(model, step),
            console=quiet(),
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.steps == 3
