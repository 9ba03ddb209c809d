"""Steps to reach a metric at ternary weights: layer-wise distillation with and without an intervening
teacher.

    python -m benchmarks.intervention [--steps 120] [--seeds 0 1] [--only gradual none ...] [--rate 3e-3]

A BERT of four layers, 64 wide, learns in full precision to name the classes of two words that stand somewhere
in a row, one of 36 answers: attention has to find them. That is the teacher. The student is its ternary base
(`calibrate: ternary`, whole rows, inputs of 8 bits by token), trained by full_qat on `signal: layers`, with
each mode of intervention in the first half of the steps (or a quarter), and with none; `labels` learns from
the rows alone; `two runs` are a run with the teacher in all its steps and, from what it trained, one without
(train.start_from), each with rates and averages of its own. Accuracy on 512 held-out rows, without the
teacher, every 5 steps; `reaches` is the first step from which on it stays at or above 90 % of the teacher's.
The rows go to a file of this name in benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import attach
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.sections.quant import QuantSection
from lowbit_ft.recipe.sections.train import TrainSection
from lowbit_ft.signals import SIGNALS, Lesson, OtherModel
from lowbit_ft.signals.intervention import MODES
from lowbit_ft.tasks import TASKS
from lowbit_ft.train.loop import train

RESULTS = Path(__file__).with_name("results") / "intervention.json"
INTERVENTIONS = {mode: {"mode": mode, "share": 0.5} for mode in MODES}
INTERVENTIONS["gradual, a quarter"] = {"mode": "gradual", "share": 0.25}
TWO_RUNS = {"two runs": 0.5, "two runs, a quarter": 0.25}  # the share of the steps that the first has
CASES = ["labels", "none", *INTERVENTIONS, *TWO_RUNS]
CLASSES, WORDS, PLAIN, LENGTH = 6, 4, 24, 12  # words of each kind and class; words that say nothing
CLS, FIRST = 2, 10
VOCABULARY = FIRST + PLAIN + 2 * CLASSES * WORDS
BATCH, EVERY, HELD_OUT, ENOUGH = 32, 5, 512, 0.9


def rows(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Words that say nothing, and one of either kind; the label is the pair of their classes."""
    ids = torch.randint(FIRST, FIRST + PLAIN, (count, LENGTH), generator=generator)
    ids[:, 0] = CLS
    places = torch.rand(count, LENGTH - 1, generator=generator).argsort(1)[:, :2] + 1
    words = torch.randint(0, CLASSES * WORDS, (count, 2), generator=generator)
    kinds = FIRST + PLAIN + CLASSES * WORDS * torch.arange(2)
    ids.scatter_(1, places, words + kinds)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": (words // WORDS * torch.tensor([CLASSES, 1])).sum(1),
    }


