"""What a model says of an image without a label: the priors of inversion. PRIORS is the list.

    batch_norm  sum_l || mean_l(x) - mean_l ||_2 + || var_l(x) - var_l ||_2
                x: what a batch norm is given, over a batch; mean_l, var_l: what it remembers of its training
                (DeepInversion, arXiv 1912.08795; summed over the layers as in arXiv 2507.16782)
    patches     - sum_l H(l), the mean over the images; H: differential entropy of the density of the cosine
                similarities of the patches' attention outputs (the heads' mean) of one image (PSAQ-ViT,
                arXiv 2203.02250). A real image has patches that are alike and others that are not; noise has
                only one similarity

`patches` is for models that have no batch norm. Its density is that of Gaussian kernels with Silverman's
width, at 10 points between the least and the largest similarity; the integral is the trapezoid rule's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

POINTS, FLOOR = 10, 1e-4  # of the density; what is added to it inside the logarithm
OUTPUTS = ("o_proj", "out_proj")  # the linear behind the heads, by transformers' names


class Prior(ABC):
    """Of a model; `watched` collects in every forward what `loss` is made of."""

    def __init__(self) -> None:
        self.seen = list[Tensor]()

    @contextmanager
    def watched(self) -> Iterator[None]:
        with ExitStack() as stack:
            for handle in self.hooks():
                stack.callback(handle.remove)
            yield

    @abstractmethod
    def hooks(self) -> list[Any]:
        """Hooks on the model, each of which leaves a scalar in `seen`."""

    def loss(self) -> Tensor:
        """Of the forward that was run last; a scalar."""
        total = torch.stack(self.seen).sum()
        self.seen.clear()
        return total


class BatchNorms(Prior):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.norms = [m for m in model.modules() if remembers(m)]
        if not self.norms:
            raise ValueError(
                "data.synthesis.prior: got batch_norm, and the model has no batch norm that remembers its "
                "training (their means are all 0); set prior: patches"
            )

    def hooks(self) -> list[Any]:
        return [norm.register_forward_pre_hook(self._look) for norm in self.norms]

    def _look(self, norm: Any, inputs: tuple[Tensor, ...]) -> None:
        mean, var = moments(inputs[0])
        off = (mean - norm.running_mean.float()).norm() + (var - norm.running_var.float()).norm()
        self.seen.append(off)


def remembers(module: nn.Module) -> bool:
    """Whether a module is a batch norm with statistics that it was trained to: also a frozen one."""
    mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
        return False
    return bool(mean.any()) or bool((var != 1).any())


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, C, ...] -> mean and variance (over all, not one less) of every channel, fp32 [C]."""
    x = x.float().transpose(0, 1).flatten(1)
    return x.mean(1), x.var(1, correction=0)


class Patches(Prior):
    """patches: of an image, without the tokens that are none."""

    def __init__(self, model: Any):
        super().__init__()
        self.config, self.places = model.config, list[tuple[nn.Module, int]]()
        for module in model.modules():
            found = [getattr(module, name, None) for name in OUTPUTS]
            last = next((one for one in found if isinstance(one, nn.Linear)), None)
            if last is not None and hasattr(module, "q_proj"):
                self.places.append((last, self._heads(module)))
        self.count = patch_count(self.config)
        if not self.places or self.count is None:
            raise ValueError(
                "data.synthesis.prior: got patches, and the model has no attention over the patches of an "
                "image by its config.json and its layers' names; set prior: batch_norm"
            )

    def _heads(self, module: Any) -> int:
        own = getattr(module, "num_attention_heads", None) or getattr(module, "num_heads", None)
        return int(own or self.config.num_attention_heads)

    def hooks(self) -> list[Any]:
        return [last.register_forward_pre_hook(partial(self._look, heads)) for last, heads in self.places]

    def _look(self, heads: int, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """inputs: [B, T, heads * d], what the heads say, before they are mixed."""
        x, count = inputs[0], self.count
        assert count is not None
        before = 0 if x.shape[1] == count else 1 + int(getattr(self.config, "num_register_tokens", 0))
        if x.shape[1] < before + count:
            return  # attention over something else, such as a window
        tokens = x[:, before : before + count].float().unflatten(-1, (heads, -1)).mean(2)
        self.seen.append(-entropy(similarities(tokens)).mean())

    def loss(self) -> Tensor:
        if not self.seen:
            raise ValueError(
                f"data.synthesis.prior: got patches, and no attention of the model is over {self.count} "
                "patches at once; set prior: batch_norm, or weights: {prior: 0}"
            )
        return super().loss()


def patch_count(config: Any) -> int | None:
    """Patches of an image, by its configuration."""
    sides = []
    for value in (getattr(config, "image_size", None), getattr(config, "patch_size", None)):
        side = (value, value) if isinstance(value, int) else value
        if not isinstance(side, list | tuple) or len(side) != 2:
            return None
        sides.append(side)
    (height, width), (patch_height, patch_width) = sides
    return (height // patch_height) * (width // patch_width)


def similarities(tokens: Tensor) -> Tensor:
    """tokens [B, T, d] -> the cosine similarities of all pairs of different ones, [B, T (T - 1) / 2]."""
    unit = torch.nn.functional.normalize(tokens, dim=-1)
    cosines = unit @ unit.transpose(1, 2)
    first, second = torch.triu_indices(tokens.shape[1], tokens.shape[1], 1, device=tokens.device)
    return cosines[:, first, second]


def entropy(x: Tensor) -> Tensor:
    """The differential entropy of samples x [B, M] by their density (above): [B], differentiable in x."""
    count = x.shape[1]
    width = 1.06 * x.std(1, keepdim=True).clamp_min(1e-3) * count**-0.2  # [B, 1]
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    steps = torch.linspace(0, 1, POINTS, device=x.device, dtype=x.dtype)
    at = low + (high - low) * steps  # [B, P]
    off = (at[:, :, None] - x[:, None, :]) / width[:, :, None]
    density = torch.exp(-(off**2) / 2).sum(-1) / (count * width * (2 * torch.pi) ** 0.5)  # [B, P]
    return torch.trapezoid(-density * torch.log(density + FLOOR), at, dim=1)


PRIORS: dict[str, type[Any]] = {"batch_norm": BatchNorms, "patches": Patches}


def prior_of(name: str, model: Any) -> Prior:
    """The prior of that name; auto: batch_norm where the model has such, else patches."""
    if name == "auto":
        name = "batch_norm" if any(remembers(module) for module in model.modules()) else "patches"
    return PRIORS[name](model)
