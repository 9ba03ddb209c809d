"""THE STRAIGHT LINE: load -> quantize -> attach -> train -> merge -> export -> evaluate -> report.

`run` is the whole of it; the other functions are its stages, for the command line. Each stage is one call
into the file of its name. A stage reads what the one before left in the run folder (rundir.py), so a run that
was stopped goes on where it was: base/ is written as it is packed, mapped into memory, and reused when it is
this very base; training resumes from its newest valid checkpoint, later stages are done again.

Under torchrun every process trains; only the main one packs, writes, merges and evaluates. One model at a
time is on the device: the trained one is measured and let go before merged/ and the export are read back.
With train.sharding: fsdp the processes share one base while they train (train/sharding.py); after it the main
one reads base/ again and puts what was trained on it.
"""

import gc
import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from . import merge as merging
from .adapters.attach import (
    adapted_layers,
    adapter_state,
    attach,
    base_digest,
    begin_step,
    load_adapter_state,
)
from .adapters.lora import Lora
from .adapters.lora_start import read_lora, start_from_lora
from .data.examples import load_examples
from .data.windows import Examples
from .evaluate.generate import generate as answer
from .evaluate.generate import read_tokenizer
from .evaluate.perplexity import STAGES, EvalRow, Reference, table
from .evaluate.perplexity import evaluate as measure
from .evaluate.tasks import TaskRow, load_tasks, merged_rows, run_tasks
from .evaluate.tasks import table as tasks_table
from .export import EXPORTERS, LayerSpec, Weights
from .export.card import CardFacts, model_card, serve_line
from .export.folder import MANIFEST, check_files, read_manifest
from .export.reader import load_exported, read_config, read_weights
from .export.verify import verify as verify_export
from .export.writer import check_model, replace_file, write_model
from .integrations.adapter_files import read_adapter, refuse_other_base, write_adapter
from .model.attention import why_not
from .model.linear import packed_op_only
from .model.load import Checkpoint, load_model, load_tokenizer
from .model.shards import is_sharded, whole
from .model.walk import Batch
from .quantize.quantize import Packing
from .recipe.recipe import Recipe
from .report import page as report_page
from .rundir import shipped
from .session import (
    Session,
    adapters_off,
    base_key,
    batches,
    calibration_batches,
    dense_device,
    eval_batches,
    load_packed,
    reader_device,
    resume,
    splits_base,
    start,
    unstopped,
    valid_batches,
)
from .train.loop import train as train_model
from .train.memory import release_freed
from .train.processes import main_process_first, world
from .train.sharding import held_by_rank, shard


class RunStopped(Exception):
    """A signal stopped training; everything is saved and the same command goes on."""


def run(recipe: Recipe) -> Path:
    """The whole line. Returns the folder of the model to serve. RunStopped when a signal ended it early."""
    session = start(recipe)
    examples = read_data(session)
    tasks = load_tasks(recipe.eval.tasks) if session.run.main else {}  # before anything that costs hours
    model = train_stage(session, quantize_stage(session), examples)
    if not session.run.main:
        return session.run.path
    merge_stage(session, model)
    measured = measure_trained(session, model)
    del model
    folder = export_stage(session, recipe.export.format)
    measure_shipped(session, measured)
    measure_tasks(session, tasks)
    session.say(f"report: {report_page.write_report(session.run.path)}")
    session.say(serve_line(card_facts(recipe), recipe.export.format, folder))
    return folder


def quantize(recipe: Recipe) -> Path:
    """Pack the base into <output>/base and stop there."""
    session = start(recipe)
    quantize_stage(session)
    return session.run / "base"


def train(recipe: Recipe) -> Path:
    """Quantize (or reuse base/), train (or resume), merge. Returns the merged folder."""
    session = start(recipe)
    examples = read_data(session)
    model = train_stage(session, quantize_stage(session), examples)
    if session.run.main:
        merge_stage(session, model)
    return session.run / "merged"


