"""The model card of a folder of the run: what the recipe says of it, and what has been measured so far."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..evaluate.perplexity import EvalRow
from ..evaluate.tasks import TaskRow
from ..export.card import CardFacts, model_card, serve_line
from ..files.jsonfile import read_json
from ..files.records import Evaluation, PackedBase, TaskTable, Zeros
from ..integrations.adapter_files import CONFIG_FILE
from ..model.config import GENERATION
from ..recipe.recipe import Recipe
from ..session import Session
from .rotations import turned_keys


def card_facts(session: Session, recipe: Recipe) -> CardFacts:
    """What the model card and the last line of a run say of the recipe, and of which keys r3 turns."""
    adapter = recipe.adapter
    grid = adapter.shipped(recipe.quant.grid_for(""))
    kv_cache = recipe.quant.kv_cache
    return CardFacts(
        recipe.name,
        recipe.model.path,
        adapter.method,
        adapter.exact_merge,
        grid,
        recipe.to_card(),
        None if kv_cache is None else kv_cache.config(turned_keys(session)),
        recipe.data.chat_template_kwargs,
        pipeline=recipe.task.shipped[0],
        auto=recipe.task.auto,
        generation=(session.checkpoint.folder / GENERATION).is_file(),
        command=recipe.task.shipped[1],
    )


def used_by(session: Session, format: str, folder: Path) -> str:
    """What serves a folder of the run, for the console: on a CPU our own server first."""
    here = session.run.path if session.device.type == "cpu" else None
    return serve_line(card_facts(session, session.recipe), format, folder, here)


def _convolutions(session: Session) -> tuple[str, ...]:
    """Those that the table of the quantizer left alone."""
    rows = session.run.read_json("quant.json", list[dict[str, Any]], [])
    return tuple(str(row.get("layer")) for row in rows if str(row.get("reason")).startswith("Conv"))


def card(session: Session, format: str) -> dict[str, str]:
    """README.md with the table as far as it has been measured."""
    measured = session.run.read_json("evaluation.json", Evaluation, Evaluation())
    rows = [EvalRow(**row.model_dump()) for row in measured.rows]
    table = session.run.read_json("tasks.json", TaskTable, TaskTable())
    tasks = [TaskRow(**row.model_dump()) for row in table.rows]
    zeros = session.run.read_json("base.json", PackedBase, PackedBase()).zeros
    if (grown := session.run.read_json("zeros.json", Zeros | None, None)) is not None:
        zeros = grown.zeros
    facts = card_facts(session, session.run.recipe())
    facts = replace(facts, zeros=zeros, grown=grown is not None)
    facts = replace(facts, dense=trained_whole(session), convolutions=_convolutions(session))
    return {"README.md": model_card(facts, format, rows, tasks)}


def trained_whole(session: Session) -> tuple[str, ...]:
    """The dense modules that the adapter of the run holds beside its pairs; none before it is written."""
    file = session.run / "adapter" / CONFIG_FILE
    if not file.is_file():
        return ()
    saved = read_json(file, dict[str, Any]).get("modules_to_save")
    return tuple(map(str, saved)) if isinstance(saved, list) else ()
