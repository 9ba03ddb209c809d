"""group: one scale per token and group of channels, dynamic. The last group may be shorter."""

from typing import ClassVar

from torch import Tensor
from torch.nn.functional import pad

from .base import Activation, ranges


class Group(Activation):
    kind: ClassVar[str] = "group"
    products: ClassVar[int] = 3

    def scales(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[..., K] -> [..., ceil(K / group_size)]."""
        size = self._scheme.group_size
        short = -x.shape[-1] % size
        # Zeros change neither an absmax nor a range that contains zero anyway.
        groups = (pad(x, (0, short)) if short else x).unflatten(-1, (-1, size))
        low, high = groups.aminmax(dim=-1)
        return ranges(low, high, self._scheme)

    def spread(self, values: Tensor, x: Tensor) -> Tensor:
        return values.repeat_interleave(self._scheme.group_size, dim=-1)[..., : x.shape[-1]]
