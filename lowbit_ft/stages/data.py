"""data: which rows a run looks at, and in which batches: to train, for the validation loss, the table, gptq.

What a row becomes, and a batch of them, the task says (tasks/); here it is given what the session knows.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data import chosen
from ..data.batches import Batches
from ..data.chat import ChatTemplate
from ..data.formats import FORMATS
from ..data.mix import sources_of
from ..data.windows import Examples
from ..export import EXPORTERS
from ..model.grown import GrownCheckpoint
from ..model.walk import Batch
from ..quantize import rows as calibrating
from ..recipe.sections.data import DataSource
from ..session import Session
from ..tasks.base import Dense, Measure
from .models import stage_model
from .synthesis import rows_key, train_source, valid_source


def read_data(session: Session) -> Examples:
    """The training windows. Before anything is quantized: a malformed row should not cost the hours that came
    before it.
    """
    recipe = session.recipe
    examples = recipe.task.examples(
        train_source(session), recipe.data, session.tokenizer, seed=recipe.train.seed, rows=session.rows
    )
    session.say(f"data: {examples.report}")
    if isinstance(grown := session.checkpoint, GrownCheckpoint) and isinstance(examples, Examples):
        if unseen := examples.unseen(grown.new.ids):
            names = ", ".join(map(repr, session.tokenizer.convert_ids_to_tokens(unseen[:4])))
            session.say(
                f"warning: {len(unseen)} of {len(grown.new.ids)} new tokens are in no row ({names}); "
                "the model learns not to write them, and nothing else of them"
            )
    if recipe.task.language and (warning := unstopped(session)):
        session.say(f"note: {warning}")
    if (valid := valid_examples(session)) is not None:
        session.say(f"valid: {valid.report}")
    return examples


def batches(
    session: Session,
    model: Any,
    examples: Examples,
    size: int,
    *,
    shuffle: bool,
    alone: bool = False,
    taught: bool = False,
) -> Batches:
    """Micro-batches for this process (alone: the only one; taught: with what a teacher has to know)."""
    feed = session.feed.alone if alone else session.feed
    task = session.recipe.task
    return task.batches(feed, model, examples, size, shuffle=shuffle, taught=taught)


def unstopped(session: Session) -> str | None:
    """What the user should know when the model will learn to end its turns with a token that no server stops
    at; None when all is well. Base models with a chat template are such: the turn ends with one token, the
    configuration stops at another."""
    formats = [source.format for source in sources_of(train_source(session))]
    if not any(FORMATS[name].needs_template for name in formats) or not getattr(
        session.tokenizer, "chat_template", None
    ):
        return None
    template, stops = ChatTemplate(session.tokenizer), EXPORTERS["native"].stops(session.checkpoint.folder)
    ending = template.ending()
    if len(ending) > 1:
        return (
            f"assistant turns end with the text {template.closing.strip()!r}, which is no single token "
            f"of this tokenizer ({len(ending)} tokens), so that no eos_token_id stops a server there; use a "
            "chat template whose end of turn is a token of this model, or stop servers at that text"
        )
    if not ending or not stops or ending[0] in stops:
        return None
    token = session.tokenizer.convert_ids_to_tokens(ending[0])
    return (
        f"assistant turns end with {token} ({ending[0]}), which is not a stop token of this model "
        f"(eos_token_id {stops}): servers will "
        f"write on behind it; set eos_token_id: {[*stops, *ending]} in the model's generation_config.json"
    )


def valid_examples(session: Session) -> Examples | None:
    """The validation windows; None when the recipe has none."""
    source = valid_source(session)
    if source is None:
        return None
    section = session.recipe.data.model_copy(update={"streaming": False})
    return session.recipe.task.examples(source, section, session.tokenizer, rows=session.rows)


def valid_batches(session: Session, model: Any, *, taught: bool = False) -> Batches | None:
    """The validation rows for the losses during training; None when the recipe has none."""
    examples, size = valid_examples(session), session.recipe.train.micro_batch_size
    return None if examples is None else batches(session, model, examples, size, shuffle=False, taught=taught)


def measure_of(session: Session, model: Any) -> Measure:
    """What the rows of the table are measured on: eval.data, or the validation rows, or the training rows."""
    recipe = session.recipe
    source = recipe.eval.data or valid_source(session) or train_source(session)
    dense = Dense(
        session.checkpoint,
        recipe.model.attention,
        session.device,
        session.dtype,
        lambda: stage_model(session, "base"),
    )
    return recipe.task.measure(session.feed, source, model, dense, session.rows)


def calibration_batches(session: Session) -> list[Batch]:
    """Token windows for a calibrator that looks at text."""
    wanted = session.recipe.quant.calibration
    return calibration_windows(session, wanted.samples, wanted.sequence_len, calibrating.window_batch(wanted))


def calibration_windows(session: Session, samples: int, sequence_len: int, size: int) -> list[Batch]:
    """Batches of `size` examples from quant.calibration.path or the training rows."""
    recipe, path = session.recipe, session.recipe.quant.calibration.path
    return recipe.task.calibration(
        train_source(session) if path is None else _calibration_source(session, path),
        recipe.data,
        session.tokenizer,
        rows=session.rows,
        seed=recipe.train.seed,
        samples=samples,
        sequence_len=sequence_len,
        size=size,
    )


def calibration_key(session: Session) -> list[Any]:
    """What `calibration_windows` are chosen from and how, for the key of what is made of them."""
    recipe, path = session.recipe, session.recipe.quant.calibration.path
    rows = rows_key(session) if path is None else _calibration_source(session, path).model_dump(mode="json")
    return [rows, recipe.train.seed, recipe.data.packing, recipe.data.on_bad_row, *recipe.data.chat]


def _calibration_source(session: Session, path: str) -> DataSource:
    if not session.recipe.task.windows:
        return DataSource(path=path)
    formats = {source.format for source in sources_of(session.recipe.data.train)}
    if len(formats) > 1:  # of which it may be any: its columns say
        return DataSource(path=path, format=calibrating.format_by_columns(path))
    kind = "text" if not formats or Path(path).suffix == ".txt" else formats.pop()
    return DataSource(path=path, format=kind)


def first_windows(
    session: Session, source: DataSource | Sequence[DataSource], count: int | None, changes: dict[str, Any]
) -> Examples:
    """The first `count` windows (None: all) of one source, or of several in turn, read only as far as
    needed."""
    section = session.recipe.data.model_copy(update={**changes, "streaming": True})
    return chosen.first_windows(source, section, session.tokenizer, session.rows, count)
