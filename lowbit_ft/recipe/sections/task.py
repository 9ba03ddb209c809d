"""task: what the model is for, and which other keys mean something beside it.

A task that is no language model has neither chats nor prompts, nothing that writes or compares tokens, and
no key-value cache. What is said here is refused by name, with the way out, before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...data.formats import FORMATS
from ...data.mix import sources_of
from ...data.synthesis import SYNTHESIS
from ...export import EXPORTERS
from ...files.tensorfile import CheckpointError
from ...model.config import load_config, read_config
from ...model.images import read_processor
from ...model.purpose import purpose_of
from ...names import listed
from ...signals import SIGNALS
from ...tasks import TASKS
from ...tasks.labelled import Labelled
from ...tasks.labels import known_labels
from ..layers import local_folder
from ..yaml import KeyPath, Problem
from .base import Problems
from .data import sources_at


def check_formats(r: Any) -> Problems:
    """Windows of text are made by a format; rows with answers have their columns named by the task."""
    task = r.task
    places: list[tuple[KeyPath, Any]] = [
        *sources_at(("data", "train"), r.data.train),
        *sources_at(("data", "valid"), r.data.valid),
    ]
    if hasattr(r, "eval"):
        places += [(("eval", "data"), one) for one in sources_of(r.eval.data)]
    for where, source in places:
        if task.windows and source.media_dir is not None:
            yield Problem(
                (*where, "media_dir"),
                f"got {source.media_dir!r} with task: {task.kind}, whose rows name no files; remove it",
            )
        if task.windows and source.format is None:
            yield Problem((*where, "format"), f"missing; add `format: ...` ({listed(FORMATS)})")
        if not task.windows and source.format is not None:
            yield Problem(
                (*where, "format"),
                f"got {source.format!r} with task: {task.kind}, whose keys name the columns; remove it",
            )


def check_task(r: Any) -> Problems:
    """A checkpoint that is none for the task, and what a task that is no language model does not go with."""
    kind = r.task.kind
    folder = local_folder(r.model.path, r.model.revision)
    if r.task.language:
        if (why := writes_no_text(r.task, folder)) is not None:
            yield Problem(("model", "path"), f"got {r.model.path!r} with task: {kind}: {why}")
        return
    for path, got, why in _strange(r, _config(folder)):
        yield Problem(path, f"got {got!r} with task: {kind}: {why}")
    if (why := _unfit(r.task, folder)) is not None:
        yield Problem(("model", "path"), f"got {r.model.path!r}: {why}")
    elif folder is not None and r.task.reads == "images":
        try:
            read_processor(folder)
        except CheckpointError as error:
            yield Problem(("model", "path"), f"got {r.model.path!r}: {error}")
    elif folder is not None and _pads(folder) is None:
        yield Problem(
            ("model", "path"),
            f"got {r.model.path!r}, whose config.json has no pad_token_id, by which a model for task: {kind} "
            "knows where a row of a batch ends; set it there (to the tokenizer's pad token)",
        )
    if (built := _unattended(r, folder)) is not None:
        yield Problem(
            ("model", "attention"),
            f"got {r.model.attention!r}, and {built} of transformers has no such attention; set eager",
        )
    if isinstance(r.task, Labelled) and r.task.scored and r.eval.perplexity and (reason := r.task.missing()):
        yield Problem(("task", "kind"), f"got {kind!r}, and {reason}; or set eval.perplexity: false")


def _unattended(r: Any, folder: Path | None) -> str | None:
    """The class of the model that has no attention of the recipe's kind; None: none is known."""
    purpose = r.task.purpose(0)
    try:
        return None if folder is None else purpose.without(load_config(folder), r.model.attention)
    except CheckpointError:
        return None  # check_model tells


