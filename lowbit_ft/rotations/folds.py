"""What becomes of one parameter when it is read: five kinds, each in float64, the result in float32.

    WeightFold   W [.., N, K]  ->  R_out^T W diag(g) R_in diag(s)      g the gain of the norm before it; or
                                   diag(1 / o) W diag(s)
    BiasFold     b [N]         ->  b / o + p
    VectorFold   b [.., N]     ->  b R_out
    GainFold     g             ->  1 / s, or g / s where the gain stays
    ShiftFold    t             ->  (t / g) R / s, or t / s             the bias of a LayerNorm

A side that nothing turns is left out. `gain(name)` gives the gain of a norm, float64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from lowbit_kernels.layout import row_chunks
from torch import Tensor

from .turn import Turn

Gain = Callable[[str], Tensor]


@dataclass(frozen=True, kw_only=True)
class WeightFold:
    """norm: whose gain is taken in. right: turns the inputs, scale [K] multiplies them afterwards; left:
    turns the outputs, of them only `rows` where these are given; over [N]: what they are divided by. turned:
    the parameter is [.., K, N]."""

    norm: str | None = None
    right: Turn | None = None
    scale: Tensor | None = None
    left: Turn | None = None
    rows: Tensor | None = None
    over: Tensor | None = None
    turned: bool = False

    @property
    def whole(self) -> bool:
        """Rows of the matrix cannot be made some at a time, without knowing which."""
        return self.left is not None or self.over is not None

    def inputs(self, value: Tensor, gain: Gain) -> Tensor:
        """value [T, K] -> value diag(g) R_in diag(s), fp32: of rows of a weight, or of A of a LoRA."""
        out = torch.empty(value.shape, dtype=torch.float32, device=value.device)
        g = gain(self.norm).to(value.device) if self.norm is not None else None
        for rows in row_chunks(*value.shape):
            part = value[rows].double()
            part = part if g is None else part * g
            part = part if self.right is None else self.right(part)
            out[rows] = part if self.scale is None else part * self.scale.to(part)
        return out

    def outputs(self, value: Tensor) -> Tensor:
        """value [T, N] -> value R_out, fp32: of columns of a weight, or of B of a LoRA."""
        if self.left is None:
            return (
                value.float() if self.over is None else (value.double() / self.over.to(value.device)).float()
            )
        out = value.to(torch.float32, copy=True)
        for rows in row_chunks(*value.shape):
            if self.rows is None:
                out[rows] = self.left(value[rows]).float()
            else:
                chosen = self.rows.to(value.device)
                part = out[rows]
                part[:, chosen] = self.left(value[rows][:, chosen]).float()
                out[rows] = part
        return out

    def matrix(self, value: Tensor, gain: Gain) -> Tensor:
        """value [N, K], or some of its rows where outputs stay as they are."""
        value = self.inputs(value, gain)
        return self.outputs(value.t()).t().contiguous() if self.whole else value

    def parameter(self, value: Tensor, gain: Gain) -> Tensor:
        """The parameter as the model keeps it: turned, or a stack of matrices."""
        value = value.transpose(-1, -2) if self.turned else value
        made = [self.matrix(one, gain) for one in value.reshape(-1, *value.shape[-2:])]
        out = torch.stack(made).view(value.shape) if value.dim() > 2 else made[0]
        return out.transpose(-1, -2).contiguous() if self.turned else out


@dataclass(frozen=True, kw_only=True)
class VectorFold:
    """A bias [.., N] of a linear whose outputs are turned; of them only `rows` where these are given."""

    left: Turn
    rows: Tensor | None = None

    def parameter(self, value: Tensor, gain: Gain) -> Tensor:
        flat = value.reshape(-1, value.shape[-1])
        return WeightFold(left=self.left, rows=self.rows).outputs(flat).view(value.shape)


@dataclass(frozen=True, kw_only=True)
class BiasFold:
    """A bias [N] of a linear whose outputs are divided by `over`, and of which `plus` is then added."""

    over: Tensor
    plus: Tensor | None = None

    def parameter(self, value: Tensor, gain: Gain) -> Tensor:
        made = value.double() / self.over.to(value.device)
        return (made if self.plus is None else made + self.plus.to(value.device)).float()


@dataclass(frozen=True, kw_only=True)
class GainFold:
    """The weight of a norm. norm: its name; fused: its gain went into the readers; one_plus: it multiplies
    with 1 + weight; scale [H]: what its output is divided by."""

    norm: str
    fused: bool
    one_plus: bool
    scale: Tensor | None = None

    def parameter(self, value: Tensor, gain: Gain) -> Tensor:
        g = gain(self.norm).to(value.device)
        g = torch.ones_like(g) if self.fused else g
        g = g if self.scale is None else g / self.scale.to(g)
        return (g - 1 if self.one_plus else g).float()


@dataclass(frozen=True, kw_only=True)
class ShiftFold:
    """The bias of a norm. stream: what turns its output, where its gain went into the readers."""

    norm: str
    stream: Turn | None
    scale: Tensor | None = None

    def parameter(self, value: Tensor, gain: Gain) -> Tensor:
        shift = value.double()
        if self.stream is not None:
            g = gain(self.norm).to(shift)
            if bool(((g.abs() < 1e-6) & (shift != 0)).any()):
                raise ValueError(
                    f"quant.rotation: {self.norm} has channels with a bias and no gain, which cannot go "
                    "through a rotation; set quant.rotation.sites.r1: false"
                )
            shift = self.stream(torch.where(shift == 0, 0.0, shift / g))
        return (shift if self.scale is None else shift / self.scale.to(shift)).float()


Fold = WeightFold | VectorFold | BiasFold | GainFold | ShiftFold