class Stream:
    """Endless batches of a seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __next__(self) -> dict[str, Tensor]:
        return rows(BATCH, self.generator)

    def __len__(self) -> int:
        return 1 << 20

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("nothing is resumed here")


@torch.no_grad()
def accuracy(model: Any, held: dict[str, Tensor]) -> float:
    training = model.training
    model.eval()
    logits = model(input_ids=held["input_ids"], attention_mask=held["attention_mask"]).logits
    model.train(training)
    return float((logits.argmax(-1) == held["labels"]).float().mean())


def teacher(folder: Path, steps: int) -> Any:
    """Trained in full precision, saved, in eval mode."""
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    }
    config = BertConfig(**size, vocab_size=VOCABULARY, max_position_embeddings=32)
    config.num_labels = CLASSES**2
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model, stream = BertForSequenceClassification(config), Stream(1)
    for name, parameter in model.named_parameters():  # drawn for long training, they would hardly matter
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=1.0 if "word_embed" in name else 0.02 if "embed" in name else 0.15)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 50)
        loss = model(**next(stream)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return model.eval()


def student(folder: Path) -> Any:
    task = TASKS["sequence_classification"].model_validate(
        {"kind": "sequence_classification", "labels": [f"LABEL_{i}" for i in range(CLASSES**2)]}
    )
    quant = QuantSection.model_validate(
        {
            "bits": 2,
            "group_size": -1,
            "calibrate": "ternary",
            "activations": {"kind": "token", "bits": 8},
        }
    )
    checkpoint = Checkpoint.open(str(folder), None, "float32", purpose=task.purpose(0))
    model, _ = quantize(checkpoint, quant)
    torch.manual_seed(0)
    attach(model, ADAPTERS["full_qat"](method="full_qat"))
    return task, model


def runs_of(case: str, steps: int) -> list[tuple[int, dict[str, Any]]]:
    """(steps, train.signal) of each run of a case."""
    if case == "labels":
        return [(steps, {"kind": "labels"})]
    plain = {"kind": "layers"}
    if case in TWO_RUNS:
        first = round(TWO_RUNS[case] * steps)
        return [(first, {**plain, "intervention": {"mode": "gradual", "share": 1}}), (steps - first, plain)]
    return [(steps, {**plain, "intervention": INTERVENTIONS[case]} if case in INTERVENTIONS else plain)]


def one_run(
    model: Any,
    task: Any,
    dense: Any,
    stream: Stream,
    steps: int,
    signal: dict[str, Any],
    rate: float,
    seed: int,
    look: Callable[[int], None],
) -> None:
    section = TrainSection.model_validate(
        {
            "max_steps": steps,
            "micro_batch_size": BATCH,
            "gradient_accumulation_steps": 1,
            "learning_rate": rate,
            "scheduler": "linear",
            "warmup_ratio": 0.1,
            "seed": seed,
            "signal": signal,
        }
    )
    chosen = SIGNALS[signal["kind"]]
    asked = OtherModel(dense, {"teacher": "dense"}) if chosen.asks else None
    with tempfile.TemporaryDirectory() as run:
        train(
            model,
            stream,
            None,
            section,
            run,
            on_step=look,
            lesson=Lesson(chosen, section.signal, asked),
            goal=task.goal,
            console=Console(quiet=True),
        )


def measure(case: str, seed: int, dense: Any, folder: Path, given: Any, held: Any) -> dict[str, Any]:
    task, model = student(folder)
    curve: list[float] = []
    done, stream = 0, Stream(100 + seed)

    def look(step: int) -> None:
        if (done + step) % EVERY == 0:
            curve.append(accuracy(model, held))

    began = time.process_time()
    for steps, signal in runs_of(case, given.steps):
        one_run(model, task, dense, stream, steps, signal, given.rate, seed, look)
        done += steps
    seconds = time.process_time() - began
    curve.append(accuracy(model, held))
    wanted = ENOUGH * accuracy(dense, held)
    below = [i for i, value in enumerate(curve) if value < wanted]
    first = 0 if not below else below[-1] + 1
    reaches = first * EVERY if first < len(curve) else None
    return {
        "case": case,
        "seed": seed,
        "steps": given.steps,
        "rate": given.rate,
        "teacher": accuracy(dense, held),
        "rounded": curve[0],
        "trained": curve[-1],
        "reaches": reaches,
        "curve": [round(value, 4) for value in curve],
        "cpu_s": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--teacher-steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--only", nargs="*", choices=CASES, default=CASES)
    given = parser.parse_args()
    held = rows(HELD_OUT, torch.Generator().manual_seed(7))
    with tempfile.TemporaryDirectory() as place:
        dense = teacher(Path(place), given.teacher_steps)
        for seed in given.seeds:
            for case in given.only:
                row = measure(case, seed, dense, Path(place), given, held)
                before = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
                key = ("case", "seed", "steps", "rate")
                kept = [r for r in before if [r[k] for k in key] != [row[k] for k in key]]
                RESULTS.write_text(json.dumps([*kept, row], indent=1) + "\n")
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
