"""model: which checkpoint is fine-tuned and how it is run, against the disk and this machine."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator

from ...data.errors import DataError
from ...data.examples import StreamedExamples
from ...files.tensorfile import CheckpointError
from ...model.checkpoint import Checkpoint
from ...model.tokenizer import read_tokenizer
from ...names import HUB_ID, listed
from ...speech.tokens import audio_tokens, code_of_codec, token_code
from ...train.compiling import missing_compiler
from ..layers import local_folder, read_shapes, shapes_here
from ..paths import near_names, path_is
from ..yaml import Problem
from .base import Problems, Section
from .chat import written_with
from .data import sources_at

# Tokens that stand for something else than text: a model that reads text alone may lack their rows.
_MEDIA = ("image_token", "audio_token", "video_token")
_FIRST_ROWS = 16


class CopyOf(Section):
    """A new row begins as the row of another token."""

    copy_of: str = Field(min_length=1, description="a token of the vocabulary")


class AudioSection(Section):
    """A token for each code of a codec, `<|audio_0|>` and so on, and two around them."""

    codec: str | None = Field(
        default=None, min_length=1, description="folder of the codec whose codes they are: its config.json"
    )
    code: dict[str, Any] | None = Field(
        default=None,
        description="in place of a codec, its vector code: {kind: bsq, bits: 14}; null: as the codec says",
    )
    rows: Literal["each", "factorised"] = Field(
        default="each",
        description="each: a row for each code; factorised: rows are sums of a vector for each digit (bit) "
        "of the code, fewer numbers that train",
    )

    @field_validator("code")
    @classmethod
    def _known(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if value is None else token_code(value).to_json()

    @model_validator(mode="after")
    def _some(self) -> AudioSection:
        if self.codec is None and self.code is None:
            raise ValueError("no code; give codec: FOLDER, or code: {kind: bsq, bits: 14}")
        return self

    @property
    def tokens(self) -> list[str]:
        """None of a codec that cannot be read, which the check of the recipe tells."""
        return [] if self.code is None else audio_tokens(token_code(self.code).size)

    def settled(self) -> AudioSection:
        """With the code of the codec, where that can be read."""
        if self.code is not None or self.codec is None:
            return self
        try:
            found = code_of_codec(Path(self.codec).expanduser()).to_json()
        except (OSError, ValueError):
            return self
        return self.model_copy(update={"code": found})


class AddTokensSection(Section):
    """Tokens that the tokenizer gets, and a row each in embedding and head, which train."""

    tokens: list[str] = Field(default=[], description="as they stand in the text")
    audio: AudioSection | None = Field(
        default=None, description="tokens for the codes of a speech codec, behind those of `tokens`"
    )
    special: bool = Field(
        default=False, description="true: control tokens, left out of decoded text (skip_special_tokens)"
    )
    init: Literal["mean"] | CopyOf = Field(
        default="mean", description="a row begins as the mean of the old ones, or {copy_of: a token}"
    )

    @model_validator(mode="after")
    def _some(self) -> AddTokensSection:
        if not self.tokens and self.audio is None:
            raise ValueError("no token; give tokens: [...], or audio: {codec: FOLDER}")
        return self

    @property
    def every(self) -> list[str]:
        """All new tokens, in the order of their ids."""
        return self.tokens if self.audio is None else self.tokens + self.audio.tokens

    @property
    def levels(self) -> tuple[int, ...]:
        """Of the digits by which the rows of the last ones are made of vectors; none: a row for each."""
        if self.audio is None or self.audio.rows == "each" or self.audio.code is None:
            return ()
        return token_code(self.audio.code).levels

    @property
    def copied(self) -> str | None:
        return self.init.copy_of if isinstance(self.init, CopyOf) else None


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
    add_tokens: AddTokensSection | None = Field(
        default=None,
        description="new tokens: a list of them, or a mapping. Their rows of embedding and head train at "
        "train.modules_learning_rate, all other rows stay; null: none",
    )

    @field_validator("add_tokens", mode="before")
    @classmethod
    def _list_of_tokens(cls, value: Any) -> Any:
        return {"tokens": value} if isinstance(value, list) else value


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
        if hasattr(r, "task"):  # a task with a mistake in it says nothing of what is built of the files
            Checkpoint.open(folder, purpose=r.task.purpose(0)).refuse_strangers()
    except (OSError, ValueError) as error:
        yield Problem(here, f"got {path!r}: {error}")


def check_tokens(r: Any) -> Problems:
    """Tokens of the tokenizer, and of the first training rows, that the model has no embedding of."""
    folder = local_folder(r.model.path, r.model.revision)
    shapes = shapes_here(r.model.path, r.model.revision)
    rows = shapes.rows if shapes is not None else None
    if folder is None or rows is None:
        return
    try:
        tokenizer = read_tokenizer(folder)
    except CheckpointError:
        return  # check_chat, or the start of the run, tells what is missing
    if hasattr(r, "data"):
        tokenizer = written_with(r, tokenizer)
    special = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    ids = {**tokenizer.get_vocab(), **dict(special)}
    beyond = sorted((i, token) for token, i in ids.items() if i is not None and i >= rows)
    media = {getattr(tokenizer, name, None) for name in _MEDIA}
    if text := [token for _, token in beyond if token not in media]:
        yield Problem(
            ("model", "path"),
            f"got {r.model.path!r}, whose tokenizer has {len(tokenizer)} tokens (up to id {beyond[-1][0]}) "
            f"and whose embedding has {rows} rows: none for {listed(map(repr, text[:4]))}"
            f"{' and more' if len(text) > 4 else ''}; give the model rows for them "
            "(model.resize_token_embeddings(len(tokenizer)) in transformers, then save it), or the "
            "tokenizer it was made with",
        )
        return
    sources = sources_at(("data", "train"), r.data.train) if beyond and hasattr(r, "data") else []
    for where, train in sources:
        if train.format is None or not path_is(Path(train.path).expanduser(), "any"):
            continue
        section = r.data.model_copy(update={"packing": False, "streaming": True})
        try:
            first = iter(StreamedExamples(train, section, tokenizer, rows))
            for _ in itertools.islice(first, _FIRST_ROWS):
                pass
        except DataError as error:
            yield Problem((*where, "path"), f"got {train.path!r}: {error}")


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
