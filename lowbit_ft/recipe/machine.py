"""Checks of a recipe against the disk and the machine: data files, GPU, installed packages, the run folder.

The checks of check.py that need no knowledge of grids and methods; same form: sections in, Problems
out.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..evaluate.tasks import task_problems
from ..files.atomic import visible_names
from ..names import did_you_mean
from ..train.compiling import missing_compiler
from ..train.losses import LOSSES
from ..train.optimizers import OPTIMIZERS
from ..train.schedulers import SCHEDULERS
from ..train.sharding import unshardable
from .yaml import KeyPath, Problem

RUN_FILES = {
    "recipe.yaml",
    "environment.json",
    "metrics.jsonl",
    "base",
    "checkpoints",
    "adapter",
    "merged",
    "report.html",
}
DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt", ".gz", ".zst", ".arrow", ".md")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
Problems = Iterator[Problem]


def check_data(r: Any) -> Problems:
    """Data files that do not exist."""
    sources: list[tuple[KeyPath, Any]] = []
    if hasattr(r, "data"):
        sources += [(("data", "train"), r.data.train), (("data", "valid"), r.data.valid)]
    if hasattr(r, "eval"):
        sources.append((("eval", "data"), r.eval.data))
    if hasattr(r, "quant"):
        sources.append((("quant", "calibration"), r.quant.calibration))
    for where, source in sources:
        path = source.path if source is not None else None
        if path is None or path_is(Path(path).expanduser(), "any") or path.startswith("hf://"):
            continue
        if any(character in path for character in "*?["):
            if not _globs(path):
                yield Problem(
                    (*where, "path"),
                    f"got {path!r}; no file matches{near_names(Path(path))}; check the "
                    "folder and the pattern",
                )
        elif (
            path.lower().endswith(DATA_SUFFIXES)
            or not HUB_ID.fullmatch(path)
            or path.startswith(("http:", "https:"))
        ):
            yield Problem(
                (*where, "path"),
                f"got {path!r}; there is no such file{near_names(Path(path))}; give a file, "
                "glob, folder or hub id",
            )


def check_train(r: Any) -> Problems:
    """Training options that need something else: a validation set, a known length, a package."""
    train = r.train
    package = OPTIMIZERS[train.optimizer].package
    if package is not None and importlib.util.find_spec(package) is None:
        message = (
            f"got {train.optimizer!r}, from {package}, which is not installed; run pip install "
            f"{package}, or set adamw"
        )
        yield Problem(("train", "optimizer"), message)
    if reasons := LOSSES[train.loss].problems(r):
        yield Problem(
            ("train", "loss"),
            f"got {train.loss!r}, but {'; '.join(reasons)}; set loss: chunked, which holds as little",
        )
    if train.sharding == "fsdp":
        for key, message in unshardable(train, getattr(r, "adapter", None)):
            yield Problem(key, f"got {message}")
    config = getattr(r, "adapter", None)
    if train.keep_codes and config is not None and not config.rounds_codes:
        yield Problem(
            ("train", "keep_codes"),
            f"got true, but {config.method} rounds nothing while it trains: there are no codes to keep; remove it",
        )
    if r.data.streaming and train.max_steps is None:
        yield Problem(
            ("train", "epochs"),
            f"got {train.epochs:g} with data.streaming, whose length is unknown; set train.max_steps",
        )
    if train.eval_every is not None and r.data.valid is None:
        yield Problem(
            ("train", "eval_every"),
            f"got {train.eval_every}, but there is no data.valid; add data.valid or set eval_every: null",
        )
    if train.keep_best and train.eval_every is None:
        yield Problem(
            ("train", "keep_best"), "got true, but nothing is evaluated while training; set train.eval_every"
        )
    if wrong := SCHEDULERS[train.scheduler].problem(train):
        yield Problem(("train", wrong[0]), wrong[1])
    for i, tracker in enumerate(train.trackers):
        package = "tensorboard" if tracker == "tensorboard" else tracker
        if importlib.util.find_spec(package) is None:
            yield Problem(
                ("train", "trackers", i),
                f"got {tracker!r}, which is not installed; run pip install {package}, or remove it",
            )


def check_tasks(r: Any) -> Problems:
    """lm-eval tasks: the package, names it does not know, files that are not there."""
    for i, text in task_problems(r.eval.tasks):
        yield Problem(("eval", "tasks", i), text)


def check_device(r: Any) -> Problems:
    """dtype, attention and device against this machine."""
    import torch

    model = r.model
    cuda = torch.cuda.is_available()
    if model.device == "cuda" and not cuda:
        yield Problem(
            ("model", "device"),
            "got 'cuda', but PyTorch sees no GPU here; allowed: auto, cpu; check nvidia-smi or set auto",
        )
        return
    on_gpu = cuda and model.device != "cpu"
    mixed = r.train.mixed_precision if hasattr(r, "train") else "no"
    if (
        on_gpu
        and "bf16" in (mixed, "bf16" if model.dtype == "bfloat16" else "")
        and not torch.cuda.is_bf16_supported(False)
    ):
        path = ("train", "mixed_precision") if mixed == "bf16" else ("model", "dtype")
        name = torch.cuda.get_device_name()
        yield Problem(
            path, f"got bf16, which {name} does not have; allowed: float16, float32; set model.dtype: float16"
        )
    if not on_gpu and (mixed == "fp16" or model.dtype == "float16"):
        path = ("train", "mixed_precision") if mixed == "fp16" else ("model", "dtype")
        yield Problem(
            path,
            "got fp16 on a CPU, where training in it overflows; allowed: bfloat16, float32; set "
            "model.dtype: float32",
        )
    if model.attention == "flex_attention" and not on_gpu:
        yield Problem(
            ("model", "attention"),
            "got 'flex_attention', whose backward PyTorch has on GPUs only; allowed here: sdpa (packed "
            "windows segment by segment, without a "
            "mask, on every device), eager; set sdpa",
        )
    if hasattr(r, "train") and r.train.compile:
        if missing := missing_compiler(on_gpu):
            yield Problem(
                ("train", "compile"), f"got true, which needs {missing}; install it, or set compile: false"
            )
    if model.attention == "flash_attention_2":
        if not on_gpu or importlib.util.find_spec("flash_attn") is None:
            why = "there is no GPU" if not on_gpu else "the package flash-attn is not installed"
            yield Problem(
                ("model", "attention"),
                f"got 'flash_attention_2', but {why}; allowed here: sdpa, eager; set sdpa",
            )


def check_output(r: Any) -> Problems:
    """That the run folder can be made, and is not a folder of something else."""
    output = r.output
    if path_is(output, "dir"):
        try:
            inside = visible_names(output)
        except OSError as error:
            yield Problem(
                ("output",),
                f"got {str(output)!r}; it cannot be read ({error.strerror}); choose another folder",
            )
            return
        if inside and not RUN_FILES & set(inside):
            yield Problem(
                ("output",),
                f"got {str(output)!r}, which holds other files ({inside[0]}, ...); choose "
                "a new or empty folder",
            )
    elif path_is(output, "any"):
        yield Problem(("output",), f"got {str(output)!r}, a file; choose a folder")
        return
    parent = output
    while not path_is(parent, "any") and parent != parent.parent:
        parent = parent.parent
    if not path_is(parent, "dir"):
        yield Problem(
            ("output",), f"got {str(output)!r}, but {str(parent)!r} is not a folder; choose another one"
        )
    elif not os.access(parent, os.W_OK | os.X_OK):
        yield Problem(
            ("output",),
            f"got {str(output)!r}, but {str(parent.absolute())!r} is not writable; choose another folder",
        )


def path_is(path: Path, kind: str) -> bool:
    """path.is_dir() and friends, False for text that cannot be a path (too long, a NUL in it)."""
    try:
        return {"dir": path.is_dir, "file": path.is_file, "any": path.exists}[kind]()
    except (OSError, ValueError):
        return False


def near_names(path: Path) -> str:
    """The names in the deepest folder of `path` that exists, nearest first: '; did you mean 'x'?' or what is
    there.
    """
    parent = path.parent
    if not path_is(parent, "dir"):
        return f" ({str(parent)!r} does not exist)"
    try:
        names = sorted(child.name for child in parent.iterdir() if not child.name.startswith("."))[:500]
    except OSError:
        return ""
    hint = did_you_mean(path.name, names)
    return (
        hint
        if hint
        else (
            f" (in {str(parent)!r} there is {', '.join(names[:4])})"
            if names
            else f" ({str(parent)!r} is empty)"
        )
    )


def _globs(pattern: str) -> bool:
    try:
        return any(True for _ in glob.iglob(pattern, recursive=True))
    except (OSError, ValueError, RecursionError, re.error):
        return False
