"""group: one scale per token and group of channels, dynamic. The last group may be shorter."""

from typing import ClassVar

import torch
from torch import Tensor

from .base import Activation


class Group(Activation):
    kind: ClassVar[str] = "group"
    products: ClassVar[int] = 3
    in_segments: ClassVar[bool] = False  # its groups are

    def scales(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[..., K] -> [..., ceil(K / group_size)]."""
        size = self._scheme.group_size
        if short := -x.shape[-1] % size:  # with its last channel, which changes no range
            x = torch.cat((x, x[..., -1:].expand(*x.shape[:-1], short)), dim=-1)
        groups = x.unflatten(-1, (-1, size))
        low, high = groups.aminmax(dim=-1)
        return self.cover(low, high)

    def spread(self, values: Tensor, x: Tensor) -> Tensor:
        return values.repeat_interleave(self._scheme.group_size, dim=-1)[..., : x.shape[-1]]
