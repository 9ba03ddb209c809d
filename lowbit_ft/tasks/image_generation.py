"""task: image_generation. A diffusion transformer of diffusers learns pictures, of a class or of none.

Rows are pictures with a label, as those of image_classification. A batch shows a picture on its way to noise,
x_t at a time t, and the answer is what the path asks for (diffusion/paths.py): the velocity, or the noise.

    loss = sum over pictures of mean (f(x_t, t, label) - f*)^2  /  pictures

What is drawn of a row (t, noise, whether the label is dropped) is a function of the seed, the epoch and the
row, so a resumed run draws the same. What is measured, and what calibrators look at, has its times spread
evenly over 0 .. 1: a static scale has seen all of them.
"""

from __future__ import annotations

import hashlib
import pathlib
import random
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..data.batches import Batches
from ..data.errors import BadRow, DataError
from ..data.mix import named
from ..diffusion.names import AUTO, CLASSES, KEY, missing
from ..diffusion.paths import GOLDEN, PATHS, Path, answer, sampled
from ..diffusion.pictures import Pictures
from ..evaluate.perplexity import EvalRow
from ..model.linear import packed_op_only
from ..model.purpose import Purpose, example_of
from ..model.walk import Batch
from ..names import listed
from .base import Dense, Feed, Measure, Task
from .batches import RowBatches
from .image_classification import file_of
from .labelled import Answers, Labelled
from .labels import Classes, found_labels, label_id, label_values
from .rows import Encoded, Encoder, Rows, of_column

FOLDER = "pictures"  # of the run: a sheet of samples of each stage
SHOWN = ("base", "quantized", "trained")  # merged/ and what is exported compute what was trained
MOST = 8  # labels of a sheet


