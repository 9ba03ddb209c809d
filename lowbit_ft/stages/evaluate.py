"""evaluate: the table of perplexity and KL over the stages, and the prompts answered before and after."""

from dataclasses import dataclass, field
from typing import Any

from ..adapters.attach import adapters_off
from ..evaluate.generate import generate
from ..evaluate.perplexity import EvalRow, table
from ..export import EXPORTERS
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
    samples: list[dict[str, str]] = field(default_factory=list)

    def add(self, session: Session, row: EvalRow) -> None:
        """One more row, and a line of it: on a slow machine minutes lie between two."""
        self.rows.append(row)
        numbers = ", ".join(f"{name} {value:.4f}" for name, value in row.numbers.items())
        session.say(f"evaluated {row.stage}: {numbers}")


def measure_trained(session: Session, model: Any) -> Measured:
    """Rows base, quantized and trained, and the recipe's prompts answered before and after."""
    recipe, done = session.recipe, Measured()
    with session.run.stage("evaluate", session.device):
        if recipe.eval.perplexity:
            done.measure = measure = measure_of(session, model)
            session.say(f"evaluate: {measure.count:,} {measure.unit}, every stage")
            for row in measure.reference():
                done.add(session, row)
            with adapters_off(model):
                done.add(session, measure.row(model, "quantized"))
            done.add(session, measure.row(model, "trained"))
            keep_files(session, measure)
            session.check_files()
        if prompts := recipe.eval.generate:
            options = {"max_new_tokens": recipe.eval.max_new_tokens, "tokenizer": session.tokenizer}
            with packed_op_only(model):  # before and after on one path, whatever decoding would take
                with adapters_off(model):
                    before = generate(model, prompts, **options)
                after = generate(model, prompts, **options)
            done.samples = [
                {"prompt": p, "before": b, "after": a} for p, b, a in zip(prompts, before, after, strict=True)
            ]
            session.run.write_json("samples.json", done.samples)
    return done


def measure_shipped(session: Session, done: Measured) -> list[EvalRow]:
    """Rows merged and exported, each read back from its folder; the table, into evaluation.json and the model
    cards. An export whose reader is not here (export.verify: false) has no row.
    """
    recipe, run_dir = session.recipe, session.run
    if done.measure is None:
        return []
    folders = {"merged": "native"}
    if (run_dir / "exported").is_dir() and recipe.export.format != "native":
        folders["exported"] = read_manifest(run_dir / "exported")["format"]
    with run_dir.stage("evaluate", session.device, resumable=True):
        for stage, format in folders.items():
            if reason := EXPORTERS[format].missing(EXPORTERS[format].reads_with):
                session.say(f"not evaluated: {stage}; reading {format} {reason}")
                continue
            model = stage_model(session, stage)
            done.add(session, done.measure.row(model, stage))
            del model
    run_dir.write_json(
        "evaluation.json",
        {
            "rows": [row.to_json() for row in done.rows],
            "windows": done.measure.count,
            "window": recipe.eval.window,
        },
    )
    keep_files(session, done.measure)
    session.say(table(done.rows))
    if (warning := worse(done.rows)) is not None:
        session.say(warning)
    for stage, format in folders.items():
        replace_file(run_dir / stage, "README.md", card(session, format)["README.md"])
    return done.rows


def keep_files(session: Session, measure: Measure) -> None:
    """What the report shows of the rows so far, into the run."""
    for name, content in measure.files().items():
        if isinstance(content, bytes):
            session.run.write_file(name, content)
        else:
            session.run.write_json(name, content)


def worse(rows: list[EvalRow]) -> str | None:
    """A warning where training made the model worse on the rows of the table; None where it did not. A
    teacher's student may lose on the labels and be nearer to the teacher: that is no loss."""
    by_stage = {row.stage: row for row in rows}
    before, after = by_stage.get("quantized"), by_stage.get("trained")
    if before is None or after is None or before.loss is None or after.loss is None:
        return None
    if after.loss <= before.loss:
        return None
    if before.kl is not None and after.kl is not None and after.kl < before.kl:
        return None
    return (
        f"warning: training made the model worse on the rows of the table: loss {before.loss:.4f} before, "
        f"{after.loss:.4f} after. Are they of the same kind as data.train? Fewer passes over the rows, more "
        "rows or a lower train.learning_rate overfit less; train.keep_best with eval_every keeps the best"
    )


def first_sample(done: Measured) -> str | None:
    """The first prompt of eval.generate, answered before and after, a line each; None without prompts."""
    if not done.samples:
        return None
    lines = {key: " ".join(text.split()) for key, text in done.samples[0].items()}
    cut = {key: text if len(text) <= 160 else f"{text[:157]}..." for key, text in lines.items()}
    return "\n".join(f"{key:>8}: {text}" for key, text in cut.items())