def merge(run_dir: Path) -> Path:
    """Merge base/ and adapter/; where merged/ is there already, compare with it instead.

    ValueError when it differs from what training wrote on this kind of device. Another kind may round ties
    differently: then the codes that differ are counted, and merged/ stays the one that was trained.
    """
    session = resume(run_dir)
    model = trained_model(session)
    folder = session.run / "merged"
    if not folder.is_dir():
        merge_stage(session, model)
        return folder
    check_files(folder)
    report = merging.verify_merge(model, folder)
    trained_on = str(session.run.read_json("environment.json", {}).get("device", session.device))
    if not report.exact and torch.device(trained_on).type == session.device.type:
        raise ValueError(f"{folder} is not what base/ and adapter/ merge to:\n{report}")
    session.say(report)
    return folder


def export(run_dir: Path, format: str | None = None) -> Path:
    """Write the merged model in a format (default: the recipe's) and verify it. Returns the folder."""
    session = resume(run_dir)
    name = format or session.recipe.export.format
    if name not in EXPORTERS:
        raise ValueError(f"format: got {name!r}; allowed are {', '.join(EXPORTERS)}")
    if not (session.run / "merged").is_dir():
        raise ValueError(f"{run_dir} has no merged model yet; run `lowbit-ft train` on its recipe first")
    if session.recipe.export.verify and (reason := EXPORTERS[name].missing(EXPORTERS[name].reads_with)):
        raise ValueError(
            f"format: {name} is verified through its reader, which {reason}; or set export.verify: false "
            f"in {run_dir}/recipe.yaml"
        )
    folder = export_stage(session, name)
    session.say(f"{name}: {folder}")
    session.say(serve_line(card_facts(session.recipe), name, folder))
    return folder


def verify(folder: Path) -> None:
    """Compare an exported folder of a run with the merged weights next to it. ValueError when anything
    differs.
    """
    session = resume(folder.resolve().parent)
    check_export(session, folder)


def evaluate(
    run_dir: Path, tasks: Sequence[str] = (), stages: Sequence[str] = (), limit: int | None = None
) -> None:
    """The tables of all stages again: perplexity, KL, samples, and the recipe's lm-eval tasks.

    With tasks or stages only tasks are measured: these (default: the recipe's), on these stages (default: all
    that are there). A folder that is no run is one model, whose table is printed. limit: rows of each task
    (default: the recipe's).
    """
    if not (run_dir / "recipe.yaml").is_file():
        return evaluate_folder(run_dir, tasks, limit)
    session = resume(run_dir)
    names = list(tasks) or session.recipe.eval.tasks
    if stages and not names:
        raise ValueError("no task to measure: give --task, or set eval.tasks in the recipe")
    if unknown := [stage for stage in stages if stage not in STAGES]:
        raise ValueError(f"stage: got {unknown[0]!r}; allowed are {', '.join(STAGES)}")
    loaded = load_tasks(names)
    if not (tasks or stages):
        measured = measure_trained(session, trained_model(session))
        measure_shipped(session, measured)
    measure_tasks(session, loaded, stages, limit)


