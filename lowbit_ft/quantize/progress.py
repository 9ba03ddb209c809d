"""How far packing is: a live bar on a terminal, a line now and then elsewhere (a log file, CI).

    quantize  37 %  layer 12 of 32: mlp.down_proj  0:12:40 passed, about 0:21:35 left

Work is counted in weights packed. While text goes through a layer the share of it that is through is shown;
what is left is foretold from the share of the weights that are done, so it comes with the first of them.
"""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar

from ..train.log import clock

EVERY = 10.0  # seconds between two lines where there is no terminal


class Progress:
    """Context manager. weights: how many there are in all; console None: nothing is shown."""

    def __init__(self, console: Console | None, weights: int):
        self.console, self.total, self.packed, self.what = console, weights, 0, ""
        self.bar: Bar | None = None
        self.began = self.last = 0.0

    def __enter__(self) -> Progress:
        self.began = self.last = time.monotonic()
        if self.console is not None and self.console.is_terminal:
            self.bar = Bar(
                TextColumn("quantize"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.description}"),
                console=self.console,
                transient=True,
            )
            self.task = self.bar.add_task("", total=max(1, self.total))
            self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.stop()

    def at(self, what: str) -> None:
        """What is being done from here on."""
        self.what = what
        self._show()

    def tick(self, share: float) -> None:
        """So much of what is being done is through."""
        self._show(f" ({share:.0%})")

    def done(self, weights: int) -> None:
        """So many more weights are packed."""
        self.packed += weights
        self._show()

    def _show(self, share: str = "") -> None:
        if self.console is None:
            return
        now = time.monotonic()
        text = f"{self.what}{share}  {self._left(now - self.began)}"
        if self.bar is not None:
            self.bar.update(self.task, completed=self.packed, description=text)
        elif now - self.last >= EVERY:
            self.last = now
            percent = f"{self.packed / max(1, self.total):.0%}"
            self.console.print(f"quantize  {percent}  {text}", highlight=False, markup=False, soft_wrap=True)

    def _left(self, seconds: float) -> str:
        passed = f"{clock(seconds)} passed"
        if not self.packed:
            return passed
        return f"{passed}, about {clock(seconds * (self.total - self.packed) / self.packed)} left"
