"""What a text encoder said of a prompt, as SD3 and Flux are told it: a .safetensors file, written once.

    encoder_hidden_states  [tokens, width]   a state for every token, those of padding too: nothing masks them
    pooled_projections     [pooled]          one of the whole prompt

No text at all, which guidance is against: a file of the states of "", as the pipelines of diffusers have it,
or zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.regular import read_regular
from .traits import shapes

MOST = 1 << 28  # bytes of a file


@dataclass(frozen=True)
class Texts:
    """tokens, and how wide their states and the pooled one are."""

    tokens: int
    width: int
    pooled: int

    @property
    def shapes(self) -> dict[str, list[int]]:
        return {"encoder_hidden_states": [self.tokens, self.width], "pooled_projections": [self.pooled]}

    def values(self, data: bytes) -> dict[str, Tensor]:
        """The bytes of a file -> fp32 tensors by name. ValueError saying what is wrong with them."""
        from safetensors.torch import load

        wanted = " and ".join(f"{name} {shape}" for name, shape in self.shapes.items())
        try:
            found = load(data)
        except Exception as error:  # any type, for a damaged file
            raise ValueError(
                f"must be a .safetensors file of what a text encoder says, {wanted}; it cannot be read "
                f"({type(error).__name__}: {error})"
            ) from error
        if missing := [name for name in self.shapes if name not in found]:
            raise ValueError(f"holds {list(found)[:5]} and no {missing[0]}; allowed: {wanted}")
        made = {}
        for name, shape in self.shapes.items():
            value = found[name]
            if list(value.shape) != shape or not value.is_floating_point():
                hint = " (task.text_tokens says how many)" if value.dim() == 2 else ""
                raise ValueError(
                    f"holds {name} {list(value.shape)} {str(value.dtype).removeprefix('torch.')}; allowed: "
                    f"floating numbers {shape}{hint}"
                )
            value = value.float()  # before it is looked at: doubles may be beyond it, float8 has no test
            if not bool(value.isfinite().all()):
                raise ValueError(f"holds numbers in {name} that are not finite")
            made[name] = value
        return made

    def without(self, place: str | None) -> dict[str, Tensor]:
        """What stands for no text: the states in a file, or zeros. ValueError naming the file."""
        if place is None:
            return {name: torch.zeros(shape) for name, shape in self.shapes.items()}
        try:
            path = Path(place).expanduser()
            found = path.stat()
            return _read(self, path, (found.st_mtime_ns, found.st_size))
        except (OSError, ValueError, RuntimeError) as error:  # "~who" of nobody, a path with a zero byte
            raise ValueError(f"{place}: {getattr(error, 'strerror', None) or error}") from error

    @classmethod
    def of(cls, config: Mapping[str, Any], tokens: int) -> Texts:
        found = shapes({**config, "text_tokens": tokens})
        return cls(tokens, found["encoder_hidden_states"][-1], found["pooled_projections"][-1])


@lru_cache(maxsize=4)
def _read(texts: Texts, path: Path, changed: tuple[int, int]) -> dict[str, Tensor]:
    """changed: when it was, and how long it is, so that another file in its place is read anew."""
    return texts.values(read_regular(path, MOST))
