"""The linear layers of a checkpoint, from config.json and safetensors headers alone: names and shapes, no
tensor is read.

Used by the recipe checks, `plan` and `init`. What a name means (quantized, skipped and why) is
QuantSection.skip_reason, the same rule the quantizer follows on the real modules.

Layers are named as the model names them where files and model differ in kind: the experts of a mixture are
`<experts>.3.gate_up_proj` and `<experts>.3.down_proj` whether a file keeps one tensor per expert (gate and up
apart) or one stack for all, and GPT-2's Conv1D weights, which lie in files as [K, N], have their sides
exchanged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from ..files.jsonfile import read_bytes
from ..incoming import Incoming, collapse
from ..model.config import check_counts, read_config
from ..model.fused import Fusion, Segment
from ..model.hub import tensor_entries
from ..model.images import patches
from ..model.matrices import Matrix
from ..model.names import Part
from ..model.roles import is_head, is_token_embedding

POSITIONS = ("max_position_embeddings", "n_positions")  # config.json: how long a window may be

_NOT_LINEAR = (
    "embed",
    "wte",
    "wpe",
    "norm",
    "rotary",
    "ln_",
    "layernorm",
)  # 2-D weights that are looked up, not multiplied


_CONV1D = dict.fromkeys(
    ("gpt2", "openai-gpt"), ("c_attn", "c_proj", "c_fc", "q_attn")
)  # model_type -> its layers that are transformers' Conv1D
_EXPERT = re.compile(
    r"(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<part>w[123]|gate_proj|up_proj|down_proj)\.weight"
)
_STACK = re.compile(r"(?P<experts>.*\.experts)\.(?P<key>gate_up_proj|up_proj|down_proj)")
_GRANITE_STACK = {"input_linear.weight": "gate_up_proj", "output_linear.weight": "down_proj"}


@dataclass(frozen=True)
class Layer:
    """A linear layer of the checkpoint: weight [N, K] (N out features, K in features). tensors: the names in
    the files of what it is made of; expert: its number in a stack; turned: it is kept as [K, N]; whole: each
    of its tensors is its own alone; rows: of a part of a fused one, which of its rows; conv: a convolution,
    kept as [N, C / g, k, k]."""

    name: str
    out_features: int
    in_features: int
    tensors: tuple[str, ...] = ()
    expert: int | None = None
    turned: bool = False
    whole: bool = True
    rows: Segment | None = None
    conv: bool = False

    def divides(self, group_size: int) -> bool:
        """Whether its rows are whole groups."""
        return group_size == -1 or self.in_features % group_size == 0

    @property
    def matrix(self) -> Matrix:
        """What the exporters ask about a layer."""
        shape = (self.out_features, self.in_features)
        return Matrix(self.name, self.name, shape, self.expert, self.turned, rows=self.rows, conv=self.conv)

    @property
    def names(self) -> tuple[str, ...]:
        """Those by which patterns may mean it."""
        return self.matrix.names

    def apart(self, fusion: Fusion) -> list[Layer]:
        """Its parts."""
        return [
            replace(self, name=f"{self.name}.{part}", out_features=rows.size, whole=False, rows=rows)
            for part, rows in fusion.items()
        ]

    @property
    def parts(self) -> list[Part] | None:
        """The file tensors that make it, for exporters that write one for each; their rows are not known
        here.
        """
        if not self.whole or self.turned or self.conv:
            return None
        return [Part(name, 0, 0) for name in self.tensors]


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
        """Every matrix that is multiplied with (not embeddings), in the order of the model."""
        found = [*self._plain(), *self._experts_apart(), *self._experts_stacked()]
        return sorted(found, key=lambda found_layer: natural(found_layer.name))

    @property
    def convolutions(self) -> list[Layer]:
        """What headers alone show as convolutions, in the order of the model: weights of four dimensions, or,
        over sequences, of three, where they are no stack of experts that is known."""
        found = [
            Layer(name.removesuffix(".weight"), shape[0], prod(shape[1:]), (name,), conv=True)
            for name, shape in self.tensors.items()
            if name.endswith(".weight") and len(shape) in (3, 4) and not name.endswith(tuple(_GRANITE_STACK))
        ]
        return sorted(found, key=lambda layer: natural(layer.name))

    def products(self, quant: Any) -> list[Layer]:
        """The layers that a `quant` section may pack and that multiply: linears, and convolutions where it
        asks for them."""
        return self.linears + (self.convolutions if quant.convolutions else [])

    def packed(self, quant: Any) -> list[Layer]:
        """Those of `products` that it packs, whole."""
        return [x for x in self.products(quant) if quant.skip_reason(x.name, convolution=x.conv) is None]

    @property
    def token_embedding(self) -> Layer | None:
        """The token embedding as a matrix [V, H]."""
        for name, shape in self.tensors.items():
            layer = name.removesuffix(".weight")
            if (
                layer != name
                and len(shape) == 2
                and is_token_embedding(layer)
                and not _EXPERT.fullmatch(name)
            ):
                return Layer(layer, *shape, tensors=(name,))
        return None

    @property
    def head(self) -> Layer | None:
        """The output head; tied to the embedding it has no tensor of its own."""
        for layer in self.linears:
            if is_head(layer.name):
                return layer
        embedding = self.token_embedding
        return None if embedding is None else Layer("lm_head", embedding.out_features, embedding.in_features)

    @property
    def rows(self) -> int | None:
        """Tokens that the model has an embedding and a logit of; None when no tensor has such a name."""
        known = [layer.out_features for layer in (self.token_embedding, self.head) if layer is not None]
        return min(known, default=None)

    @property
    def positions(self) -> int | None:
        """How long a window may be, or how many tokens an image is; None when config.json does not say."""
        return self.number(*POSITIONS) or patches(self.config)

    def _plain(self) -> Iterator[Layer]:
        turned = _CONV1D.get(self.config.get("model_type", ""), ())
        for name, shape in self.tensors.items():
            layer = name.removesuffix(".weight")
            last = layer.rpartition(".")[2]
            if (
                layer == name
                or len(shape) != 2
                or any(word in last.lower() for word in _NOT_LINEAR)
                or _EXPERT.fullmatch(name)
            ):
                continue
            yield Layer(
                layer, *(shape[::-1] if last in turned else shape), tensors=(name,), turned=last in turned
            )

    def _experts_apart(self) -> Iterator[Layer]:
        """One tensor per expert; gate and up are one matrix in the model."""
        experts: dict[tuple[str, int], dict[str, str]] = {}
        for name, shape in self.tensors.items():
            if (found := _EXPERT.fullmatch(name)) and len(shape) == 2:
                part = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.get(
                    found["part"], found["part"]
                )
                experts.setdefault((found["experts"], int(found["number"])), {})[part] = name
        for (prefix, number), parts in experts.items():
            first = "gate_up_proj" if "gate_proj" in parts else "up_proj"
            for key, names in ((first, ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
                tensors = tuple(parts[name] for name in names if name in parts)
                if tensors:
                    n, k = sum(self.tensors[name][0] for name in tensors), self.tensors[tensors[0]][1]
                    model_name = prefix.replace(".block_sparse_moe.", ".mlp.")  # as transformers renames it
                    yield Layer(f"{model_name}.{number}.{key}", n, k, tensors, number)

    def _experts_stacked(self) -> Iterator[Layer]:
        """All experts of a layer in one tensor [E, N, K], or [E, K, N]."""
        hidden = self.number("hidden_size")
        for name, shape in self.tensors.items():
            found = _STACK.fullmatch(name)
            prefix, key = (found["experts"], found["key"]) if found else (None, None)
            if not found and name.partition("block_sparse_moe.")[2] in _GRANITE_STACK:
                head, _, tail = name.partition("block_sparse_moe.")
                prefix, key = f"{head}block_sparse_moe.experts", _GRANITE_STACK[tail]
            if prefix is None or len(shape) != 3:
                continue
            turned = (
                self.config.get("model_type") == "gpt_oss"
                or hidden == shape[1 if key != "down_proj" else 2] != shape[2 if key != "down_proj" else 1]
            )
            n, k = shape[:0:-1] if turned else shape[1:]
            for number in range(shape[0]):
                yield Layer(f"{prefix}.{number}.{key}", n, k, (name,), number, turned, whole=False)

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
    """Whether the tokenizer of a checkpoint folder brings a chat template (of its own file, or in its
    config).
    """
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    try:
        return b'"chat_template"' in read_bytes(folder / "tokenizer_config.json")
    except ValueError:
        return False


def read_shapes(folder: Path) -> Shapes:
    """Read config.json and the safetensors headers of `folder`.

    Raises:
        ValueError: no config.json, no safetensors, a damaged header; the message names the file and the fix.
    """
    config_file = folder / "config.json"
    config = read_config(folder)
    entries, problems = tensor_entries(folder)
    if problems:
        raise ValueError(problems[0])
    try:
        entries, incoming = collapse(config.get("quantization_config"), entries)
    except ValueError as error:
        raise ValueError(f"{config_file}: {error}") from None
    check_counts(config_file, config, entries)
    shapes = {name: entry.shape for name, entry in entries.items()}
    return Shapes(folder, config, shapes, {name: entry.nbytes for name, entry in entries.items()}, incoming)


def shapes_here(path: str, revision: str | None) -> Shapes | None:
    """The headers of the model at a model.path, when it is on this disk and readable."""
    folder = local_folder(path, revision)
    if folder is None:
        return None
    try:
        return read_shapes(folder)
    except (OSError, ValueError):
        # a local folder: check_model tells; a hub id half downloaded: model/load.py fetches the rest
        return None