def writes_no_text(task: Any, folder: Path | None) -> str | None:
    """Why the model of a folder is none that writes text, with the task to set; None where it is one, or
    nothing is known. task: the one that writes text."""
    if folder is None or (why := _unfit(task, folder)) is not None:
        return None if folder is None else why
    import transformers  # slow: seconds

    try:
        config = load_config(folder)
        made = purpose_of(config)
    except CheckpointError:
        return None  # check_model tells
    if made is None or type(config) in getattr(transformers, task.auto)._model_mapping:
        return None
    kinds = [kind for kind, other in TASKS.items() if other.auto == made.auto]
    return f"a {config.architectures[0]} writes no text; set task: {listed(kinds)} (docs/tasks.md)"


def _unfit(task: Any, folder: Path | None) -> str | None:
    config = _config(folder)
    return task.unfit(config) if config else None


def _config(folder: Path | None) -> Mapping[str, Any]:
    """config.json of a folder; {} where it is not known, or cannot be read: check_model tells."""
    try:
        return {} if folder is None else read_config(folder)
    except ValueError:
        return {}


def _pads(folder: Path) -> Any:
    """The padding token of a checkpoint; False where its config.json cannot be read: check_model tells."""
    try:
        return getattr(load_config(folder), "pad_token_id", None)
    except CheckpointError:
        return False


def _unmade(r: Any) -> str | None:
    """Why the model of a task cannot make its rows, and the way out; None where it can."""
    if r.task.labeller(None) is None:
        return "rows with answers cannot be written; remove data.synthesis"
    if r.data.synthesis.reads != r.task.reads:
        fit = [name for name, kind in SYNTHESIS.items() if kind.reads == r.task.reads]
        return f"its rows are {r.task.reads}; set kind: {listed(fit)}"
    folder = local_folder(r.model.path, r.model.revision)
    if folder is None or not (folder / "config.json").is_file():
        return None
    try:
        known, purpose = known_labels(read_config(folder)), purpose_of(load_config(folder))
    except ValueError:
        return None  # check_model tells
    if purpose is None or purpose.auto != r.task.auto or not known:
        return (
            f"{r.model.path} has no head for it yet, so it has no answer to an image; give a checkpoint that "
            "was trained for the task, or rows of your own as data.train"
        )
    if (given := r.task.labels) is not None and (
        len(given) != len(known) or (set(given) == set(known) and list(given) != known)
    ):
        return (
            f"{r.model.path} answers {listed(known[:20])}, in this order, and task.labels says "
            f"{listed(given[:20])}: nothing but rows of your own (data.train) teaches it those; leave labels "
            "out, or give other names for the same ones"
        )
    return None


