"""The seam where keys and values pass: what every attention module of transformers does before it attends is

    key, value = cache.update(key, value, layer_idx)        key after rotary embedding, [B, heads, L, D]

so the object it is given for its cache sees them whatever attends afterwards: sdpa, eager, flash attention,
our segments (attention.py). A hook before the module's forward hands it a `Passage` in place of the cache:

    no cache (training)       update gives k^, v^, straight-through
    an empty dynamic cache    its layer is exchanged for a packed one (kv_cache/cache.py), which stores
                              integers and gives k^, v^
    any other cache           k^, v^ are put into it, as they are

In each case the values are quantized once, and attention gets the same ones: what generates is what was
trained. A wrapped attention function would see the same tensors, but behind a cache only, where they have
been quantized already; and it would have another name, which models and masks look at.

R3 rotates q and k over head_dim before k is quantized. Scores are products of the two, so

    (q H) . Q(k H)  =  q . (Q(k H) H)        H orthonormal and symmetric

and turning k^ back is all it takes: q stays as it is, and every attention implementation has R3.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

SEAM = "kv_seam"  # the attribute of an attention module that has one
ARGUMENTS = ("past_key_values", "layer_past")  # how attention modules call their cache


class Codec(Protocol):
    """Keys or values [B, heads, L, D] on a grid."""

    def fake(self, x: Tensor) -> Tensor:
        """x^ in x's shape and dtype; its gradient is x's."""
        ...

    def turned(self) -> Codec:
        """The same grid behind a Hadamard rotation of every head (R3)."""
        ...


@dataclass
class Seam:
    """What an attention module does with its keys and values. keys, values: their grids; None: nothing.
    before_rope: at the outputs of k_proj and v_proj and not where they are cached. r3: the keys of this layer
    are rotated before they are rounded. off: for now in full precision. layer: makes a packed cache layer of
    (grid of keys, of values, an empty layer of transformers), None where there is none of its kind."""

    keys: Codec | None = None
    values: Codec | None = None
    before_rope: bool = False
    r3: bool = False
    off: bool = False
    layer: Callable[[Any, Any, Any], Any] | None = None
    argument: str = ARGUMENTS[0]
    position: int = 0
    hooked: dict[str, Any] = field(default_factory=dict)  # projection -> (module, handle), before_rope

    def quantize(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """[B, heads, L, D] each -> k^, v^."""
        keys, values = self.codecs
        return keys.fake(key), values.fake(value)

    @property
    def codecs(self) -> tuple[Codec, Codec]:
        assert self.keys is not None and self.values is not None
        return (self.keys.turned() if self.r3 else self.keys), self.values


class Passage:
    """What an attention module gets for its cache, for one forward."""

    def __init__(self, seam: Seam, cache: Any):
        self.seam, self.cache = seam, cache

    def update(
        self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As transformers' Cache.update: all keys and values so far, these among them."""
        seam, cache = self.seam, self.cache
        if cache is None:
            return seam.quantize(key, value)
        if not packs(cache, layer, seam, key, value):
            key, value = seam.quantize(key, value)
        return cache.update(key, value, layer, *args, **kwargs)

    def get_seq_length(self, layer: int = 0) -> int:
        return 0 if self.cache is None else self.cache.get_seq_length(layer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


def packs(cache: Any, layer: int, seam: Seam, key: Tensor, value: Tensor) -> bool:
    """Whether this layer of the cache quantizes by itself; an empty dynamic one does from here on, where
    no gradient is asked for."""
    from transformers.cache_utils import DynamicLayer

    layers = getattr(cache, "layers", None)
    if layers is None:
        return False
    if cache.layer_class_to_replicate is DynamicLayer:
        while len(layers) <= layer:
            layers.append(DynamicLayer())
    if layer >= len(layers):
        return False
    here = layers[layer]
    if getattr(here, "packed", False):
        return True
    learns = torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)
    if here.is_initialized or learns or seam.layer is None:
        return False
    made = seam.layer(*seam.codecs, here)
    if made is None:
        return False
    layers[layer] = made
    return True


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the decoder that keep keys and values in a cache, by name: their forward takes a cache
    and updates it."""
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else model  # pyright: ignore[reportCallIssue]
    inside = {id(module) for module in decoder.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if id(module) in inside and _updates(type(module))
    }


def layer_number(module: nn.Module) -> int:
    """The number of the decoder layer that an attention module is in, by which it asks its cache."""
    number = getattr(module, "layer_idx", None)
    return number if number is not None else module.layer_id  # pyright: ignore[reportReturnType]  (GPT-Neo's name)


def _updates(kind: type[nn.Module]) -> bool:
    if not set(ARGUMENTS) & set(inspect.signature(kind.forward).parameters):
        return False
    try:
        return ".update(" in inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return False


def set_seam(module: nn.Module, seam: Seam) -> None:
    """Put a seam on an attention module, in place of the one it has."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    seam.argument = next(name for name in ARGUMENTS if name in names)
    seam.position = names.index(seam.argument)
    if not hasattr(module, SEAM):
        module.register_forward_pre_hook(_hand_over, with_kwargs=True)
    else:
        for _, handle in getattr(module, SEAM).hooked.values():
            handle.remove()
    setattr(module, SEAM, seam)


def seams(model: nn.Module) -> Iterator[tuple[str, Seam]]:
    """(name of the attention module, its seam)."""
    for name, module in model.named_modules():
        if hasattr(module, SEAM):
            yield name, getattr(module, SEAM)


def _hand_over(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    seam: Seam = getattr(module, SEAM)
    if seam.keys is None:
        return None
    if seam.before_rope:
        _follow(module, seam)
        return None
    if seam.off:
        return None
    if seam.argument not in kwargs and len(args) > seam.position:
        cache = args[seam.position]
        return (*args[: seam.position], Passage(seam, cache), *args[seam.position + 1 :]), kwargs
    return args, {**kwargs, seam.argument: Passage(seam, kwargs.get(seam.argument))}


PROJECTIONS = ("k_proj", "v_proj")


def _follow(module: nn.Module, seam: Seam) -> None:
    """Hooks on the projections that the module has now: a library of adapters may have put others there."""
    for name in PROJECTIONS:
        projection = getattr(module, name)
        before = seam.hooked.get(name)
        if before is not None and before[0] is projection:
            continue
        if before is not None:
            before[1].remove()
        seam.hooked[name] = (projection, projection.register_forward_hook(_AtOutput(seam, name)))


class _AtOutput:
    """A forward hook: the whole vector [B, L, heads * D] of a token is one row of the grid."""

    def __init__(self, seam: Seam, name: str):
        self.seam, self.name = seam, name

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seam = self.seam
        codec = seam.keys if self.name == PROJECTIONS[0] else seam.values
        if seam.off or codec is None:
            return output
        return codec.fake(output[:, None])[:, 0]
