"""Fused: a matrix that is several in one (q, k and v; gate and up) as linears of its own, one for each part.

Made only where a recipe gives a part another grid than the rest. Each part is then a layer like any other,
`<layer>.v`, with codes, scales, adapter and files of its own; all are given one and the same input, and their
outputs are put together in the order in which the model takes them apart. The bias stays what it is in the
files, one of the whole. Which rows a part is, and what it is called, segments/ reads off the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .experts import StandIn


@dataclass(frozen=True)
class Segment:
    """Channels start + j stride + i, for j below count and i below width: a range (count 1), or runs of one
    width at one distance."""

    start: int
    width: int
    count: int = 1
    stride: int = 0

    @property
    def size(self) -> int:
        return self.width * self.count

    @property
    def stop(self) -> int:
        """Behind the last channel."""
        return self.start + (self.count - 1) * self.stride + self.width

    def channels(self) -> Tensor:
        """Their numbers, in order: int64 [size]."""
        runs = self.start + self.stride * torch.arange(self.count, device="cpu")
        return (runs[:, None] + torch.arange(self.width, device="cpu")).flatten()

    def of(self, value: Tensor) -> Tensor:
        """These channels of the first dimension of a tensor, as a tensor of its own."""
        if self.count == 1:
            return value[self.start : self.stop].clone()
        return value[self.channels().to(value.device)]

    def to_json(self) -> list[int]:
        return [self.start, self.width, self.count, self.stride]

    def __str__(self) -> str:
        text = f"{self.start}:{self.stop}"
        return text if self.count == 1 else f"{text} ({self.count} x {self.width} every {self.stride})"


Fusion = Mapping[str, Segment]  # name of a part -> its rows of the matrix


def check_parts(parts: Iterable[Segment], size: int, what: str) -> None:
    """ValueError unless each of `size` rows is in exactly one part."""
    parts = list(parts)
    if sum(part.size for part in parts) == size:
        every = torch.cat([part.channels() for part in parts]).sort().values
        if torch.equal(every, torch.arange(size, device="cpu")):
            return
    said = ", ".join(map(str, parts))
    raise ValueError(f"{what}: segments {said} are not its {size} rows, each in one of them")


class Fused(nn.Module):
    """x [..., K] -> [..., N], by linears [N_i, K] named as the parts of `fusion`."""

    bias: nn.Parameter | None

    def __init__(self, fusion: Fusion, in_features: int, bias: nn.Parameter | None, dtype: torch.dtype):
        """The linears are StandIns on the meta device. bias: [N], of the whole. fusion: by first row."""
        super().__init__()
        self.fusion = dict(fusion)
        self.in_features = in_features
        self.out_features = sum(rows.size for rows in fusion.values())
        for name, rows in self.fusion.items():
            self.add_module(name, StandIn(in_features, rows.size, bias=False, device="meta", dtype=dtype))
        self.bias = bias
        # Runs in the order of the whole: (part, number of the run). Where all parts have as many, these lie
        # in each stretch of rows one behind the other, which is a view.
        at = sorted(
            (rows.start + run * rows.stride, part, run)
            for part, rows in enumerate(self.fusion.values())
            for run in range(rows.count)
        )
        self._runs = [(part, run) for _, part, run in at]
        self._count = len(at) // len(self.fusion)
        even = [(part, run) for run in range(self._count) for part in range(len(self.fusion))]
        self._even = self._runs == even

    def forward(self, x: Tensor) -> Tensor:
        y = self._whole([self._modules[name](x) for name in self.fusion])  # pyright: ignore[reportOptionalCall]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @property
    def weight(self) -> Tensor:
        """The dense weight [N, K], put together on every read, for code that looks at it."""
        return self._whole([self.get_submodule(name).weight.t() for name in self.fusion]).t()  # pyright: ignore[reportCallIssue]

    def _whole(self, parts: list[Tensor]) -> Tensor:
        """[..., N_i] of every part -> [..., N]."""
        if self._even and self._count == 1:
            return torch.cat(parts, -1)
        runs = [
            part.unflatten(-1, (rows.count, -1))
            for part, rows in zip(parts, self.fusion.values(), strict=True)
        ]
        if self._even:
            return torch.cat(runs, -1).flatten(-2)
        return torch.cat([runs[part][..., run, :] for part, run in self._runs], -1)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: rows {rows}" for name, rows in self.fusion.items())


def fused_modules(model: nn.Module) -> Iterator[tuple[str, Fused]]:
    """(name, module) of every Fused, in model order."""
    for name, module in model.named_modules():
        if isinstance(module, Fused):
            yield name, module


def fusions_in(model: nn.Module) -> dict[str, Fusion]:
    """Name of the matrix -> its parts, for every matrix that is in parts."""
    return {name: module.fusion for name, module in fused_modules(model)}


def part_rows(model: nn.Module) -> dict[str, Segment]:
    """Layer -> its rows of a fused matrix, for every layer that is a part of one."""
    return {
        f"{name}.{part}": rows for name, fusion in fusions_in(model).items() for part, rows in fusion.items()
    }


def known_as(layer: str, parts: Iterable[str]) -> tuple[str, ...]:
    """The names by which patterns of a recipe may mean a layer: its own, and that of the matrix that it is a
    part of. parts: the layers that are such."""
    return (layer, layer.rpartition(".")[0]) if layer in parts else (layer,)
