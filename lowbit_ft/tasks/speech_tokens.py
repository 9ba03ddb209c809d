"""task: speech_tokens. A codec learns to make speech again from 6.25 codes a second and the text.

Rows name a WAV file and what is said in it. A batch holds what the codec is called with (speech/codec.py):
the frames, noise between them and pure noise at a time t, a clean prompt in front, and what is dropped; and
the answer, the velocity from noise to sound.

    loss = sum over frames outside the prompt of mean |v - v*|, + entropy_weight x the entropy term

What is drawn (t, noise, the prompt's length, what is dropped) is a function of the seed, the epoch and the
row: a resumed run draws the same, and every stage is measured on the same.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from ..data.batches import Batches
from ..data.errors import BadRow, DataError
from ..evaluate.perplexity import EvalRow
from ..model.linear import packed_op_only
from ..model.purpose import Purpose
from ..model.tokenizer import pad_id
from ..report.speech import FILE as SPEECH
from ..speech.mel import Mel
from ..speech.names import AUTO, MODEL_TYPE
from ..speech.sample import GUIDANCE, STEPS, Spoken, decode, encode, frames_of
from ..speech.wav import read_wav
from ..train.goal import Pace
from ..vector_codes import VectorCode
from .base import CLOSED, Dense, Feed, Measure, Task
from .labelled import Answers, Labelled
from .rows import Encoded, Encoder, Rows, encoded_text, place_of, read_encoded, text_of

Share = Annotated[float, Field(ge=0, lt=1)]
MADE_AGAIN = 16  # rows of the table that are decoded, for the error of the spectrogram


class Frames(BaseModel):
    """What a frame is: keys of the codec's config.json."""

    model_config = CLOSED

    sample_rate: Annotated[int, Field(gt=0)]
    hop_length: Annotated[int, Field(gt=0)]
    n_fft: Annotated[int, Field(gt=0)]
    num_mel_bins: Annotated[int, Field(gt=0)]
    frames_per_code: Annotated[int, Field(gt=0)]
    mel_mean: float
    mel_std: Annotated[float, Field(gt=0)]

    @property
    def mel(self) -> Mel:
        return Mel(self.sample_rate, self.hop_length, self.n_fft, self.num_mel_bins)

    @property
    def samples_per_code(self) -> int:
        return self.hop_length * self.frames_per_code


