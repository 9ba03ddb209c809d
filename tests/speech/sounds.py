"""Sounds of syllables: a buzz through two formants, so that what is said has a spectrum of its own."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from lowbit_ft.speech.wav import write_wav

RATE = 8000
VOWELS = {"a": (800, 1200), "e": (500, 1900), "i": (300, 2300), "o": (450, 900), "u": (320, 700)}


def spoken(text: str, pitch: float = 120.0) -> Tensor:
    """A vowel lasts 0.16 s (a code of the tests' codec), any other letter is as long a silence."""
    time = torch.arange(1280) / RATE
    found = []
    for letter in text:
        sound = torch.zeros(1280)
        for number in range(1, int(RATE / 2 / pitch)) if letter in VOWELS else ():
            loud = sum(math.exp(-(((number * pitch - formant) / 150) ** 2)) for formant in VOWELS[letter])
            sound += loud * torch.sin(2 * math.pi * number * pitch * time)
        found.append(sound * torch.sin(math.pi * time / time[-1]).clamp_min(0) ** 0.5)
    whole = torch.cat(found)
    return 0.6 * whole / whole.abs().max().clamp_min(1e-6)


def write_rows(folder: Path, texts: list[str], name: str = "rows.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, text in enumerate(texts):
        write_wav(folder / f"{number}.wav", spoken(text, 100 + 10 * number), RATE)
        rows.append({"audio": f"{number}.wav", "text": text})
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name
