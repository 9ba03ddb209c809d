"""The sections of a recipe: every key with its type, its bounds, its default and what it means.

The descriptions are the documentation of the keys: error messages and the JSON Schema quote them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..grid import BinaryGrid, IntGrid
from ..names import did_you_mean, matches
from .errors import shown
from .values import number

GroupSize = Literal[32, 64, 128, 256, -1]
Unit = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
FROM_CHECKPOINT = "from_checkpoint"


# Names that the output head and the token embedding have in transformers' models.
HEADS = frozenset({"lm_head", "embed_out"})
OTHER_TOWERS = (
    "vision",
    "visual",
    "audio",
    "image",
)  # how parts of a multimodal model are called that read no text
TOKEN_EMBEDDINGS = frozenset({"embed_tokens", "wte", "embed_in", "word_embeddings"})


def is_head(layer_name: str) -> bool:
    """Whether a layer of this name makes the logits."""
    return layer_name.rpartition(".")[2] in HEADS


def is_token_embedding(layer_name: str) -> bool:
    """Whether an embedding of this name is the one of the tokens (not of positions, or of other towers)."""
    return layer_name.rpartition(".")[2] in TOKEN_EMBEDDINGS


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys, no infinities, numbers from text such as '1e-4',
    true/false not a number.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _numbers(cls, value: Any, info: Any) -> Any:
        return number(cls.model_fields[info.field_name].annotation, value)


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


class CalibrationSection(Section):
    """Text that data-driven calibrators (gptq) look at."""

    path: str | None = Field(
        default=None, description="text, jsonl, ... or a hub data set; null: the rows of data.train"
    )
    samples: Count = Field(default=128, description="number of windows")
    sequence_len: Count = Field(default=512, description="tokens per window")
    damping: Positive = Field(
        default=0.01, description="gptq: fraction of the mean Hessian diagonal that is added to it"
    )


class OverrideSection(Section):
    """Another grid for the layers that match."""

    match: str = Field(min_length=1, description="glob over layer names, for example '*.down_proj'")
    bits: Literal[1, 2, 3, 4, 8] | None = Field(default=None, description="bits for these layers")
    group_size: GroupSize | None = Field(default=None, description="group size for these layers")

    @model_validator(mode="after")
    def _says_something(self) -> OverrideSection:
        if self.bits is None and self.group_size is None:
            raise ValueError("an override that changes nothing; set bits or group_size, or drop it")
        return self


class QuantSection(Section):
    """How the frozen base is packed."""

    grid: Literal["integer", "binary"] = Field(
        default="integer", description="integer codes with a scale, or binary planes (alpha_tuning)"
    )
    bits: Literal[1, 2, 3, 4, 8] = Field(default=4, description="integer: 2, 3, 4, 8; binary: 1 to 4 planes")
    group_size: GroupSize = Field(default=128, description="inputs that share a scale; -1: the whole row")
    symmetric: bool = Field(
        default=True, description="no zero points; vLLM serves 2 and 3 bit only when symmetric"
    )
    residual_bits: Literal[0, 1, 2, 4] = Field(
        default=4, description="bits of the rounding error kept for training (integer grid only)"
    )
    calibrate: str = Field(
        default_factory=lambda data: "greedy" if data.get("grid") == "binary" else "mse",
        description="integer: absmax, minmax, mse, gptq (default mse); binary: greedy, alternating "
        "(default greedy); "
        "from_checkpoint: the codes of a checkpoint that is quantized already (set by itself)",
    )
    scale_dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16",
        description="dtype of the scales that train and ship: bfloat16 values fit every format; a "
        "quantized checkpoint brings its own",
    )
    mse_p: Positive = Field(
        default=2.4, description="mse: the error norm |w - w_hat|^p that the clipping search minimises"
    )
    calibration: CalibrationSection = Field(
        default_factory=lambda: CalibrationSection(), description="text for gptq"
    )
    targets: Literal["all-linear"] | list[str] = Field(
        default="all-linear",
        description="all-linear (attention and MLP linears of the decoder layers), or names, globs, "
        "regexes of layers",
    )
    exclude: list[str] = Field(
        default=["lm_head"], description="layers left in full precision: names, globs or regexes"
    )
    overrides: list[OverrideSection] = Field(
        default=[], description="other bits or group sizes for some layers; the last match wins"
    )
    lm_head: Literal[4, 8] | None = Field(
        default=None,
        description="bits of the output head, packed and trained too (whatever exclude says); "
        "null: full precision",
    )
    embeddings: Literal[4, 8] | None = Field(
        default=None, description="bits of the token embedding, packed and frozen; null: full precision"
    )

    @model_validator(mode="after")
    def _integers_only(self) -> QuantSection:
        for key in ("lm_head", "embeddings"):
            if self.grid != "integer" and getattr(self, key) is not None:
                raise ValueError(
                    f"{key} {getattr(self, key)} needs quant.grid: integer; the recipe has {self.grid}"
                )
        return self

    @field_validator("targets", mode="before")
    @classmethod
    def _all_linear_or_list(cls, value: Any) -> Any:
        if value == "all-linear" or (
            isinstance(value, list) and all(isinstance(item, str) for item in value)
        ):
            return value
        hint = did_you_mean(value, ["all-linear"]) if isinstance(value, str) else ""
        raise ValueError(
            f"{shown(value)}; allowed: all-linear, or a list of layer names, globs or regexes{hint}"
        )

    @property
    def from_checkpoint(self) -> bool:
        """The codes come with the checkpoint, which is quantized already (incoming.py)."""
        return self.calibrate == FROM_CHECKPOINT

    def skip_reason(self, layer_name: str, embedding: bool = False) -> str | None:
        """Why a linear layer (or an embedding) stays in full precision, judged by its name; None: it is
        quantized.
        """
        if embedding:
            if self.embeddings is None or not is_token_embedding(layer_name):
                return "embedding"
            outside = any(part.startswith(OTHER_TOWERS) for part in layer_name.split("."))
            return "not part of the language model" if outside else None
        if self.lm_head is not None and is_head(layer_name):
            return None
        for pattern in self.exclude:
            if matches(pattern, layer_name):
                return f"excluded by '{pattern}'"
        if isinstance(self.targets, list):
            return (
                None
                if any(matches(pattern, layer_name) for pattern in self.targets)
                else "not among quant.targets"
            )
        parts = layer_name.split(".")
        if not any(part.isdecimal() for part in parts):
            return "not in a decoder layer"
        if parts[-1] in ("gate", "router") or "router" in parts:
            return "a router: its few weights choose the experts"
        if any(part.startswith(OTHER_TOWERS) for part in parts):
            return "not part of the language model"
        return None

    def grid_for(self, layer_name: str) -> IntGrid | BinaryGrid:
        """The grid of one layer, overrides applied (the last one that matches wins for each of bits and
        group_size).
        """
        bits: int = self.bits
        group_size: int = self.group_size
        for override in self.overrides:
            if matches(override.match, layer_name):
                bits = override.bits if override.bits is not None else bits
                group_size = override.group_size if override.group_size is not None else group_size
        if self.grid == "binary":
            return BinaryGrid(bits=bits, group_size=group_size, scale_dtype=self.scale_dtype)
        if self.embeddings is not None and is_token_embedding(layer_name):
            # It is not trained, so no rounding error is kept.
            return IntGrid(
                bits=self.embeddings,
                group_size=self.group_size,
                symmetric=self.symmetric,
                residual_bits=0,
                scale_dtype=self.scale_dtype,
            )
        if self.lm_head is not None and is_head(layer_name):
            bits = self.lm_head
        return IntGrid(
            bits=bits,
            group_size=group_size,
            symmetric=self.symmetric,
            residual_bits=self.residual_bits,
            scale_dtype=self.scale_dtype,
        )


class DataSource(Section):
    """One data set."""

    path: str = Field(
        min_length=1, description="file, glob, folder (jsonl, json, parquet, csv, txt) or hub id"
    )
    format: Literal["chat", "completion", "alpaca", "text"] = Field(
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

    train: DataSource = Field(description="training rows")
    valid: DataSource | None = Field(
        default=None, description="validation rows: eval_every, keep_best and the perplexity table"
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


class TrainSection(Section):
    """How it is trained."""

    max_steps: Count | None = Field(default=None, description="optimizer steps; give this or epochs")
    epochs: Positive | None = Field(
        default=None, description="passes over data.train; give this or max_steps"
    )
    micro_batch_size: Count = Field(default=1, description="windows per forward; raise while memory lasts")
    gradient_accumulation_steps: Count = Field(default=8, description="forwards per optimizer step")
    learning_rate: Positive = Field(default=1e-3, description="of the low-rank matrices A and B")
    scale_learning_rate: Positive | None = Field(
        default=None, description="of scales, magnitudes and offsets; null: learning_rate"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.0, description="decoupled weight decay")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), description="of Adam"
    )
    eps: Positive = Field(default=1e-8, description="of Adam")
    optimizer: str = Field(
        default="adamw",
        description="adamw (torch, fused) or a bitsandbytes optimizer such as paged_adamw8bit",
    )
    scheduler: Literal["linear", "cosine", "wsd", "constant"] = Field(
        default="cosine", description="learning-rate curve after the warm-up"
    )
    warmup_ratio: Unit = Field(default=0.05, description="fraction of the steps spent warming up")
    min_lr_ratio: Unit = Field(default=0.0, description="last learning rate over the peak")
    decay_ratio: Unit = Field(default=0.2, description="wsd: fraction of the steps spent decaying at the end")
    max_grad_norm: Positive = Field(default=1.0, description="gradients are clipped to this norm")
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations: about 30 % slower, much less memory"
    )
    offload: Literal["no", "cpu", "disk"] = Field(
        default="no",
        description="where what gradient_checkpointing keeps, the input of every layer, waits: no, on the "
        "device; cpu, in CPU memory; "
        "disk, in a file of the run folder: for long sequences on a GPU",
    )
    loss: Literal["chunked", "liger"] = Field(
        default="chunked",
        description="chunked: logits in chunks through the model's own head; liger: Liger's fused kernel "
        "(extra liger, a GPU, a plain head)",
    )
    mlp_chunk: Annotated[int, Field(ge=16)] | None = Field(
        default=None,
        description="tokens that go through the MLP and the norms of a layer at a time; null: all. For "
        "long sequences: they hold most of what "
        "a layer needs, and its products run no more often than under gradient_checkpointing",
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = Field(
        default="no", description="autocast; 'no' computes in model.dtype"
    )
    sharding: Literal["none", "fsdp"] = Field(
        default="none",
        description="with several processes: none, each holds the whole base (DDP); fsdp, "
        "they share one (FSDP2)",
    )
    keep_codes: bool = Field(
        default=False,
        description="keep the trained integers of every layer for the whole optimizer step instead of "
        "making them anew in each forward and "
        "backward: bits per trained weight of memory",
    )
    compile: bool = Field(
        default=False,
        description="torch.compile of the decoder layers; the same integers, see "
        "docs/speed.md for where it helps",
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        default=0, description="of the start of A, the data order and dropout"
    )
    log_every: Count = Field(default=1, description="steps between lines of metrics.jsonl")
    eval_every: Count | None = Field(
        default=None, description="steps between validation losses; null: only at the end"
    )
    save_every: Count | None = Field(
        default=None, description="steps between checkpoints; null: only at the end and on a signal"
    )
    keep_checkpoints: Count = Field(default=2, description="newest checkpoints kept")
    keep_best: bool = Field(
        default=False, description="ship the checkpoint of the lowest validation loss, not the last"
    )
    max_bad_steps: Count = Field(
        default=5, description="stop after this many NaN or infinite losses in a row"
    )
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default=[], description="besides metrics.jsonl, which is always written"
    )

    @field_validator("mixed_precision", "offload", mode="before")
    @classmethod
    def _no_is_a_word(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads an unquoted no as false

    @model_validator(mode="after")
    def _offload(self) -> TrainSection:
        if self.offload != "no" and not self.gradient_checkpointing:
            raise ValueError(
                f"offload {self.offload} moves what gradient_checkpointing keeps, and that is off; set "
                "gradient_checkpointing: true, "
                "or offload: no"
            )
        return self

    @model_validator(mode="after")
    def _compile(self) -> TrainSection:
        if self.compile and self.mlp_chunk is not None:
            raise ValueError(
                f"compile and mlp_chunk {self.mlp_chunk} do not go together: the chunks run their own "
                "backward, which is not for a compiler; set "
                "compile: false, or mlp_chunk: null"
            )
        return self

    @model_validator(mode="after")
    def _length(self) -> TrainSection:
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError(
                f"max_steps {self.max_steps} and epochs {self.epochs}; allowed: exactly one of them; set "
                "max_steps or epochs"
            )
        return self


class EvalSection(Section):
    """What is measured at the end."""

    perplexity: bool = Field(
        default=True, description="perplexity of base, quantized, trained, merged, exported"
    )
    data: DataSource | None = Field(default=None, description="rows to measure on; null: data.valid")
    windows: Count | None = Field(default=64, description="windows measured; null: all")
    window: Annotated[int, Field(ge=8)] = Field(default=256, description="tokens per window")
    kl: bool = Field(
        default=True,
        description="also the KL divergence to the full-precision model, which is loaded again for it",
    )
    tasks: list[str] = Field(
        default=[], description="lm-eval tasks: names, or YAML files of its format (extra: eval)"
    )
    task_limit: Count | None = Field(default=None, description="rows measured of each task; null: all")
    generate: list[str] = Field(default=[], description="prompts answered before and after training")
    max_new_tokens: Count = Field(default=48, description="tokens per answer")


class ExportSection(Section):
    """What is written for serving."""

    format: str = Field(
        default="compressed-tensors",
        description="compressed-tensors (vLLM, SGLang, transformers), gguf (llama.cpp, Ollama), gptq, "
        "gptq_v2, awq, mlx (mlx-lm), torchao, "
        "or native (every grid)",
    )
    verify: bool = Field(default=True, description="reload the export and compare codes, scales and logits")