class ImageGeneration(Labelled):
    reads: ClassVar[str] = "images"
    pipeline: ClassVar[str] = "unconditional-image-generation"
    auto: ClassVar[str] = AUTO
    peft: ClassVar[str | None] = None
    inputs: ClassVar[frozenset[str]] = frozenset({"hidden_states", "timestep", "class_labels"})
    unit: ClassVar[str] = "images"
    scored: ClassVar[bool] = False
    layered: ClassVar[bool] = False
    segmented: ClassVar[bool] = True
    command: ClassVar[str | None] = "lowbit-ft draw {folder} pictures.png"

    kind: Literal["image_generation"] = "image_generation"
    train_head: Literal[False] = Field(default=False, description="it has no head of its own")
    image: str = Field(
        default="image",
        description="the column of the picture: its bytes, or a path; of a transformer of latents a "
        ".safetensors file of one tensor",
    )
    label: str | None = Field(default="label", description="the column of the class; null: none has one")
    labels: Classes | None = Field(
        default=None, description="the classes by name, in their order; null: those that the rows have"
    )
    prediction: Literal["velocity", "noise"] = Field(
        default="velocity",
        description="what the transformer was trained to say: velocity (flow matching), or noise (DDPM)",
    )
    drop_labels: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.1, description="the share of rows that train without their label, for guidance"
    )
    samples: Annotated[int, Field(ge=0, le=16)] = Field(
        default=4, description="pictures of each class that the report shows; 0: none"
    )
    sample_steps: Annotated[int, Field(ge=1, le=1000)] = Field(
        default=20, description="steps from noise to a picture"
    )
    guidance: Annotated[float, Field(ge=0, le=100)] = Field(
        default=1.0, description="of these pictures: 1 is none, more holds to the label"
    )

    @model_validator(mode="after")
    def _labelled(self) -> ImageGeneration:
        if self.label is None and self.labels is not None:
            raise ValueError(
                f"label: null, so no row has a class, and labels names {len(self.labels)}; remove one of both"
            )
        return self

    @property
    def path(self) -> Path:
        return PATHS[self.prediction]

    def unfit(self, config: Mapping[str, Any]) -> str | None:
        if (reason := missing()) is not None:
            return f"task: {self.kind} {reason}"
        name = config.get(KEY)
        if not CLASSES.get(str(name), False):
            fit = listed(one for one, trains in CLASSES.items() if trains)
            beside = "looks at the states of a text encoder, which no row has" if name in CLASSES else ""
            return (
                f"task: {self.kind} trains a transformer of classes ({KEY}: {fit}), and this {KEY} is "
                f"{name!r}{f', which {beside}: its segments and its plan are known' if beside else ''}"
            )
        if (trained := config.get("prediction", self.prediction)) != self.prediction:
            return f"it was trained to say {trained!r} (its config.json); set task.prediction: {trained}"
        classes = config.get("num_embeds_ada_norm", 1000)
        if self.labels is not None and isinstance(classes, int) and len(self.labels) > classes:
            return (
                f"it knows {classes} classes (num_embeds_ada_norm), and task.labels names {len(self.labels)}"
            )
        return None

    def settled(self, r: Any, config: Mapping[str, Any]) -> Task:
        made = self
        if self.label is not None and self.labels is None and r.data.train is not None:
            made = self.model_copy(update={"labels": tuple(found_labels(r.data.train, self.label, config))})
        if config and (reason := made.unfit(config)) is not None:
            raise DataError(f"{r.model.path}: {reason}")
        return made

    def purpose(self, seed: int) -> Purpose:
        names = () if self.label is None else self.labels  # none: `draw` asks for none either
        return Purpose(self.auto, {**label_values(names), "prediction": self.prediction}, seed)

    def encoder(self, source: Any, section: Any, tokenizer: Any) -> Encoder:
        """tokenizer: Pictures."""
        names = list(self.labels or ())

        def encode(row: Mapping[str, Any], folder: pathlib.Path) -> list[Encoded]:
            data = file_of(of_column(row, self.image), self.image, folder)
            try:
                tokenizer.values(data)
            except ValueError as error:
                raise BadRow(f"{self.image!r} {error}") from None
            label = self.label
            found = tokenizer.classes if label is None else label_id(of_column(row, label), label, names)
            return [{"image": data, "class_labels": found}]

        def told(made: Encoded) -> list[str]:
            return [] if self.label is None else [names[made["class_labels"]]]

        return Encoder(encode, told, frozenset({self.image} | ({self.label} if self.label else set())))

    def batches(
        self, feed: Feed, model: Any, examples: Any, size: int, *, shuffle: bool, taught: bool = False
    ) -> Batches:
        assert not taught, "refused by the recipe"
        return RowBatches(
            examples,
            size,
            0,
            feed.r.train.seed,
            rank=feed.rank,
            world=feed.world,
            shuffle=shuffle,
            taken=self.inputs | frozenset(self.answers),
            shown=partial(self.on_its_way, feed.tokenizer, shuffle),
        )

    def on_its_way(self, pictures: Pictures, drawn: bool, row: Any, key: str) -> Encoded:
        """What a batch shows of a row; drawn: its time, too, and whether it has its label (training)."""
        seed = hashlib.sha256(key.encode()).digest()
        draw = torch.Generator().manual_seed(int.from_bytes(seed[:7], "big"))
        chance = torch.rand(2, generator=draw, dtype=torch.float64).tolist()
        even = (0.5 + int(key.rpartition("/")[2]) * GOLDEN) % 1
        t = torch.tensor([chance[0] if drawn else even])
        x = pictures.values(row["image"])[None]
        noise = torch.randn(x.shape, generator=draw)
        without = drawn and chance[1] < self.drop_labels
        return {
            "hidden_states": self.path.noisy(x, noise, t)[0],
            "timestep": self.path.told(t)[0],
            "class_labels": pictures.classes if without else row["class_labels"],
            "labels": self.path.wanted(x, noise)[0],
        }

    def calibration(
        self,
        source: Any,
        section: Any,
        tokenizer: Any,
        *,
        rows: int | None,
        seed: int,
        samples: int,
        sequence_len: int,
        size: int,
    ) -> list[Batch]:
        """A seeded choice of the rows, over and over where there are fewer than samples: each with a noise
        and a time of its own, the times evenly over 0 .. 1."""
        pool = self.examples(source, section, tokenizer, rows=rows)
        if not len(pool):
            raise DataError("no usable row to calibrate on", named(source))
        order = random.Random(seed).sample(range(len(pool)), len(pool))
        chosen = Rows([pool[order[i % len(order)]] for i in range(samples)])
        shown = partial(self.on_its_way, tokenizer, False)
        size = min(size, len(chosen))
        found = RowBatches(chosen, size, 0, seed, shuffle=False, taken=self.inputs, shown=shown)
        return list(found.one_epoch())

    def rehearsed(self, model: Any, windows: int, length: int, loss: bool) -> Any:
        one = example_of(model.config.to_dict(), self.purpose(0))
        given = {
            name: torch.empty((windows, *value.shape[1:]), dtype=value.dtype) for name, value in one.items()
        }
        outputs = model(**given)
        return self.loss(outputs, {"labels": torch.empty_like(given["hidden_states"])}) if loss else outputs

    def measure(self, feed: Feed, source: Any, model: Any, dense: Dense, rows: int | None) -> Measure:
        found = self.examples(source, feed.r.data, feed.tokenizer, rows=rows)
        return Generated(self, feed, self.first(found, feed.r.eval.windows), model, dense)

    def loss(self, outputs: Any, labels: dict[str, Tensor]) -> Tensor:
        wanted = labels["labels"]
        off = answer(outputs.sample.float(), wanted.shape[1]) - wanted
        return off.square().flatten(1).mean(1).sum()

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        return torch.tensor(len(batch["labels"]))

    def said(self, outputs: Any, labels: dict[str, Tensor], rows: Any) -> tuple[list[Any], list[Any]]:
        return [], list(answer(outputs.sample.float(), labels["labels"].shape[1]).cpu())

    def score(self, true: list[Any], said: list[Any]) -> dict[str, float]:
        return {}  # against the full-precision model: Generated


class Generated(Answers):
    """The loss, how far what is said is from the full-precision model's answers, and pictures of each stage
    from the same noise.

        error = |f - f_full| / |f_full|, Frobenius norms over all pictures
    """

    def __init__(self, task: ImageGeneration, feed: Feed, chosen: Any, model: Any, dense: Dense) -> None:
        super().__init__(task, feed, chosen, model, dense)
        self.generation, self.pictures = task, feed.tokenizer
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
            labels, noise = self.asked()
            made = sampled(model, task.path, labels, noise, task.sample_steps, task.guidance)
        model.train(training)
        self.sheets[stage] = self.pictures.sheet(made, task.samples)
        return row

    def asked(self) -> tuple[Tensor, Tensor]:
        """(labels [B], noise [B, C, H, W]) of the sheet: a row of pictures for each of the first labels."""
        names, size = self.generation.labels, self.pictures.size
        labels = torch.arange(min(MOST, len(names))) if names else torch.tensor([self.pictures.classes])
        labels = labels.repeat_interleave(self.generation.samples)
        draw = torch.Generator().manual_seed(0)
        return labels, torch.randn(len(labels), self.pictures.channels, size, size, generator=draw)

    def files(self) -> dict[str, bytes]:
        return {f"{FOLDER}/{stage}.png": data for stage, data in self.sheets.items()}
