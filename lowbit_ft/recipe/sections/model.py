"""model: which checkpoint is fine-tuned and how it is run, against the disk and this machine."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from ...train.compiling import missing_compiler
from ..layers import read_shapes
from ..paths import HUB_ID, near_names, path_is
from ..yaml import Problem
from .base import Problems, Section


class ModelSection(Section):
    """Which checkpoint is fine-tuned, and how it is run."""

    path: str = Field(
        min_length=1,
        description="folder of a Hugging Face checkpoint (safetensors), or a hub id such as org/name",
    )
    revision: str | None = Field(
        default=None, description="branch, tag or commit of the hub id; the resolved commit is recorded"
    )
    dtype: Literal["bfloat16", "float32", "float16"] = Field(
        default="bfloat16", description="dtype of activations and of unquantized weights"
    )
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = Field(
        default="sdpa",
        description="attention implementation of transformers; sdpa trains packed windows segment by "
        "segment, without a mask",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: the GPU when there is one"
    )


def check_model(r: Any) -> Problems:
    """That a path which is meant as a folder is a checkpoint that can be read (a quantized one: in a format
    of incoming/).
    """
    path = r.model.path
    here = ("model", "path")
    folder = Path(path).expanduser()
    if not path_is(folder, "dir"):
        if path_is(folder, "file"):
            yield Problem(here, f"got {path!r}, a file; give the folder that holds config.json")
        elif not HUB_ID.fullmatch(path) or path_is(folder.parent, "dir") and len(folder.parts) > 1:
            yield Problem(
                here,
                f"got {path!r}; there is no such folder{near_names(folder)}; give a checkpoint folder or a "
                "hub id owner/name",
            )
        return
    if r.model.revision is not None:
        yield Problem(
            ("model", "revision"), f"got {r.model.revision!r}; a local folder has no revisions; remove it"
        )
    try:
        incoming = read_shapes(folder).incoming
        if incoming is not None:
            incoming.refuse_order()
    except (OSError, ValueError) as error:
        yield Problem(here, f"got {path!r}: {error}")


def check_device(r: Any) -> Problems:
    """dtype, attention and device against this machine."""
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
