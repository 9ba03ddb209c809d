"""What a training run tells the world: metrics.jsonl, the terminal, and trackers.

metrics.jsonl is always written, one JSON object a line, flushed line by line: a step's numbers, a
validation loss ({"step", "valid_loss"}) or a skipped step ({"step", "skipped": why}). A resumed run first
cuts it back to the step of its checkpoint, so the file never has a step twice. On a terminal there is a
live bar, elsewhere (a log file, CI) a plain line now and then. Only the main process writes.
"""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ..files.atomic import write_text
from ..files.errors import writing
from .goal import TOKENS, Pace

_PLAIN_LINES = 20  # about so many lines a run where there is no terminal


class TrainLog:
    """Context manager around a run's reporting; `line` for one step, `note` for anything else.

    run_dir: where metrics.jsonl lies; start, total: steps done and steps in all; main: whether this process
    writes; pace: what its speed is told in.
    """

    def __init__(
        self,
        run_dir: Path,
        start: int,
        evaluated: int,
        total: int,
        main: bool,
        console: Console | None,
        pace: Pace = TOKENS,
    ) -> None:
        self.evaluated, self.pace = evaluated, pace
        self.file, self.start, self.total, self.main = run_dir / "metrics.jsonl", start, total, main
        self.console = console or Console()
        self.bar = Progress(
            TextColumn("train"),
            BarColumn(),
            TaskProgressColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (main and self.console.is_terminal),
        )
        self.task = self.bar.add_task("train", total=total, completed=start, numbers="")
        self.began = time.monotonic()

    def __enter__(self) -> TrainLog:
        if self.main:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            cut_metrics(self.file, self.start, self.evaluated)
            self.out = self.file.open("a", encoding="utf-8")
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        if self.main:
            self.out.close()

    def line(self, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl (None values are left out)."""
        if self.main:
            kept = {key: value for key, value in values.items() if value is not None}
            with writing(self.file):
                self.out.write(json.dumps(kept, allow_nan=False) + "\n")
                self.out.flush()

    def show(self, values: dict[str, Any]) -> None:
        """Show a step: the bar where there is a terminal, now and then a line elsewhere."""
        step = values["step"]
        numbers = (
            f"loss {values['loss']:.4f}{self.shown(values)}  {self._speed(values)}  "
            f"{values['memory_gb']:.2f} GB"
            if "loss" in values
            else f"skipped: {values['skipped']}"
        )
        self.bar.update(self.task, completed=step, numbers=numbers)
        if self.main and not self.console.is_terminal:
            every = max(1, self.total // _PLAIN_LINES)
            if step % every == 0 or step == self.total or step == self.start + 1 or "skipped" in values:
                left = (time.monotonic() - self.began) / (step - self.start) * (self.total - step)
                line = f"step {step}/{self.total}  {numbers}  ETA {clock(left)}"
                self.console.print(line, highlight=False, soft_wrap=True)

    def _speed(self, values: dict[str, Any]) -> str:
        speed = values[f"{self.pace.key}_per_s"]
        return f"{speed:,.{1 if speed < 10 and self.pace is not TOKENS else 0}f} {self.pace.word}/s"

    @staticmethod
    def shown(values: dict[str, Any]) -> str:
        """The parts of the loss, and of what is told beside it how often the chosen answer wins and by how
        much."""
        parts = ", ".join(
            f"{name.removeprefix('valid_').removeprefix('rewards/').removesuffix('_loss')} {value:.4f}"
            for name, value in values.items()
            if value is not None and name.endswith(("_loss", "/accuracies", "/margins"))
        )
        return f" ({parts})" if parts else ""

    def note(self, text: str) -> None:
        """A line above the bar."""
        if self.main:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)


class WalkLog:
    """Context manager around something that goes through many windows: a bar where there is a terminal, now
    and then a line elsewhere, each with what is done, of how many, and the time that is left.

    what: a word; total: windows; done: of them, from before; main: whether this process speaks.
    """

    def __init__(self, what: str, total: int, done: int, main: bool, console: Console | None = None) -> None:
        self.what, self.total, self.start, self.main = what, total, done, main
        self.console = console or Console()
        self.bar = Progress(
            TextColumn(what),
            BarColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self.console,
            disable=not (main and self.console.is_terminal),
        )
        self.task = self.bar.add_task(what, total=total, completed=done, numbers="")
        self.began, self.said = time.monotonic(), (-1, -1)  # the part and the windows said last

    def __enter__(self) -> WalkLog:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, done: float) -> None:
        """So many windows are done; a part of one where several go through a model together."""
        left = (time.monotonic() - self.began) / max(done - self.start, 1e-9) * (self.total - done)
        numbers = f"{int(done):,} of {self.total:,} windows, {clock(left)} left"
        self.bar.update(self.task, completed=done, numbers=numbers)
        part, whole = int(done * _PLAIN_LINES / max(1, self.total)), int(done)
        if self.main and not self.console.is_terminal and part > self.said[0] and whole > self.said[1]:
            self.said = (part, whole)
            self.console.print(f"{self.what}: {numbers}", highlight=False, soft_wrap=True)


def cut_metrics(file: Path, step: int, evaluated: int) -> None:
    """Keep the lines of metrics.jsonl up to `step` (validation: `evaluated`); a half-written last line goes
    too.
    """
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            if row["step"] <= (evaluated if "valid_loss" in row else step):
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # half a line: the process was killed while it wrote
    write_text(file, "".join(line + "\n" for line in kept))


def check_trackers(names: list[str]) -> None:
    """Raise ValueError for a tracker whose package is missing (accelerate would skip it in silence)."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"train.trackers: {', '.join(missing)} cannot be imported; pip install {' '.join(missing)} "
            "(or 'lowbit-ft[trackers]'), or take it out of the list: metrics.jsonl is written in any case"
        )


def clock(seconds: float) -> str:
    """h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"
