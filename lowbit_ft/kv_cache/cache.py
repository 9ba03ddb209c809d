"""Packed layers for transformers' caches: a row of bytes per token and head where keys and values were.

`DynamicLayer` and `DynamicSlidingWindowLayer` append, crop, reorder, repeat, select and offload tensors
[B, heads, L, D] without looking into the last axis. Ours are these classes with rows of bytes for it: codes
and scale of a token never part, and what comes out of `update` is decoded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from .codec import Codec


class _Packed(DynamicLayer):
    packed = True

    key_codec: Codec
    value_codec: Codec

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """k^ and v^ [B, heads, L, D] of all tokens so far, in the dtype of the new ones."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise ValueError(
                "this cache holds integers, through which no gradient passes; train without a cache "
                "(use_cache=False), or generate under torch.no_grad()"
            )
        stored = self.key_codec.encode(key_states), self.value_codec.encode(value_states)
        keys, values = super().update(*stored, *args, **kwargs)
        return _decoded(self.key_codec, keys, key_states), _decoded(self.value_codec, values, value_states)

    @property
    def nbytes(self) -> int:
        """Bytes that are stored."""
        return 0 if not self.is_initialized else self.keys.numel() + self.values.numel()  # pyright: ignore[reportOptionalMemberAccess]


def _decoded(codec: Codec, stored: Tensor, like: Tensor) -> Tensor:
    return codec.decode(stored, like.shape[1], like.shape[-1], like.dtype)


class PackedLayer(_Packed):
    """Grows by every token."""

    def __init__(self, keys: Codec, values: Codec):
        super().__init__()
        self.key_codec, self.value_codec = keys, values


class PackedSlidingLayer(_Packed, DynamicSlidingWindowLayer):
    """Keeps the last tokens that its window sees."""

    def __init__(self, keys: Codec, values: Codec, sliding_window: int):
        DynamicSlidingWindowLayer.__init__(self, sliding_window)
        self.key_codec, self.value_codec = keys, values


def packed_like(keys: Codec, values: Codec, like: CacheLayerMixin) -> DynamicLayer | None:
    """The packed layer for an empty one of transformers; None where we have none of its kind: static layers,
    and those with more in them than keys and values."""
    if type(like) is DynamicLayer:
        return PackedLayer(keys, values)
    if type(like) is DynamicSlidingWindowLayer:
        made = PackedSlidingLayer(keys, values, like.sliding_window)
        made.record_past = like.record_past
        return made
    return None


def cache_bytes(cache: Any) -> int:
    """Bytes of keys and values in a cache of transformers, packed or not."""
    kept = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum(t.numel() * t.element_size() for t in kept)
