"""What a run says of itself: passes over the windows, a table that got worse, one answer."""

from types import SimpleNamespace
from typing import Any

from lowbit_ft.evaluate.perplexity import EvalRow
from lowbit_ft.stages.evaluate import Measured, first_sample, worse
from lowbit_ft.stages.train import passes


def rows(before: float, after: float, kl: tuple[float | None, float | None]) -> list[EvalRow]:
    losses = {"base": (1.0, 0.0), "quantized": (before, kl[0]), "trained": (after, kl[1])}
    return [EvalRow(stage, loss, None, far, 9) for stage, (loss, far) in losses.items()]


def test_passes_are_counted_where_the_windows_are() -> None:
    section: Any = SimpleNamespace(micro_batch_size=4, gradient_accumulation_steps=2)
    assert passes(section, range(4), 30, "rows") == "train: 30 steps of 8, 60 passes over 4 rows"
    assert passes(section, iter(range(4)), 30, "rows") is None, "a stream has no length"


def test_a_worse_table_is_said_unless_a_teacher_got_nearer() -> None:
    said = worse(rows(4.0, 5.0, (0.1, 0.4)))
    assert said is not None and "loss 4.0000 before, 5.0000 after" in said
    assert worse(rows(4.0, 5.0, (None, None))) is not None
    assert worse(rows(4.0, 4.01, (0.4, 0.1))) is None and worse(rows(4.0, 3.0, (0.1, 0.4))) is None
    assert worse(rows(4.0, 5.0, (0.1, 0.4))[:2]) is None


def test_one_answer_is_shown_on_three_short_lines() -> None:
    assert first_sample(Measured()) is None
    shown = first_sample(Measured(samples=[{"prompt": "a\n b", "before": "x" * 999, "after": "y"}]))
    assert shown is not None and shown.splitlines()[0::2] == ["  prompt: a b", "   after: y"]
    assert shown.splitlines()[1] == f"  before: {'x' * 157}..."
