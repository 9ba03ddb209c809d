"""What the small JSON files of a run folder hold, as models: whoever reads one gets this, or an error that
names the file.

    started.json      Started          the folder that relative paths of recipe.yaml are from
    environment.json  Environment      versions and machine; the commit of a hub model; the device
    stages.json       [StageTime]      seconds and memory of every stage
    base.json         PackedBase       what base/ was packed from
    evaluation.json   Evaluation       the table of perplexity and KL
    tasks.json        TaskTable        what lm-eval measured
    teacher.json      TeacherMeasure   how near a teacher and the model as it starts are to full precision
    made.json         Made             {folder: identity of the tensors that this run wrote there}

A key that is more than these is kept where the file is written again, and means nothing here. The report
reads the same files more leniently, section by section (report/files.py): it shows what is left of a run.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, Strict, StrictBool, StrictInt, StrictStr

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


class Measure(BaseModel):
    """A row of the table (evaluate/perplexity.py: EvalRow)."""

    model_config = ConfigDict(extra="forbid")
    stage: StrictStr
    loss: Number
    perplexity: Number
    kl: Number | None
    tokens: Count


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


class TeacherMeasure(Record):
    """of: the teacher, base, adapter and data that were measured (stages/teacher.py)."""

    of: Any
    kl: Number
    student_kl: Number
    windows: Count
    tokens: Count
