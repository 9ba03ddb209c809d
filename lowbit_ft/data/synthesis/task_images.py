"""kind: task_images. Images of a task without data: noise that the model's own statistics and answers shape.

    labels: own       noise -> image that the prior likes -> the model's own answer is the label
    labels: drawn     a label is drawn -> an image that the model answers so
    labels: adaptive  a label is drawn, and moved while an image is made for it to what the model sees there;
                      that image is thrown away, and another one made for the labels (arXiv 2507.16782)

`own` comes first because it was as good as the others where they were measured. An image is stored as a PNG
of the size that the image processor makes, and answered as it will be read: from that file. With `own` a row
of which the model is not sure enough is dropped.
"""

from __future__ import annotations

import io
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from ...model.images import made_size, picture_of, pixels
from .base import CLOSED, Count, Given, Maker, Shard, Share, SynthesisConfig, Tell
from .invert import Frame, Inversion, Revise, invert, noise
from .labeller import Labeller
from .priors import Prior, prior_of

FOLDER = "images"  # of the files, in synthesis/
COLLAPSED = 0.9
UNSURE = "the model is not sure"
Weight = Annotated[float, Field(ge=0)]


class WeightsConfig(BaseModel):
    """Of the parts of the loss of an image."""

    model_config = CLOSED

    prior: Weight = Field(default=1.0, description="what the model's statistics say")
    variation: Weight = Field(default=0.02, description="total variation: against single pixels")
    task: Weight = Field(default=1.0, description="the task's loss, where labels are not `own`")


