"""The model of a recipe without weights: what it will hold, and one packed, adapted decoder layer of each
kind.

config.json builds the model on the meta device (transformers' own code, so every architecture is itself), the
rule of `quantize` says which matrices are packed, and PackedLinears and adapters of the recipe take their
places. Bytes are then counted from the tensors' shapes, not from formulas. Decoder layers that are alike are
built once and multiplied.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import Scheme
from ..activations.learned import learn_inputs
from ..activations.place import place
from ..adapters import AdapterConfig
from ..adapters.base import Adapter
from ..grid import empty_weight
from ..kv_cache import bytes_per_token, put_seams, reject_model, said
from ..model.config import CONFIG, load_config, read_config
from ..model.kinds import matrix_shape, packed_in_place_of
from ..model.linear import PackedEmbedding, PackedLinear
from ..model.matrices import Matrix, find_matrices, fusions_of, stand_in
from ..model.meta import meta_model
from ..model.purpose import head_parameters
from ..model.walk import decoder_layers, kind_of
from ..model.whole import train_parameters, train_whole
from ..quantize.table import plan_layers
from ..recipe.layers import Shapes
from ..recipe.recipe import Recipe
from ..segments import Segments, segments_in
from ..tasks import Task
from .beside import ends_of, grown_rows, table_bytes, train_new_rows, trained_whole
from .costs import attends
from .pruned import put_zeros
from .turned import online_layers, put_online, untie

# Bytes by part, in the order in which they are shown.
PARTS = ("codes", "residual", "mask", "scales and zeros", "embeddings", "head", "norms and other", "adapters")
_PACKED_PARTS = {"codes": "codes", "planes": "codes", "residual": "residual", "mask": "mask"}


@dataclass(frozen=True)
class PlanRow:
    """One linear layer: weight [N, K]; `reason` says why it is skipped (None: quantized on `grid`); sizes in
    bytes, parameters.
    """

    layer: str
    out_features: int
    in_features: int
    grid: str = ""
    reason: str | None = None
    base_bytes: int = 0
    residual_bytes: int = 0
    trainable: int = 0


@dataclass
class Block:
    """A kind of decoder layer: the module (packed and adapted, on meta), its name, and which layers are of
    this kind. like: the same for layers that differ in nothing but that one of them is the first."""

    name: str
    module: nn.Module
    like: str
    indices: list[int] = field(default_factory=list)


@dataclass
class Skeleton:
    """A recipe's model: kinds of decoder layers, the rest of the model (its layers are still dense and only
    stand for their number), bytes by part, and the numbers of elements of every trained tensor."""

    model: Any
    blocks: list[Block]
    rows: list[PlanRow]
    held: dict[str, int]
    trained: list[int]
    trained_bytes: int  # of all of them; their gradients are as large
    block_bytes: dict[str, list[int]]  # kind -> [frozen bytes, trained elements] of one layer
    largest: int  # elements of the largest matrix to be packed
    dense_block: int  # bytes of the largest decoder layer in model.dtype
    dense_bytes: int  # bytes of the whole dense model in model.dtype
    shapes: Shapes  # of the dense model's tensors, as the headers of its checkpoint would give them
    task: Task

    @property
    def table_bytes(self) -> int:
        """Of the token embedding's gradient before it is fp32, where it trains."""
        return table_bytes(self.model)

    @property
    def trainable(self) -> int:
        return sum(self.trained)

    @property
    def layers(self) -> int:
        return sum(len(block.indices) for block in self.blocks)


