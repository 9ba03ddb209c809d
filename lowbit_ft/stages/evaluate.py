"""evaluate: the table of perplexity and KL over the stages, and the prompts answered before and after."""

from dataclasses import dataclass, field
from typing import Any

from ..adapters.attach import adapters_off
from ..evaluate.generate import generate
from ..evaluate.perplexity import EvalRow, table
from ..export.folder import read_manifest, replace_file
from ..model.linear import packed_op_only
from ..session import Session
from ..tasks.base import Measure
from .card import card
from .data import measure_of
from .models import stage_model


@dataclass
class Measured:
    """The rows so far, with what the next ones are measured on."""

    rows: list[EvalRow] = field(default_factory=list)
    measure: Measure | None = None


def measure_trained(session: Session, model: Any) -> Measured:
    """Rows base, quantized and trained, and the recipe's prompts answered before and after."""
    recipe, done = session.recipe, Measured()
    with session.run.stage("evaluate", session.device):
        if recipe.eval.perplexity:
            done.measure = measure = measure_of(session, model)
            session.say(f"evaluate: {measure.count:,} {measure.unit}, every stage")
            done.rows += measure.reference()
            with adapters_off(model):
                done.rows.append(measure.row(model, "quantized"))
            done.rows.append(measure.row(model, "trained"))
            session.check_files()
        if prompts := recipe.eval.generate:
            options = {"max_new_tokens": recipe.eval.max_new_tokens, "tokenizer": session.tokenizer}
            with packed_op_only(model):  # before and after on one path, whatever decoding would take
                with adapters_off(model):
                    before = generate(model, prompts, **options)
                after = generate(model, prompts, **options)
            samples = [
                {"prompt": p, "before": b, "after": a} for p, b, a in zip(prompts, before, after, strict=True)
            ]
            session.run.write_json("samples.json", samples)
    return done


def measure_shipped(session: Session, done: Measured) -> list[EvalRow]:
    """Rows merged and exported, each read back from its folder; the table, into evaluation.json and the model
    cards.
    """
    recipe, run_dir = session.recipe, session.run
    if done.measure is None:
        return []
    folders = {"merged": "native"}
    if (run_dir / "exported").is_dir() and recipe.export.format != "native":
        folders["exported"] = read_manifest(run_dir / "exported")["format"]
    with run_dir.stage("evaluate", session.device, resumable=True):
        for stage in folders:
            model = stage_model(session, stage)
            done.rows.append(done.measure.row(model, stage))
            del model
    run_dir.write_json(
        "evaluation.json",
        {
            "rows": [row.to_json() for row in done.rows],
            "windows": done.measure.count,
            "window": recipe.eval.window,
        },
    )
    session.say(table(done.rows))
    for stage, format in folders.items():
        replace_file(run_dir / stage, "README.md", card(session, format)["README.md"])
    return done.rows
