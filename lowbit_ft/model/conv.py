"""PackedConv2d: a convolution is the product of a matrix [N, C k k] with the patches of its input.

    y[:, i, j] = W p[i, j] + bias        p[i, j] [C k k]: what the kernel covers at that place, channel by
                                         channel, and zeros (or what its padding_mode says) beyond the edge

So its weight lies on the same grids, is trained by the same adapters and multiplied by the same op as that of
a linear layer, over B x H' x W' rows instead of tokens. A Conv1d is one of height 1.

With groups a row of W has the C / g channels of its group, and so have the patches: p [g, C / g k k]. No op
of ours multiplies N / g rows of W with one part of the input, so W^T is read off as the op's answer to the
identity, the same bits as in any other product, and the groups are multiplied by torch. C / g is small where
there are groups (1 in a depthwise convolution), and so is that identity. A method that looks at the inputs of
a layer (ef_qat's importance) sees it in their place.

What puts the input on a grid (activations/) sees patches: a token is the patch of one place (with groups, of
one group), which is what a server multiplies that unfolds the image into rows. A padded zero is 0 on every
such grid, with a zero point too: where there is padding, 0 lies in the range that the zero point covers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..grid import Weight
from .linear import PackedInDtype

_PAD = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


@dataclass(frozen=True)
class Patches:
    """How an image [B, C, H, W] (flat: a sequence [B, C, L], of height 1) becomes rows. pads: left, right,
    top, bottom, as torch's `pad` takes them; mode: what stands there, in its words."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    groups: int = 1
    mode: str = "constant"
    flat: bool = False

    @classmethod
    def of(cls, conv: nn.Conv1d | nn.Conv2d) -> Patches:
        flat = isinstance(conv, nn.Conv1d)
        kernel, stride, dilation = map(_two, (conv.kernel_size, conv.stride, conv.dilation))
        before, after = _padding(conv.padding, kernel, dilation)
        pads = (before[1], after[1], before[0], after[0])
        return cls(kernel, stride, dilation, pads, conv.groups, _PAD[conv.padding_mode], flat)

    def rows(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, H', W', C k k], with groups [B, H', W', g, C / g k k]; flat: [B, C, L] -> [B,
        L', C k], the same way."""
        if x.dim() == 3 - self.flat:  # without a batch, as torch takes it too
            return self.rows(x[None])[0]
        if self.flat:
            x = x.unsqueeze(-2)
        if any(self.pads):
            x = functional.pad(x, self.pads, self.mode)
        high, wide = (
            (size - step * (k - 1) - 1) // stride + 1
            for size, k, step, stride in zip(
                x.shape[-2:], self.kernel, self.dilation, self.stride, strict=True
            )
        )
        if self.kernel == (1, 1):
            x = x[..., :: self.stride[0], :: self.stride[1]].movedim(1, -1)
        else:
            x = functional.unfold(x, self.kernel, self.dilation, stride=self.stride).transpose(1, 2)
            x = x.unflatten(1, (high, wide))
        x = x.unflatten(-1, (self.groups, -1)) if self.groups > 1 else x
        return (x.squeeze(1) if self.flat else x).contiguous()

    def product(self, rows: Tensor, op: Callable[[Tensor], Tensor]) -> Tensor:
        """Rows as `rows` gives them -> [B, H', W', N]. op: [..., K] -> [..., N], x W^T."""
        if self.groups == 1:
            return op(rows)
        turned = op(torch.eye(rows.shape[-1], dtype=rows.dtype, device=rows.device))  # W^T [K, N]
        return torch.einsum("...gk,kgn->...gn", rows, turned.unflatten(-1, (self.groups, -1))).flatten(-2)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[B, C, H, W] -> [B, N, H', W'] by torch, with a dense weight [N, K]."""
        size = self.kernel[1:] if self.flat else self.kernel
        pads = self.pads[:2] if self.flat else self.pads
        x = functional.pad(x, pads, self.mode) if any(pads) else x
        weight = weight.unflatten(1, (-1, *size))
        one, two = functional.conv1d, functional.conv2d
        stride, dilation = self.stride[self.flat :], self.dilation[self.flat :]
        return (one if self.flat else two)(x, weight, bias, stride, 0, dilation, self.groups)

    def answer(self, y: Tensor) -> Tensor:
        """[B, H', W', N] -> [B, N, H', W']; flat [B, L', N] -> [B, N, L']."""
        return y.movedim(-1, -2 if self.flat else -3)


def _two(size: tuple[int, ...], none: int = 1) -> tuple[int, int]:
    """Of height and width; none: what a sequence has for its height."""
    return (size[0], size[1]) if len(size) == 2 else (none, size[0])


def _padding(
    padding: str | tuple[int, ...], kernel: tuple[int, int], dilation: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """What is added before and after each of the two dimensions."""
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding == "same":  # torch puts the odd one behind
        high, wide = (step * (k - 1) for k, step in zip(kernel, dilation, strict=True))
        return (high // 2, wide // 2), (high - high // 2, wide - wide // 2)
    assert isinstance(padding, tuple)
    both = _two(padding, 0)
    return both, both


def is_conv(module: nn.Module) -> bool:
    """Whether a module is a convolution of the kinds that may be packed (`conv_problem` says if this one)."""
    return isinstance(module, nn.Conv1d | nn.Conv2d)


def conv_problem(conv: nn.Module) -> str | None:
    """Why a convolution of these kinds cannot be packed; None when it can."""
    kind = type(conv)
    if conv._parameters.get("weight") is None:
        return f"{kind.__name__}: its weight is computed from other tensors"
    plain = nn.Conv1d if isinstance(conv, nn.Conv1d) else nn.Conv2d
    if kind.forward is not plain.forward or kind._conv_forward is not plain._conv_forward:  # pyright: ignore[reportAttributeAccessIssue]
        return f"{kind.__name__} is an nn.{plain.__name__} with a forward of its own"
    return None


def matrix_of(weight: Tensor) -> Tensor:
    """The matrix [N, K] of a weight [N, C / g, ...], as its rows multiply patches; a matrix as it is."""
    return weight.flatten(1)


def rows_of(dense: nn.Module, x: Tensor) -> Tensor | None:
    """What the matrix of a dense layer multiplies of its input, [..., K]; None: parts of it multiply other
    rows (groups)."""
    if not isinstance(dense, nn.Conv1d | nn.Conv2d):
        return x
    patches = Patches.of(dense)
    return patches.rows(x) if patches.groups == 1 else None


def rows_key(dense: nn.Module) -> Patches | None:
    """Dense layers of one key have the same rows of the same input (`rows_of`)."""
    return Patches.of(dense) if isinstance(dense, nn.Conv1d | nn.Conv2d) else None


class PackedConv2d(PackedInDtype):
    """A convolution, its weight as a packed matrix. What its module said of itself (kernel_size, stride, ...,
    the dtype of its weight) it says too: some models look."""

    def __init__(
        self,
        base: Weight,
        bias: Tensor | None,
        dtype: torch.dtype,
        patches: Patches,
        said: dict[str, object],
    ):
        super().__init__(base, bias, dtype)
        self.patches, self.said = patches, said
        for name, value in said.items():
            setattr(self, name, value)

    @classmethod
    def in_place_of(
        cls, conv: nn.Conv1d | nn.Conv2d, base: Weight, bias: Tensor | None, dtype: torch.dtype
    ) -> PackedConv2d:
        """What takes the place of a model's own convolution."""
        names = (
            *("in_channels", "out_channels", "kernel_size", "stride"),
            *("padding", "dilation", "groups", "padding_mode"),
        )
        return cls(base, bias, dtype, Patches.of(conv), {name: getattr(conv, name) for name in names})

    def over(self, base: Weight) -> PackedConv2d:
        return PackedConv2d(base, self.bias, self.like.dtype, self.patches, self.said)

    @property
    def weight(self) -> Tensor:
        """The dense weight [N, C / g, k, k] (of a Conv1d [N, C / g, k]) in the model's dtype, as
        `PackedLinear.weight`: many models put images into the dtype that they find here."""
        kernel = self.patches.kernel[1:] if self.patches.flat else self.patches.kernel
        return super().weight.unflatten(1, (-1, *kernel)).to(self.like.dtype)

    @property
    def row_key(self) -> object:
        return self.patches

    @property
    def row_shape(self) -> tuple[int, ...]:
        groups = self.patches.groups
        return (self.in_features,) if groups == 1 else (groups, self.in_features)

    def rows(self, x: Tensor) -> Tensor:
        return self.patches.rows(super().rows(x))

    def product(self, rows: Tensor, op: Callable[[Tensor], Tensor]) -> Tensor:
        return self.patches.product(rows, op)

    def answer(self, y: Tensor) -> Tensor:
        return self.patches.answer(y)

    def _repacks(self, x: Tensor) -> bool:
        return self.patches.groups == 1 and super()._repacks(x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.patches}"
