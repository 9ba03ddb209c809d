"""What is measured of image_generation: the loss, how far it is from full precision, sheets of pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..diffusion.paths import Told, sampled
from ..evaluate.perplexity import EvalRow
from ..model.linear import packed_op_only
from .base import Dense, Feed
from .batches import pad
from .labelled import Answers

FOLDER = "pictures"  # of the run: a sheet of samples of each stage
SHOWN = ("base", "quantized", "trained")  # merged/ and what is exported compute what was trained
MOST = 8  # labels, or texts, of a sheet


class Generated(Answers):
    """The loss, how far what is said is from the full-precision model's answers, and pictures of each stage
    from the same noise.

        error = |f - f_full| / |f_full|, Frobenius norms over all pictures
    """

    def __init__(self, task: Any, feed: Feed, chosen: Any, model: Any, dense: Dense) -> None:
        super().__init__(task, feed, chosen, model, dense)
        self.generation, self.pictures = task, task.seen(feed.tokenizer)
        self.full: Tensor | None = None
        self.sheets: dict[str, bytes] = {}

    def scores(self, stage: str, true: list[Any], said: list[Any]) -> dict[str, float]:
        found = torch.stack(said).double()
        self.full = found if stage == "base" else self.full
        if self.full is None:
            return {}
        return {f"{self.generation.prediction}_error": float((found - self.full).norm() / self.full.norm())}

    def row(self, model: Any, stage: str) -> EvalRow:
        row, task = super().row(model, stage), self.generation
        if stage not in SHOWN or not task.samples:
            return row
        training = model.training
        model.eval()
        with packed_op_only(model):
            told, without, noise = self.asked()
            made = sampled(model, task.path, told, without, noise, task.sample_steps, task.guidance)
        model.train(training)
        self.sheets[stage] = self.pictures.sheet(made, task.samples)
        return row

    def asked(self) -> tuple[Told, Told, Tensor]:
        """(what is told, what stands for nothing, noise [B, C, H, W]) of the sheet: a row of pictures for
        each of the first labels, or of the first texts that are measured."""
        task, pictures = self.generation, self.pictures
        rows: list[Any] = [{"class_labels": i} for i in range(min(MOST, len(task.labels or ())))] or [None]
        if pictures.texts is not None:
            rows = list({getattr(row["text"], "digest", row["text"]): row for row in self.rows}.values())[
                :MOST
            ]
        count = task.samples * len(rows)
        told, without = (
            {name: value.repeat_interleave(task.samples, 0) for name, value in stacked.items()}
            for stacked in (
                pad([task.told(pictures, row) for row in some], 0, task.inputs)
                for some in (rows, [None] * len(rows))
            )
        )
        draw = torch.Generator().manual_seed(0)
        shape = (count, pictures.channels, pictures.size, pictures.size)
        return told, without, torch.randn(shape, generator=draw)

    def files(self) -> dict[str, bytes]:
        return {f"{FOLDER}/{stage}.png": data for stage, data in self.sheets.items()}
