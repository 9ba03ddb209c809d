"""TRAITS: what each class of diffusers sees of a picture, how it is told the time, and what else it is told.

    class                      beside           a picture [C, H, W] is                told at t
    DiTTransformer2DModel      class_labels     itself                                1000 t, or the step
    SD3Transformer2DModel      states of a text itself                                1000 t
    FluxTransformer2DModel     states of a text [H/2 W/2, 4 C], its patches of 2 x 2  t

In diffusers' own units and order, as its pipelines call them, so what is trained here is what they sample
from. A token of Flux holds a channel's four values before the next channel's; its place is (0, row, column),
that of every token of the text (0, 0, 0).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Traits:
    """chain: a layer is given the hidden states first and returns nothing else. per: what 1000 t is divided
    by before the model is told it. text_tokens: how many states a text has by its pipeline; 0: it is told a
    label and no text. patch: patches of so many pixels a side are tokens; 1: a picture is itself. size: of a
    picture, where config.json names none."""

    chain: bool = False
    per: float = 1.0
    text_tokens: int = 0
    patch: int = 1
    size: int = 128

    @property
    def texts(self) -> bool:
        return self.text_tokens > 0

    def channels(self, config: Mapping[str, Any]) -> int:
        """Of a picture."""
        return config.get("in_channels", 4) // self.patch**2

    def packed(self, x: Tensor) -> Tensor:
        """Pictures [B, C, H, W] -> what the model is called with."""
        if self.patch == 1:
            return x
        b, c, h, w = x.shape
        parts = x.reshape(b, c, h // self.patch, self.patch, w // self.patch, self.patch)
        return parts.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * self.patch**2)

    def unpacked(self, said: Tensor) -> Tensor:
        """What the model says -> square pictures [B, C, H, W]."""
        if self.patch == 1:
            return said
        b, tokens, width = said.shape
        side = math.isqrt(tokens)
        parts = said.reshape(b, side, side, width // self.patch**2, self.patch, self.patch)
        return parts.permute(0, 3, 1, 4, 2, 5).reshape(b, -1, side * self.patch, side * self.patch)

    def places(self, tokens: int, device: torch.device) -> Tensor:
        """fp32 [tokens, 3]: (0, row, column) of the tokens of a square picture. ValueError for another."""
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise ValueError(f"got {tokens} tokens of a picture, which is no square: give its img_ids")
        at = torch.arange(tokens, device=device)
        return torch.stack((torch.zeros_like(at), at // side, at % side), -1).float()


TRAITS: dict[str, Traits] = {
    "DiTTransformer2DModel": Traits(chain=True),
    "SD3Transformer2DModel": Traits(text_tokens=333),  # 77 of the CLIP encoders, 256 of T5
    "FluxTransformer2DModel": Traits(per=1000.0, text_tokens=512, patch=2),
}


def shapes(config: Mapping[str, Any], windows: int = 1) -> dict[str, tuple[int, ...]]:
    """What a model is called with beside its time, by its config.json: the shape of each input, of so many
    pictures. Of Flux, whose config.json names no size, and of texts: what `task` wrote there, else 8 pixels
    and 6 tokens."""
    seen = TRAITS[config["_class_name"]]
    channels, size = seen.channels(config), config.get("picture_size") or config.get("sample_size", 8)
    pictures = (windows, channels, size, size)
    if seen.patch > 1:
        pictures = (windows, (size // seen.patch) ** 2, channels * seen.patch**2)
    if not seen.texts:
        return {"hidden_states": pictures, "class_labels": (windows,)}
    tokens, width = config.get("text_tokens") or 6, config.get("joint_attention_dim", 4096)
    pooled = config.get("pooled_projection_dim", 768 if seen.patch > 1 else 2048)
    return {
        "hidden_states": pictures,
        "encoder_hidden_states": (windows, tokens, width),
        "pooled_projections": (windows, pooled),
    }
