"""task: image_generation. A diffusion transformer of diffusers learns pictures, of a class, of a text or of
none.

Rows are pictures with a label, as those of image_classification, or with what a text encoder said of a
prompt. A batch shows a picture on its way to noise,
x_t at a time t, and the answer is what the path asks for (diffusion/paths.py): the velocity, or the noise.

    loss = sum over pictures of mean (f(x_t, t, told) - f*)^2  /  pictures

What is drawn of a row (t, noise, whether what is told of it is dropped) is a function of the seed, the epoch
and the row, so a resumed run draws the same. What is measured, and what calibrators look at, has its times
spread evenly over 0 .. 1: a static scale has seen all of them.
"""

from __future__ import annotations

import hashlib
import pathlib
import random
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..data.batches import Batches
from ..data.errors import BadRow, DataError
from ..data.mix import named
from ..diffusion.names import AUTO, KEY, missing
from ..diffusion.paths import GOLDEN, PATHS, TIMES, Path, answer
from ..diffusion.pictures import Pictures
from ..diffusion.texts import MOST as MOST_TEXT
from ..diffusion.texts import Texts
from ..diffusion.traits import TRAITS, Traits, shapes
from ..model.purpose import Purpose
from ..model.walk import Batch
from ..names import listed
from ..signals.divergence import Divergence
from ..train.goal import IMAGES, Pace
from .base import Dense, Feed, Measure, Task
from .batches import RowBatches
from .generated import Generated
from .kept import data_of, kept_file, read_picture
from .labelled import Labelled
from .labels import Distinct, found_labels, label_id, label_values
from .rows import Encoded, Encoder, Rows, of_column

CLASSES = "num_embeds_ada_norm"  # of config.json


