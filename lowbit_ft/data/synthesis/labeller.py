"""How a task whose rows are images answers, as a maker of images has to know it: what labels it draws, what
the loss of an image is, what the model itself says of one."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor


class Labeller(ABC):
    """Of a task and its model. An answer is the labels of one image, whatever they are; images are
    [B, C, H, W] as the image processor makes them."""

    @abstractmethod
    def drawn(self, number: int, chance: random.Random) -> Any:
        """An answer for image `number` of a run."""

    @abstractmethod
    def loss(self, model: Any, images: Tensor, answers: Sequence[Any]) -> Tensor:
        """The model's loss of images with these answers, the mean over the images: a scalar, differentiable
        in the images."""

    @abstractmethod
    def own(self, model: Any, images: Tensor, confidence: float) -> list[Any | None]:
        """What the model says of each image, where it is at least so sure of it; else None."""

    @abstractmethod
    def revised(
        self, model: Any, images: Tensor, answers: Sequence[Any], confidence: float, overlap: float
    ) -> list[Any]:
        """The answers, moved to what the model is at least so sure of (adaptive label sampling). overlap: of
        boxes, from which on two are one."""

    @abstractmethod
    def columns(self, answer: Any, width: int, height: int) -> dict[str, Any]:
        """The columns of a row with this answer, beside that of the image of so many pixels."""

    @abstractmethod
    def answer(self, row: Mapping[str, Any]) -> Any:
        """The answer in the columns of a row."""

    @property
    @abstractmethod
    def image(self) -> str:
        """The column of the image."""

    @abstractmethod
    def words(self, answer: Any) -> list[str]:
        """An answer by its labels' names, for the histogram."""

    @property
    @abstractmethod
    def names(self) -> Sequence[str]:
        """All labels."""

    @abstractmethod
    def score(self, model: Any, images: Iterable[Tensor], answers: Sequence[Any]) -> Mapping[str, float]:
        """The task's measures of the model on images [C, H, W] with these answers. images: read once, in
        order."""
