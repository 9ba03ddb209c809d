"""teacher: what the run learns from: the signal, and the teacher it asks, made and measured before training.

A live teacher's own KL to the full-precision model is measured on the run's first windows by the walk that
holds one layer at a time, and written to teacher.json beside the student's at step 0. One that is not several
times nearer than the student (`Teacher.nearest`) would be trained towards for nothing: it is refused, not
warned of, because the hours would be spent and the model would be worse than with labels.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..adapters.attach import base_digest
from ..data.windows import Examples
from ..evaluate.perplexity import Reference, evaluate
from ..files.records import TeacherMeasure
from ..model.attention import why_not
from ..model.checkpoint import Checkpoint
from ..model.config import read_config
from ..model.heads import resting
from ..model.linear import packed_op_only
from ..model.load import load_model
from ..model.upload import upload_each
from ..names import listed
from ..session import Session
from ..signals import REFERENCES, SIGNALS, TEACHERS, Lesson, Making, Teacher, teacher_kind
from ..signals.checkpoint import unlike
from ..tasks.base import inputs_of
from ..tasks.labelled import Labelled
from ..tasks.labels import known_labels, unnamed
from ..train.processes import main_process_first
from .answers import kept_answers, refuse_other_answers
from .data import batches, first_windows
from .models import in_8_bits
from .reference import kept_reference
from .synthesis import rows_key, train_source

FILE = "teacher.json"
WINDOWS, TOKENS = 8, 512  # what is measured on: so many windows, of at most so many tokens
ROWS = 32  # of a task that has rows, in one batch; of one that measures few at a time, as many


def ready_teacher(session: Session, examples: Examples) -> None:
    """Refuse, before anything is quantized, what can be known of a teacher by then: another checkpoint is
    fetched, its tokens and labels are compared, and a shared folder of answers is one for these windows.
    ValueError."""
    section = session.recipe.train
    if not SIGNALS[section.signal.kind].asks:
        return
    assert section.teacher is not None, "refused by the recipe"
    with main_process_first():
        kept = section.teacher in TEACHERS
        own = session.checkpoint if kept else other_checkpoint(session, section.teacher)
        refuse_other_labels(session, section.teacher, own)
        if section.teacher == "cached":
            refuse_other_answers(session, examples)


def other_checkpoint(session: Session, source: str) -> Checkpoint:
    """The checkpoint that teaches. ValueError where there is none, its tokens are others, or it says
    something else than the task learns."""
    recipe = session.recipe
    purpose = recipe.task.purpose(recipe.train.seed)
    try:
        checkpoint = Checkpoint.open(source, None, recipe.model.dtype, purpose=purpose)
    except ValueError as error:
        raise ValueError(
            f"train.teacher: {error}; give one of {', '.join(TEACHERS)}, or the folder or hub id of a model "
            "with the same tokens"
        ) from error
    if reason := unlike(checkpoint.folder, session.checkpoint.folder, recipe.task.reads):
        raise ValueError(f"train.teacher: got {source!r}, but {reason}")
    if reason := recipe.task.unfit(read_config(checkpoint.folder)):
        raise ValueError(f"train.teacher: got {source!r}, but {reason}; or give another teacher")
    return checkpoint


def refuse_other_labels(session: Session, teacher: str, checkpoint: Checkpoint) -> None:
    """ValueError for a teacher whose files have a label of the task at another number: its head has the same
    shape, and says another label by the same place. Where they have other names (COCO's categories have two
    sets of them) nobody knows, so it is said."""
    ours = list(getattr(session.recipe.task, "labels", None) or ())
    theirs = known_labels(read_config(checkpoint.folder))
    pairs = [pair for pair in zip(ours, theirs, strict=False) if pair[0] != pair[1]]
    moved = [name for name, _ in pairs if name in theirs]
    if len(ours) != len(theirs) or not pairs or unnamed(len(ours)) in (ours, theirs):
        return  # of another shape it is refused for that; of labels that nobody named nothing is known
    mine, other = pairs[0]
    if moved:
        name = moved[0]
        raise ValueError(
            f"train.teacher: got {teacher!r}, for which {name!r} is label {theirs.index(name)}, and here it "
            f"is {ours.index(name)}: it would teach another label by that name; give task.labels in the "
            f"order of its config.json ({listed(theirs[:8])}{', ...' if len(theirs) > 8 else ''})"
        )
    session.say(
        f"warning: train.teacher: {teacher} calls {len(pairs)} of {len(ours)} labels otherwise (label "
        f"{ours.index(mine)} is {other!r} there and {mine!r} here), and is taken to mean the same by them"
    )


def lesson_of(session: Session, model: Any, examples: Examples, fitted: str | None) -> Lesson:
    """What train.signal and train.teacher say. model: packed, adapters attached, not yet sharded; fitted:
    what the adapters were fitted to before (reconstruct_stage), if they were. ValueError for a teacher that
    cannot be made or is not near enough to full precision."""
    section = session.recipe.train
    signal = SIGNALS[section.signal.kind]
    making = Making(
        model=model,
        pack=partial(pack_other, session),
        kept=partial(kept_answers, session, model, examples),
        referred=partial(kept_reference, session, model, examples),
    )
    if signal.refers:
        name = section.signal.reference
        return Lesson(signal, section.signal, REFERENCES[name].make(making, name))
    if not signal.asks:
        return Lesson(signal, section.signal)
    assert section.teacher is not None, "refused by the recipe"
    if section.teacher in TEACHERS:
        refuse_drawn(section.teacher, session.checkpoint)
    teacher = teacher_kind(section.teacher).make(making, section.teacher)
    with main_process_first():
        measured = measure(session, model, teacher, examples, fitted)
    if measured is not None:
        _judge(session, teacher, measured)
    return Lesson(signal, section.signal, teacher)


def pack_other(session: Session, source: str) -> tuple[Any, dict[str, Any]]:
    """The model of another checkpoint, packed to rows of 8 bits on the session's device, and what tells it
    from any other. ValueError where its tokens are others."""
    session.say(f"teacher: {source}, packed to 8 bits")
    checkpoint = other_checkpoint(session, source)
    model = in_8_bits(session, checkpoint, -1, exclude=session.recipe.quant.exclude)
    refuse_drawn(source, checkpoint)
    return model, {"model": source, "files": checkpoint.revision or checkpoint.fingerprint()}


def refuse_drawn(teacher: str, checkpoint: Checkpoint) -> None:
    """ValueError for a teacher whose head is not in its files, but drawn at random."""
    if checkpoint.drawn:
        raise ValueError(
            f"train.teacher: got {teacher!r}, and {checkpoint.folder} has no head for this task "
            f"({', '.join(checkpoint.drawn)}): its answers would be drawn at random; fine-tune it first "
            "(with train.signal.kind: labels, or in full precision), and start from what that leaves"
        )


def measure(
    session: Session, model: Any, teacher: Teacher, examples: Examples, fitted: str | None = None
) -> TeacherMeasure | None:
    """KL to full precision of a live teacher and of the student as it starts; by the main process, once per
    run. examples: what is trained on. None for a teacher that is full precision by what it is made of."""
    found = teacher.model()
    if found is None:
        return None
    other, at_work = found
    recipe = session.recipe
    key = {
        "teacher": teacher.facts,
        "base": base_digest(model),
        "adapter": recipe.adapter.model_dump(mode="json"),
        "fitted": fitted,
        "data": [
            rows_key(session),
            recipe.data.sequence_len,
            recipe.data.packing,
            recipe.data.on_bad_row,
            *recipe.data.chat,
        ],
        "dtype": recipe.model.dtype,
    }
    stored = session.run.read_json(FILE, TeacherMeasure | None, None)
    if stored is not None and stored.of == key:
        return stored
    assert session.run.main, "the main process has measured it"
    if isinstance(recipe.task, Labelled):
        measured = TeacherMeasure(of=key, **_of_rows(session, recipe.task, examples, model, other, at_work))
        session.run.write_json(FILE, measured.model_dump(mode="json"))
        return measured
    length = min(TOKENS, recipe.data.sequence_len)
    whole = {"sequence_len": length, "train_on": "all"}
    rows = first_windows(session, train_source(session), WINDOWS, whole)
    windows = list(batches(session, model, rows, 1, shuffle=False, alone=True).one_epoch())
    reference = Reference(
        session.checkpoint,
        windows,
        attention=session.recipe.model.attention,
        device=session.device,
        dtype=session.dtype,
        segments=not why_not(model),
    )
    student = evaluate(model, windows, "student", reference)
    with at_work:
        theirs = evaluate(other, windows, "teacher", reference)
    assert student.kl is not None and theirs.kl is not None
    measured = TeacherMeasure(
        of=key, kl=theirs.kl, student_kl=student.kl, windows=len(rows), tokens=theirs.tokens
    )
    session.run.write_json(FILE, measured.model_dump(mode="json"))
    return measured


@torch.no_grad()
def _of_rows(
    session: Session, task: Labelled, examples: Examples, model: Any, other: Any, at_work: Any
) -> dict[str, Any]:
    """The fields of a measure, of a task whose rows have answers: the divergence of its own logits."""
    count = task.measured or ROWS
    rows = task.first(examples, count)
    (batch,) = batches(session, model, rows, count, shuffle=False, alone=True).one_epoch()
    moved = {name: upload_each(value, session.device) for name, value in batch.items()}
    inputs, labels = inputs_of(moved, task.answers), {name: moved[name] for name in task.answers}
    dense = load_model(
        session.checkpoint, session.recipe.model.attention, session.device, session.dtype
    ).eval()

    def student() -> Any:
        with resting(model), packed_op_only(model):
            return task.reply(model, inputs)

    def teacher() -> Any:
        with at_work:
            return task.reply(other, inputs)

    full, said, taught = task.beside(lambda: task.reply(dense, inputs), student, teacher)
    ours, theirs = (task.between(one, full, labels) for one in (said, taught))
    answers = int(task.count(batch))
    return {
        "kl": float(theirs) / answers,
        "student_kl": float(ours) / answers,
        "windows": len(rows),
        "tokens": task.pace.count(batch),
    }


def _judge(session: Session, teacher: Teacher, measured: TeacherMeasure) -> None:
    name = session.recipe.train.teacher
    session.say(
        f"teacher {name}: KL to full precision {measured.kl:.6f}, the model as it starts "
        f"{measured.student_kl:.6f} ({measured.tokens:,} {session.recipe.task.pace.word})"
    )
    if teacher.nearest is not None and teacher.nearest * measured.kl > measured.student_kl:
        raise ValueError(
            f"train.teacher: got {name!r}, whose KL to full precision is {measured.kl:.4g}, and the model "
            f"that it would teach starts at {measured.student_kl:.4g}: it must be {teacher.nearest:g} times "
            f"nearer, or training on it leads away from the model; {teacher.instead}"
        )
