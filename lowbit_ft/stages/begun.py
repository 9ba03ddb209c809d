"""Begun: codes of rows beside the file that they become, so that a killed encode goes on behind them.

    OUTPUT.jsonl.begun    {"of": sha256 of codec and sound, "codes": [...]}, a line as each row is done

A line says what it is of, so whatever was changed meanwhile (a sound, the codec, the order of the rows) is
encoded anew and everything else is taken. Half a line at the end, of a process that was killed while it
wrote, is cut off. The file goes when the rows are written.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError

from ..files.errors import writing
from ..files.regular import irregular

Code = Annotated[StrictInt, Field(ge=0)]


class Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    of: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    codes: Annotated[list[Code], Field(min_length=1)]


class Begun:
    """Context manager around an encode that writes `output`. size: codes that there are. ValueError where
    the file beside it is none of these, or another process writes it."""

    def __init__(self, output: Path, size: int) -> None:
        self.file, self.size = output.with_name(f"{output.name}.begun"), size
        self.known: dict[str, list[int]] = {}

    def __enter__(self) -> Begun:
        if (what := irregular(self.file)) is not None:
            raise ValueError(f"{self.file}: got {what}; move it away")
        with writing(self.file):
            self.out = self.file.open("ab+")
        try:
            fcntl.flock(self.out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.out.close()
            raise ValueError(
                f"{self.file}: another process writes it; wait for it, or name another output"
            ) from None
        try:
            self._read()
        except BaseException:
            self.out.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or not self.known:
            self.file.unlink(missing_ok=True)
        self.out.close()

    def _read(self) -> None:
        self.out.seek(0)
        whole = 0
        for number, line in enumerate(self.out, 1):
            if not line.endswith(b"\n"):
                break  # killed while it was written
            try:
                found = Line.model_validate_json(line)
            except ValidationError:
                found = None
            if found is None or max(found.codes) >= self.size:
                raise ValueError(
                    f"{self.file}:{number}: is no line that encode wrote for these codes; move the file away"
                )
            self.known[found.of] = found.codes
            whole += len(line)
        self.out.truncate(whole)

    def codes(self, of: str, made: Callable[[], list[int]]) -> list[int]:
        """The codes of a sound: those that are there, or `made`, which are kept."""
        if of not in self.known:
            self.known[of] = made()
            with writing(self.file):
                self.out.write(json.dumps({"of": of, "codes": self.known[of]}).encode() + b"\n")
                self.out.flush()
                os.fsync(self.out.fileno())
        return self.known[of]