class AdaptConfig(BaseModel):
    """labels: adaptive."""

    model_config = CLOSED

    every: Count = Field(default=20, description="steps from one look at the labels to the next")
    begin: Annotated[int, Field(ge=0)] = Field(default=60, description="the first step of a look")
    confidence: Share = Field(default=0.2, description="of what the model sees, to become a label")
    overlap: Share = Field(default=0.35, description="IoU from which on two boxes are one")
    scale: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0,
        description="sides of the images that labels are found in, by those of the images that are made: for "
        "models that take images of any size",
    )

    @property
    def first(self) -> int:
        """The first step of a look."""
        return max(1, -(-self.begin // self.every)) * self.every


class TaskImagesConfig(SynthesisConfig):
    reads: ClassVar[str] = "images"
    format: ClassVar[str | None] = None

    kind: Literal["task_images"] = "task_images"
    samples: Count | None = Field(default=256, description="images to make")
    labels: Literal["own", "drawn", "adaptive"] = Field(
        default="own", description="the model's answers to its images, or labels that images are made for"
    )
    steps: Count = Field(default=300, description="of Adam on the pixels of an image")
    check_every: Count = Field(default=50, description="steps; the best of these is kept")
    learning_rate: Annotated[float, Field(gt=0)] = Field(
        default=0.05, description="of the pixels, which lie from 0 to 1; it falls to 0 along a cosine"
    )
    prior: Literal["auto", "batch_norm", "patches"] = Field(
        default="auto", description="auto: batch_norm where the model has trained ones, else patches"
    )
    weights: WeightsConfig = Field(default_factory=WeightsConfig, description="of the parts of the loss")
    adapt: AdaptConfig = Field(default_factory=AdaptConfig, description="labels: adaptive")
    confidence: Share = Field(
        default=0.2, description="of the model's answer to an image (labels: own), at least"
    )

    @model_validator(mode="after")
    def _images(self) -> TaskImagesConfig:
        if self.samples is None:
            raise ValueError(
                "samples: got null; images cannot be counted before they are made; give a number"
            )
        if not (self.weights.prior or (self.weights.task and self.labels != "own")):
            raise ValueError("weights: nothing shapes an image; set prior, or task with labels: drawn")
        if self.labels != "own" and not self.weights.task:
            raise ValueError(
                f"weights.task: got 0 with labels: {self.labels}, and nothing else puts labels into images; "
                "raise it, or set labels: own"
            )
        if self.labels == "adaptive" and self.adapt.begin >= self.steps:
            raise ValueError(f"adapt.begin {self.adapt.begin} of {self.steps} steps; lower it")
        if self.labels == "adaptive" and self.adapt.first > self.steps:
            raise ValueError(
                f"adapt: the first look at the labels is at step {self.adapt.first} (a multiple of every, "
                f"from begin on) of {self.steps}; lower adapt.every"
            )
        return self

    def longest(self, sequence_len: int) -> int:
        return self.steps * (2 if self.labels == "adaptive" else 1)

    def working_bytes(self, weights: int, model: Any, size: int, longest: int) -> int:
        """What a forward keeps for the backward, and the backward beside it: a small ViT keeps 7 numbers to a
        pixel and channel, a small RT-DETR 27; twice the larger is counted."""
        return round(1.15 * weights) + 2 * 27 * 4 * self.batch_size * _numbers(model)

    def disk_bytes(self, model: Any, longest: int) -> int:
        """A PNG of noise is as long as its pixels."""
        return (self.samples or 0) * (_numbers(model) + 400)

    @property
    def loosen(self) -> str:
        return "lower data.synthesis.confidence, or raise steps"

    def maker(self, given: Given) -> Maker:
        return Pictures(self, given)


def _numbers(model: Any) -> int:
    """Numbers of an image, by config.json, or by the image processor beside it; else of 640 x 640."""
    size = getattr(model, "image_size", None) or made_size(Path(model._name_or_path)) or 640
    height, width = (size, size) if isinstance(size, int) else size
    return 3 * height * width


class Pictures(Maker):
    """Makes the rows of a TaskImagesConfig. frame: what its image processor does to a picture."""

    unit = "image steps"

    def __init__(self, config: TaskImagesConfig, given: Given):
        self.config, self.processor = config, given.tokenizer
        assert given.labeller is not None, "refused by the recipe"
        self.labeller: Labeller = given.labeller
        self.count, self.longest = config.samples or 0, given.longest
        self.frame = Frame(self.processor)
        self.notes = [f"images of {self.frame.width} x {self.frame.height}, labels: {config.labels}"]
        self.found, self.what = Counter[str](), Counter[str]()

    def write(self, numbers: range, model: Any, tell: Tell) -> Shard:
        config, labeller = self.config, self.labeller
        model.requires_grad_(False)
        prior = prior_of(config.prior, model) if config.weights.prior else None
        if config.labels == "own":
            drawn = answers = None
        else:
            chances = [random.Random(f"{config.seed}/{number}") for number in numbers]
            drawn = answers = [labeller.drawn(n, c) for n, c in zip(numbers, chances, strict=True)]
        if config.labels == "adaptive":
            if config.adapt.scale < 1:
                self._refuse_small(model)
            _, answers = self._make(numbers, 0, model, prior, answers, self._revise(model), tell)
        made, _ = self._make(numbers, 1, model, prior, answers, None, tell)
        files = [_png(image) for image in made]
        if answers is None:
            answers = self._own(files, model)
        before = [None] * len(files) if drawn is None else drawn
        shard = Shard(len(files) * self.longest)
        for number, data, answer, first in zip(numbers, files, answers, before, strict=True):
            name = f"{FOLDER}/{number:06}.png"
            if answer is None:  # its image is not kept
                shard.lines["dropped"].append({"row": number, "dropped": UNSURE})
                continue
            stored: dict[str, Any] = {"row": number, labeller.image: f"../{name}"}
            stored |= labeller.columns(answer, self.frame.width, self.frame.height)
            fate = config.labels if first in (None, answer) else "moved"
            stored["about"] = {"fate": fate, "size": [self.frame.width, self.frame.height]}
            shard.files[name] = data
            self.remember(stored)
            shard.lines["valid" if number < config.valid else "train"].append(stored)
        return shard

    def _make(
        self,
        numbers: range,
        stage: int,
        model: Any,
        prior: Prior | None,
        answers: list[Any] | None,
        revise: Revise | None,
        tell: Tell,
    ) -> tuple[Tensor, list[Any] | None]:
        config, weights = self.config, self.config.weights
        how = Inversion(
            config.steps,
            config.check_every,
            config.learning_rate,
            weights.prior,
            weights.variation,
            weights.task,
        )
        frame = self.frame if stage else self.frame.scaled(config.adapt.scale)
        x = noise(config.seed, numbers, frame, stage).to(next(model.parameters()).device)
        with prior.watched() if prior is not None else nullcontext():
            return invert(
                model,
                x,
                frame,
                how,
                prior,
                self.labeller,
                answers,
                lambda images: tell(0, images),
                revise,
            )

    @torch.no_grad()
    def _refuse_small(self, model: Any) -> None:
        """ValueError where the model does not take images as small as labels are found in."""
        frame, like = self.frame.scaled(self.config.adapt.scale), next(model.parameters())
        try:
            model(pixel_values=frame.low[None].to(like.device, like.dtype))
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(
                f"data.synthesis.adapt.scale: got {self.config.adapt.scale:g}, and the model takes no images "
                f"of {frame.width} x {frame.height} ({error}); raise it, or leave it out"
            ) from error

    def _revise(self, model: Any) -> Revise:
        adapt = self.config.adapt

        def revise(step: int, images: Tensor, answers: list[Any]) -> list[Any]:
            if step < adapt.begin or step % adapt.every:
                return answers
            return self.labeller.revised(model, images, answers, adapt.confidence, adapt.overlap)

        return revise

    @torch.no_grad()
    def _own(self, files: Sequence[bytes], model: Any) -> list[Any | None]:
        """What the model says of images, as it reads them from their files."""
        images = torch.stack([pixels(self.processor, picture_of(data)) for data in files])
        like = next(model.parameters())
        return self.labeller.own(model, images.to(like.device, like.dtype), self.config.confidence)

    def remember(self, row: Mapping[str, Any]) -> None:
        self.found.update(self.labeller.words(self.labeller.answer(row)))
        self.what[row["about"]["fate"]] += 1

    @property
    def answers(self) -> Counter[str]:
        return self.found

    @property
    def fates(self) -> Counter[str]:
        return self.what

    @torch.no_grad()
    def score(
        self, model: Any, rows: Iterable[Mapping[str, Any]], read: Callable[[str], bytes]
    ) -> Mapping[str, float]:
        if self.config.labels == "own":
            return {}  # 1 by construction
        kept = list(rows)  # the images come one by one: they need not fit in memory together
        names = (str(row[self.labeller.image]).removeprefix("../") for row in kept)
        images = (pixels(self.processor, picture_of(read(name))) for name in names)
        return self.labeller.score(model, images, [self.labeller.answer(row) for row in kept])

    def warnings(self) -> list[str]:
        total, found = self.found.total(), []
        if not total:
            return []
        word, most = self.found.most_common(1)[0]
        if most > COLLAPSED * total:
            found.append(
                f"{most / total:.0%} of the labels are {word!r}: they have collapsed; set labels: drawn, or "
                "other weights"
            )
        if missing := [name for name in self.labeller.names if not self.found[name]]:
            found.append(f"no image is {missing[0]!r} ({len(missing)} of {len(self.labeller.names)} labels)")
        return found


def _png(image: Tensor) -> bytes:
    """uint8 [3, H, W] -> the bytes of a PNG."""
    from PIL import Image  # optional: only images need it

    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(file, "PNG")
    return file.getvalue()
