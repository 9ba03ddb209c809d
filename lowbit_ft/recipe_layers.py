"""The linear layers of a checkpoint, from config.json and safetensors headers alone: names and shapes, no
tensor is read.

Used by the recipe checks, `plan` and `init`. What a name means (quantized, skipped and why) is
QuantSection.skip_reason, the same rule the quantizer follows on the real modules.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowbit_ft.incoming import Incoming

_NOT_LINEAR = (
    "embed",
    "wte",
    "wpe",
    "norm",
    "rotary",
    "ln_",
    "layernorm",
)  # 2-D weights that are looked up, not multiplied


@dataclass(frozen=True)
class Layer:
    """A linear layer of the checkpoint: weight [N, K] (N out features, K in features)."""

    name: str
    out_features: int
    in_features: int


@dataclass(frozen=True)
class Shapes:
    """What the headers of a checkpoint say."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]
    nbytes: dict[str, int]
    incoming: Incoming | None = None  # what is packed in the files already

    @property
    def linears(self) -> list[Layer]:
        """Every 2-D `*.weight` that is multiplied with (not embeddings), in the order of the model."""
        found = []
        for name, shape in self.tensors.items():
            layer = name.removesuffix(".weight")
            last = layer.rpartition(".")[2].lower()
            if layer != name and len(shape) == 2 and not any(word in last for word in _NOT_LINEAR):
                found.append(Layer(layer, *shape))
        return sorted(found, key=lambda found_layer: natural(found_layer.name))

    def number(self, *keys: str) -> int | None:
        """The first of these integers that config.json has (looked up in text_config too)."""
        inner = self.config.get("text_config")
        for values in (self.config, inner if isinstance(inner, dict) else {}):
            for key in keys:
                if isinstance(values.get(key), int):
                    return values[key]
        return None


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def local_folder(path: str, revision: str | None = None) -> Path | None:
    """The folder a model path means when it is on this disk (a hub id: its snapshot in the hub cache), else
    None.
    """
    folder = Path(path).expanduser()
    try:
        if folder.is_dir():
            return folder
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(path, "config.json", revision=revision)
    except (OSError, ValueError):  # not a path, or not a hub id either
        return None
    return Path(found).parent if isinstance(found, str) else None


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer of a checkpoint folder brings a chat template (of its own file, or in its config)."""
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    try:
        return '"chat_template"' in (folder / "tokenizer_config.json").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def read_shapes(folder: Path) -> Shapes:
    """Read config.json and the safetensors headers of `folder`.

    Raises:
        ValueError: no config.json, no safetensors, a damaged header; the message names the file and the fix.
    """
    from lowbit_ft.hub import tensor_entries
    from lowbit_ft.incoming import collapse

    config_file = folder / "config.json"
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{config_file}: missing; give the folder of a Hugging Face checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{config_file}: not readable JSON ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{config_file}: got a JSON {type(config).__name__}; allowed: an object")

    entries, problems = tensor_entries(folder)
    if problems:
        raise ValueError(problems[0])
    try:
        entries, incoming = collapse(config.get("quantization_config"), entries)
    except ValueError as error:
        raise ValueError(f"{config_file}: {error}") from None
    shapes = {name: entry.shape for name, entry in entries.items()}
    return Shapes(folder, config, shapes, {name: entry.nbytes for name, entry in entries.items()}, incoming)
