"""NEFTune (arXiv 2310.05914): noise on the embeddings while a model trains.

    x + u alpha / sqrt(L d), u uniform in (-1, 1), for a row of L tokens (padding too) and d features

Only in the forward of the student in training mode: teachers, references and evaluations run in eval mode
and see none, and what ships knows nothing of it. The noise of a micro-batch is drawn from its own seed (run,
step, its place in the step, the process), so a resumed run draws the same, and so does every forward
of a gradient that runs several."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .setup import TrainError


class EmbeddingNoise:
    """On the embeddings of `model` until `remove` is called."""

    def __init__(self, model: nn.Module, alpha: float, seed: int, rank: int) -> None:
        self.model, self.alpha, self.seed, self.rank = model, alpha, seed, rank
        self.at(0, 0)
        find: Callable[[], Any] = getattr(model, "get_input_embeddings", lambda: None)
        embeddings = find()
        if not isinstance(embeddings, nn.Module):
            raise TrainError(
                f"train.neftune_alpha: got {alpha:g}, but {type(model).__name__} does not say which of its "
                "modules are the embeddings; remove it"
            )
        self._handle = embeddings.register_forward_hook(self._add)

    def at(self, step: int, micro: int) -> None:
        """The micro-batch of this process whose forward comes next: its place in an optimizer step."""
        name = f"neftune/{self.seed}/{step}/{micro}/{self.rank}"
        self._drawn_from = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")

    def remove(self) -> None:
        self._handle.remove()

    def _add(self, module: nn.Module, given: Any, output: Tensor) -> Tensor:
        if not module.training:
            return output
        generator = torch.Generator(output.device).manual_seed(self._drawn_from)
        noise = torch.rand(output.shape, generator=generator, device=output.device) * 2 - 1
        size = self.alpha / math.sqrt(output.shape[-2] * output.shape[-1])
        return output + (noise * size).to(output.dtype)