def _strange(r: Any, config: Mapping[str, Any]) -> Iterator[tuple[KeyPath, Any, str]]:
    """(key, its value, what to do) of the keys that only a language model reads."""
    quant, data, train, ev = r.quant, r.data, r.train, r.eval
    language = "it is for language models"
    if quant.rotation.kind != "none":
        yield ("quant", "rotation", "kind"), quant.rotation.kind, "folds are known of decoders; set none"
    if quant.smooth is not None and not r.task.smooths:
        yield ("quant", "smooth"), quant.smooth, "folds are known of decoders; set null"
    if r.task.reads == "images" and r.model.add_tokens is not None:
        yield ("model", "add_tokens"), r.model.add_tokens.every[:4], "it reads no tokens; set null"
    if r.task.reads == "images" and (data.chat_template is not None or data.chat_template_kwargs):
        yield ("data", "chat_template"), "a template", "it reads no text; remove it and its kwargs"
    if r.task.dtype is not None and r.model.dtype != r.task.dtype:
        yield ("model", "dtype"), r.model.dtype, f"its loss needs more digits; set {r.task.dtype}"
    if quant.reads_text and not r.task.walks(config):
        why = "it walks along a chain of layers, which this model is not; set mse, or absmax"
        yield ("quant", "calibrate"), quant.calibrate, why
    if quant.kv_cache is not None:
        yield ("quant", "kv_cache"), "a cache", "an encoder has none; set null"
    if quant.embeddings is not None and r.task.windows:
        yield ("quant", "embeddings"), quant.embeddings, "they are its decoder too; set null"
    if data.synthesis is not None and (why := _unmade(r)):
        yield ("data", "synthesis", "kind"), data.synthesis.kind, why
    if data.streaming:
        yield ("data", "streaming"), True, "its rows are held in memory; set false"
    if any(getattr(source, "weight", None) is not None for source in sources_of(data.train)):
        yield ("data", "train"), "weights", "its sources are read one after the other; remove them"
    yield from _untaught(r)
    if train.signal.top_k is not None:
        why = "a teacher's answers are compared whole; remove it"
        yield ("train", "signal", "top_k"), train.signal.top_k, why
    if train.signal.on != "targets":
        yield ("train", "signal", "on"), train.signal.on, "its answers are where its labels are; set targets"
    if train.loss != "chunked":
        yield ("train", "loss"), train.loss, f"{language}; set chunked"
    if train.reconstruct is not None:
        yield ("train", "reconstruct"), "a fit", f"{language}; remove it"
    if train.sharding != "none":
        yield ("train", "sharding"), train.sharding, "its model is not cut over processes; set none"
    if train.offload != "no":
        yield ("train", "offload"), train.offload, f"{language}; set no"
    if train.mlp_chunk is not None:
        yield ("train", "mlp_chunk"), train.mlp_chunk, f"{language}; set null"
    if train.compile:
        yield ("train", "compile"), True, "batches of changing lengths are compiled anew each; set false"
    if train.neftune_alpha is not None:
        yield ("train", "neftune_alpha"), train.neftune_alpha, f"{language}; set null"
    if getattr(r.adapter, "segments", "none") != "none" and not r.task.segmented:
        yield ("adapter", "segments"), r.adapter.segments, f"{language}; set none"
    if ev.tasks:
        yield ("eval", "tasks"), ev.tasks[0], "lm-eval measures language models; remove it"
    if ev.generate:
        yield ("eval", "generate"), "prompts", "it writes no text; remove them"
    if (why := EXPORTERS[r.export.format].language_only) is not None:
        yield ("export", "format"), r.export.format, f"{why}; set native, or compressed-tensors"


def _untaught(r: Any) -> Iterator[tuple[KeyPath, Any, str]]:
    """The same of signals, and of what a task has that a teacher's can be compared with."""
    task, train = r.task, r.train
    chosen, signal = train.signal, SIGNALS[train.signal.kind]
    kind, walks = ("train", "signal", "kind"), signal.of_layers and not task.states
    if signal.language:
        yield kind, chosen.kind, "it is for language models; set labels, mix or layers"
    elif signal.asks and not task.taught:
        yield kind, chosen.kind, "its model has no answer that a teacher's could be compared with; set labels"
    elif walks and not task.layered:
        yield kind, chosen.kind, "its layers are none of tokens; set labels, logits or mix"
    elif signal.asks and not walks and train.teacher == "cached":
        why = "it keeps what was said of the tokens of windows; set residual, or a model with this head"
        yield ("train", "teacher"), train.teacher, why
    elif signal.of_layers and not walks:
        if several := [name for name in ("scores", "outputs") if chosen.weights[name]]:
            why = "only its hidden states are compared; set losses: {hidden: 1, scores: 0, outputs: 0}"
            yield ("train", "signal", "losses"), several, why
        if chosen.intervention is not None:
            why = "its layers are no chain that a teacher could be put into; remove it"
            yield ("train", "signal", "intervention"), chosen.intervention.mode, why
    if signal.asks and not task.likely:
        for key, usual in (("temperature", 1.0), ("divergence", "forward")):
            if (got := getattr(chosen, key)) != usual:
                why = f"its answers are numbers, of which the squared error is taken; set {usual}"
                yield ("train", "signal", key), got, why
