"""The loop: it learns, a step is the gradient of the global mean, and what it logs."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from rich.console import Console

from lowbit_ft.model import heads
from lowbit_ft.train.loop import TrainResult, train
from lowbit_ft.train.losses import count_targets, next_token_loss
from lowbit_ft.train.setup import TrainError, make_accelerator, total_steps
from tests.loop_tools import (
    go,
    lines,
    losses,
)
from tests.toy import Toy, batches, quiet, section, state


def test_it_learns_and_reports(tmp_path: Path) -> None:
    model, result = go(tmp_path, valid=batches(seed=1), max_steps=30, eval_every=10, scale_learning_rate=0.01)
    rows = lines(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert rows[-1]["loss"] < rows[0]["loss"] * 0.7
    keys = "step loss lr scale_lr grad_norm tokens tokens_per_s memory_gb seconds"
    assert set(rows[0]) == set(keys.split())
    assert rows[0]["scale_lr"] == pytest.approx(rows[0]["lr"] / 2)
    valid = lines(tmp_path, "valid_loss")
    assert [row["step"] for row in valid] == [10, 20, 30]
    assert valid[-1]["valid_loss"] < valid[0]["valid_loss"]
    assert result.steps == 30 and result.final_loss == rows[-1]["loss"] and not result.stopped
    assert result.valid_loss == valid[-1]["valid_loss"] and result.best_step is None and result.bad_steps == 0
    assert result.tokens == rows[-1]["tokens"] > 0 and result.seconds > 0 and result.peak_memory > 0
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert torch.equal(model.frozen, torch.ones(3))


def test_a_step_is_the_gradient_of_the_global_mean(tmp_path: Path) -> None:
    """One step against plain torch: token losses of all micro-batches over all their targets, clip, AdamW."""
    model, _ = go(tmp_path, max_steps=1, gradient_accumulation_steps=3, warmup_ratio=0, max_grad_norm=0.1)
    plain, data = Toy(), batches()
    micro = [next(data) for _ in range(3)]
    targets = sum(count_targets(b["labels"]) for b in micro)
    for batch in micro:
        labels = batch.pop("labels")
        (next_token_loss(plain(**batch, use_cache=False).logits, labels) / targets).backward()
    trained = [p for p in plain.parameters() if p.requires_grad]
    torch.nn.utils.clip_grad_norm_(trained, 0.1)
    torch.optim.AdamW(trained, lr=0.02, weight_decay=0.0).step()
    for name, value in state(model).items():
        torch.testing.assert_close(value, state(plain)[name], rtol=1e-6, atol=1e-7)


def test_accumulation_equals_a_larger_micro_batch(tmp_path: Path) -> None:
    a, _ = go(tmp_path / "a", data=batches(size=2, n=12), gradient_accumulation_steps=3)
    b, _ = go(tmp_path / "b", data=batches(size=6, n=12), gradient_accumulation_steps=1)
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), abs=1e-5)
    for name, value in state(a).items():
        torch.testing.assert_close(value, state(b)[name], rtol=1e-3, atol=1e-4)


def test_on_step_comes_first_with_the_zero_based_step(tmp_path: Path) -> None:
    seen: list[int] = []
    go(tmp_path / "a", on_step=seen.append, max_steps=3)
    assert seen == [0, 1, 2]
    go(tmp_path / "b", on_step=seen.append, max_steps=2, save_every=1)
    with pytest.warns(UserWarning, match="planned for 2 steps and now has 4"):
        go(tmp_path / "b", on_step=seen.append, max_steps=4, resume=True)
    assert seen[3:] == [
        0,
        1,
        1,
        2,
        3,
    ]  # a resume tells the last step done once more, before it reads the tensors


def test_epochs_become_steps() -> None:
    data = batches(n=13, size=2)  # 7 micro-batches
    assert total_steps(section(epochs=2, gradient_accumulation_steps=4), data) == 4
    assert total_steps(section(epochs=0.01, gradient_accumulation_steps=4), data) == 1
    assert total_steps(section(max_steps=5), data) == 5


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    curves = []
    for on in (False, True):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).requires_grad_(False)
        model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
        calls = 0

        def count(module: Any, _: Any) -> None:
            nonlocal calls
            calls += module.training  # not the few tokens that ask the model how it attends

        model.model.layers[0].mlp.register_forward_pre_hook(count)
        go(tmp_path / str(on), model, max_steps=3, gradient_checkpointing=on)
        assert calls == 6 * (1 + on)  # 3 steps x 2 micro-batches, each again in the backward
        assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        assert not model.model.embed_tokens._forward_hooks
        curves.append(losses(tmp_path / str(on)))
    assert curves[0] == pytest.approx(curves[1], abs=1e-6)


@pytest.mark.parametrize("mode", ["no", "bf16"])
def test_a_loss_in_chunks_trains_as_the_whole_does(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With recomputed layers, offload and accelerate's autocast around it; the validation loss is in chunks
    too.
    """
    config = transformers.LlamaConfig(
        vocab_size=600, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    options = {
        "max_steps": 3,
        "gradient_checkpointing": True,
        "offload": "cpu",
        "mixed_precision": mode,
        "eval_every": 2,
    }
    curves, rows = [], []
    for logits in (1 << 25, 600 * 7):
        monkeypatch.setattr(heads, "LOGITS_AT_A_TIME", logits)
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).requires_grad_(False)
        model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
        model.lm_head.weight.requires_grad_()
        seen: list[int] = []
        model.lm_head.register_forward_hook(
            lambda _m, _a, out, seen=seen: seen.append(out.shape[0] * out.shape[1])
        )
        folder = tmp_path / str(logits)
        go(folder, model, valid=batches(seed=1), **options)
        assert "forward" not in vars(model) and "forward" not in vars(model.model)
        rows.append(seen[4:])  # but for the trials, which are whole
        curves.append([row.get("loss", row.get("valid_loss")) for row in lines(folder, "step")])
    assert max(rows[0]) > 7 and max(rows[1]) == 7
    assert len(curves[0]) == 5 and curves[0] == pytest.approx(curves[1], rel=1e-5 if mode == "no" else 1e-3)
    assert curves[0][-2] < curves[0][0]