def skeleton(recipe: Recipe, folder: Path) -> Skeleton:
    """The model of `recipe` with the config.json of `folder`. ValueError when no model can be made of it, or
    packed as asked.
    """
    attention = "eager" if attends(recipe) == "eager" else "sdpa"
    rows = grown_rows(recipe, folder)
    dense = _dense(str(folder), _stamp(folder), recipe.model.dtype, attention, rows, recipe.task)
    targets, skipped = plan_layers(dense, recipe.quant, folder)
    # of what is no chain of layers the whole network is one stretch
    prefix, layers = decoder_layers(dense) if recipe.task.walks(read_config(folder)) else ("", [])
    inside: dict[int, list[str]] = {i: [] for i in range(len(layers))}
    outside = []
    for name in targets:
        head, _, tail = name.removeprefix(f"{prefix}.").partition(".")
        if name.startswith(f"{prefix}.") and head.isdecimal():
            inside[int(head)].append(tail)
        else:
            outside.append(name)

    config, dtype = _start_free(recipe.adapter), getattr(torch, recipe.model.dtype)
    kv_cache = None if recipe.quant.kv_cache is None else recipe.quant.kv_cache.config()
    if kv_cache is not None and (problems := reject_model(dense, kv_cache)):
        raise ValueError("quant.kv_cache: " + "; ".join(problems))
    online = online_layers(recipe, dense)
    segments = _segments(recipe, folder)
    if getattr(config, "segments", "none") == "auto":
        config = config.with_plan({name: own.outputs for name, own in segments.items()})
    whole = trained_whole(recipe, dense, targets)
    blocks: dict[str, Block] = {}
    for index, layer in enumerate(layers):
        name = f"{prefix}.{index}"
        own = {n: targets[f"{name}.{n}"] for n in inside[index]}
        grids = [_asked(recipe, config, n, matrix, segments) for n, matrix in own.items()]
        trained = [n.removeprefix(f"{name}.") for n in whole if n.startswith(f"{name}.")]
        like = repr((grids, kind_of(layer), trained))
        key = f"{index == 0} {like}"
        if key not in blocks:
            module = copy.deepcopy(layer)
            apart = fusions_of(replace(matrix, name=n) for n, matrix in own.items())
            stand_in(module, own, apart)
            _pack(module, grids, dtype)
            train_whole(module, trained)
            put_zeros(module, recipe)
            put_online(module, f"{name}.", online)
            if kv_cache is not None:
                put_seams(module, dense.config.get_text_config(), kv_cache)
            blocks[key] = Block(name, module, like)
        blocks[key].indices.append(index)

    shell = copy.copy(dense)  # its own dict of modules, so that the cached one stays dense
    rest = _without_layers(shell, prefix)
    own_head = untie(recipe, rest)
    _pack(rest, [_asked(recipe, config, n, targets[n], segments) for n in outside], dtype)
    train_whole(rest, [n for n in whole if not n.startswith(f"{prefix}.")])
    train_new_rows(recipe, rest, folder)
    if recipe.task.trains_head:
        train_parameters(rest, head_parameters(rest, recipe.train.signal.learns_labels))
    tied = getattr(dense.config.get_text_config(), "tie_word_embeddings", False) and not any(
        n in targets for n in _ends(dense)
    )
    tied = bool(tied) and not own_head
    return _counted(rest, list(blocks.values()), targets, skipped, recipe, prefix, dense, tied)


def cache_line(recipe: Recipe, made: Skeleton) -> str | None:
    """What keys and values of a token take in a cache; None where the recipe leaves them alone."""
    if recipe.quant.kv_cache is None:
        return None
    dtype, text = getattr(torch, recipe.model.dtype), made.model.config.get_text_config()
    sizes = [(len(b.indices), *bytes_per_token(b.module, dtype.itemsize, text)) for b in made.blocks]
    ours, plain = (sum(row[0] * row[part] for row in sizes) for part in (1, 2))
    return said(recipe.quant.kv_cache.config(), ours, plain, dtype)


