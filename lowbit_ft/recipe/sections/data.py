"""data: what is trained on, and whether the files, the positions of the model and its chat template are there
for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ...data.formats import FORMATS
from ...data.synthesis import SYNTHESIS, SynthesisConfig
from ...names import HUB_ID, listed
from ..layers import POSITIONS, has_chat_template, shapes_here
from ..paths import globs, near_names, path_is
from ..values import OneKind, OneOf
from ..yaml import KeyPath, Problem
from .base import Count, Problems, Section

DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt", ".gz", ".zst", ".arrow", ".md")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


class DataSource(Section):
    """One data set."""

    path: str = Field(
        min_length=1, description="file, glob, folder (jsonl, json, parquet, csv, txt) or hub id"
    )
    format: Annotated[str, OneOf(FORMATS)] = Field(
        description="chat: messages; completion: prompt and completion"
    )
    split: str = Field(
        default="train",
        description="split of a hub data set, of a folder, or of files told apart by their names",
    )
    name: str | None = Field(
        default=None, description="configuration of a hub data set, or of the README.md of a folder"
    )
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub data set")
    limit: Count | None = Field(default=None, description="use only the first n rows")


class DataSection(Section):
    """What is trained on."""

    train: DataSource | None = Field(
        default=None, description="training rows; left out with synthesis, which writes them"
    )
    valid: DataSource | None = Field(
        default=None, description="validation rows: eval_every, keep_best and the perplexity table"
    )
    synthesis: Annotated[SynthesisConfig, OneKind(SYNTHESIS)] | None = Field(
        default=None, description="no rows at all: the full-precision model writes them (data-free)"
    )
    sequence_len: Annotated[int, Field(ge=8)] = Field(
        default=2048, description="tokens per window; longer rows are cut, and counted"
    )
    packing: bool = Field(
        default=True, description="several rows per window without attention between them; false: padding"
    )
    train_on: Literal["assistant", "completion", "all"] = Field(
        default="assistant", description="tokens that carry loss"
    )
    on_bad_row: Literal["error", "skip"] = Field(
        default="error", description="stop at a malformed row, or skip and count it"
    )
    streaming: bool = Field(default=False, description="read while training; needs train.max_steps")

    @property
    def rows(self) -> str:
        """Where the training rows are from, for people."""
        if self.train is not None:
            return f"{self.train.path} ({self.train.format})"
        return (
            f"rows that the model writes ({self.synthesis.kind})" if self.synthesis is not None else "no rows"
        )


def check_data(r: Any) -> Problems:
    """Data files that do not exist."""
    sources: list[tuple[KeyPath, Any]] = []
    if hasattr(r, "data"):
        if r.data.train is None and r.data.synthesis is None:
            yield Problem(
                ("data", "train"),
                "missing; add `train: ...` (training rows), or `synthesis: {kind: self_generated}`, with "
                "which the model writes them itself",
            )
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
            if not globs(path):
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


def check_synthesis(r: Any) -> Problems:
    """Rows that the model writes, beside the other keys of data."""
    data, config = r.data, r.data.synthesis
    if config is None:
        return
    here = ("data", "synthesis")
    if data.train is not None:
        yield Problem(
            ("data", "train"),
            f"got {data.train.path!r} beside data.synthesis, which writes the training rows; remove one of "
            "the two",
        )
    if data.valid is not None and config.valid:
        yield Problem(
            (*here, "valid"),
            f"got {config.valid} beside data.valid ({data.valid.path!r}); set valid: 0, or remove data.valid",
        )
    if config.max_len is not None and config.max_len > data.sequence_len:
        yield Problem(
            (*here, "max_len"),
            f"got {config.max_len}, more than a window of {data.sequence_len} tokens, which would cut what "
            f"was written; set it to {data.sequence_len} or less, or raise data.sequence_len",
        )
    if wrong := config.problem(config.max_len or data.sequence_len):
        yield Problem((*here, wrong[0]), wrong[1])


def check_lengths(r: Any) -> Problems:
    """Window lengths against the positions the model has."""
    shapes = shapes_here(r.model.path, r.model.revision)
    limit = shapes.number(*POSITIONS) if shapes else None
    if limit is None:
        return
    pairs = r.data.train is not None and FORMATS[r.data.train.format].pairs
    length = r.data.sequence_len // 2 if pairs else r.data.sequence_len  # of a text
    windows: list[tuple[KeyPath, int]] = [(("data", "sequence_len"), length)]
    if hasattr(r, "eval"):
        windows.append((("eval", "window"), r.eval.window))
    if hasattr(r, "quant") and r.quant.reads_rows:
        windows.append((("quant", "calibration", "sequence_len"), r.quant.calibration.sequence_len))
    if hasattr(r, "train") and r.train.reconstruct is not None:
        windows.append((("train", "reconstruct", "sequence_len"), r.train.reconstruct.sequence_len))
    for path, length in windows:
        if length > limit:
            yield Problem(
                path,
                f"got {length}; allowed: at most the {limit} positions of the model; set it to {limit} or "
                "less, or extend them in the model's "
                "config.json (rope_parameters, then max_position_embeddings)",
            )


def check_chat(r: Any) -> Problems:
    """Formats of turns need the template of the model's tokenizer."""
    folder = Path(r.model.path).expanduser()
    if not path_is(folder, "dir") or has_chat_template(folder):
        return  # a hub id: data/examples.py looks, once the tokenizer is there
    if not any(path_is(folder / name, "file") for name in TOKENIZER_FILES):
        yield Problem(
            ("model", "path"),
            f"got {r.model.path!r}, which has no tokenizer ({', '.join(TOKENIZER_FILES)}); copy it there",
        )
        return
    config = r.data.synthesis
    if config is not None and config.needs_template:
        yield Problem(
            ("data", "synthesis", "kind"),
            f"got {config.kind!r}, but {r.model.path} has no chat template; set kind: self_generated, or put "
            "a chat_template.jinja into its folder",
        )
    for key, source in (("train", r.data.train), ("valid", r.data.valid)):
        if source is not None and FORMATS[source.format].needs_template:
            others = listed(name for name, kind in FORMATS.items() if not kind.needs_template)
            message = f"got {source.format!r}, but {r.model.path} has no chat template; allowed: {others}"
            yield Problem(("data", key, "format"), f"{message}; or put a chat_template.jinja into its folder")
