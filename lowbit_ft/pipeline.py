"""THE STRAIGHT LINE: load -> quantize -> attach -> train -> merge -> export -> evaluate -> report.

`run` is the whole of it; the other functions are its stages, for the command line. Each stage is one call
into the file of its name in stages/. A stage reads what the one before left in the run folder (rundir.py),
so a run that was stopped goes on where it was: base/ is written as it is packed, mapped into memory, and
reused when it is this very base; training resumes from its newest valid checkpoint, later stages are done
again.

Under torchrun every process trains; only the main one packs, writes, merges and evaluates. One model at a
time is on the device: the trained one is measured and let go before merged/ and the export are read back.
With train.sharding: fsdp the processes share one base while they train (train/sharding.py); after it the main
one reads base/ again and puts what was trained on it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .evaluate.generate import generate as answer
from .evaluate.speak import Drawing
from .evaluate.tasks import load_tasks
from .export.folder import check_if_ours
from .export.reader import load_exported
from .kv_cache import cache_line
from .model.config import load_config
from .model.purpose import purpose_of
from .model.tokenizer import read_tokenizer
from .recipe.recipe import Recipe
from .report.page import write_report
from .rundir import RunDir, shipped
from .session import resume, start
from .stages.card import used_by
from .stages.data import read_data
from .stages.draw import draw_pictures
from .stages.evaluate import first_sample, measure_shipped, measure_trained
from .stages.export import check_export, export_stage, refuse_export
from .stages.merge import compare_merge, merge_stage
from .stages.models import check_folders, trained_model
from .stages.outside import export_outside
from .stages.push import push as push_folder
from .stages.quantize import quantize_stage
from .stages.speak import encode_rows, speak_text
from .stages.speech import Making, Voice, decode_codes, encode_wav
from .stages.student import refuse_other_words
from .stages.synthesis import synthesis_stage
from .stages.tasks import asked_tasks, evaluate_folder, measure_tasks
from .stages.teacher import ready_teacher
from .stages.train import train_stage
from .vector_codes import vector_code


def run(recipe: Recipe) -> Path:
    """The whole line. Returns the folder of the model to serve. RunStopped when a signal ended it early."""
    with start(recipe) as session:
        refuse_other_words(session)
        synthesis_stage(session)
        examples = read_data(session)
        ready_teacher(session, examples)
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
        if (sample := first_sample(measured)) is not None:
            session.say(sample)
        session.say(f"report: {write_report(session.run.path)}")
        session.say(used_by(session, recipe.export.format, folder))
        return folder


def quantize(recipe: Recipe) -> Path:
    """Pack the base into <output>/base and stop there."""
    with start(recipe) as session:
        if recipe.quant.reads_rows and recipe.quant.calibration.path is None:
            synthesis_stage(session)
        quantize_stage(session)
        return session.run / "base"


def train(recipe: Recipe) -> Path:
    """Quantize (or reuse base/), train (or resume), merge. Returns the merged folder."""
    with start(recipe) as session:
        refuse_other_words(session)
        synthesis_stage(session)
        examples = read_data(session)
        ready_teacher(session, examples)
        model = train_stage(session, quantize_stage(session), examples)
        if session.run.main:
            merge_stage(session, model)
        return session.run / "merged"


def merge(run_dir: Path) -> Path:
    """Merge base/ and adapter/; where merged/ is there already, compare with it instead.

    ValueError when it differs from what training wrote on this kind of device. Another kind may round ties
    differently: then the codes that differ are counted, and merged/ stays the one that was trained.
    """
    with resume(run_dir, writes=True) as session:
        check_folders(session, ("base", "adapter", "merged"))
        model = trained_model(session)
        folder = session.run / "merged"
        if not folder.is_dir():
            merge_stage(session, model)
        else:
            compare_merge(session, model, folder)
        return folder


def export(
    run_dir: Path, format: str | None = None, output: Path | None = None, base: Path | None = None
) -> Path:
    """Write the merged model of a run in a format (default: the recipe's) and verify it. Returns the folder.

    A folder that is no run is a packed model, or an adapter over the packed `base`; it is written to `output`
    (stages/outside.py).
    """
    if not (run_dir / "recipe.yaml").is_file():
        return export_outside(run_dir, format, output, base)
    if output is not None or base is not None:
        raise ValueError(
            f"{run_dir} is a run, whose base and place of the export it knows: leave --output and --base out"
        )
    with resume(run_dir, writes=True) as session:
        name = format or session.recipe.export.format
        refuse_export(session, name)
        folder = export_stage(session, name)
        session.say(f"{name}: {folder}")
        session.say(used_by(session, name, folder))
        return folder


def push(folder: Path, repo: str, public: bool = False) -> str:
    """Upload the export of a run, or an exported folder, to the hub; private unless asked. Returns its
    address.
    """
    return push_folder(folder, repo, public)


def verify(folder: Path) -> None:
    """Compare an exported folder of a run with the merged weights next to it. ValueError when anything
    differs.
    """
    with resume(folder.resolve().parent) as session:
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
    with resume(run_dir, writes=True) as session:
        loaded = asked_tasks(session, tasks, stages)
        check_folders(session)
        if not (tasks or stages):
            measured = measure_trained(session, trained_model(session))
            measure_shipped(session, measured)
        measure_tasks(session, loaded, stages, limit)


def generate(folder: Path, prompt: str, max_new_tokens: int = 128, device: str = "auto") -> str:
    """Answer one prompt with an exported model, or with a run's export. device: auto, cpu or cuda."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = shipped(folder)
    check_if_ours(folder)  # before its tokenizer is believed
    if (purpose := purpose_of(load_config(folder))) is not None:
        raise ValueError(
            f"{folder} is for {purpose.auto.removeprefix('AutoModelFor')} and writes no text; its README.md "
            "says how it is asked"
        )
    tokenizer = read_tokenizer(folder)
    model = load_exported(folder, device=device)
    if (line := cache_line(model, model.dtype)) is not None:
        print(line, file=sys.stderr)
    return answer(model, [prompt], max_new_tokens=max_new_tokens, tokenizer=tokenizer)[0]


def draw(folder: Path, output: Path, labels: Sequence[str] = (), **options: Any) -> str:
    """Write a sheet of pictures, by the diffusion transformer of a folder or run; options as draw_pictures
    has them. Returns a line about it."""
    return f"{output}: {draw_pictures(folder, output, labels, **options)} pictures"


def encode(folder: Path, source: Path, output: Path, device: str = "auto", plain: bool = False) -> str:
    """Write the codes of a WAV file, or of rows {audio, text} as rows for a language model (plain: without a
    chat), by the speech codec of a folder or run. Returns a line about them."""
    if output.suffix.lower() == ".jsonl":
        sizes = encode_rows(folder, source, output, plain, device)
        return f"{output}: {len(sizes):,} rows, {min(sizes)} to {max(sizes)} codes, {sum(sizes):,} in all"
    if plain:
        raise ValueError(f"--plain: is of rows (.jsonl), and {output} is of one WAV file; leave it out")
    found = encode_wav(folder, source, output, device)
    seconds, bits = found.samples / found.sample_rate, len(found.codes) * vector_code(found.code).id_bits
    return (
        f"{output}: {len(found.codes)} codes for {seconds:.2f} s, {bits / 8:.0f} bytes of information "
        f"({bits / seconds:.1f} bits a second)"
    )


def decode(
    folder: Path,
    codes: Path,
    output: Path,
    text: str = "",
    prompt: Voice | None = None,
    making: Making | None = None,
    device: str = "auto",
) -> str:
    """Write the speech of a file of codes, by the codec that made them. Returns a line about it."""
    seconds = decode_codes(folder, codes, output, text, prompt, making, device)
    return f"{output}: {seconds:.2f} s"


def speak(
    folder: Path,
    codec: Path,
    text: str,
    output: Path,
    drawing: Drawing | None = None,
    making: Making | None = None,
    prompt: Voice | None = None,
    plain: bool = False,
    codes: Path | None = None,
    device: str = "auto",
) -> str:
    """Write a text as speech: the codes that a language model says, made sound by their codec. Returns a line
    about it."""
    how = drawing or Drawing(), making or Making()
    count, seconds = speak_text(folder, codec, text, output, *how, prompt, plain, codes, device)
    return f"{output}: {count} codes, {seconds:.2f} s"


def report(run_dir: Path) -> Path:
    """Write report.html again from the files of the run."""
    run = RunDir(run_dir)
    run.hold()
    try:
        return write_report(run_dir)
    finally:
        run.close()