def _counted(
    rest: Any,
    blocks: list[Block],
    targets: dict[str, Any],
    skipped: list[Any],
    recipe: Recipe,
    prefix: str,
    dense: Any,
    tied: bool,
) -> Skeleton:
    held: dict[str, int] = dict.fromkeys(PARTS, 0)
    trained: list[int] = []
    per_block: dict[str, list[int]] = {}
    embedding, head = ends_of(rest)

    def part_of(module: nn.Module) -> str:
        return (
            "embeddings"
            if module is embedding
            else "head"
            if module is head and not tied
            else "norms and other"
        )

    for part, size in _bytes(rest, part_of):
        held[part] += size
    trained += [p.numel() for p in rest.parameters() if p.requires_grad]
    trained_bytes = sum(p.nbytes for p in rest.parameters() if p.requires_grad)
    for block in blocks:
        own = list(_bytes(block.module, lambda _: "norms and other"))
        for part, size in own:
            held[part] += size * len(block.indices)
        masters = [p.numel() for p in block.module.parameters() if p.requires_grad]
        trained += masters * len(block.indices)
        own_bytes = sum(p.nbytes for p in block.module.parameters() if p.requires_grad)
        trained_bytes += own_bytes * len(block.indices)
        per_block[block.name] = [sum(size for part, size in own if part != "adapters"), sum(masters)]
    rows = [_row(name, matrix, recipe, rest, blocks, prefix) for name, matrix in targets.items()]
    shapes = {name: matrix.shape for name, matrix in find_matrices(dense).items()}
    left = [row for row in skipped if row.layer in shapes and row.reason != "embedding"]
    rows += [
        PlanRow(row.layer, shapes[row.layer][0], shapes[row.layer][1], reason=row.reason) for row in left
    ]
    size = getattr(torch, recipe.model.dtype).itemsize
    layers: Any = dense.get_submodule(prefix) if prefix else [dense]
    dense_block = max(sum(p.numel() for p in layer.parameters()) for layer in layers) * size
    largest = max((m.shape[0] * m.shape[1] for m in targets.values()), default=0)
    whole = sum(p.numel() for p in dense.parameters()) * size
    tensors = {name: tuple(p.shape) for name, p in dense.named_parameters()}
    header = Shapes(Path(), dense.config.get_text_config().to_dict(), tensors, {})
    return Skeleton(
        rest,
        blocks,
        rows,
        held,
        trained,
        trained_bytes,
        per_block,
        largest,
        dense_block,
        whole,
        header,
        recipe.task,
    )


def _bytes(module: nn.Module, part_of: Callable[[nn.Module], str]) -> Iterable[tuple[str, int]]:
    """(part, bytes) of every tensor of a module, tied ones once."""
    seen: set[int] = set()
    for owner in module.modules():
        packed = isinstance(owner, PackedLinear)
        for name, tensor in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            part = part_of(owner)
            if tensor.requires_grad:
                part = "adapters"
            elif packed and part == "norms and other" and name != "bias":
                part = _PACKED_PARTS.get(name, "scales and zeros")
            elif part == "norms and other" and _is_adapter(owner):
                part = "adapters"
            yield part, tensor.numel() * tensor.element_size()


def _is_adapter(module: nn.Module) -> bool:
    return isinstance(module, Adapter)


def _row(name: str, matrix: Any, recipe: Recipe, rest: Any, blocks: list[Block], prefix: str) -> PlanRow:
    module: nn.Module = rest
    inner = name
    head, _, tail = name.removeprefix(f"{prefix}.").partition(".")
    if name.startswith(f"{prefix}.") and head.isdecimal():
        module = next(block.module for block in blocks if int(head) in block.indices)
        inner = tail
    layer = module.get_submodule(inner)
    assert isinstance(layer, PackedLinear)
    sizes = {key: t.numel() * t.element_size() for key, t in layer.base.to_tensors().items()}
    residual = sizes.pop("residual", 0)
    count = (
        sum(p.numel() for p in layer.adapter.parameters() if p.requires_grad)
        if layer.adapter is not None
        else 0
    )
    n, k = matrix.shape
    grid = str(recipe.quant.grid_for(*matrix.names))
    return PlanRow(name, n, k, grid, None, sum(sizes.values()), residual, count)


_Asked = tuple[str, Any, AdapterConfig | None, Scheme | None]


