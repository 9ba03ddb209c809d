"""evaluate: the table of perplexity and KL over the stages, and the prompts answered before and after."""

from dataclasses import dataclass, field
from typing import Any

from ..adapters.attach import adapters_off
from ..evaluate.generate import generate
from ..evaluate.perplexity import EvalRow, Reference, evaluate, table
from ..export.folder import read_manifest, replace_file
from ..model.attention import why_not
from ..model.linear import packed_op_only
from ..model.walk import Batch
from ..session import Session
from .card import card
from .data import eval_batches
from .models import stage_model


@dataclass
class Measured:
    """The rows so far, with what the next ones are measured on."""

    rows: list[EvalRow] = field(default_factory=list)
    data: list[Batch] = field(default_factory=list)
    reference: Reference | None = None


def measure_trained(session: Session, model: Any) -> Measured:
    """Rows base, quantized and trained, and the recipe's prompts answered before and after."""
    recipe, done = session.recipe, Measured()
    with session.run.stage("evaluate", session.device):
        if recipe.eval.perplexity:
            done.data = eval_batches(session, model)
            windows = sum(len(b["labels"]) for b in done.data)
            session.say(f"evaluate: {windows:,} windows of {recipe.eval.window:,} tokens, every stage")
            if recipe.eval.kl:
                done.reference = Reference(
                    session.checkpoint,
                    done.data,
                    attention=recipe.model.attention,
                    device=session.device,
                    dtype=session.dtype,
                    segments=not why_not(model),
                )
                done.rows.append(done.reference.row())
            with adapters_off(model):
                done.rows.append(evaluate(model, done.data, "quantized", done.reference))
            done.rows.append(evaluate(model, done.data, "trained", done.reference))
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
    if not done.data:
        return []
    folders = {"merged": "native"}
    if (run_dir / "exported").is_dir() and recipe.export.format != "native":
        folders["exported"] = read_manifest(run_dir / "exported")["format"]
    with run_dir.stage("evaluate", session.device, resumable=True):
        for stage in folders:
            model = stage_model(session, stage)
            done.rows.append(evaluate(model, done.data, stage, done.reference))
            del model
    run_dir.write_json(
        "evaluation.json",
        {
            "rows": [row.to_json() for row in done.rows],
            "windows": sum(len(b["labels"]) for b in done.data),
            "window": recipe.eval.window,
        },
    )
    session.say(table(done.rows))
    for stage, format in folders.items():
        replace_file(run_dir / stage, "README.md", card(session, format)["README.md"])
    return done.rows
