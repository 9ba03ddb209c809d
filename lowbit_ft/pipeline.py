"""THE STRAIGHT LINE: load -> quantize -> attach -> train -> merge -> export -> evaluate -> report.

`run` is the whole of it; the other functions are its stages, for the command line. Each stage is one call into the file of its
name. A stage reads what the one before left in the run folder (rundir.py), so a run that was stopped goes on where it was:
base/ is reused when it is this very base, training resumes from its newest valid checkpoint, later stages are done again.

Under torchrun every process trains; only the main one packs, writes, merges and evaluates.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import merge as merging
from . import report as report_page
from .adapters.lora import Lora
from .attach import adapted_layers, attach, base_digest, begin_step, load_adapter_state
from .card import model_card
from .data import Batches, Examples, keeps_segments_apart, load_examples
from .evaluate import EvalRow, Reference, table
from .evaluate import evaluate as measure
from .export import EXPORTERS
from .export.reader import load_exported, read_weights
from .export.verify import verify as verify_export
from .export.writer import replace_file, write_model
from .generate import generate as answer
from .integrations.adapter_files import read_adapter, refuse_other_base, write_adapter
from .load import Checkpoint, load_tokenizer
from .processes import join, main_process_first, rank, world
from .quantize import quantize as quantize_model
from .recipe import DataSource, Recipe
from .rundir import RunDir
from .train import train as train_model
from .walk import Batch


@dataclass
class Session:
    """What every stage needs: the recipe, its run folder, the checkpoint and its tokenizer, and where to compute."""

    recipe: Recipe
    run: RunDir
    checkpoint: Checkpoint
    tokenizer: Any
    device: torch.device
    console: Console

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.recipe.model.dtype)

    def say(self, text: object) -> None:
        if self.run.main:
            self.console.print(str(text), highlight=False, soft_wrap=True, markup=False)


def run(recipe: Recipe) -> Path:
    """The whole line. Returns the folder of the model to serve."""
    session = start(recipe)
    model = quantize_stage(session)
    stopped = train_stage(session, model)
    if stopped or not session.run.main:
        return session.run.path
    merge_stage(session, model)
    folder = export_stage(session, recipe.export.format)
    evaluate_stage(session, model)
    page = report_page.write_report(session.run.path)
    session.say(f"report: {page}")
    session.say(f"serve it: {EXPORTERS[recipe.export.format].serve(str(folder))}")
    return folder


def quantize(recipe: Recipe) -> Path:
    """Pack the base into <output>/base and stop there."""
    session = start(recipe)
    quantize_stage(session)
    return session.run / "base"


def train(recipe: Recipe) -> Path:
    """Quantize (or reuse base/), train (or resume), merge. Returns the merged folder."""
    session = start(recipe)
    model = quantize_stage(session)
    if not train_stage(session, model) and session.run.main:
        merge_stage(session, model)
    return session.run / "merged"


def merge(run_dir: Path) -> Path:
    """Merge base/ and adapter/ again and compare with what training merged: codes that differ are counted and named."""
    session = resume(run_dir)
    model = trained_model(session)
    if (session.run / "merged").is_dir():
        session.say(merging.verify_merge(model, session.run / "merged"))
    else:
        merge_stage(session, model)
    return session.run / "merged"


def export(run_dir: Path, format: str | None = None) -> Path:
    """Write the merged model in a format (default: the recipe's) and verify it. Returns the folder."""
    session = resume(run_dir)
    name = format or session.recipe.export.format
    if name not in EXPORTERS:
        raise ValueError(f"format: got {name!r}; allowed are {', '.join(EXPORTERS)}")
    folder = export_stage(session, name)
    session.say(f"serve it: {EXPORTERS[name].serve(str(folder))}")
    return folder


def verify(folder: Path) -> None:
    """Compare an exported folder of a run with the merged weights next to it. ValueError when anything differs."""
    session = resume(folder.parent)
    check_export(session, folder)


def evaluate(run_dir: Path) -> list[EvalRow]:
    """The table of all stages again, and the samples."""
    session = resume(run_dir)
    return evaluate_stage(session, trained_model(session))


def generate(folder: Path, prompt: str, max_new_tokens: int = 128) -> str:
    """Answer one prompt with an exported model, or with a run's export."""
    if (folder / "recipe.yaml").is_file():
        exported = folder / "exported"
        folder = exported if exported.is_dir() else folder / "merged"
    return answer(folder, [prompt], max_new_tokens=max_new_tokens)[0]


def report(run_dir: Path) -> Path:
    """Write report.html again from the files of the run."""
    return report_page.write_report(run_dir)


# ------------------------------------------------------------------------------------------------ the stages


def start(recipe: Recipe) -> Session:
    """Open the checkpoint and the run folder; nothing is loaded yet."""
    device = pick_device(recipe)
    main = join(device)
    checkpoint = Checkpoint.open(recipe.model.path, recipe.model.revision, recipe.model.dtype)
    run_dir = RunDir.start(recipe, main)
    session = Session(recipe, run_dir, checkpoint, load_tokenizer(checkpoint), device, Console())
    session.say(f"{recipe.name}: {recipe.model.path} ({checkpoint.revision or 'local'}) on {device}, {recipe.model.dtype}")
    return session


def resume(run_dir: Path) -> Session:
    """The session of a run that is there."""
    return start(RunDir(run_dir).recipe().model_copy(update={"output": Path(run_dir)}))


def quantize_stage(session: Session) -> Any:
    """The packed model: from base/ when it was made from this checkpoint with these settings, else packed now and kept."""
    recipe, run_dir = session.recipe, session.run
    key = base_key(session)
    with run_dir.stage("quantize", session.device), main_process_first():
        if run_dir.read_json("base.json", {}).get("key") == key:
            session.say(f"base: reusing {run_dir / 'base'}")
            return load_packed(run_dir / "base", session)
        model, rows = quantize_model(
            session.checkpoint, recipe.quant, device=session.device, dtype=session.dtype,
            attention=recipe.model.attention, calibration=lambda: calibration_batches(session),
        )  # fmt: skip
        session.say(rows)
        run_dir.write_json("quant.json", rows.to_json())
        write_model(run_dir / "base", session.checkpoint, merging.base_weights(model), EXPORTERS["native"])
        run_dir.write_json("base.json", {"key": key, "digest": base_digest(model)})
    return model


def calibration_batches(session: Session) -> list[Batch]:
    """Token windows for gptq: quant.calibration.path, or the training rows."""
    recipe, wanted = session.recipe, session.recipe.quant.calibration
    source = recipe.data.train
    if wanted.path is not None:
        kind = "text" if Path(wanted.path).suffix == ".txt" else recipe.data.train.format
        source = DataSource(path=wanted.path, format=kind)
    section = recipe.data.model_copy(update={"sequence_len": wanted.sequence_len, "train_on": "all", "streaming": False})
    windows = load_examples(source, section, session.tokenizer, seed=recipe.train.seed)
    count = min(wanted.samples, len(windows))
    size = max(1, 4096 // wanted.sequence_len)
    batches = Batches(windows, size, pad_id(session), recipe.train.seed)
    return [without_labels(next(batches)) for _ in range(-(-count // size))]


def train_stage(session: Session, model: Any) -> bool:
    """Attach and train; writes adapter/. True when a signal stopped it before the end (start the same command to go on)."""
    recipe, run_dir = session.recipe, session.run
    torch.manual_seed(recipe.train.seed)
    rows = attach(model, recipe.adapter, lambda layer: session.checkpoint.weight_for(f"{layer}.weight", dtype=torch.float32))
    run_dir.write_json("trainable.json", rows.to_json())
    session.say(rows)
    examples = load_examples(recipe.data.train, recipe.data, session.tokenizer, seed=recipe.train.seed)
    session.say(f"data: {examples.report}")
    digest = base_digest(model)
    with run_dir.stage("train", session.device):
        result = train_model(
            model,
            batches(session, model, examples, recipe.train.micro_batch_size, shuffle=True),
            valid_batches(session, model),
            recipe.train,
            run_dir.path,
            meta={"base": digest, "adapter": recipe.adapter.model_dump(mode="json")},
            resume=True,
            on_step=lambda step: begin_step(model, step),
            console=session.console,
        )
    if result.stopped:
        session.say(f"stopped at step {result.steps}; everything is saved. The same command goes on from there")
        return True
    begin_step(model, result.steps)
    if run_dir.main:
        write_adapter(run_dir / "adapter", model, recipe.adapter, digest, run_dir / "base")
    return False


def merge_stage(session: Session, model: Any) -> None:
    """merged/: the codes and scales of the last forward, on the device that trained them; and what training moved."""
    with session.run.stage("merge", session.device):
        merging.merge(model, session.checkpoint, session.run / "merged", extra_files=card(session, "native"))
        session.run.write_json("moved.json", merging.moved(model))
        losses = [layer.adapter.rounding_loss for _, layer in adapted_layers(model) if isinstance(layer.adapter, Lora)]
        if losses:
            mean = sum(loss or 0.0 for loss in losses) / len(losses)
            session.say(f"lora was merged by rounding again: the rounding error is {mean:.1f} times the size of what was trained")


def export_stage(session: Session, name: str) -> Path:
    """exported/: the merged integers in the format of a server, reloaded through its reader and compared."""
    folder = session.run / ("merged" if name == "native" else "exported")
    with session.run.stage("export", session.device):
        if name != "native":
            merged = read_weights(session.run / "merged")
            write_model(folder, session.checkpoint, merged, EXPORTERS[name], extra_files=card(session, name))
        if session.recipe.export.verify:
            check_export(session, folder)
    return folder


def check_export(session: Session, folder: Path) -> None:
    """Compare a folder with merged/, through the format's own reader: files, codes, scales, weights, logits."""
    merged = session.run / "merged"
    packed = load_packed(merged, session)
    session.say(
        verify_export(folder, read_weights(merged), model=packed, dtype=session.dtype, device=str(session.device))
    )


def evaluate_stage(session: Session, model: Any) -> list[EvalRow]:
    """One table for base, quantized, trained, merged and exported; then answers before and after."""
    recipe, run_dir = session.recipe, session.run
    rows: list[EvalRow] = []
    with run_dir.stage("evaluate", session.device):
        if recipe.eval.perplexity:
            data = eval_batches(session, model)
            reference = None
            if recipe.eval.kl:
                reference = Reference(
                    session.checkpoint, data, attention=recipe.model.attention, device=session.device, dtype=session.dtype
                )
                rows.append(reference.row())
            with adapters_off(model):
                rows.append(measure(model, data, "quantized", reference))
            rows.append(measure(model, data, "trained", reference))
            for stage in ("merged", "exported"):
                if (run_dir / stage).is_dir():
                    loaded = load_packed(run_dir / stage, session)
                    rows.append(measure(loaded, data, stage, reference))
                    del loaded
            run_dir.write_json("evaluation.json", {
                "rows": [row.to_json() for row in rows], "windows": sum(len(b["labels"]) for b in data), "window": recipe.eval.window,
            })  # fmt: skip
            session.say(table(rows))
            for stage, format in (("merged", "native"), ("exported", recipe.export.format)):
                if (run_dir / stage).is_dir():
                    replace_file(run_dir / stage, "README.md", model_card(recipe, format, rows))
        if recipe.eval.generate:
            run_dir.write_json("samples.json", samples(session, model))
    return rows


def samples(session: Session, model: Any) -> list[dict[str, str]]:
    """The recipe's prompts answered by the quantized base and by the trained model."""
    prompts, tokens = session.recipe.eval.generate, session.recipe.eval.max_new_tokens
    with adapters_off(model):
        before = answer(model, prompts, max_new_tokens=tokens, tokenizer=session.tokenizer)
    after = answer(model, prompts, max_new_tokens=tokens, tokenizer=session.tokenizer)
    return [{"prompt": p, "before": b, "after": a} for p, b, a in zip(prompts, before, after, strict=True)]


# ------------------------------------------------------------------------------------------------ small things


def trained_model(session: Session) -> Any:
    """base/ with adapter/ on it. ValueError when the run has not trained, or the adapter belongs to another base."""
    run_dir = session.run
    if not (run_dir / "adapter").is_dir():
        raise ValueError(f"{run_dir.path} has no adapter yet; run `lowbit-ft train` on its recipe first")
    model = load_packed(run_dir / "base", session)
    config, state, digest = read_adapter(run_dir / "adapter")
    refuse_other_base(base_digest(model), digest, str(run_dir / "adapter"))
    attach(model, config, lambda layer: session.checkpoint.weight_for(f"{layer}.weight", dtype=torch.float32))
    load_adapter_state(model, state)
    begin_step(model, 1 << 62)  # past any warm-up
    return model.eval()


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """The quantized base alone."""
    held = [(layer, layer.adapter) for _, layer in adapted_layers(model)]
    for layer, _ in held:
        layer.adapter = None
    try:
        yield
    finally:
        for layer, adapter in held:
            layer.adapter = adapter


def card(session: Session, format: str) -> dict[str, str]:
    """README.md as it stands before the measurements."""
    return {"README.md": model_card(session.recipe, format, [])}


def base_key(session: Session) -> str:
    """What the base is made of: the checkpoint's files and the quant section."""
    facts = {
        "quant": session.recipe.quant.model_dump(mode="json"),
        "files": session.checkpoint.fingerprint(),
        "calibration": session.recipe.data.train.model_dump(mode="json") if session.recipe.quant.calibrate == "gptq" else None,
        "seed": session.recipe.train.seed if session.recipe.quant.calibrate == "gptq" else None,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def load_packed(folder: Path, session: Session) -> Any:
    """A folder of any of our formats through its reader, on the session's device and in its dtype."""
    return load_exported(
        folder, dtype=session.dtype, device=str(session.device), attention=session.recipe.model.attention
    )


def batches(session: Session, model: Any, examples: Examples, size: int, *, shuffle: bool, evaluating: bool = False) -> Batches:
    """Micro-batches for this process; with an explicit mask where the model does not keep packed segments apart by itself."""
    packed_apart = keeps_segments_apart(model, size)
    return Batches(
        examples, size, pad_id(session), session.recipe.train.seed, rank=0 if evaluating else rank(), world=1 if evaluating else world(),
        shuffle=shuffle, mask_dtype=None if packed_apart else session.dtype,
    )  # fmt: skip


def valid_batches(session: Session, model: Any) -> Batches | None:
    """data.valid for the losses during training; None when the recipe has none."""
    data = session.recipe.data
    if data.valid is None:
        return None
    examples = load_examples(data.valid, data.model_copy(update={"streaming": False}), session.tokenizer)
    return batches(session, model, examples, session.recipe.train.micro_batch_size, shuffle=False)


def eval_batches(session: Session, model: Any) -> list[Batch]:
    """The windows of the table: eval.data, or data.valid, or the training rows; at most eval.windows of eval.window tokens."""
    recipe = session.recipe
    source = recipe.eval.data or recipe.data.valid or recipe.data.train
    section = recipe.data.model_copy(update={"sequence_len": recipe.eval.window, "streaming": False})
    examples = load_examples(source, section, session.tokenizer)
    chosen = Examples(examples[: recipe.eval.windows])
    size = max(1, min(len(chosen), 4096 // recipe.eval.window))
    return list(batches(session, model, chosen, size, shuffle=False, evaluating=True).one_epoch())


def pad_id(session: Session) -> int:
    """The tokenizer's padding token; pads are never targets, so the end-of-text token or 0 does as well."""
    return next((i for i in (session.tokenizer.pad_token_id, session.tokenizer.eos_token_id) if i is not None), 0)


def without_labels(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name != "labels"}


def pick_device(recipe: Recipe) -> torch.device:
    """auto is the GPU when there is one; under torchrun each process takes its own."""
    wanted = recipe.model.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("model.device: cuda, but torch sees no GPU here; set model.device: cpu (or auto)")
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if wanted == "cuda" else "cpu")