class ImageGeneration(Labelled):
    reads: ClassVar[str] = "images"
    pipeline: ClassVar[str] = "unconditional-image-generation"
    auto: ClassVar[str] = AUTO
    peft: ClassVar[str | None] = None
    inputs: ClassVar[frozenset[str]] = frozenset(
        {"hidden_states", "timestep", "class_labels", "encoder_hidden_states", "pooled_projections"}
    )
    unit: ClassVar[str] = "images"
    scored: ClassVar[bool] = False
    likely: ClassVar[bool] = False
    layered: ClassVar[bool] = False
    smooths: ClassVar[bool] = True
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
    labels: Annotated[Distinct, Field(min_length=1)] | None = Field(
        default=None, description="the classes by name, in their order; null: those that the rows have"
    )
    text: str = Field(
        default="text",
        description="of SD3 and Flux the column of a .safetensors file (its path, or its bytes) of what a "
        "text encoder said: encoder_hidden_states [text_tokens, width], pooled_projections [width]",
    )
    text_tokens: Annotated[int, Field(ge=1, le=1 << 16)] | None = Field(
        default=None,
        description="states of a text; null: as many as the pipeline gives, 333 (SD3), 512 (Flux)",
    )
    no_text: str | None = Field(
        default=None,
        description="a file like those of the rows that stands for no text (the states of the empty prompt), "
        "in place of the dropped ones and for guidance; null: zeros",
    )
    size: Annotated[int, Field(ge=1, le=1 << 12)] | None = Field(
        default=None,
        description="height and width of what the model sees of SD3 and Flux, latents where it has those; "
        "null: as config.json says, of Flux 128",
    )
    times: Literal["even", "middle"] = Field(
        default="even",
        description="where on the way training looks: even, or mostly in the middle (logit-normal, as SD3)",
    )
    distilled_guidance: Annotated[float, Field(ge=0, le=100)] | None = Field(
        default=None, description="what a transformer with guidance_embeds (Flux.1-dev) is told; null: 3.5"
    )
    prediction: Literal["velocity", "noise"] = Field(
        default="velocity",
        description="what the transformer was trained to say: velocity (flow matching), or noise (DDPM)",
    )
    drop_labels: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.1, description="the share of rows that train without their label, or text, for guidance"
    )
    samples: Annotated[int, Field(ge=0, le=16)] = Field(
        default=4, description="pictures of each class, or text, that the report shows; 0: none"
    )
    sample_steps: Annotated[int, Field(ge=1, le=1000)] = Field(
        default=20, description="steps from noise to a picture"
    )
    guidance: Annotated[float, Field(ge=0, le=100)] = Field(
        default=1.0, description="of these pictures: 1 is none, more holds to the label, or text"
    )

    @model_validator(mode="after")
    def _labelled(self) -> ImageGeneration:
        if self.label is None and self.labels is not None:
            raise ValueError(
                f"label: null, so no row has a class, and labels names {len(self.labels)}; remove one of both"
            )
        return self

    @property
    def shipped(self) -> tuple[str, str | None]:
        if not self.text_tokens:
            return self.pipeline, self.command
        return "text-to-image", f"{self.command} --text STATES.safetensors"

    @property
    def path(self) -> Path:
        return PATHS[self.prediction]

    def unfit(self, config: Mapping[str, Any]) -> str | None:
        if (reason := missing()) is not None:
            return f"task: {self.kind} {reason}"
        name = config.get(KEY)
        if (seen := TRAITS.get(str(name))) is None:
            return f"task: {self.kind} trains a transformer of {KEY}: {listed(TRAITS)}; this one is {name!r}"
        if (trained := config.get("prediction", self.prediction)) != self.prediction:
            return f"it was trained to say {trained!r} (its config.json); set task.prediction: {trained}"
        return self._strange(seen, config) or self._unsized(seen, config)

    def _strange(self, seen: Traits, config: Mapping[str, Any]) -> str | None:
        """What this class is not told."""
        if not seen.texts:
            told, classes = ("text_tokens", "no_text", "distilled_guidance"), config.get(CLASSES)
            if (other := next((key for key in told if getattr(self, key) is not None), None)) is not None:
                return f"it is told classes and no texts; remove task.{other}"
            if self.labels is not None and isinstance(classes, int) and len(self.labels) > classes:
                return f"it knows {classes} classes ({CLASSES}), and task.labels names {len(self.labels)}"
            return None
        if self.prediction != "velocity":
            return "it says the velocity, as SD3 and Flux were trained; set task.prediction: velocity"
        if self.labels is not None:
            return "it is told texts and knows no classes; remove task.labels"
        if self.distilled_guidance is not None and not config.get("guidance_embeds"):
            return "it was not distilled with a guidance (guidance_embeds); remove task.distilled_guidance"
        return None

    def _unsized(self, seen: Traits, config: Mapping[str, Any]) -> str | None:
        """Why it does not take pictures of task.size."""
        patch, own = config.get("patch_size", 1), config.get("sample_size")
        most = config.get("pos_embed_max_size")
        if self.size is None or not (type(patch) is int and patch > 0 and type(most) in (int, type(None))):
            return None  # what is wrong with a config.json, the model says that is built of it
        step = patch * seen.patch
        if seen.chain and self.size != own:
            return f"its positions are those of {own} x {own} (sample_size); remove task.size"
        if self.size % step or (most is not None and self.size > most * step):
            upto = "" if most is None else f" up to {most * step} (pos_embed_max_size)"
            return f"task.size: got {self.size}; allowed: multiples of {step}{upto}"
        return None

    def walks(self, config: Mapping[str, Any]) -> bool:
        """The blocks of SD3 and Flux hand two streams on."""
        seen = TRAITS.get(str(config.get(KEY)))
        return seen is None or seen.chain

    def settled(self, r: Any, config: Mapping[str, Any]) -> Task:
        made, seen = self, TRAITS.get(str(config.get(KEY)))
        if seen is not None and seen.texts:
            made = self._of_texts(seen, config)
        elif self.label is not None and self.labels is None and r.data.train is not None:
            made = self.model_copy(update={"labels": tuple(found_labels(r.data.train, self.label, config))})
        if config and (reason := made.unfit(config)) is not None:
            raise DataError(f"{r.model.path}: {reason}")
        if made.no_text is not None and made.text_tokens is not None:
            try:
                Texts.of(config, made.text_tokens).without(made.no_text)
            except ValueError as error:
                raise DataError(f"task.no_text: {error}") from None
        return made

    def _of_texts(self, seen: Traits, config: Mapping[str, Any]) -> ImageGeneration:
        """With the sizes that a row is checked against. It reads no label."""
        tokens = self.text_tokens or config.get("text_tokens") or seen.text_tokens
        size = self.size or config.get("picture_size") or config.get("sample_size", seen.size)
        return self.model_copy(update={"label": None, "text_tokens": tokens, "size": size})

    @property
    def pace(self) -> Pace:
        return IMAGES

    def purpose(self, seed: int) -> Purpose:
        sizes = {
            "text_tokens": self.text_tokens,
            "picture_size": self.size,
            "distilled_guidance": self.distilled_guidance,
        }
        names = () if self.label is None else self.labels  # none: `draw` asks for none either
        values = {**label_values(names), "prediction": self.prediction}
        values |= {key: value for key, value in sizes.items() if value is not None}
        if self.text_tokens is not None:
            values["no_text"] = self.no_text is not None  # whether `draw` needs a file, too, for guidance
        return Purpose(self.auto, values, seed)

    def seen(self, pictures: Pictures) -> Pictures:
        """As the task has them."""
        texts = pictures.texts
        if texts is not None and self.text_tokens is not None:
            texts = replace(texts, tokens=self.text_tokens)
        return replace(pictures, size=self.size or pictures.size, texts=texts)

    def encoder(self, source: Any, section: Any, tokenizer: Any) -> Encoder:
        """tokenizer: Pictures."""
        names, pictures = list(self.labels or ()), self.seen(tokenizer)
        beside, texts = self.label if pictures.texts is None else self.text, pictures.texts

        def encode(row: Mapping[str, Any], folder: pathlib.Path) -> list[Encoded]:
            data, held = read_picture(of_column(row, self.image), self.image, folder)
            try:
                pictures.values(data)
            except ValueError as error:
                raise BadRow(f"{self.image!r} {error}") from None
            if texts is not None:
                value = of_column(row, self.text)
                return [{"image": held, "text": kept_file(value, self.text, folder, MOST_TEXT, texts.values)}]
            if self.label is None:
                return [{"image": held, "class_labels": pictures.classes}]
            return [{"image": held, "class_labels": label_id(of_column(row, self.label), self.label, names)}]

        def told(made: Encoded) -> list[str]:
            return [] if texts is not None or self.label is None else [names[made["class_labels"]]]

        return Encoder(encode, told, frozenset({self.image} | ({beside} if beside else set())))

    def batches(
        self, feed: Feed, model: Any, examples: Any, size: int, *, shuffle: bool, taught: bool = False
    ) -> Batches:
        return RowBatches(
            examples,
            size,
            0,
            feed.r.train.seed,
            rank=feed.rank,
            world=feed.world,
            shuffle=shuffle,
            taken=self.inputs | frozenset(self.answers),
            shown=partial(self.on_its_way, self.seen(feed.tokenizer), shuffle),
        )

    def on_its_way(self, pictures: Pictures, drawn: bool, row: Any, key: str) -> Encoded:
        """What a batch shows of a row; drawn: its time, too, and whether it is told what the row says."""
        seed = hashlib.sha256(key.encode()).digest()
        draw = torch.Generator().manual_seed(int.from_bytes(seed[:7], "big"))
        chance = torch.rand(2, generator=draw, dtype=torch.float64)
        even = (0.5 + int(key.rpartition("/")[2]) * GOLDEN) % 1
        t = torch.tensor([float(TIMES[self.times](chance[0])) if drawn else even])
        x, seen = pictures.values(data_of(row["image"]))[None], pictures.traits
        noise = torch.randn(x.shape, generator=draw)
        without = drawn and float(chance[1]) < self.drop_labels
        return {
            "hidden_states": seen.packed(self.path.noisy(x, noise, t))[0],
            "timestep": self.path.told(t)[0] / seen.per,
            **self.told(pictures, None if without else row),
            "labels": seen.packed(self.path.wanted(x, noise))[0],
        }

    def told(self, pictures: Pictures, row: Any) -> Encoded:
        """What the model is told of a row; None: nothing."""
        if pictures.texts is None:
            return {"class_labels": pictures.classes if row is None else row["class_labels"]}
        if row is None:
            return {**pictures.texts.without(self.no_text)}
        return {**pictures.texts.values(data_of(row["text"], MOST_TEXT))}

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
        shown = partial(self.on_its_way, self.seen(tokenizer), False)
        size = min(size, len(chosen))
        found = RowBatches(chosen, size, 0, seed, shuffle=False, taken=self.inputs, shown=shown)
        return list(found.one_epoch())

    def rehearsed(self, model: Any, windows: int, length: int, loss: bool) -> Any:
        config = model.config.to_dict()
        seen = TRAITS[config[KEY]]
        own = self._of_texts(seen, config) if seen.texts else self
        found = shapes({**config, "text_tokens": own.text_tokens, "picture_size": own.size}, windows)
        given: dict[str, Tensor] = {name: torch.empty(shape) for name, shape in found.items()}
        if not seen.texts:
            given["class_labels"] = torch.empty((windows,), dtype=torch.int64)
        outputs = model(timestep=torch.empty((windows,)), **given)
        return self.loss(outputs, {"labels": torch.empty_like(given["hidden_states"])}) if loss else outputs

    def measure(self, feed: Feed, source: Any, model: Any, dense: Dense, rows: int | None) -> Measure:
        found = self.examples(source, feed.r.data, feed.tokenizer, rows=rows)
        return Generated(self, feed, self.first(found, feed.r.eval.windows), model, dense)

    def loss(self, outputs: Any, labels: dict[str, Tensor]) -> Tensor:
        wanted = labels["labels"]
        off = answer(outputs.sample.float(), wanted.shape[1]) - wanted
        return off.square().flatten(1).mean(1).sum()

    def between(
        self,
        ours: Any,
        theirs: Any,
        labels: dict[str, Any],
        temperature: float = 1.0,
        kind: Divergence = "forward",
    ) -> Tensor:
        """The squared error: what the teacher says of a picture on its way stands for the answer."""
        channels = labels["labels"].shape[1]
        return self.loss(ours, {"labels": answer(theirs.sample.float(), channels)})

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        return torch.tensor(len(batch["labels"]))

    def said(self, outputs: Any, labels: dict[str, Tensor], rows: Any) -> tuple[list[Any], list[Any]]:
        return [], list(answer(outputs.sample.float(), labels["labels"].shape[1]).cpu())

    def score(self, true: list[Any], said: list[Any]) -> dict[str, float]:
        return {}  # against the full-precision model: Generated