def generate(folder: Path, prompt: str, max_new_tokens: int = 128, device: str = "auto") -> str:
    """Answer one prompt with an exported model, or with a run's export. device: auto, cpu or cuda."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = shipped(folder)
    tokenizer = read_tokenizer(folder)
    model = load_exported(folder, device=device)
    return answer(model, [prompt], max_new_tokens=max_new_tokens, tokenizer=tokenizer)[0]


def report(run_dir: Path) -> Path:
    """Write report.html again from the files of the run."""
    return report_page.write_report(run_dir)


# ------------------------------------------------------------------------------------------------ the stages


def quantize_stage(session: Session) -> Any:
    """The packed model: from base/ when it was made from this checkpoint with these settings, else packed now
    and kept.
    """
    recipe, run_dir = session.recipe, session.run
    key, folder = base_key(session), run_dir / "base"
    # A base that is about to be cut waits on the CPU, so that no device has to hold it whole.
    place = "cpu" if splits_base(recipe) else None
    with run_dir.stage("quantize", session.device, resumable=True), main_process_first():
        stored = run_dir.read_json("base.json", {})
        if stored.get("key") == key and folder.is_dir():
            try:
                check_files(folder)
                session.say(f"base: reusing {folder}")
                return load_packed(folder, session, place)
            except ValueError as error:
                session.say(f"base: {error}\nbase: packing it again")
                shutil.rmtree(folder)
        pack_base(session, folder)
        model = load_packed(folder, session, place)
        run_dir.write_json("base.json", {"key": key, "digest": base_digest(model)})
    return model


def pack_base(session: Session, folder: Path) -> None:
    """base/, written layer by layer as it is packed: neither the checkpoint nor the packed model is ever
    whole in memory.
    """
    recipe, run_dir = session.recipe, session.run
    run_dir.write_json("base.json", {})  # a folder that is being replaced belongs to no key
    packing = Packing(
        session.checkpoint,
        recipe.quant,
        device=session.device,
        dtype=session.dtype,
        attention=recipe.model.attention,
        calibration=lambda: calibration_batches(session),
    )
    weights = Weights({name: LayerSpec(*spec) for name, spec in packing.specs.items()}, packing.take)
    write_model(folder, session.checkpoint, weights, EXPORTERS["native"])
    session.say(packing.table)
    run_dir.write_json("quant.json", packing.table.to_json())


def read_data(session: Session) -> Examples:
    """The training windows. Before anything is quantized: a malformed row should not cost the hours that came
    before it.
    """
    recipe = session.recipe
    examples = load_examples(recipe.data.train, recipe.data, session.tokenizer, seed=recipe.train.seed)
    session.say(f"data: {examples.report}")
    if warning := unstopped(session):
        session.say(f"note: {warning}")
    if recipe.data.valid is not None:
        load_examples(
            recipe.data.valid, recipe.data.model_copy(update={"streaming": False}), session.tokenizer
        )
    return examples


def train_stage(session: Session, model: Any, examples: Examples) -> Any:
    """Attach and train; writes adapter/. Returns the trained model, whole, on the main process and None on
    the others. RunStopped when a signal ended it before the last step."""
    recipe, run_dir = session.recipe, session.run
    torch.manual_seed(recipe.train.seed)
    rows = attach(model, recipe.adapter, lambda layer: session.checkpoint.matrix(layer, dtype=torch.float32))
    run_dir.write_json("trainable.json", rows.to_json())
    session.say(rows)
    if folder := getattr(recipe.adapter, "init_from", None):
        started = start_from_lora(model, recipe.adapter, read_lora(folder))
        run_dir.write_json("lora_start.json", started.to_json())
        session.say(started)
    # Before hours of training, not after: can the format hold what this will become?
    check_model(session.checkpoint, merging.merged_weights(model).specs, EXPORTERS[recipe.export.format])
    digest = base_digest(model)
    split = splits_base(recipe)
    if split:
        shard(model, session.device)
    if world() > 1:
        ranks = held_by_rank(model, session.device)
        run_dir.write_json(
            "processes.json", {"type": "FSDP2" if is_sharded(model) else "DDP", "ranks": ranks}
        )
        parts = ", ".join(f"{r['base'] / 1e9:.6f}" for r in ranks)
        session.say(
            f"packed base of {ranks[0]['whole_base'] / 1e9:.6f} GB, held by {len(ranks)} "
            f"processes: {parts} GB"
        )
    with run_dir.stage("train", session.device, resumable=True):
        result = train_model(
            model,
            batches(session, model, examples, recipe.train.micro_batch_size, shuffle=True),
            valid_batches(session, model),
            recipe.train,
            run_dir.path,
            meta={"base": digest, "adapter": recipe.adapter.model_dump(mode="json")},
            resume=True,
            on_step=partial(begin_step, model),
            choose_after=getattr(recipe.adapter, "warmup_steps", 0),
            console=session.console,
        )
    if result.stopped:
        raise RunStopped(
            f"stopped at step {result.steps}; everything is saved. The same command goes on from there"
        )
    state = {
        key: whole(tensor) for key, tensor in adapter_state(model).items()
    }  # by all processes, for the one that writes
    if not run_dir.main:
        return None
    write_adapter(run_dir / "adapter", state, recipe.adapter, digest, run_dir / "base")
    if not split:
        return model
    del model, state  # shards make room for the whole base; hooks tie them into cycles
    gc.collect()
    release_freed()
    return trained_model(session)


def merge_stage(session: Session, model: Any) -> None:
    """merged/: the codes and scales of the last forward, on the device that trained them; and what training
    moved.
    """
    with session.run.stage("merge", session.device):
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="lora: the merge rounds again"
            )  # said below, with its size
            merging.merge(
                model, session.checkpoint, session.run / "merged", extra_files=card(session, "native")
            )
            session.run.write_json("moved.json", merging.moved(model))
        losses = [
            layer.adapter.rounding_loss
            for _, layer in adapted_layers(model)
            if isinstance(layer.adapter, Lora)
        ]
        if losses:
            mean = sum(loss or 0.0 for loss in losses) / len(losses)
            session.say(
                f"lora was merged by rounding again: the rounding error is {mean:.1f} times the size of "
                "what was trained"
            )


def export_stage(session: Session, name: str) -> Path:
    """exported/: the merged integers in the format of a server, reloaded through its reader and compared. The
    native format is merged/ itself."""
    folder = session.run / ("merged" if name == "native" else "exported")
    with session.run.stage("export", session.device):
        if name != "native":
            before = read_manifest(folder)["format"] if (folder / MANIFEST).is_file() else name
            merged = read_weights(session.run / "merged")
            write_model(folder, session.checkpoint, merged, EXPORTERS[name], extra_files=card(session, name))
            if before != name and session.run.main:
                print(f"{folder}: the {before} export that was here is replaced by {name}", file=sys.stderr)
        if session.recipe.export.verify:
            try:
                check_export(session, folder)
            except BaseException as error:
                if name == "native":  # merged/ is what was trained, not a copy of it
                    raise
                refused = set_aside(folder)
                if isinstance(error, ValueError):
                    raise ValueError(
                        f"{error}\n{folder} was not verified and is no model to serve; what was written is "
                        f"in {refused}"
                    ) from error
                raise
    return folder


def set_aside(folder: Path) -> Path:
    """Rename a folder that failed to <name>.refused, instead of one that failed before. Nothing takes it for
    a model of the run.
    """
    refused = folder.with_name(f"{folder.name}.refused")
    if refused.exists():
        shutil.rmtree(refused)
    return folder.rename(refused)


def check_export(session: Session, folder: Path) -> None:
    """Compare a folder with merged/, through the format's own reader: files, codes, scales, weights,
    logits.
    """
    merged = session.run / "merged"
    device = reader_device(folder, session)
    session.say(
        verify_export(
            folder,
            read_weights(merged),
            model=lambda: load_packed(merged, session),
            dtype=session.dtype,
            device=device,
            source=session.checkpoint.folder,
        )
    )
    release_freed()


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
                done.rows.append(measure(model, done.data, "quantized", done.reference))
            done.rows.append(measure(model, done.data, "trained", done.reference))
        if prompts := recipe.eval.generate:
            options = {"max_new_tokens": recipe.eval.max_new_tokens, "tokenizer": session.tokenizer}
            with packed_op_only(model):  # before and after on one path, whatever decoding would take
                with adapters_off(model):
                    before = answer(model, prompts, **options)
                after = answer(model, prompts, **options)
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
            done.rows.append(measure(model, done.data, stage, done.reference))
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


def measure_tasks(
    session: Session, tasks: dict[str, Any], stages: Sequence[str] = (), limit: int | None = None
) -> None:
    """lm-eval tasks on one stage after another, each alone in memory; into tasks.json and the model cards."""
    if not tasks or not tasks["tasks"]:
        return
    recipe, run_dir = session.recipe, session.run
    stages = stages or ("base", "quantized", "trained", shipped(run_dir.path).name)
    if "exported" in stages and (run_dir / "exported").is_dir():
        refuse_tasks(run_dir / "exported")
    rows = [TaskRow(**row) for row in run_dir.read_json("tasks.json", {}).get("rows", [])]
    with run_dir.stage("tasks", session.device):
        for stage in stages:
            model = stage_model(session, stage)
            new = run_tasks(
                model,
                session.tokenizer,
                tasks,
                stage,
                limit=limit or recipe.eval.task_limit,
                max_length=max(2048, recipe.data.sequence_len),
            )
            del model
            release_freed()
            rows = merged_rows(rows, new)
            run_dir.write_json(
                "tasks.json", {"lm_eval": version("lm-eval"), "rows": [row.to_json() for row in rows]}
            )
    session.say(tasks_table(rows))
    for stage in ("merged", "exported"):
        if (run_dir / stage).is_dir():
            replace_file(
                run_dir / stage,
                "README.md",
                card(session, read_manifest(run_dir / stage)["format"])["README.md"],
            )


def evaluate_folder(folder: Path, tasks: Sequence[str], limit: int | None) -> None:
    """lm-eval tasks on a model folder of any of our formats (or a plain one), in its own dtype; printed."""
    if not tasks:
        raise ValueError(
            f"{folder} is not the folder of a run (no recipe.yaml in it); to measure a "
            "model folder give --task"
        )
    refuse_tasks(folder)
    loaded = load_tasks(tasks)
    model = load_exported(folder, device="cuda" if torch.cuda.is_available() else "cpu")
    print(
        tasks_table(
            run_tasks(
                model, load_tokenizer(Checkpoint.open(folder, check=False)), loaded, folder.name, limit=limit
            )
        )
    )


def refuse_tasks(folder: Path) -> None:
    """ValueError for a folder whose reader is not transformers, which is what lm-eval measures."""
    if (read_config(folder).get("quantization_config") or {}).get("quant_method") == "mlx":
        raise ValueError(
            f"{folder}: lm-eval cannot measure an mlx folder; measure merged/ of its run (--stage merged), "
            "the equal model"
        )


def stage_model(session: Session, stage: str) -> Any:
    """The model of one stage, in the session's dtype. ValueError when the run has not come that far."""
    run_dir = session.run
    if stage == "base":
        device = dense_device(session, "the full-precision model")
        return load_model(session.checkpoint, session.recipe.model.attention, device, session.dtype).eval()
    if stage == "trained":
        return trained_model(session)
    folder = run_dir / ("base" if stage == "quantized" else stage)
    if not folder.is_dir():
        raise ValueError(f"{run_dir.path} has no {folder.name}/ yet, so there is no {stage} model to measure")
    if stage == "quantized":
        return load_packed(folder, session)
    return load_exported(
        folder,
        dtype=session.dtype,
        device=reader_device(folder, session),
        attention=session.recipe.model.attention,
    )


