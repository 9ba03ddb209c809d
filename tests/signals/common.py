"""What the tests of signals share: a small packed student, teachers, and a short training of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit_ft.data.batches import Batches
from lowbit_ft.data.windows import Example, Examples
from lowbit_ft.grid import IntGrid
from lowbit_ft.model import heads
from lowbit_ft.model.heads import Answering
from lowbit_ft.recipe.sections.signal import SignalSection
from lowbit_ft.signals import SIGNALS, Ask, Lesson, OtherModel, Teacher, Whole
from lowbit_ft.signals.base import Answers, Walked
from lowbit_ft.signals.reference import StepReference
from lowbit_ft.signals.residual import Residual
from lowbit_ft.train.loop import TrainResult, train
from tests.packed_tools import adapted_llama, adapter_config
from tests.toy import quiet, section

CPU = torch.device("cpu")
GRID = IntGrid(bits=3, group_size=64, symmetric=False, residual_bits=4)
VOCABULARY = 32
STEPS = 4
ASKING = [name for name, signal in SIGNALS.items() if signal.asks]
PAIRS = [name for name, signal in SIGNALS.items() if signal.pairs]
# One setting of each signal that has every key of it at another value than its default.
OPTIONS: dict[str, dict[str, Any]] = {
    "labels": {},
    "logits": {"temperature": 2.0, "top_k": 5, "on": "all", "divergence": "symmetric"},
    "mix": {"temperature": 2.0, "label_weight": 0.3, "on": "all", "divergence": "reverse"},
    "layers": {
        "losses": {"logits": 0.5, "hidden": 0.2, "scores": 0.1, "outputs": 0.2},
        "intervention": {"mode": "gradual", "boundaries": [0.3, 0.6], "share": 0.7},
        "temperature": 2.0,
        "on": "all",
        "divergence": "symmetric",
    },
    "dpo": {"beta": 0.7, "loss_type": "robust", "label_smoothing": 0.2},
    "orpo": {"beta": 0.3},
}


def student(start: int = 0, **changes: Any) -> Any:
    """Random integers and residuals of a Llama of two layers, fresh lr_qat adapters on them."""
    wide: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4}
    wide |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY}
    return adapted_llama(adapter_config("lr_qat", rank=3), GRID, seed=1 + start, **(wide | changes))


@torch.no_grad()
def randomized(model: Any) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))


def options(kind: str, **changes: Any) -> SignalSection:
    return SignalSection(kind=kind, **changes)


def windows(n: int = 9, seed: int = 0) -> Examples:
    """Windows of two segments (to a signal of pairs: a chosen and a rejected answer) and of several lengths,
    so that batches have padding; a third is no target."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for number in range(n):
        size = 9 + number % 4
        ids = torch.randint(1, VOCABULARY, (size,), generator=generator).tolist()
        labels = [-100 if i in (0, 4) or i % 3 == 0 else t for i, t in enumerate(ids)]
        out.append(Example(ids, labels, [4, size - 4]))
    return Examples(out)


class Mirror(Teacher):
    """Answers what the student itself says: its logits, whole."""

    def __init__(self, model: Any = None) -> None:
        super().__init__({"teacher": "mirror"})
        self.answering: Answering | None = None
        self.student = model

    @contextmanager
    def begin(self, student: Answering) -> Iterator[None]:
        self.answering = student
        yield

    def walked(self) -> Walked:
        assert self.answering is not None and self.student is not None
        return Walked(self.student, self.answering, lambda ask: ask.inputs, lambda part: nullcontext())

    def answers(self, ask: Ask) -> Answers:
        assert self.answering is not None
        read = self.answering.read(ask.inputs)

        def answer(positions: torch.Tensor) -> Whole:
            with torch.no_grad():
                return Whole(read(positions))

        return answer


def teacher_of(name: str, model: Any, alike: bool = False) -> Teacher:
    """A teacher by name for this student. other: another random model; alike: of the same width."""
    if name == "residual":
        return Residual(model)
    narrow = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    other = student(start=7, **({} if alike else narrow))
    if alike:  # adapters at their start change nothing
        randomized(other)
    return OtherModel(other, {"teacher": "checkpoint", "model": "another"})


def lesson(kind: str, model: Any, teacher: str = "residual", **changes: Any) -> Lesson:
    signal = SIGNALS[kind]
    made = teacher_of(teacher, model, signal.of_layers) if signal.asks else None
    asked = StepReference(model) if signal.refers else made
    return Lesson(signal, options(kind, **changes), asked)


def go(
    run_dir: Path,
    model: Any,
    lesson: Lesson,
    rank: int = 0,
    world: int = 1,
    *,
    chunks: bool = True,
    resume: bool = False,
    on_step: Any = None,
    meta: dict[str, Any] | None = None,
    **changes: Any,
) -> TrainResult:
    """Four steps of two windows in all; chunks: the loss in chunks of five positions, of two with a
    teacher."""
    data = Batches(windows(), 1, 0, 0, rank, world, taught=True)
    valid = Batches(windows(3, seed=1), 1, 0, 0, rank, world, taught=lesson.signal.pairs)
    setting = {"max_steps": STEPS, "gradient_accumulation_steps": 2 // world, "eval_every": 2}
    setting |= {"max_grad_norm": 0.1, "warmup_ratio": 0.0}
    with pytest.MonkeyPatch.context() as patch:
        if chunks:
            patch.setattr(heads, "LOGITS_AT_A_TIME", VOCABULARY * 5)
            patch.setattr(heads, "SMALL_VOCABULARY", 0)
        return train(
            model,
            data,
            valid,
            section(**{k: v for k, v in (setting | changes).items() if v is not None}),
            run_dir,
            meta=meta,
            resume=resume,
            on_step=on_step,
            lesson=lesson,
            console=quiet(),
        )
