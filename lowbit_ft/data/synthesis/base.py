"""The contract of data.synthesis: the keys that all kinds share, and who makes the rows of a kind.

    Maker.write(numbers)   the rows of a shard, made together
    folder.py              asks for the shards that are missing, and keeps them

A kind whose rows are tokens is a TextConfig (text.py), which brings a maker; one whose rows are images
(images.py) brings its own. The folder, the hashes and going on after a stop are the same for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .labeller import Labeller

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]

CLOSED = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
PARTS = ("train", "valid", "dropped")
Tell = Callable[[int, int], None]  # (rows, units) more than before


class SynthesisConfig(BaseModel):
    """The `data.synthesis` section of a recipe. Subclasses add their own keys; unknown keys are refused."""

    model_config = CLOSED

    reads: ClassVar[str] = "text"  # what a row is: that of the tasks it is for (Task.reads)
    format: ClassVar[str | None] = "tokens"  # of its rows, as data.train has it
    without_template: ClassVar[str] = "kind: self_generated"  # what to set where a template is missing

    kind: str
    samples: Count | None = Field(default=1024, description="rows to write, before the filter")
    valid: Annotated[int, Field(ge=0)] = Field(
        default=0, description="of these, rows for validation (data.valid is then left out)"
    )
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = Field(default=0, description="of starts and draws")
    batch_size: Count = Field(
        default=32, description="rows written at once, and the unit that a stopped run goes on from"
    )

    @model_validator(mode="after")
    def _rows_for_training(self) -> SynthesisConfig:
        if self.samples is not None and self.valid >= self.samples:
            raise ValueError(
                f"valid {self.valid} of samples {self.samples}; leave rows for training: raise samples"
            )
        return self

    @property
    def needs_template(self) -> bool:
        """The tokenizer's chat template."""
        return False

    @property
    def writer(self) -> str:
        """The model that writes: dense, packed (to 8 bits), or auto, dense where it fits."""
        return "dense"

    def longest(self, sequence_len: int) -> int:
        """Units of a row at most: tokens, or steps of an image. sequence_len: data.sequence_len."""
        return sequence_len

    def problem(self, longest: int) -> tuple[str, str] | None:
        """(key, what is wrong with it and the way out) where the keys do not go together, for rows of so many
        units; else None."""
        return None

    def working_bytes(self, weights: int, model: Any, size: int, longest: int) -> int:
        """Memory while a batch of rows is made by a model with weights of so many bytes. model: its
        configuration; size: bytes of a number of it; longest: units of a row."""
        raise AssertionError(f"{type(self).__name__} makes no rows")

    def disk_bytes(self, model: Any, longest: int) -> int:
        """Of synthesis/, about. model: its configuration; longest: units of a row."""
        raise AssertionError(f"{type(self).__name__} makes no rows")

    @property
    def loosen(self) -> str:
        """What to do where no row is left."""
        return "and change what made and dropped them"

    def maker(self, given: Given) -> Maker:
        """Who makes the rows. ValueError where they cannot be made."""
        raise AssertionError(f"{type(self).__name__} makes no rows")


@dataclass(frozen=True)
class Given:
    """What a maker has to know of the run. tokenizer: or the image processor; stops: tokens that end an
    answer; rows: of the embedding; longest: units of a row at most; labeller: how a task of images answers.
    """

    tokenizer: Any
    stops: Sequence[int]
    rows: int | None
    longest: int
    labeller: Labeller | None = None


@dataclass
class Shard:
    """The rows that were made together. lines: part (train, valid, dropped) -> rows, those dropped with the
    reason as `dropped`; files: name -> content, of what the rows name; units: tokens that were written, or
    steps of images."""

    units: int
    lines: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {part: [] for part in PARTS})
    files: dict[str, bytes] = field(default_factory=dict)


class Maker(ABC):
    """Makes the rows of a kind, by their numbers. count: how many there are; longest: units of a row at most;
    unit: what is counted while it works; notes: what the user should know."""

    count: int
    longest: int
    unit: str = "tokens"
    notes: Sequence[str] = ()

    @abstractmethod
    def write(self, numbers: range, model: Any, tell: Tell) -> Shard:
        """The rows of these numbers, made by the model. tell(0, n): n units more."""

    @abstractmethod
    def remember(self, row: Mapping[str, Any]) -> None:
        """A row of an earlier shard, as it is stored, that was not dropped: what is told of all rows, and
        what no other row may repeat."""

    @property
    def answers(self) -> Counter[str]:
        """How often each answer is there, of the rows that were kept; none where rows have no answers."""
        return Counter()

    @property
    def fates(self) -> Counter[str]:
        """What became of the answers of the rows that were kept."""
        return Counter()

    def score(
        self, model: Any, rows: Iterable[Mapping[str, Any]], read: Callable[[str], bytes]
    ) -> Mapping[str, float]:
        """How well the model answers its own rows, by the task's measures; empty where that says nothing.
        rows: those that were kept; read: a file that they name."""
        return {}

    def warnings(self) -> list[str]:
        """What the user should know of the rows that were kept, all together."""
        return []
