"""What a block-wise calibrator is shown of a decoder layer (grid/calibrate/signround.py: Block): its dense
weights, and the error of its output with other ones.

    loss = sum |F^(x^) - F(x)|^2 / sum |F(x) - x|^2      per batch, the unit over all batches

x are the dense model's hidden states before the layer, x^ those that come out of the packed layers. The dense
ones wait on the CPU beside those of the walk.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..grid import IntGrid
from ..model.walk import LayerWalk

CPU = torch.device("cpu")


class DenseStream:
    """The dense model's hidden states, [batch] -> [B, L, H], beside a walk whose own ones go through packed
    layers.
    """

    def __init__(self, walk: LayerWalk):
        self.walk, self.hidden = walk, list(walk.hidden)

    @torch.no_grad()
    def advance(self, index: int) -> float:
        """Through layer `index` while it is dense; returns the mean square of what it adds."""
        added = count = 0.0
        for number, x in enumerate(self.hidden):
            out = self.walk.call(index, number, x)
            added += float((out.float() - x.to(out.device).float()).square().sum())
            self.hidden[number] = out.to(CPU)
            count += out.numel()
        return max(added / count, 1e-30)


class DenseBlock:
    """Layer `index` of a walk, dense, after `stream` has passed through it. weights: fp32 [N, K] of the
    linears to be packed, by the name in the model; told(n): called at each of n losses that is asked for
    with a gradient; zeros: bool [N, K] of those with weights locked at zero.
    """

    def __init__(
        self,
        stream: DenseStream,
        index: int,
        prefix: str,
        weights: Mapping[str, Tensor],
        grids: Mapping[str, IntGrid],
        unit: float,
        told: Callable[[int], None],
        zeros: Mapping[str, Tensor],
    ):
        self.walk, self.index, self.prefix = stream.walk, index, prefix
        self.layer: nn.Module = self.walk.layers[index]
        self.weights, self.grids, self.unit = weights, grids, unit
        self.targets, self.batches = stream.hidden, len(stream.hidden)
        self.told, self.steps, self.zeros = told, 0, zeros

    def loss(self, number: int, weights: Mapping[str, Tensor]) -> Tensor:
        """Differentiable in the weights."""
        if torch.is_grad_enabled():
            self.steps += 1
            self.told(self.steps)
        made = {f"{name.removeprefix(self.prefix)}.weight": weight for name, weight in weights.items()}
        named = {  # a convolution has its matrix in another shape
            key: weight.to(self.walk.dtype).view(self.layer.get_parameter(key).shape)
            for key, weight in made.items()
        }
        layer: Callable[..., Any] = lambda *args, **kwargs: functional_call(self.layer, named, args, kwargs)  # noqa: E731
        out = self.walk.call(self.index, number, self.walk.hidden[number], layer)
        return (out.float() - self.targets[number].to(out.device).float()).square().mean() / self.unit