class SpeechTokens(Labelled):
    pipeline: ClassVar[str] = "feature-extraction"
    auto: ClassVar[str] = AUTO
    peft: ClassVar[str | None] = None
    command: ClassVar[str | None] = "lowbit-ft encode {folder} speech.wav speech.json"
    answers: ClassVar[tuple[str, ...]] = ("labels", "counted")
    scored: ClassVar[bool] = False

    taught: ClassVar[bool] = False

    kind: Literal["speech_tokens"] = "speech_tokens"
    audio: str = Field(default="audio", description="the column of the WAV file, beside the file of the rows")
    text: str = Field(default="text", description="the column of what is said")
    max_seconds: Annotated[float, Field(gt=0)] = Field(default=20.0, description="a longer row is malformed")
    prompt: Share = Field(
        default=0.25, description="the most of a row that is given clean, from its beginning"
    )
    drop_codes: Share = Field(default=0.2, description="the share of rows that train without their codes")
    drop_text: Share = Field(default=0.1, description="the share of rows that train without their text")
    frames: Frames | None = Field(default=None, description="what a frame is; null: as the checkpoint says")

    def settled(self, r: Any, config: Mapping[str, Any]) -> Task:
        if config.get("model_type") != MODEL_TYPE:
            raise DataError(
                f"task: {self.kind} trains a speech codec (model_type {MODEL_TYPE}), and {r.model.path} is "
                f"{config.get('model_type')!r}; docs/speech-tokens.md says how one is made"
            )
        if self.frames is not None:
            return self
        keys = {name: config.get(name) for name in Frames.model_fields}
        return self.model_copy(update={"frames": Frames.model_validate(keys)})

    @property
    def pace(self) -> Pace:
        """Frames are counted, and seconds told."""
        each = 0.0 if self.frames is None else self.frames.hop_length / self.frames.sample_rate
        return Pace("sound_seconds", "s of sound", _frames, lambda rows, length: None, each)

    def purpose(self, seed: int) -> Purpose:
        return Purpose(self.auto, {}, seed)

    def encoder(self, source: Any, section: Any, tokenizer: Any) -> Encoder:
        frames = self.frames
        assert frames is not None, "settled before rows are read"

        def encode(row: Mapping[str, Any], folder: Path) -> list[Encoded]:
            made = encoded_text(tokenizer, section.sequence_len, text_of(row, self.text))
            samples = self._samples(text_of(row, self.audio), folder, frames.sample_rate)
            mel, digest = frames_of(frames, samples), hashlib.sha256(samples.numpy().tobytes()).hexdigest()
            kept = {key: made[key] for key in ("input_ids", "attention_mask")}
            return [{**kept, "cut": made["cut"], "mel": mel, "sound": digest}]

        return Encoder(encode, lambda made: (), frozenset([self.audio, self.text]))

    def _samples(self, name: str, folder: Path, rate: int) -> Tensor:
        """The sound of a row. BadRow."""
        try:
            wav = read_wav(path := place_of(name, folder))
        except (ValueError, RuntimeError) as error:
            raise BadRow(str(error)) from None
        if wav.seconds > self.max_seconds:
            raise BadRow(
                f"{path}: {wav.seconds:.1f} s of sound; allowed: {self.max_seconds:g} (task.max_seconds)"
            )
        return wav.at(rate)

    def examples(
        self, source: Any, section: Any, tokenizer: Any, *, seed: int = 0, rows: int | None = None
    ) -> Any:
        found = read_encoded(source, section, self.encoder(source, section, tokenizer), rows)
        frames = self.frames
        assert frames is not None
        seconds = sum(len(row["mel"]) for row in found) * frames.hop_length / frames.sample_rate
        found.report.notes.append(f"{seconds:,.1f} s of sound")
        return Utterances(found, found.report)

    def batches(
        self, feed: Feed, model: Any, examples: Any, size: int, *, shuffle: bool, taught: bool = False
    ) -> Batches:
        assert not taught, "refused by the recipe"
        return SpeechBatches(
            examples,
            size,
            pad_id(feed.tokenizer),
            feed.r.train.seed,
            rank=feed.rank,
            world=feed.world,
            shuffle=shuffle,
            task=self,
        )

    def looked_at(self, chosen: Any, size: int, tokenizer: Any, seed: int) -> Batches:
        """At times and with noise of their own."""
        return SpeechBatches(chosen, size, pad_id(tokenizer), seed, shuffle=False, task=self)

    def measure(self, feed: Feed, source: Any, model: Any, dense: Dense, rows: int | None) -> Measure:
        found = self.examples(source, feed.r.data, feed.tokenizer, rows=rows)
        return Speech(self, feed, self.first(found, feed.r.eval.windows), model, dense)

    def first(self, examples: Any, count: int | None) -> Any:
        chosen = examples[:count] if count is not None else examples[:]
        return Utterances(sorted(chosen, key=lambda row: -len(row["mel"])), examples.report)

    def loss(self, outputs: Any, labels: dict[str, Tensor]) -> Tensor:
        counted = labels["counted"]
        off = (outputs.velocity.float() - labels["labels"]).abs().mean(-1)
        return (off * counted).sum() + outputs.code_loss * counted.sum()

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["counted"].sum()

    def rehearsed(self, model: Any, windows: int, length: int, loss: bool) -> Any:
        """As many codes as tokens: about what speech has in characters."""
        config = model.config
        frames = length * config.frames_per_code
        sound = [torch.empty(windows, frames, config.num_mel_bins) for _ in range(3)]
        seen, prompt = (torch.empty(windows, frames, dtype=torch.bool) for _ in range(2))
        outputs = model(
            input_ids=torch.empty(windows, length, dtype=torch.int64),
            attention_mask=torch.empty(windows, length, dtype=torch.int64),
            mel=sound[0],
            noisy=sound[1],
            time=torch.empty(windows),
            frame_mask=seen,
            prompt_mask=prompt,
            keep=torch.empty(windows),
        )
        return self.loss(outputs, {"labels": sound[2], "counted": seen}) if loss else outputs

    def said(
        self, outputs: Any, labels: dict[str, Tensor], rows: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        return [], []  # what is measured beside the loss is of sound that is made: Speech

    def score(self, true: list[Any], said: list[Any]) -> dict[str, float]:
        return {}


class Speech(Answers):
    """The loss, and of sound that is made again: the error of its spectrogram with its own codes and with
    those of another row, both in log units; and how the codes are used."""

    def __init__(self, task: SpeechTokens, feed: Feed, chosen: Any, model: Any, dense: Dense) -> None:
        super().__init__(task, feed, chosen, model, dense)
        self.rows = list(chosen)
        self.speech = task
        self.heard = {
            "spoken": self.rows[0]["mel"]
        }  # frames [F, M] of the first row; by stage, what it makes
        self.words = feed.tokenizer.decode(self.rows[0]["input_ids"], skip_special_tokens=True)

    def files(self) -> dict[str, Any]:
        """Spectrograms of the first row, for the report."""
        frames = self.speech.frames
        assert frames is not None
        logs = {name: mel * frames.mel_std + frames.mel_mean for name, mel in self.heard.items()}
        rows = [
            {"stage": name, "mel": [[round(x, 2) for x in frame] for frame in mel.tolist()]}
            for name, mel in logs.items()
        ]
        seconds = frames.hop_length / frames.sample_rate
        return {SPEECH: {"text": self.words, "seconds_per_frame": seconds, "rows": rows}}

    def row(self, model: Any, stage: str) -> EvalRow:
        row, training = super().row(model, stage), model.training
        model.eval()
        with packed_op_only(model):
            codes = [encode(model, one["mel"]) for one in self.rows]
            first = self.rows[:MADE_AGAIN]
            own = [Spoken(c, one["input_ids"]) for c, one in zip(codes, first, strict=False)]
            others = [replace(one, codes=like(codes[i - 1], one.codes)) for i, one in enumerate(own)]
            made = decode(model, own)
            self.heard[stage] = made[0]
            scores = {
                "mel_error": off_by(model, made, first),
                "mel_error_other_codes": mel_error(model, others, first),
                **use_of(model.config.vectors, torch.cat(codes)),
            }
        model.train(training)
        return replace(row, scores=scores)


def mel_error(
    model: Any, spoken: list[Spoken], rows: Sequence[Any], steps: int = STEPS, guidance: float = GUIDANCE
) -> float:
    """Of what is decoded and what is there."""
    return off_by(model, decode(model, spoken, steps, guidance), rows)


def off_by(model: Any, made: list[Tensor], rows: Sequence[Any]) -> float:
    """Mean |difference| of log-mels."""
    off = torch.cat([(a - row["mel"]).abs() for a, row in zip(made, rows, strict=True)])
    return float(off.mean()) * model.config.mel_std


def use_of(code: VectorCode, ids: Tensor) -> dict[str, float]:
    """The share of codes that are different ones, and the mean entropy of a coordinate over the most it
    has."""
    digits = code.digits_of(ids)
    found = []
    for i, levels in enumerate(code.levels):
        share = torch.bincount(digits[:, i], minlength=levels).double() / len(digits)
        found.append(float(torch.special.entr(share).sum()) / math.log(levels))
    return {"codes_used": len(ids.unique()) / len(ids), "bit_entropy": sum(found) / len(found)}


def like(codes: Tensor, other: Tensor) -> Tensor:
    """codes, over and over, as many as `other` has."""
    return codes.repeat(-(-len(other) // len(codes)))[: len(other)]


class Utterances(Rows):
    """Rows with sound; `digest` names it by the sound's own."""

    @cached_property
    def digest(self) -> str:
        sha = hashlib.sha256()
        for row in self:
            sha.update(json.dumps({k: v for k, v in row.items() if k != "mel"}, sort_keys=True).encode())
        return sha.hexdigest()


def _frames(batch: Mapping[str, Any]) -> int:
    return int(batch["frame_mask"].sum())


class SpeechBatches(Batches):
    """Rows with sound, padded to the longest; nothing is dropped unless the order is shuffled (training)."""

    def __init__(self, *args: Any, task: SpeechTokens, **options: Any):
        super().__init__(*args, **options)
        self.task = task

    def _collate(self, windows: Sequence[Any], numbers: Sequence[int]) -> dict[str, Tensor]:
        count, task = len(windows), self.task
        length, frames = (max(len(row[key]) for row in windows) for key in ("input_ids", "mel"))
        ids = torch.full((count, length), self.pad_id)
        text, seen = torch.zeros_like(ids), torch.zeros(count, frames, dtype=torch.bool)
        prompt, keep, time = torch.zeros_like(seen), torch.ones(count), torch.zeros(count)
        mel, noisy, wanted = (torch.zeros(count, frames, windows[0]["mel"].shape[1]) for _ in range(3))
        for b, (row, number) in enumerate(zip(windows, numbers, strict=True)):
            key = hashlib.sha256(f"{self.seed}/{self.epoch}/{number}".encode()).digest()
            draw = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
            chance = torch.rand(4, generator=draw, dtype=torch.float64).tolist()
            x, tokens = row["mel"], row["input_ids"]
            noise = torch.randn(x.shape, generator=draw)
            time[b], given = chance[0], int(chance[1] * task.prompt * len(x))
            if not self.shuffle or chance[2] >= task.drop_text:
                text[b, : len(tokens)] = 1
            keep[b] = float(not self.shuffle or chance[3] >= task.drop_codes)
            ids[b, : len(tokens)] = torch.tensor(tokens)
            seen[b, : len(x)], prompt[b, :given], mel[b, : len(x)] = True, True, x
            noisy[b, : len(x)], wanted[b, : len(x)] = time[b] * x + (1 - time[b]) * noise, x - noise
            noisy[b, :given] = x[:given]
        return {
            "input_ids": ids,
            "attention_mask": text,
            "mel": mel,
            "noisy": noisy,
            "time": time,
            "frame_mask": seen,
            "prompt_mask": prompt,
            "keep": keep,
            "labels": wanted,
            "counted": seen & ~prompt,
        }
