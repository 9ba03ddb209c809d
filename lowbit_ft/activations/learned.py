"""learned: what the scale of an input is made by, trained with the adapters: a static scale, or the clip of
dynamic ones.

    s = round_to_dtype(s0 exp(l))    LSQ (arXiv 1902.08153, sections 2.1 and 2.2), s0 from calibration
                                     (its own start, 2 mean|x| / sqrt(2^(b-1) - 1), is range: lsq)
    a = min(1, a0 exp(l))            s = a max|x| / (2^(b-1) - 1), token by token: the clip of OmniQuant and
                                     ZeroQAT (arXiv 2509.00031, Eq. 5), theirs a sigmoid; ours begins anywhere
    d x^ / d s = round(x / s) - x / s   where x lies in the range; where it is clipped the code less its zero
    d x^ / d a = s / a  d x^ / d s      the zero point does not depend on a

The master l is 0 at the start, in fp32; the gradient that reaches s or a is multiplied by LSQ's factor,
1 / sqrt(K (2^(b-1) - 1)), K inputs. What is pushed beyond a = 1 has no gradient.

The forward rounds s to the dtype in which it ships; a ships in fp32, as a number of the scheme. So those of
the last forward are the ones of merged/. A relative master for the reason that group scales have one
(adapters/base.py). LSQ counts the features of an input in its factor, not its tokens: a step is the same
however a batch is cut.

Layers that are given one tensor (q, k and v) have one. It belongs to the adapter of the first of them that
trains: there it is saved, counted, put into the optimizer's scale group, and averaged over processes.
Where none of them trains it stays what calibration found.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from lowbit_kernels import exact_exp
from torch import Tensor, nn

from ..grid.estimators import cast_scale, scale_gradient
from .base import Activation, Scheme
from .place import hosts


class Learned(nn.Module):
    """start exp(master), the master a parameter of the name `master_name`. () -> fp32 [numbers of the start],
    of the values that ship."""

    master_name: ClassVar[str]

    def __init__(self, start: tuple[float, ...], scheme: Scheme, in_features: int, device: torch.device):
        super().__init__()
        self.start = start
        self.factor = 1 / math.sqrt(in_features * scheme.highest)
        # The change of the master that moves codes by 1, root mean square.
        self.one_step = math.sqrt(3) / scheme.highest
        self.register_parameter(self.master_name, nn.Parameter(torch.zeros(len(start), device=device)))

    @property
    def master(self) -> nn.Parameter:
        return self.get_parameter(self.master_name)

    def of(self, log: Tensor) -> Tensor:
        """start exp(log)."""
        start = torch.cat([torch.full((1,), value, device=log.device) for value in self.start])
        return start * exact_exp(log)

    @property
    def version(self) -> int:
        """Counts what was written to the master."""
        return self.master._version


class LearnedScale(Learned):
    """The static scale of a scheme."""

    master_name: ClassVar[str] = "log_input_scale"

    def __init__(self, scheme: Scheme, in_features: int, scale_dtype: str, device: torch.device):
        assert scheme.scale, "a static scale that no calibration gave"
        super().__init__(scheme.scale, scheme, in_features, device)
        self.scale_dtype = scale_dtype

    def forward(self) -> Tensor:
        return cast_scale(self.of(scale_gradient(self.master, self.factor)), self.scale_dtype)


class LearnedClip(Learned):
    """The clip of a dynamic scheme, or those of its segments."""

    master_name: ClassVar[str] = "log_input_clip"

    def __init__(self, scheme: Scheme, in_features: int, scale_dtype: str, device: torch.device):
        count = max(1, len(scheme.segments))
        start = scheme.clips if len(scheme.clips) == count else scheme.clips * count
        super().__init__(start, scheme, in_features // count, device)

    def forward(self) -> Tensor:
        exact = self.of(scale_gradient(self.master, self.factor))
        return _AtMostOne.apply(exact)  # pyright: ignore[reportReturnType]  autograd.Function is untyped

    def value(self) -> Tensor:
        """The same without a gradient. A graph of torch.compile takes each of the functions above once."""
        return self.of(self.master.detach()).clamp(max=1)


class _AtMostOne(torch.autograd.Function):
    """min(1, value); backward the gradient, but where a step along it would go further beyond 1."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.save_for_backward(value >= 1)
        return value.clamp(max=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (at_end,) = ctx.saved_tensors
        return gradient.masked_fill(at_end & (gradient < 0), 0)


def learn_inputs(model: nn.Module) -> None:
    """Give the inputs whose schemes say `learn` their parameter, each in the adapter of the first of its
    layers that has one. Fresh adapters, fresh scales: they start at the scheme's.
    """
    owners: dict[str, Learned] = {}
    found = []
    for _, layer in hosts(model):
        activation = layer.activation
        if not isinstance(activation, Activation) or (group := activation.scheme().learn) is None:
            continue
        found.append((group, activation))
        if layer.adapter is not None and group not in owners:
            kind = LearnedClip if activation.scheme().dynamic else LearnedScale
            owners[group] = kind(
                activation.scheme(), layer.in_features, layer.grid.scale_dtype, layer.base.scale.device
            )
            layer.adapter.add_module("input", owners[group])
    for group, activation in found:
        activation.learn(owners.get(group))