def trained_model(session: Session) -> Any:
    """base/ with adapter/ on it. ValueError when the run has not trained, or the adapter belongs to another
    base.
    """
    run_dir = session.run
    if not (run_dir / "adapter").is_dir():
        raise ValueError(f"{run_dir.path} has no adapter yet; run `lowbit-ft train` on its recipe first")
    model = load_packed(run_dir / "base", session)
    config, state, digest = read_adapter(run_dir / "adapter")
    refuse_other_base(base_digest(model), digest, str(run_dir / "adapter"))
    # The start does not matter, every tensor is about to be replaced.
    attach(
        model, config.model_copy(update={"init": "zero"}) if "init" in type(config).model_fields else config
    )
    load_adapter_state(model, state)
    return model.eval()


def card_facts(recipe: Recipe) -> CardFacts:
    """What the model card and the last line of a run say of the recipe."""
    adapter = recipe.adapter
    grid = adapter.shipped(recipe.quant.grid_for(""))
    return CardFacts(
        recipe.name, recipe.model.path, adapter.method, adapter.exact_merge, grid, recipe.to_yaml()
    )


def card(session: Session, format: str) -> dict[str, str]:
    """README.md with the table as far as it has been measured."""
    rows = [EvalRow(**row) for row in session.run.read_json("evaluation.json", {}).get("rows", [])]
    tasks = [TaskRow(**row) for row in session.run.read_json("tasks.json", {}).get("rows", [])]
    return {"README.md": model_card(card_facts(session.recipe), format, rows, tasks)}