def test_mixed_precision_in_one_process_with_others(tmp_path: Path) -> None:
    """accelerate's singletons refuse another setting; several runs in one process must work all the same."""
    logits: list[torch.dtype] = []

    class Watched(Toy):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            logits.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
            return super().forward(*args, **kwargs)

    for i, mode in enumerate(("no", "bf16", "no")):
        model, result = go(tmp_path / str(i), Watched(), mixed_precision=mode, max_steps=2)
        assert result.steps == 2 and set(logits) == {torch.bfloat16 if mode == "bf16" else torch.float32}
        assert "forward" not in vars(model)  # the wrapper is gone
        logits.clear()
    assert losses(tmp_path / "0") == losses(tmp_path / "2") != losses(tmp_path / "1")


def test_an_accelerator_can_be_given(tmp_path: Path) -> None:
    accelerator = make_accelerator(section(), tmp_path, Toy())
    assert isinstance(accelerator, Accelerator) and accelerator.num_processes == 1
    _, result = go(tmp_path, accelerator=accelerator, max_steps=1)
    assert result.steps == 1


def test_missing_tracker_is_named_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit_ft.train.log.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="train.trackers: wandb cannot be imported; pip install wandb"):
        go(tmp_path, trackers=["wandb"])


def test_log_every_and_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    go(tmp_path, log_every=3, trackers=["tensorboard"], valid=batches(seed=1))
    assert [row["step"] for row in lines(tmp_path)] == [3, 6, 8]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "trackers" / "lowbit_ft"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [3, 6, 8]
    assert [e.step for e in events.Scalars("valid_loss")] == [8]


def test_plain_lines_and_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    go(tmp_path / "a", console=Console(width=120), valid=batches(seed=1), max_steps=40)
    out = capsys.readouterr().out
    assert "step 40/40  loss " in out and "tokens/s" in out and " GB" in out and "ETA 0:00:00" in out
    assert "validation loss" in out and out.count("\nstep ") < 25
    go(tmp_path / "b", console=Console(force_terminal=True, width=120), max_steps=3)
    assert "3/3" in capsys.readouterr().out


def test_outside_the_main_thread(tmp_path: Path) -> None:
    """Signals cannot be caught there; training works all the same."""
    results: list[TrainResult] = []
    thread = threading.Thread(target=lambda: results.append(go(tmp_path, max_steps=2)[1]))
    thread.start()
    thread.join()
    assert results[0].steps == 2


def test_layers_that_the_forward_goes_past_are_an_error(tmp_path: Path) -> None:
    class Past(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.ModuleDict({"adapter": torch.nn.Linear(3, 3)})

    with pytest.raises(
        TrainError,
        match=r"1 layers with adapters got no gradient \(unused, ...\).*quant.exclude: \['\*.unused'\]",
    ):
        train(Past(), batches(), None, section(), tmp_path, console=quiet())
