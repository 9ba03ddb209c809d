"""The loop: it learns, it resumes bit-equal from anywhere, it survives NaN, and two processes train as
one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from rich.console import Console
from safetensors.torch import load_file

import lowbit_ft.train.losses
from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import adapted_layers, attach, begin_step
from lowbit_ft.data.batches import Batches
from lowbit_ft.data.windows import Example, Examples
from lowbit_ft.grid import IntGrid
from lowbit_ft.grid.calibrate import CALIBRATORS, Stats
from lowbit_ft.model.linear import PackedLinear
from lowbit_ft.train.loop import TrainResult, train
from lowbit_ft.train.losses import count_targets, next_token_loss
from lowbit_ft.train.setup import TrainError, make_accelerator, total_steps
from tests.toy import VOCABULARY, Toy, batches, equal, quiet, section, state

ROOT = Path(__file__).parents[2]


def go(
    run_dir: Path, model: Any = None, data: Any = None, valid: Any = None, **changes: Any
) -> tuple[Any, TrainResult]:
    """Train a toy; keyword arguments of train() are taken out of the changes to the section."""
    names = ("meta", "resume", "on_step", "choose_after", "console", "accelerator")
    options = {name: changes.pop(name) for name in names if name in changes}
    model = model if model is not None else Toy()
    data = data if data is not None else batches()
    result = train(model, data, valid, section(**changes), run_dir, **({"console": quiet()} | options))
    return model, result


def lines(run_dir: Path, key: str = "loss") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if key in row]


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in lines(run_dir)]


def digest(run_dir: Path, step: int) -> str:
    file = run_dir / "checkpoints" / f"step-{step:08d}" / "adapter.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()


# ---------------------------------------------------------------- the step itself


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
        monkeypatch.setattr(lowbit_ft.train.losses, "LOGITS_AT_A_TIME", logits)
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


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", ["adamw", "paged_adamw8bit", "lion32bit", "ademamix8bit"])
def test_optimizers_resume_bit_equal(name: str, tmp_path: Path) -> None:
    straight, _ = go(tmp_path / "a", optimizer=name, max_steps=4)
    go(tmp_path / "b", optimizer=name, max_steps=4, on_step=stop_at(2))
    resumed, result = go(tmp_path / "b", Toy(start=9), optimizer=name, max_steps=4, resume=True)
    assert result.steps == 4 and equal(state(straight), state(resumed))


# ---------------------------------------------------------------- nothing is lost


def stop_at(step: int, number: int = signal.SIGTERM) -> Any:
    def on_step(now: int) -> None:
        if now == step:
            os.kill(os.getpid(), number)

    return on_step


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at", [0, 3, 7])
def test_signal_finishes_the_step_saves_and_resumes_bit_equal(at: int, number: int, tmp_path: Path) -> None:
    setting: dict[str, Any] = {"eval_every": 3, "valid": batches(seed=1)}
    handler = signal.getsignal(number)
    straight, _ = go(tmp_path / "a", Toy(dropout=0.3), **setting)
    _, result = go(tmp_path / "b", Toy(dropout=0.3), on_step=stop_at(at, number), **setting)
    assert result.stopped and result.steps == at + 1 and signal.getsignal(number) is handler
    resumed, result = go(tmp_path / "b", Toy(start=9, dropout=0.3), resume=True, **setting)
    assert result.steps == 8 and not result.stopped
    assert equal(state(straight), state(resumed)) and digest(tmp_path / "a", 8) == digest(tmp_path / "b", 8)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert lines(tmp_path / "a", "valid_loss") == lines(tmp_path / "b", "valid_loss")


def test_second_interrupt_does_not_wait(tmp_path: Path) -> None:
    def twice(_: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)  # SIG_IGN where the tests run in the background of a shell
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, on_step=twice)
    assert signal.getsignal(signal.SIGINT) is before


def test_signal_during_evaluation_leaves_it_to_the_resumed_run(tmp_path: Path) -> None:
    class Slow:
        def one_epoch(self) -> Any:
            for batch in batches(seed=1).one_epoch():
                os.kill(os.getpid(), signal.SIGTERM)
                yield batch

    _, result = go(tmp_path, valid=Slow(), eval_every=2, keep_best=True)
    assert result.stopped and result.steps == 2 and not lines(tmp_path, "valid_loss")
    _, result = go(tmp_path, valid=batches(seed=1), eval_every=2, keep_best=True, resume=True)
    assert [row["step"] for row in lines(tmp_path, "valid_loss")] == [2, 4, 6, 8]


class Crash(Exception):
    pass


@pytest.mark.parametrize("at", [2, 5, 6])
def test_crash_resumes_from_the_last_checkpoint_bit_equal(at: int, tmp_path: Path) -> None:
    def crash(now: int) -> None:
        if now == at:
            raise Crash

    straight, _ = go(tmp_path / "a", Toy(dropout=0.3), save_every=2)
    with pytest.raises(Crash):
        go(tmp_path / "b", Toy(dropout=0.3), save_every=2, on_step=crash)
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # half a line, as a kill leaves it
    (tmp_path / "b" / "checkpoints" / ".step-00000008.partial").mkdir()
    resumed, _ = go(tmp_path / "b", Toy(start=9, dropout=0.3), save_every=2, resume=True)
    assert equal(state(straight), state(resumed)) and losses(tmp_path / "a") == losses(tmp_path / "b")
    assert [row["step"] for row in lines(tmp_path / "b")] == list(range(1, 9))
    assert not list((tmp_path / "b" / "checkpoints").glob(".*"))


def test_damaged_checkpoint_is_skipped(tmp_path: Path) -> None:
    straight, _ = go(tmp_path / "a", save_every=2)
    go(tmp_path / "b", save_every=2)
    file = tmp_path / "b" / "checkpoints" / "step-00000008" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"step-00000008/optimizer\.safetensors: expected \d+ bytes"):
        resumed, _ = go(tmp_path / "b", Toy(start=9), save_every=2, resume=True)
    assert equal(state(straight), state(resumed)) and digest(tmp_path / "a", 8) == digest(tmp_path / "b", 8)


def test_resume_of_a_finished_run_and_of_nothing(tmp_path: Path) -> None:
    model, first = go(tmp_path, valid=batches(seed=1), resume=True)  # nothing there yet: begins
    again, second = go(tmp_path, Toy(start=9), valid=batches(seed=1), resume=True)
    assert equal(state(model), state(again)) and len(losses(tmp_path)) == 8
    assert (first.steps, first.final_loss, first.valid_loss) == (
        second.steps,
        second.final_loss,
        second.valid_loss,
    )


def test_real_sigkill_resumes_to_the_same_file(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__)), "killed", str(tmp_path / "b")]
    process = subprocess.Popen(command, env=environment())
    metrics = tmp_path / "b" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not metrics.exists() or metrics.read_text().count("\n") < 15):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert len(losses(tmp_path / "b")) < 150
    killed(tmp_path / "b", resume=True)
    killed(tmp_path / "a", resume=False)
    assert digest(tmp_path / "a", 150) == digest(tmp_path / "b", 150)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def killed(run_dir: Path, resume: bool) -> None:
    def slow(_: int) -> None:
        if not resume and __name__ == "__main__":
            time.sleep(0.005)

    go(run_dir, Toy(dropout=0.3), max_steps=150, save_every=10, resume=resume, on_step=slow)


# ---------------------------------------------------------------- refusals


def test_a_run_is_not_written_over(tmp_path: Path) -> None:
    go(tmp_path, max_steps=1)
    before = digest(tmp_path, 1)
    with pytest.raises(
        TrainError, match=r"has checkpoints of an earlier run \(up to step 1\).*resume it, or choose"
    ):
        go(tmp_path, max_steps=1)
    assert digest(tmp_path, 1) == before and len(losses(tmp_path)) == 1


def test_resume_with_another_base_optimizer_or_adapter_is_refused(tmp_path: Path) -> None:
    go(tmp_path, max_steps=1, meta={"base": "abc"})
    with pytest.raises(TrainError, match="base was 'abc' and is 'xyz'"):
        go(tmp_path, max_steps=2, meta={"base": "xyz"}, resume=True)
    with pytest.raises(TrainError, match="optimizer was 'adamw' and is 'lion'"):
        go(tmp_path, max_steps=2, meta={"base": "abc"}, optimizer="lion", resume=True)
    other = Toy()
    other.A = torch.nn.Parameter(torch.zeros(5, 12))
    with pytest.raises(
        TrainError, match=r"trains other tensors \(1 differ, such as 'A': \(4, 12\) there, \(5, 12\) here"
    ):
        go(tmp_path, other, max_steps=2, meta={"base": "abc"}, resume=True)


def test_keep_best_needs_validation_and_something_must_train(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="keep_best needs validation data"):
        go(tmp_path, keep_best=True)
    with pytest.raises(ValueError, match="nothing to train"):
        go(tmp_path, Toy().requires_grad_(False))
    assert not (tmp_path / "checkpoints").exists()


def test_validation_without_targets_is_refused(tmp_path: Path) -> None:
    blank = Batches(Examples([Example([1, 2, 3], [-100] * 3, [3])]), 1, 0)
    with pytest.raises(TrainError, match="validation data has no target tokens"):
        go(tmp_path, valid=blank)


def test_steps_without_targets_are_skipped(tmp_path: Path) -> None:
    blank = Batches(Examples([Example([1, 2, 3], [-100] * 3, [3])]), 1, 0)
    with pytest.raises(TrainError, match="5 steps in a row"):
        go(tmp_path, data=blank)
    assert "no target tokens" in lines(tmp_path, "skipped")[0]["skipped"]


def test_missing_tracker_is_named_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit_ft.train.loop.log.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="train.trackers: wandb cannot be imported; pip install wandb"):
        go(tmp_path, trackers=["wandb"])


# ---------------------------------------------------------------- bad steps


class Poisoned(Toy):
    """Gives NaN logits (or an infinite gradient) at the given forwards, two to a step."""

    def __init__(self, forwards: set[int], gradient: bool = False) -> None:
        super().__init__()
        self.forwards, self.gradient, self.calls = forwards, gradient, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        self.calls += self.training
        if self.calls in self.forwards and self.training:
            if self.gradient:
                out.logits.register_hook(lambda g: g * math.inf)
            else:
                out.logits = out.logits * math.nan
        return out


@pytest.mark.parametrize("gradient", [False, True])
def test_bad_step_is_skipped_and_counted(gradient: bool, tmp_path: Path) -> None:
    before: dict[int, Any] = {}
    model = Poisoned({5}, gradient)  # the first micro-batch of the third step
    _, result = go(tmp_path, model, on_step=lambda step: before.update({step: state(model)}))
    assert result.bad_steps == 1 and result.steps == 8
    assert equal(before[2], before[3]) and not equal(before[3], before[4])
    (row,) = lines(tmp_path, "skipped")
    assert row["step"] == 3 and ("gradient norm" if gradient else "loss is nan") in row["skipped"]
    assert [r["step"] for r in lines(tmp_path)] == [1, 2, 4, 5, 6, 7, 8]
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_bad_steps_in_a_row_stop_the_run_with_the_last_good_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(
        TrainError, match=r"3 steps in a row .*\(up to step 5\).*checkpoints/step-00000004\. Lower"
    ):
        go(tmp_path / "a", Poisoned(set(range(5, 99))), max_bad_steps=3, save_every=2)
    assert len(lines(tmp_path / "a", "skipped")) == 3
    with pytest.raises(TrainError, match=r"No checkpoint was written yet \(see train.save_every\)"):
        go(tmp_path / "b", Poisoned(set(range(1, 99))), max_bad_steps=3)
    good, _ = go(tmp_path / "c", max_bad_steps=3)  # a signal handler or a hook left behind would show here
    assert all(torch.isfinite(p).all() for p in good.parameters())


def test_loss_scaler_searches_its_scale_and_is_resumed(tmp_path: Path) -> None:
    """fp16 needs a GPU, its scaler does not: a scale that overflows is not counted as a bad run, and it is
    saved.
    """

    def scaled() -> Accelerator:
        accelerator = make_accelerator(section(), tmp_path, Toy())
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=3)
        return accelerator

    setting: dict[str, Any] = {"max_bad_steps": 1, "max_steps": 12}
    straight, result = go(tmp_path / "a", accelerator=scaled(), **setting)
    assert 0 < result.bad_steps < 8 and not equal(state(straight), state(Toy()))
    assert all("gradient norm" in row["skipped"] for row in lines(tmp_path / "a", "skipped"))
    go(tmp_path / "b", accelerator=scaled(), on_step=stop_at(6), **setting)
    resumed, _ = go(tmp_path / "b", Toy(start=9), accelerator=scaled(), resume=True, **setting)
    assert equal(state(straight), state(resumed)) and losses(tmp_path / "a") == losses(tmp_path / "b")
    with pytest.raises(TrainError, match="fp16 needs a GPU"):
        go(tmp_path / "c", mixed_precision="fp16")


# ---------------------------------------------------------------- best, trackers, terminal


def test_keep_best_ships_the_lowest_validation_loss(tmp_path: Path) -> None:
    """Random validation text is predicted worse and worse: the model must end with the weights of the best
    step.
    """
    rng = random.Random(0)
    ids = [[rng.randrange(VOCABULARY) for _ in range(9)] for _ in range(6)]
    valid = Batches(Examples([Example(row, row, [9]) for row in ids]), 2, 0)
    kept, result = go(
        tmp_path / "a",
        valid=valid,
        eval_every=1,
        keep_best=True,
        learning_rate=0.05,
        max_steps=12,
        keep_checkpoints=1,
        warmup_ratio=0,
        scheduler="constant",
    )
    table = {row["step"]: row["valid_loss"] for row in lines(tmp_path / "a", "valid_loss")}
    best = min(table, key=lambda step: table[step])
    assert best != 12, "this test needs a best step that is not the last"
    assert result.best_step == best and result.valid_loss == table[best]
    loss = targets = 0.0
    with torch.no_grad():
        for batch in valid.one_epoch():
            labels = batch.pop("labels")
            loss += float(next_token_loss(kept(**batch, use_cache=False).logits, labels))
            targets += count_targets(labels)
    assert loss / targets == table[best]
    names = sorted(p.name for p in (tmp_path / "a" / "checkpoints").iterdir())
    assert names == [f"step-{best:08d}", "step-00000012"]
    again, result = go(
        tmp_path / "a",
        Toy(start=9),
        valid=valid,
        eval_every=1,
        keep_best=True,
        learning_rate=0.05,
        max_steps=12,
        resume=True,
    )
    assert result.best_step == best and equal(state(kept), state(again))


# ---------------------------------------------------------------- a warm-up of another model (l4q)

WARMUP = 3


class Warming(torch.nn.Module):
    """The toy with one packed 2-bit layer and l4q on it: unrounded for WARMUP steps, then on the grid."""

    def __init__(self, start: int = 0, **options: Any) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.register_buffer("embedding", torch.randn(VOCABULARY, 32, generator=g))
        head = torch.randn(VOCABULARY, 32, generator=g) / 4
        self.head = PackedLinear(
            CALIBRATORS["minmax"].run(head, IntGrid(bits=2, group_size=32, symmetric=False), Stats())
        )
        torch.manual_seed(start)
        attach(self, ADAPTERS["l4q"](rank=4, warmup_steps=WARMUP, offset="float", **options))

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return transformers.utils.ModelOutput(logits=self.head(self.embedding[input_ids]))


def warm(run_dir: Path, model: Any, on_step: Any = None, **changes: Any) -> TrainResult:
    """Train it as the pipeline does; on_step(step) is called after begin_step."""

    def step_of(step: int) -> None:
        begin_step(model, step)
        if on_step is not None:
            on_step(step)

    setting = {"valid": batches(seed=1), "eval_every": 1, "choose_after": WARMUP, "scale_learning_rate": 0.01}
    return go(run_dir, model, on_step=step_of, **(setting | changes))[1]


def all_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Also those that do not train: without train_scale only the switch changes log_scale."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_warm_up_step_is_never_the_best(tmp_path: Path) -> None:
    model = Warming()

    def spoil(step: int) -> None:
        if step == 6:
            model.get_parameter("head.adapter.B").data[::2] += 3

    # steps so small that nothing makes up for the rounding
    result = warm(tmp_path, model, spoil, learning_rate=1e-5, scale_learning_rate=1e-5, keep_best=True)
    table = {row["step"]: row["valid_loss"] for row in lines(tmp_path, "valid_loss")}
    assert list(table) == list(range(1, 9))
    assert min(table, key=lambda s: table[s]) <= WARMUP, "this test needs an unrounded model that is better"
    best = min((s for s in table if s > WARMUP), key=lambda s: table[s])
    assert best < 8, "this test needs a best step that is not the last"
    assert result.best_step == best and result.valid_loss == table[best]
    (_, layer), *_ = adapted_layers(model)
    assert layer.adapter is not None and not layer.adapter.warming
    shipped = layer.adapter.merge(layer.base).dequantize()
    assert torch.equal(layer(torch.eye(32)), shipped.t())


@pytest.mark.parametrize("train_scale", [True, False])
@pytest.mark.parametrize("at", [WARMUP - 1, WARMUP, WARMUP + 1, 8])
def test_resume_around_the_end_of_a_warm_up(at: int, train_scale: bool, tmp_path: Path) -> None:
    """Stopped in the evaluation after `at` steps: the resumed run evaluates the same model, and the scale
    restarts once.
    """
    options = {"train_scale": train_scale}
    straight = Warming(**options)
    restarted: list[Any] = []
    warm(
        tmp_path / "a", straight, lambda s: restarted.append(all_tensors(straight)["head.adapter.log_scale"])
    )
    assert not restarted[WARMUP - 1].any() and restarted[WARMUP].any()
    passes = 0

    class StopsAt:
        def one_epoch(self) -> Any:
            nonlocal passes
            passes += 1
            for batch in batches(seed=1).one_epoch():
                if passes == at:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

    result = warm(tmp_path / "b", Warming(**options), valid=StopsAt())
    assert result.stopped and result.steps == at and len(lines(tmp_path / "b", "valid_loss")) == at - 1
    resumed = Warming(start=9, **options)
    assert warm(tmp_path / "b", resumed, resume=True).steps == 8
    assert lines(tmp_path / "a", "valid_loss") == lines(tmp_path / "b", "valid_loss")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert equal(all_tensors(straight), all_tensors(resumed))
    assert digest(tmp_path / "a", 8) == digest(tmp_path / "b", 8)


def test_a_run_no_longer_than_its_warm_up_is_refused(tmp_path: Path) -> None:
    said = (
        r"adapter\.warmup_steps: got 4, but the run has 4 steps.*lower it, or raise train.max_steps or "
        r"train.epochs"
    )
    with pytest.raises(TrainError, match=said):  # 7 micro-batches, 4 steps of 2
        go(tmp_path, epochs=1, choose_after=4)
    with pytest.raises(TrainError, match=said):
        go(tmp_path, max_steps=4, choose_after=4)
    assert not (tmp_path / "checkpoints").exists()
    assert go(tmp_path, max_steps=4, choose_after=3)[1].steps == 4


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


# ---------------------------------------------------------------- two processes


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(Path(__file__)), "ddp", str(tmp_path)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts == {"type": "MULTI_CPU", "processes": 2, "stopped_after": 4}
    one, _ = go(
        tmp_path / "one", valid=batches(seed=1), gradient_accumulation_steps=4, max_steps=8, eval_every=4
    )
    for run in ("two", "resumed"):
        assert losses(tmp_path / run) == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
        for a, b in zip(
            lines(tmp_path / run, "valid_loss"), lines(tmp_path / "one", "valid_loss"), strict=True
        ):
            assert a["step"] == b["step"] and a["valid_loss"] == pytest.approx(b["valid_loss"], abs=1e-4)
        tokens = [row["tokens"] for row in lines(tmp_path / run)]
        assert tokens == pytest.approx(
            [row["tokens"] for row in lines(tmp_path / "one")], rel=0.2
        )  # padding differs
    assert digest(tmp_path / "two", 8) == digest(
        tmp_path / "resumed", 8
    )  # stopped by a signal to one process only
    assert [p.name for p in (tmp_path / "two").iterdir()].count("metrics.jsonl") == 1
    # l4q's warm-up, where DDP gives the idle scales zeros: Adam must not count them
    warm(tmp_path / "warm-one", Warming(), gradient_accumulation_steps=4)
    for key in ("loss", "valid_loss"):
        found, wanted = ([row[key] for row in lines(tmp_path / f"warm-{n}", key)] for n in ("two", "one"))
        assert found == pytest.approx(wanted, abs=1e-4)
    files = {
        n: tmp_path / f"warm-{n}" / "checkpoints" / "step-00000008" / "optimizer.safetensors"
        for n in ("two", "one")
    }
    two, one = (load_file(files[n]) for n in ("two", "one"))
    counts = {name: int(value) for name, value in one.items() if name.endswith("/step")}
    assert counts == {name: int(value) for name, value in two.items() if name.endswith("/step")}
    assert counts["head.adapter.log_scale/step"] == counts["head.adapter.offset/step"] == 8 - WARMUP
    assert counts["head.adapter.B/step"] == 8


def ddp(folder: Path) -> None:
    """What each of the two processes runs."""
    rank = int(os.environ["RANK"])
    setting: dict[str, Any] = {"gradient_accumulation_steps": 2, "eval_every": 4}

    def data(seed: int = 0) -> Any:
        return batches(rank, 2, seed)

    model = Toy(start=0 if rank == 0 else 5)  # DDP hands out the weights of rank 0
    accelerator = make_accelerator(section(), folder, model)
    facts = {"type": accelerator.distributed_type.name, "processes": accelerator.num_processes}
    go(folder / "two", model, data(), data(1), accelerator=accelerator, **setting)
    on_step = stop_at(3) if rank == 1 else None
    _, result = go(folder / "resumed", Toy(), data(), data(1), on_step=on_step, **setting)
    _, _ = go(folder / "resumed", Toy(start=7), data(), data(1), resume=True, **setting)
    warm(folder / "warm-two", Warming(), data=data(), valid=data(1), gradient_accumulation_steps=2)
    if rank == 0:
        (folder / "facts.json").write_text(json.dumps(facts | {"stopped_after": result.steps}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    {"ddp": ddp, "killed": lambda folder: killed(folder, resume=False)}[sys.argv[1]](Path(sys.argv[2]))


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
