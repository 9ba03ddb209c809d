"""The recipe: what a run is, in one YAML file, checked as a whole before anything is loaded.

Nested by noun (model, quant, adapter, data, train, eval, export), leaf names as Hugging Face users know them, unknown keys refused. The
`adapter` section is the config class of its `method` (lowbit_ft.adapters.ADAPTERS). Shapes and types are checked here, what one
section means for another in recipe_check.py, lines of the file in recipe_yaml.py. No key of a recipe enables remote code.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from lowbit_ft.adapters import ADAPTERS, AdapterConfig
from lowbit_ft.recipe_errors import shown, to_problems
from lowbit_ft.recipe_values import for_method, found, matches, number
from lowbit_ft.recipe_yaml import Problem, RecipeError, apply_override, did_you_mean, read_source

if TYPE_CHECKING:
    from lowbit_ft.grid import BinaryGrid, IntGrid

__all__ = ["Recipe", "RecipeError", "check_recipe", "load_recipe", "matches", "recipe_schema"]

GroupSize = Literal[32, 64, 128, 256, -1]
Unit = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys, no infinities, numbers from text such as '1e-4', true/false not a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _numbers(cls, value: Any, info: Any) -> Any:
        return number(cls.model_fields[info.field_name].annotation, value)


class ModelSection(Section):
    """Which checkpoint is fine-tuned, and how it is run."""

    path: str = Field(min_length=1, description="folder of a Hugging Face checkpoint (safetensors), or a hub id such as org/name")
    revision: str | None = Field(None, description="branch, tag or commit of the hub id; the resolved commit is recorded")
    dtype: Literal["bfloat16", "float32", "float16"] = Field("bfloat16", description="dtype of activations and of unquantized weights")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", description="attention implementation of transformers")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: the GPU when there is one")


class CalibrationSection(Section):
    """Text that data-driven calibrators (gptq) look at."""

    path: str | None = Field(None, description="text, jsonl, ... or a hub data set; null: the rows of data.train")
    samples: Count = Field(128, description="number of windows")
    sequence_len: Count = Field(512, description="tokens per window")
    damping: Positive = Field(0.01, description="gptq: fraction of the mean Hessian diagonal that is added to it")


class OverrideSection(Section):
    """Another grid for the layers that match."""

    match: str = Field(min_length=1, description="glob over layer names, for example '*.down_proj'")
    bits: Literal[1, 2, 3, 4, 8] | None = Field(None, description="bits for these layers")
    group_size: GroupSize | None = Field(None, description="group size for these layers")

    @model_validator(mode="after")
    def _says_something(self) -> OverrideSection:
        if self.bits is None and self.group_size is None:
            raise ValueError("an override that changes nothing; set bits or group_size, or drop it")
        return self


class QuantSection(Section):
    """How the frozen base is packed."""

    grid: Literal["integer", "binary"] = Field("integer", description="integer codes with a scale, or binary planes (alpha_tuning)")
    bits: Literal[1, 2, 3, 4, 8] = Field(4, description="integer: 2, 3, 4, 8; binary: 1 to 4 planes")
    group_size: GroupSize = Field(128, description="inputs that share a scale; -1: the whole row")
    symmetric: bool = Field(True, description="no zero points; vLLM serves 2 and 3 bit only when symmetric")
    residual_bits: Literal[0, 1, 2, 4] = Field(4, description="bits of the rounding error kept for training (integer grid only)")
    calibrate: str = Field(
        default_factory=lambda data: "greedy" if data.get("grid") == "binary" else "mse",
        description="integer: absmax, minmax, mse, gptq (default mse); binary: greedy, alternating (default greedy)",
    )
    mse_p: Positive = Field(2.4, description="mse: the error norm |w - w_hat|^p that the clipping search minimises")
    calibration: CalibrationSection = Field(default_factory=CalibrationSection, description="text for gptq")
    targets: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="all-linear (attention and MLP linears of the decoder layers), or names, globs, regexes of layers"
    )
    exclude: list[str] = Field(["lm_head"], description="layers left in full precision: names, globs or regexes")
    overrides: list[OverrideSection] = Field([], description="other bits or group sizes for some layers; the last match wins")

    @field_validator("targets", mode="before")
    @classmethod
    def _all_linear_or_list(cls, value: Any) -> Any:
        if value == "all-linear" or (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            return value
        hint = did_you_mean(value, ["all-linear"]) if isinstance(value, str) else ""
        raise ValueError(f"{shown(value)}; allowed: all-linear, or a list of layer names, globs or regexes{hint}")

    def skip_reason(self, layer_name: str) -> str | None:
        """Why a linear layer stays in full precision, judged by its name; None: it is quantized."""
        for pattern in self.exclude:
            if matches(pattern, layer_name):
                return f"excluded by '{pattern}'"
        if isinstance(self.targets, list):
            return None if any(matches(pattern, layer_name) for pattern in self.targets) else "not among quant.targets"
        parts = layer_name.split(".")
        if not any(part.isdecimal() for part in parts):
            return "not in a decoder layer"
        if parts[-1] in ("gate", "router") or "router" in parts:
            return "a router: its few weights choose the experts"
        if any(part.startswith(("vision", "visual", "audio", "image")) for part in parts):
            return "not part of the language model"
        return None

    def grid_for(self, layer_name: str) -> IntGrid | BinaryGrid:
        """The grid of one layer, overrides applied (the last one that matches wins for each of bits and group_size)."""
        from lowbit_ft.grid import BinaryGrid, IntGrid

        bits: int = self.bits
        group_size: int = self.group_size
        for override in self.overrides:
            if matches(override.match, layer_name):
                bits = override.bits if override.bits is not None else bits
                group_size = override.group_size if override.group_size is not None else group_size
        if self.grid == "binary":
            return BinaryGrid(bits=bits, group_size=group_size)
        return IntGrid(bits=bits, group_size=group_size, symmetric=self.symmetric, residual_bits=self.residual_bits)


class DataSource(Section):
    """One data set."""

    path: str = Field(min_length=1, description="file, glob, folder (jsonl, json, parquet, csv, txt) or hub id")
    format: Literal["chat", "completion", "alpaca", "text"] = Field(description="chat: messages; completion: prompt and completion")
    split: str = Field("train", description="split of a hub data set")
    name: str | None = Field(None, description="configuration of a hub data set")
    revision: str | None = Field(None, description="branch, tag or commit of a hub data set")
    limit: Count | None = Field(None, description="use only the first n rows")


class DataSection(Section):
    """What is trained on."""

    train: DataSource = Field(description="training rows")
    valid: DataSource | None = Field(None, description="validation rows: eval_every, keep_best and the perplexity table")
    sequence_len: Annotated[int, Field(ge=8)] = Field(2048, description="tokens per window; longer rows are cut, and counted")
    packing: bool = Field(True, description="several rows per window without attention between them; false: padding")
    train_on: Literal["assistant", "completion", "all"] = Field("assistant", description="tokens that carry loss")
    on_bad_row: Literal["error", "skip"] = Field("error", description="stop at a malformed row, or skip and count it")
    streaming: bool = Field(False, description="read while training; needs train.max_steps")


class TrainSection(Section):
    """How it is trained."""

    max_steps: Count | None = Field(None, description="optimizer steps; give this or epochs")
    epochs: Positive | None = Field(None, description="passes over data.train; give this or max_steps")
    micro_batch_size: Count = Field(1, description="windows per forward; raise while memory lasts")
    gradient_accumulation_steps: Count = Field(8, description="forwards per optimizer step")
    learning_rate: Positive = Field(1e-3, description="of the low-rank matrices A and B")
    scale_learning_rate: Positive | None = Field(None, description="of scales, magnitudes and offsets; null: learning_rate")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="decoupled weight decay")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field((0.9, 0.999), description="of Adam")
    eps: Positive = Field(1e-8, description="of Adam")
    optimizer: str = Field("adamw", description="adamw (torch, fused) or a bitsandbytes optimizer such as paged_adamw8bit")
    scheduler: Literal["linear", "cosine", "wsd", "constant"] = Field("cosine", description="learning-rate curve after the warm-up")
    warmup_ratio: Unit = Field(0.05, description="fraction of the steps spent warming up")
    min_lr_ratio: Unit = Field(0.0, description="last learning rate over the peak")
    decay_ratio: Unit = Field(0.2, description="wsd: fraction of the steps spent decaying at the end")
    max_grad_norm: Positive = Field(1.0, description="gradients are clipped to this norm")
    gradient_checkpointing: bool = Field(False, description="recompute activations: about 30 % slower, much less memory")
    mixed_precision: Literal["no", "bf16", "fp16"] = Field("no", description="autocast; 'no' computes in model.dtype")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="of the start of A, the data order and dropout")
    log_every: Count = Field(1, description="steps between lines of metrics.jsonl")
    eval_every: Count | None = Field(None, description="steps between validation losses; null: only at the end")
    save_every: Count | None = Field(None, description="steps between checkpoints; null: only at the end and on a signal")
    keep_checkpoints: Count = Field(2, description="newest checkpoints kept")
    keep_best: bool = Field(False, description="ship the checkpoint of the lowest validation loss, not the last")
    max_bad_steps: Count = Field(5, description="stop after this many NaN or infinite losses in a row")
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field([], description="besides metrics.jsonl, which is always written")

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_is_a_word(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads an unquoted no as false

    @model_validator(mode="after")
    def _length(self) -> TrainSection:
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError(f"max_steps {self.max_steps} and epochs {self.epochs}; allowed: exactly one of them; set max_steps or epochs")
        return self


class EvalSection(Section):
    """What is measured at the end."""

    perplexity: bool = Field(True, description="perplexity of base, quantized, trained, merged, exported")
    data: DataSource | None = Field(None, description="rows to measure on; null: data.valid")
    windows: Count | None = Field(64, description="windows measured; null: all")
    window: Annotated[int, Field(ge=8)] = Field(256, description="tokens per window")
    kl: bool = Field(True, description="also the KL divergence to the full-precision model, which is loaded again for it")
    tasks: list[str] = Field([], description="lm-eval task names (extra: eval)")
    generate: list[str] = Field([], description="prompts answered before and after training")
    max_new_tokens: Count = Field(48, description="tokens per answer")


class ExportSection(Section):
    """What is written for serving."""

    format: str = Field("compressed-tensors", description="compressed-tensors (vLLM, transformers) or native (every grid)")
    verify: bool = Field(True, description="reload the export and compare codes, scales and logits")


if TYPE_CHECKING:
    AdapterSection = AdapterConfig
else:
    AdapterSection = Annotated[Union[tuple(ADAPTERS.values())], Field(discriminator="method")]  # noqa: UP007 - built from the table


class Recipe(Section):
    """One run. See the sections for what each key means; `load_recipe` reads one from YAML."""

    name: str = Field(min_length=1, pattern=r"^[\w.+-]+$", description="of the run, for logs and the model card")
    model: ModelSection = Field(description="the checkpoint")
    quant: QuantSection = Field(default_factory=QuantSection, description="the grid of the base")
    adapter: AdapterSection = Field(description="the method and its own keys")
    data: DataSection = Field(description="the data")
    train: TrainSection = Field(description="the loop")
    eval: EvalSection = Field(default_factory=EvalSection, description="the measurements")
    export: ExportSection = Field(default_factory=ExportSection, description="the target")
    output: Path = Field(description="folder of the run")

    def to_yaml(self) -> str:
        """Every key with its value, defaults included; `load_recipe` reads it back to an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe; `adapter` is a oneOf by method."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def check_recipe(recipe: Recipe) -> list[Problem]:
    """What one section means for another, the model and the machine: the problems found, nothing loaded. See recipe_check.py."""
    from lowbit_ft.recipe_check import check

    return check({name: getattr(recipe, name) for name in Recipe.model_fields})


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, check: bool = True) -> Recipe:
    """Read a recipe and check it as a whole.

    Relative model and data paths are looked for from the current folder first, then from the recipe's folder.

    Args:
        path: the YAML file.
        overrides: `a.b=value` texts, value in YAML, applied in order over the file.
        check: also run the cross checks (method, grid, layers, files, machine).

    Raises:
        FileNotFoundError: there is no such file.
        RecipeError: lists every problem, one per line, with file:line.
    """
    source = read_source(Path(path))
    for override in overrides:
        apply_override(source, override)
    problems: list[Problem] = []
    values: dict[str, Any] = {}
    for key in source.values:
        if key not in Recipe.model_fields:
            known = ", ".join(Recipe.model_fields)
            problems.append(Problem((key,), f"unknown key{did_you_mean(key, Recipe.model_fields)}; allowed: {known}"))
    for name, info in Recipe.model_fields.items():
        given = source.values.get(name)
        if name not in source.values or (given is None and isinstance(info.annotation, type) and issubclass(info.annotation, Section)):
            given = {}  # a section left out or left empty is judged by what it must hold
        if name not in source.values and name in ("name", "output"):
            problems.append(Problem((name,), f"missing; add `{name}: ...` ({info.description})"))
            continue
        try:
            value = for_method(given) if name == "adapter" else given
            values[name] = TypeAdapter(Annotated[info.annotation, info]).validate_python(value)
        except ValidationError as error:
            problems += to_problems(name, info.annotation, error.errors(include_url=False), given)
    values = {name: found(value, Path(path).parent) for name, value in values.items()}
    if check:
        from lowbit_ft.recipe_check import check as cross_check

        problems += cross_check(values)
    lines = source.lines(problems)
    if lines:
        raise RecipeError(lines)
    return Recipe(**values)
