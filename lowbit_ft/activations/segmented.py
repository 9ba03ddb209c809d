"""segmented: scales of their own for the segments of an input, such as the heads before an output projection
(SegQuant, arXiv 2507.14811). Any kind whose scales are of all channels, once per segment:

    x = [x_1, ..., x_S]     q_i, s_i of x_i alone     y = sum over i of s_i (q_i - z_i) W_i^T

Where one head is large, one scale for all leaves the others a few codes. Segments are stretches of channels,
as the plan of the model has them (segments/); there are S sums per output in the place of one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .base import Activation, Scheme


class Segmented(Activation):
    def __init__(self, scheme: Scheme, kind: type[Activation]):
        assert scheme.segments and kind.in_segments
        nn.Module.__init__(self)
        self._scheme = scheme
        self.by_rows = kind.by_rows  # pyright: ignore[reportAttributeAccessIssue]
        # Plain objects, not children: they have nothing that a model would have to know of.
        self.parts = tuple(kind(scheme.part(number)) for number in range(len(scheme.segments)))
        self.every = (kind(scheme.part(0)),)  # of all, where they are a dimension
        self.learn(None)

    def learn(self, learned: Any) -> None:
        super().learn(learned)
        own = learned is not None and self._scheme.dynamic
        for number, part in enumerate(self.parts):
            part.given = partial(self.clip_of, number) if own else None
        alike = not own and len(set(self._scheme.clips)) == 1
        self.every[0].given = None if alike else partial(self.clip_of, None)

    def clip_of(self, number: int | None, device: torch.device) -> Tensor:
        """The clip of a segment [1], or of all [segments, 1]."""
        if self.learned is None:
            each = [torch.full((1,), v, dtype=torch.float64, device=device) for v in self._scheme.clips]
            clips = torch.cat(each)
        else:
            clips = self.learned.value().double()
        return clips[:, None] if number is None else clips[number : number + 1]

    def summed(self, values: Tensor) -> Tensor:
        by_channel = values.flatten(0, -2).sum(0)
        return torch.stack([part.sum() for part in by_channel.split(self._scheme.segments)])

    @property
    def even(self) -> bool:
        """Whether all segments have one width, so that they are a dimension."""
        return len(set(self._scheme.segments)) == 1

    def scales(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[..., K] -> those of the first segment, of the second, ..."""
        if self.even and self.by_rows and self._scheme.dynamic:
            scale, zero = self.every[0].scales(x.unflatten(-1, (len(self.parts), -1)))
            return scale.flatten(-2), None if zero is None else zero.flatten(-2)
        pieces = x.split(self._scheme.segments, dim=-1)
        made = [part.scales(piece) for part, piece in zip(self.parts, pieces, strict=True)]
        zeros = [zero for _, zero in made if zero is not None]
        return torch.cat([scale for scale, _ in made], -1), torch.cat(zeros, -1) if zeros else None

    def spread(self, values: Tensor, x: Tensor) -> Tensor:
        values = values.unflatten(-1, (len(self.parts), -1))
        if self.even:
            return _wide(self.parts[0], values, x.unflatten(-1, (len(self.parts), -1))).flatten(-2)
        pieces = x.split(self._scheme.segments, dim=-1)
        found = zip(self.parts, values.unbind(-2), pieces, strict=True)
        return torch.cat([_wide(part, own, piece) for part, own, piece in found], -1)


def _wide(part: Activation, values: Tensor, x: Tensor) -> Tensor:
    """What multiplies x, with its last dimension."""
    made = part.spread(values, x)
    return made.expand(*made.shape[:-1], x.shape[-1])
