"""config.json: the one place where it is read, and where transformers makes a configuration of it.

It is data from a stranger. Keys that name code, kernels or other files are dropped (DROPPED), as if they had
not been written: the recipe says which attention runs, and no code or kernel is fetched. Counts and sizes
are bounded before anything is built of them, by what the weight files hold where there are any. And over a
bad value transformers raises whatever it likes (KeyError, TypeError, ZeroDivisionError, errors of its own
validators): `answered` makes each of them an answer that names the file.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, StrictInt, StrictStr

from ..diffusion.names import recognised
from ..diffusion.register import register as register_diffusion
from ..files.atomic import write_text
from ..files.errors import FileError
from ..files.jsonfile import as_shape, read_json, shown
from ..files.tensorfile import CheckpointError, TensorEntry
from ..speech.register import register as register_speech

CONFIG, GENERATION = "config.json", "generation_config.json"
# Python files that are not run, the attention and expert kernels that a recipe or the model's class chooses
# ("org/name" is fetched from the hub and run), other names for config.json and the weights, and what a call
# of the model returns, which is up to the caller.
DROPPED = (
    "auto_map",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "_attn_implementation_autoset",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
    "configuration_files",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "torchscript",
    "transformers_weights",
)
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")
_COUNT = re.compile(r".*layers?|.*depth|.*experts?|num_stages")
_SIZE = re.compile(
    r".*(hidden|intermediate|embedding|vocab|inner|ffn)_?(size|dim)|.*_heads?|.*_groups|head_dim|.*_head_dim"
    r"|n_embd|n_inner|d_(model|ff|kv|state|inner)|ffn_dim|word_embed_proj_dim|n_(positions|ctx)|.*_rank"
)
# Without weights at hand (`plan --config`): more layers or experts than any model has, and a width whose
# square has 2^48 numbers.
MOST_LAYERS = 1024
MOST_WIDE = 1 << 24
_MAX_CONFIG = 16 << 20  # bytes; mixtures list every layer that is not quantized


class _Read(BaseModel):
    """The keys that our own code reads, and of which kind they are."""

    model_config = ConfigDict(protected_namespaces=())
    model_type: StrictStr | None = None
    text_config: dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None
    vocab_size: StrictInt | None = None
    max_position_embeddings: StrictInt | None = None
    n_positions: StrictInt | None = None
    sliding_window: StrictInt | None = None  # the cache of transformers reads it, whatever model has it
    layer_types: list[StrictStr] | None = None


def head_width(number: Callable[[str], Any], values: bool = False) -> int | None:
    """Channels of a head (values: of v) by a configuration; None where it does not tell. number(key): its
    value of a key, None where there is none."""

    def first(*keys: str) -> int | None:
        return next((size for key in keys if isinstance(size := number(key), int)), None)

    own = first("v_head_dim", "head_dim") if values else first("head_dim")
    if own is not None:
        return own
    heads, hidden = first("num_attention_heads", "n_head"), first("hidden_size", "n_embd", "d_model")
    return hidden // heads if hidden and heads else None


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a model folder, without what is never followed; of diffusers, with a model_type.
    ValueError naming the file."""
    path = Path(folder) / CONFIG
    fix = "give the folder of a Hugging Face checkpoint (with config.json and *.safetensors)"
    values = read_json(path, dict[str, Any], fix, _MAX_CONFIG)
    as_shape(values, _Read, str(path))
    return recognised(_kept(values))


def load_config(folder: str | Path) -> Any:
    """What transformers makes of the config.json in a folder. CheckpointError naming the file, for whatever
    is wrong with it."""
    from transformers import AutoConfig  # slow: seconds, and recipes are checked without

    path = Path(folder) / CONFIG
    try:
        has_code = "auto_map" in read_json(path, dict[str, Any], limit=_MAX_CONFIG)
        values = read_config(folder)
        check_counts(path, values)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    register_speech(values)
    register_diffusion(values)
    with tempfile.TemporaryDirectory() as place, answered(path, _own_code(has_code)):
        write_text(Path(place) / CONFIG, _text(values))
        config = AutoConfig.from_pretrained(place, trust_remote_code=False, local_files_only=True)
    config._name_or_path = str(folder)
    return config


def check_counts(
    path: Path, values: Mapping[str, Any], entries: Mapping[str, TensorEntry] | None = None
) -> None:
    """ValueError for a count of layers or experts, or a size, that no model has; with the tensors of the
    files, that these cannot hold: a layer is a tensor at least, and a width an element.
    """
    tensors = elements = None
    if entries:
        tensors = len(entries)
        elements = 4 * sum(entry.nbytes for entry in entries.values())  # of two bits at the least
    for key, value in _numbers(values):
        name = key.rpartition(".")[2]
        if name in _DEPTHS and tensors is not None:
            most, why = tensors, f"the files have {tensors} tensors"
        elif _COUNT.fullmatch(name):
            most, why = MOST_LAYERS, "no model has more"
        elif _SIZE.fullmatch(name):
            most, why = min(MOST_WIDE, elements or MOST_WIDE), "the files hold no more"
            why = why if elements and elements < MOST_WIDE else "no model has more"
        else:
            continue
        if value != value or value > most:
            raise ValueError(f"{path}: {key}: got {shown(value)}; allowed: at most {most}, {why}")


@contextmanager
def answered(path: Path, hint: str = "") -> Iterator[None]:
    """CheckpointError naming `path` for whatever transformers raises in the block, with the type of it; our
    own errors pass."""
    try:
        yield
    except (CheckpointError, FileError):
        raise
    except Exception as error:  # any type: see above
        text = str(error).strip().splitlines()
        said = f"{type(error).__name__}: {text[0] if text else 'no detail'}"
        if len(text) > 1 and text[0].endswith(":"):  # huggingface_hub's validators: the reason comes below
            said += f" {text[1].strip()}"
        raise CheckpointError(f"{path}: {hint or 'cannot be used'} ({said})") from error


def _own_code(has_code: bool) -> str:
    return (
        "cannot be used; it names Python code of its own, and code from a checkpoint is never run here"
        if has_code
        else ""
    )


def _kept(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _kept(inner) for key, inner in value.items() if key not in DROPPED}
    return [_kept(inner) for inner in value] if isinstance(value, list) else value


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number of the configuration by its dotted key, those of the quantization left out."""
    for key, value in values.items():
        if isinstance(value, dict) and key != "quantization_config":
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", value
        elif isinstance(value, list):
            for item in value:
                if isinstance(item, int | float) and not isinstance(item, bool):
                    yield f"{prefix}{key}", item


def _text(values: Mapping[str, Any]) -> str:
    return json.dumps(values)


class _Stops(BaseModel):
    eos_token_id: StrictInt | list[StrictInt] | None = None


def stop_ids(path: Path) -> list[int] | None:
    """eos_token_id of generation_config.json or config.json: ids of tokens, none of them is an empty list.
    None where there is no such file. ValueError naming the file."""
    if not os.path.lexists(path):
        return None
    ids = read_json(path, _Stops).eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else ids


def stored_dtype(path: Path, config: Mapping[str, Any]) -> torch.dtype:
    """`dtype` of a config.json (`torch_dtype` in older ones), float32 where it says none. ValueError naming
    the file."""
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    found = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"{path}: dtype: got {shown(name)}; allowed: bfloat16, float16, float32")
    return found
