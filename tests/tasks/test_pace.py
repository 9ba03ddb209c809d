"""What a run counts to say how fast it is: tokens, images, or seconds of sound."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lowbit_ft.tasks import TASKS
from lowbit_ft.train.goal import TOKENS, Pace
from lowbit_ft.train.log import TrainLog

KEYS = {
    "image_classification": "images",
    "object_detection": "images",
    "image_generation": "images",
    "speech_tokens": "sound_seconds",
}
SOUND = {
    "kind": "speech_tokens",
    "frames": {
        "sample_rate": 16000,
        "n_fft": 512,
        "hop_length": 200,
        "num_mel_bins": 20,
        "mel_mean": 0.0,
        "mel_std": 1.0,
        "frames_per_code": 4,
    },
}


def paced(kind: str) -> Any:
    keys = SOUND if kind == "speech_tokens" else {"kind": kind}
    return TASKS[kind].model_validate(keys)


@pytest.mark.parametrize("kind", list(TASKS))
def test_every_task_says_what_it_counts(kind: str) -> None:
    """And its goal the same, which the loop asks."""
    task = paced(kind)
    assert task.pace.key == KEYS.get(kind, "tokens") == task.goal.pace.key
    ids = torch.zeros(3, 7, dtype=torch.int64)
    seen = torch.tensor([[True] * 8, [True] * 4 + [False] * 4])
    batch = {"pixel_values": torch.zeros(5, 3, 4, 4), "input_ids": ids, "frame_mask": seen}
    wanted = {"images": 5, "tokens": 21, "sound_seconds": 12}[task.pace.key]
    assert task.pace.count(batch) == wanted and isinstance(task.pace.count(batch), int)
    assert task.pace.planned(4, 16) == {"images": 4, "tokens": 64, "sound_seconds": None}[task.pace.key]


def test_frames_are_told_as_seconds() -> None:
    told = paced("speech_tokens").pace.told(800, 1600, 4.0)
    assert told == {"sound_seconds": pytest.approx(20), "sound_seconds_per_s": pytest.approx(2.5)}
    assert TOKENS.told(800, 1600, 4.0) == {"tokens": 1600, "tokens_per_s": 200}
    assert json.dumps(TOKENS.told(8, 16, 1.0)["tokens"]) == "16", "whole, as before"


def line(pace: Pace, speed: int, folder: Path) -> str:
    out = io.StringIO()
    with TrainLog(folder, 0, 0, 1, True, Console(file=out, width=200), pace) as log:
        log.show({"step": 1, "loss": 2.0, "memory_gb": 1.0, **pace.told(speed, speed, 1.0)})
    return out.getvalue()


def test_a_line_has_the_word_of_the_task(tmp_path: Path) -> None:
    assert "  7 tokens/s  " in line(TOKENS, 7, tmp_path)
    assert "  7.0 images/s  " in line(paced("object_detection").pace, 7, tmp_path)
    assert "  1,234 images/s  " in line(paced("image_classification").pace, 1234, tmp_path)
    assert "  1.0 s of sound/s  " in line(paced("speech_tokens").pace, 80, tmp_path)
