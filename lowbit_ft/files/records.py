"""What the small JSON files of a run folder hold, as models: whoever reads one gets this, or an error that
names the file.

    started.json      Started          the folder that relative paths of recipe.yaml are from
    environment.json  Environment      versions and machine; the commit of a hub model; the device
    stages.json       [StageTime]      seconds and memory of every stage
    base.json         PackedBase       what base/ was packed from
    zeros.json        Zeros            what was pruned while it trained
    evaluation.json   Evaluation       the table of perplexity and KL
    tasks.json        TaskTable        what lm-eval measured
    teacher.json      TeacherMeasure   how near a teacher and the model as it starts are to full precision
    made.json         Made             {folder: identity of the tensors that this run wrote there}
    synthesis/lowbit_ft.json  Synthesis  the rows that the model wrote itself

A key that is more than these is kept where the file is written again, and means nothing here. The report
reads the same files more leniently, section by section (report/files.py): it shows what is left of a run.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    Strict,
    StrictBool,
    StrictInt,
    StrictStr,
    model_serializer,
)

Number = Annotated[float, Strict()]  # an integer is one too, true and "1" are not
Amount = Annotated[float, Strict(), Field(ge=0)]
Count = Annotated[int, Strict(), Field(ge=0)]

Made = dict[StrictStr, StrictStr]


class Record(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())


class Started(Record):
    folder: StrictStr = Field(min_length=1)
    from_here: StrictStr = Field(min_length=1)


class Environment(Record):
    revision: StrictStr | None = None
    device: StrictStr | None = None


class StageTime(Record):
    stage: StrictStr
    seconds: Amount
    peak_memory_gb: Amount


class PackedBase(Record):
    """Empty while base/ is being replaced: a folder that belongs to no key."""

    key: Any = None
    digest: StrictStr | None = None
    zeros: Amount | None = None  # the share of its weights that is locked at zero


class Zeros(Record):
    """Of a run that pruned while it trained."""

    zeros: Amount  # the share of the weights of these layers that were chosen


class Measure(BaseModel):
    """A row of the table (evaluate/perplexity.py: EvalRow)."""

    model_config = ConfigDict(extra="forbid")
    stage: StrictStr
    loss: Number | None
    perplexity: Number | None
    kl: Number | None
    tokens: Count
    scores: dict[StrictStr, Number] = {}


class Evaluation(Record):
    rows: list[Measure] = []


class TaskMeasure(BaseModel):
    """A row of lm-eval (evaluate/tasks.py: TaskRow)."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    stage: StrictStr
    task: StrictStr
    metric: StrictStr
    value: Number
    stderr: Number | None
    higher_is_better: StrictBool | None
    samples: StrictInt | None


class TaskTable(Record):
    rows: list[TaskMeasure] = []


class FileEntry(BaseModel):
    """A file of a manifest (manifest.py: file_entry)."""

    model_config = ConfigDict(extra="forbid")
    bytes: Count
    sha256: StrictStr


class SynthesisShard(BaseModel):
    """rows: part -> rows in it; reasons: why a row was dropped -> rows; tokens: written, dropped ones too."""

    model_config = ConfigDict(extra="forbid")
    files: dict[StrictStr, FileEntry]
    rows: dict[StrictStr, Count]
    reasons: dict[StrictStr, Count]
    tokens: Count


class Synthesis(BaseModel):
    """The manifest of synthesis/. key: of what the rows are made; by: the model that wrote them; answers: of
    the rows that were kept, how often each is there; fates: what became of their answers; unit: what `tokens`
    counts; own_score: of the model on its rows, by the task's measures; warnings: of the kept rows."""

    model_config = ConfigDict(extra="forbid")
    key: StrictStr
    by: StrictStr | None = None
    done: StrictBool = False
    shards: dict[StrictStr, SynthesisShard] = {}
    answers: dict[StrictStr, Count] = {}
    fates: dict[StrictStr, Count] = {}
    unit: StrictStr = "tokens"
    own_score: dict[StrictStr, Number] = {}
    warnings: list[StrictStr] = []

    @model_serializer(mode="wrap")
    def _said(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what the rows of this kind do not have."""
        without = {"answers": {}, "fates": {}, "unit": "tokens", "own_score": {}, "warnings": []}
        return {key: v for key, v in plain(self).items() if key not in without or v != without[key]}

    def count(self, part: str) -> int:
        """Rows of a part (train, valid, dropped)."""
        return sum(shard.rows.get(part, 0) for shard in self.shards.values())

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards.values())

    @property
    def reasons(self) -> dict[str, int]:
        """Why rows were dropped -> rows, the most frequent first."""
        total: dict[str, int] = {}
        for shard in self.shards.values():
            for reason, count in shard.reasons.items():
                total[reason] = total.get(reason, 0) + count
        return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))

    def __str__(self) -> str:
        dropped = ", ".join(f"{reason} {count:,}" for reason, count in self.reasons.items())
        rows = sum(self.count(part) for part in ("train", "valid", "dropped"))
        return (
            f"{rows:,} rows of {self.tokens:,} {self.unit}, written by the {self.by} model: "
            f"{self.count('train'):,} to train on, {self.count('valid'):,} for validation, "
            f"{self.count('dropped'):,} dropped" + (f" ({dropped})" if dropped else "")
        )


class TeacherMeasure(Record):
    """of: the teacher, base, adapter and data that were measured (stages/teacher.py)."""

    of: Any
    kl: Number
    student_kl: Number
    windows: Count
    tokens: Count
