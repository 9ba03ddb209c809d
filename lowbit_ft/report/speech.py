"""The speech of the report page: spectrograms of a sentence, as it was spoken and as each stage makes it."""

from __future__ import annotations

from typing import Any, TypeGuard

from .files import STAGES, NotShown, RunFiles
from .html import image, is_number, note, plain

FILE = "speech.json"
FROM_THE_RUN = ("spoken", "base", "quantized", "trained")  # what ships makes the same as what was trained
MOST = 1 << 20  # numbers of a picture


def speech_section(run: RunFiles) -> str:
    """One picture, a spectrogram below the other. NotShown where there is none that can be drawn."""
    from . import plots as report_plots  # slow: matplotlib, and only pictures need it

    facts = run.json(FILE, "No speech was made", dict)
    rows = facts.get("rows")
    found: dict[str, list[list[float]]] = {}
    for row in rows if isinstance(rows, list) else []:
        stage, mel = (row.get("stage"), row.get("mel")) if isinstance(row, dict) else (None, None)
        if stage in FROM_THE_RUN and mel is not None and _is_picture(mel):
            found[stage] = mel
    seconds = facts.get("seconds_per_frame")
    if not found or not is_number(seconds) or not seconds > 0:
        raise NotShown(f"No speech was made ({FILE} has no spectrogram).")
    named = {STAGES.get(stage, stage): mel for stage, mel in found.items()}
    picture = report_plots.spectrograms(named, float(seconds))
    return image(picture, "log-mel spectrograms of one sentence") + note(
        f"{plain(facts.get('text'))}: as it was spoken, and as each stage makes it of its codes and the text "
        "(log-mel, low tones below)."
    )


def _is_picture(mel: Any) -> TypeGuard[list[list[float]]]:
    """Frames of equally many numbers."""
    if not isinstance(mel, list) or not mel or not all(isinstance(frame, list) for frame in mel):
        return False
    width = len(mel[0])
    return (
        0 < width * len(mel) <= MOST
        and all(len(frame) == width for frame in mel)
        and all(is_number(value) for frame in mel for value in frame)
    )
