"""The model card of a folder of the run: what the recipe says of it, and what has been measured so far."""

from dataclasses import replace
from typing import Any

from ..evaluate.perplexity import EvalRow
from ..evaluate.tasks import TaskRow
from ..export.card import CardFacts, model_card
from ..files.records import Evaluation, PackedBase, TaskTable
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
        pipeline=recipe.task.pipeline,
        auto=recipe.task.auto,
    )


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
    facts = replace(card_facts(session, session.run.recipe()), zeros=zeros, dense=_convolutions(session))
    return {"README.md": model_card(facts, format, rows, tasks)}
