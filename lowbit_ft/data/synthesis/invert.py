"""Images from noise: Adam on the pixels, against a prior of the model, total variation and the task's loss.

    L = a_prior L_prior + a_variation TV + a_task L_task(teacher(x), labels)
    TV = mean over the images of sum over d of || x shifted by d - x ||_2,   d = right, down, both diagonals

x is in [0, 1], and stays there after every step; the rate falls to 0 along a cosine. The iterate that is kept
is the one with the least L of those looked at, every few steps and after the last, as it will be stored: in
256 steps a channel.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...model.images import pixels
from .labeller import Labeller
from .priors import Prior

Revise = Callable[[int, Tensor, list[Any]], list[Any]]  # (step, images as the model takes them, answers)


class Frame:
    """What an image processor does to pictures of the size that it makes: x in [0, 1] -> low + x span, for
    each channel. ValueError where it does something else to them."""

    def __init__(self, processor: Any):
        from PIL import Image  # optional: only images need it

        self.height, self.width = (int(n) for n in pixels(processor, Image.new("RGB", (8, 8))).shape[1:])
        size = (self.width, self.height)
        self.low, white = (pixels(processor, Image.new("RGB", size, c)).float() for c in ("black", "white"))
        self.span = white - self.low
        probe = np.random.default_rng(0).integers(0, 256, (self.height, self.width, 3), dtype=np.uint8)
        made = pixels(processor, Image.fromarray(probe)).float()
        wanted = self(torch.from_numpy(probe).permute(2, 0, 1) / 255)
        if made.shape != wanted.shape or not torch.allclose(made, wanted, atol=1e-4):
            raise ValueError(
                "data.synthesis: the image processor resizes or cuts even pictures of the size that it makes "
                f"({self.width} x {self.height}), so none can be made for it; set size (and crop_size) in "
                "preprocessor_config.json to that"
            )

    def scaled(self, scale: float) -> Frame:
        """The same of images whose sides are this share of the processor's (0 to 1)."""
        made = copy.copy(self)
        made.height, made.width = (max(1, round(scale * side)) for side in (self.height, self.width))
        made.low, made.span = (t[:, : made.height, : made.width] for t in (self.low, self.span))
        return made

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., 3, H, W] in [0, 1] -> as the model takes it."""
        return self.low.to(x.device) + x * self.span.to(x.device)


@dataclass(frozen=True)
class Inversion:
    """How images are made. prior, variation, task: the weights of the parts of L; rate: of Adam."""

    steps: int
    check_every: int
    rate: float
    prior: float
    variation: float
    task: float


def noise(seed: int, rows: Sequence[int], frame: Frame, stage: int) -> Tensor:
    """Gaussian images of mean 1/2 and deviation 1/4, cut to [0, 1]: [B, 3, H, W], each by its own number."""
    made = []
    for row in rows:
        raw = np.random.Philox(key=np.array([seed, row], dtype=np.uint64)).random_raw(stage + 1)
        generator = torch.Generator().manual_seed(int(raw[stage] >> np.uint64(1)))
        made.append(torch.randn(3, frame.height, frame.width, generator=generator))
    return (torch.stack(made) / 4 + 0.5).clamp(0, 1)


def variation(x: Tensor) -> Tensor:
    """Total variation of images [B, C, H, W] (above): a scalar."""
    shifts = (
        x[..., :, 1:] - x[..., :, :-1],
        x[..., 1:, :] - x[..., :-1, :],
        x[..., 1:, 1:] - x[..., :-1, :-1],
        x[..., 1:, :-1] - x[..., :-1, 1:],
    )
    return torch.stack([shift.flatten(1).norm(dim=1) for shift in shifts]).sum(0).mean()


def stored(x: Tensor) -> Tensor:
    """x in [0, 1] as a PNG has it: uint8."""
    return (x.detach() * 255).round().to(torch.uint8)


def invert(
    model: Any,
    x: Tensor,
    frame: Frame,
    how: Inversion,
    prior: Prior | None,
    labeller: Labeller,
    answers: list[Any] | None,
    tell: Callable[[int], None],
    revise: Revise | None = None,
) -> tuple[Tensor, list[Any] | None]:
    """x [B, 3, H, W] in [0, 1], on the model's device, changed step by step -> (the best images, uint8; the
    answers, which `revise` may have moved). prior: None where its weight is 0; answers: None where no label
    is asked for. tell(n): n steps of images more. ValueError where the loss is no number."""
    x = x.clone().requires_grad_(True)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    optimizer = torch.optim.Adam([x], lr=how.rate)

    def loss_at(image: Tensor) -> Tensor:
        given = frame(image).to(dtype)
        if prior is not None:
            prior.seen.clear()  # of a look at the labels
        if answers is not None and how.task:
            task = labeller.loss(model, given, answers).float()
        else:
            model(pixel_values=given)
            task = image.new_zeros(())
        total = how.variation * variation(image) + how.task * task
        return total if prior is None else total + how.prior * prior.loss()

    best, least = stored(x), math.inf
    for step in range(1, how.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = how.rate * (1 + math.cos(math.pi * (step - 1) / how.steps)) / 2
        optimizer.zero_grad(set_to_none=True)
        loss_at(x).backward()
        optimizer.step()
        with torch.no_grad():
            x.clamp_(0, 1)
            if revise is not None and answers is not None:
                answers = revise(step, frame(x).to(dtype), answers)
            if step % how.check_every == 0 or step == how.steps:
                now = float(loss_at(stored(x) / 255))
                if now < least:
                    best, least = stored(x), now
        tell(len(x))
    if least == math.inf:  # and NaN is not less: `best` is the noise that was given
        raise ValueError(
            "data.synthesis: the loss of the images is no number at any step that was looked at; lower "
            "data.synthesis.weights or learning_rate, or set model.dtype: float32"
        )
    return best, answers
