"""learned: a static scale that trains with the adapters, LSQ's way (arXiv 1902.08153, sections 2.1 and 2.2).

    s = round_to_dtype(s0 exp(l)),  l = 0 at the start              the master l in fp32, s0 from calibration
    d x^ / d s = round(x / s) - x / s   where x lies in the range; where it is clipped the code less its zero
    the gradient that reaches s is multiplied by 1 / sqrt(K (2^(b-1) - 1)), K inputs: LSQ's factor

The forward rounds s to the dtype in which it ships, so the scale of the last forward is the one of merged/.
A relative master for the reason that group scales have one (adapters/base.py). LSQ counts the features of an
input in its factor, not its tokens: a step is the same however a batch is cut.

Layers that are given one tensor (q, k and v) have one scale. It belongs to the adapter of the first of them
that trains: there it is saved, counted, put into the optimizer's scale group, and averaged over processes.
Where none of them trains the scale stays what calibration found.
"""

from __future__ import annotations

import math

import torch
from lowbit_kernels import exact_exp
from torch import Tensor, nn

from ..grid.estimators import cast_scale, scale_gradient
from .base import Activation, Scheme
from .place import hosts


class LearnedScale(nn.Module):
    """The static scale of a scheme as a parameter. () -> fp32 [numbers of the scale], of scale_dtype's
    values."""

    def __init__(self, scheme: Scheme, in_features: int, scale_dtype: str, device: torch.device):
        super().__init__()
        assert scheme.scale, "a static scale that no calibration gave"
        self.start = scheme.scale
        self.factor = 1 / math.sqrt(in_features * scheme.highest)
        self.one_step = (
            math.sqrt(3) / scheme.highest
        )  # the change of l that moves codes by 1, root mean square
        self.scale_dtype = scale_dtype
        self.log_input_scale = nn.Parameter(torch.zeros(len(scheme.scale), device=device))

    def forward(self) -> Tensor:
        log = scale_gradient(self.log_input_scale, self.factor)
        start = torch.cat([torch.full((1,), value, device=log.device) for value in self.start])
        return cast_scale(start * exact_exp(log), self.scale_dtype)

    @property
    def version(self) -> int:
        """Counts what was written to the master."""
        return self.log_input_scale._version


def learn_inputs(model: nn.Module) -> None:
    """Give the inputs whose schemes say `learn` their parameter, each in the adapter of the first of its
    layers that has one. Fresh adapters, fresh scales: they start at the scheme's.
    """
    owners: dict[str, LearnedScale] = {}
    found = []
    for _, layer in hosts(model):
        activation = layer.activation
        if not isinstance(activation, Activation) or (group := activation.scheme().learn) is None:
            continue
        found.append((group, activation))
        if layer.adapter is not None and group not in owners:
            owners[group] = LearnedScale(
                activation.scheme(), layer.in_features, layer.grid.scale_dtype, layer.base.scale.device
            )
            layer.adapter.add_module("input", owners[group])
    for group, activation in found:
        activation.learn(owners.get(group))
