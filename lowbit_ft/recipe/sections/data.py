"""data: what is trained on, and whether the files, the positions of the model and its chat template are there
for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter
from pydantic_core import CoreSchema, core_schema

from ...data.formats import FORMATS
from ...data.mix import named, sources_of, unmixable, weights_of
from ...data.synthesis import SYNTHESIS, SynthesisConfig
from ...names import HUB_ID
from ..layers import shapes_here
from ..paths import globs, near_names, path_is
from ..values import OneKind, OneOf
from ..yaml import KeyPath, Problem
from .base import Count, Positive, Problems, Section

DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt", ".gz", ".zst", ".arrow", ".md")


class DataSource(Section):
    """One data set."""

    path: str = Field(
        min_length=1, description="file, glob, folder (jsonl, json, parquet, csv, txt) or hub id"
    )
    format: Annotated[str, OneOf(FORMATS)] | None = Field(
        default=None,
        description="chat: messages; completion: prompt and completion; none where the task names columns",
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
    media_dir: str | None = Field(
        default=None,
        min_length=1,
        description="folder of the pictures or sounds that rows name; null: beside the file of the rows",
    )


class WeightedSource(DataSource):
    """One data set of several."""

    weight: Positive | None = Field(
        default=None, description="its share of an epoch's rows, of the sum of all weights"
    )


def _adapter(kind: Any) -> TypeAdapter[Any]:
    """The validator of a type that is put together as the program runs."""
    return TypeAdapter(kind)


@dataclass(frozen=True, eq=False)
class OneOrMore:
    """Marks a source, or a list of them; a list of one is that source itself."""

    entry: type[DataSource]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._read)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> Any:
        entries: Any = Annotated[list[self.entry], Field(min_length=1)]  # pyright: ignore[reportInvalidTypeForm]
        return handler(_adapter(DataSource | entries).core_schema)

    def _read(self, value: Any) -> DataSource | list[Any]:
        if not isinstance(value, list | tuple):
            return DataSource.model_validate(value)
        if not value:
            raise ValueError("an empty list; allowed: a source, or a list of sources")
        sources: list[Any] = _adapter(list[self.entry]).validate_python(value)  # pyright: ignore[reportInvalidTypeForm]
        if len(sources) > 1:
            return sources
        return DataSource(**sources[0].model_dump(exclude={"weight"}, exclude_unset=True))


class DataSection(Section):
    """What is trained on."""

    train: Annotated[DataSource | list[WeightedSource], OneOrMore(WeightedSource)] | None = Field(
        default=None,
        description="training rows: a source, or a list of them, each with a weight or none; left out with "
        "synthesis, which writes them",
    )
    valid: Annotated[DataSource | list[DataSource], OneOrMore(DataSource)] | None = Field(
        default=None,
        description="validation rows, a source or a list: eval_every, keep_best and the perplexity table",
    )
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = Field(
        default="first_exhausted",
        description="of weighted sources: an epoch ends with the first that has given its last row, or when "
        "all have (shorter ones begin again)",
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
    chat_template: str | None = Field(
        default=None,
        min_length=1,
        description="chatml, a file of Jinja, the folder or hub id of a model that has one, or the text "
        "itself; null: the model's own. It ships",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="what the template is told, such as {enable_thinking: false}; ships as its default",
    )
    streaming: bool = Field(default=False, description="read while training; needs train.max_steps")

    @property
    def chat(self) -> list[Any]:
        """What chats are written with, for the key of what is made of rows; empty: the model's own way."""
        said = self.chat_template is not None or bool(self.chat_template_kwargs)
        return [self.chat_template, self.chat_template_kwargs] if said else []

    @property
    def rows(self) -> str:
        """Where the training rows are from, for people."""
        sources = sources_of(self.train)
        if sources:
            weights = weights_of(sources)
            shares = [""] * len(sources) if weights is None else [f", weight {w:g}" for w in weights]
            until = "" if weights is None else f", mixed to {self.stopping_strategy}"
            kinds = [s.format or "columns of the task" for s in sources]
            told = (
                f"{s.path} ({kind}{share})" for s, kind, share in zip(sources, kinds, shares, strict=True)
            )
            return " and ".join(told) + until
        return (
            f"rows that the model writes ({self.synthesis.kind})" if self.synthesis is not None else "no rows"
        )


def sources_at(where: Sequence[str], given: Any) -> list[tuple[KeyPath, Any]]:
    """The sources of data.train or data.valid, each with its place in the recipe."""
    if isinstance(given, list):
        return [((*where, i), source) for i, source in enumerate(given)]
    return [((*where,), source) for source in sources_of(given)]


def check_mixture(r: Any) -> Problems:
    """Several sources: whether they go together."""
    data = r.data
    for name in ("train", "valid"):
        sources = sources_of(getattr(data, name))
        if len(sources) > 1 and (why := unmixable(sources, data.packing)):
            yield Problem(("data", name), why)
    weighted = any(getattr(source, "weight", None) is not None for source in sources_of(data.train))
    if data.stopping_strategy != type(data).model_fields["stopping_strategy"].default and not weighted:
        yield Problem(
            ("data", "stopping_strategy"),
            f"got {data.stopping_strategy!r} and no weights, without which every row stands in an epoch "
            "once; give every source of data.train a weight, or remove the key",
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
        sources += sources_at(("data", "train"), r.data.train) + sources_at(("data", "valid"), r.data.valid)
    if hasattr(r, "eval"):
        sources.append((("eval", "data"), r.eval.data))
    if hasattr(r, "quant"):
        sources.append((("quant", "calibration"), r.quant.calibration))
    for where, source in sources:
        media = getattr(source, "media_dir", None)
        if media is not None and not path_is(Path(media).expanduser(), "dir"):
            yield Problem(
                (*where, "media_dir"),
                f"got {media!r}; there is no such folder{near_names(Path(media))}; give the one of the files "
                "that rows name",
            )
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
    if config.reads != "text" and getattr(getattr(r, "task", None), "language", True):
        yield Problem(
            (*here, "kind"),
            f"got {config.kind!r}, whose rows are {config.reads}, with a task that reads text; set task: "
            "image_classification, or kind: self_generated",
        )
        return
    if data.train is not None:
        yield Problem(
            ("data", "train"),
            f"got {named(data.train)!r} beside data.synthesis, which writes the training rows; remove one of "
            "the two",
        )
    if data.valid is not None and config.valid:
        yield Problem(
            (*here, "valid"),
            f"got {config.valid} beside data.valid ({named(data.valid)!r}); set valid: 0, or remove "
            "data.valid",
        )
    longest = config.longest(data.sequence_len)
    if config.reads == "text" and longest > data.sequence_len:
        yield Problem(
            (*here, "max_len"),
            f"got {longest}, more than a window of {data.sequence_len} tokens, which would cut what "
            f"was written; set it to {data.sequence_len} or less, or raise data.sequence_len",
        )
    if wrong := config.problem(longest):
        yield Problem((*here, wrong[0]), wrong[1])


def check_lengths(r: Any) -> Problems:
    """Window lengths against the positions the model has."""
    shapes = shapes_here(r.model.path, r.model.revision)
    limit = shapes.positions if shapes else None
    if limit is None:
        return
    pairs = any(FORMATS[s.format].pairs for s in sources_of(r.data.train) if s.format is not None)
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