def _segments(recipe: Recipe, folder: Path) -> dict[str, Segments]:
    """The segments of the model's linears, where the recipe asks for them."""
    section = recipe.quant.activations
    wanted = (section, recipe.adapter)
    return segments_in(folder) if any(getattr(one, "segments", "none") == "auto" for one in wanted) else {}


def _asked(recipe: Recipe, config: Any, name: str, matrix: Matrix, segments: dict[str, Segments]) -> _Asked:
    """What the recipe wants of a matrix, called `name` in its module: (name, grid, its adapter's config, what
    its input is on)."""
    section, own = recipe.quant.activations, segments.get(matrix.whole, Segments())
    scheme = None if section is None else section.planned(matrix.whole, own.widths)
    adapter = config.of_layer(matrix.name) if config.trains(*matrix.names) else None
    return name, recipe.quant.grid_for(*matrix.names), adapter, scheme


def _pack(module: nn.Module, grids: list[_Asked], dtype: torch.dtype) -> None:
    """PackedLinears and adapters on meta in the place of the matrices of these names."""
    for name, grid, config, scheme in grids:
        old = module.get_submodule(name)
        shape, bias = matrix_shape(old), getattr(old, "bias", None)
        assert shape is not None and len(shape) == 2, name
        bias = None if bias is None else torch.empty(bias.shape, dtype=dtype, device="meta")
        layer = packed_in_place_of(old, empty_weight(shape, grid, "meta"), bias, dtype)
        module.set_submodule(name, layer)
        if isinstance(layer, PackedEmbedding):
            continue
        place(layer, scheme)
        if config is not None:
            if reason := config.reject(grid):
                raise ValueError(f"adapter {config.method} cannot train {name}: {reason}")
            with torch.device("meta"):
                layer.adapter = config.build(layer.base)
    learn_inputs(module)
    for name, parameter in module.named_parameters():
        if ".adapter." not in f".{name}":
            parameter.requires_grad_(False)


def _start_free(config: Any) -> Any:
    """The adapter section with a start that reads nothing: it changes no shape."""
    changes = {
        key: value
        for key, value in (("init", "zero"), ("init_from", None))
        if key in type(config).model_fields
    }
    return config.model_copy(update=changes)


def _ends(model: Any) -> list[str]:
    """Names of the token embedding and of the output head."""
    ends = [end for end in ends_of(model) if end is not None]
    return [name for name, module in model.named_modules() if any(module is end for end in ends)]


def _without_layers(model: Any, prefix: str) -> Any:
    """A copy of the model (on meta) whose decoder layers are empty modules of the same number: see step.py,
    which calls it.
    """
    layers: Any = model.get_submodule(prefix) if prefix else []
    kept = {id(layer): Hollow(layer) for layer in layers}
    return copy.deepcopy(model, memo=dict(kept))


class Hollow(nn.Module):
    """Stands for a decoder layer: no tensors, but what the model looks at on a layer before calling it (its
    kind of attention), or computes with itself (`seen_from_outside`).
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for key, value in vars(layer).items():
            if isinstance(value, str | int | float | bool) and key != "training":
                setattr(self, key, value)
        for key, part in vars(layer).get("seen_from_outside", {}).items():
            setattr(self, key, part)

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden


def _stamp(folder: Path) -> int:
    return (folder / "config.json").stat().st_mtime_ns


@functools.lru_cache(maxsize=4)
def _dense(folder: str, stamp: int, dtype: str, attention: str, rows: int | None, task: Task) -> Any:
    """The dense model on meta; read only: everybody copies what they change."""
    path, config = Path(folder) / CONFIG, load_config(folder)
    if getattr(config, "quantization_config", None) is not None:
        delattr(config, "quantization_config")  # its layers are packed by us: resolve_quant has their grids
    if rows is not None:
        config.get_text_config().vocab_size = rows
    purpose = task.purpose(0)
    config = config if purpose is None else purpose.applied(config, Path(folder))
    return meta_model(config, getattr(torch, dtype), attention, path, purpose)
