"""The small speech codec of recipes/assets/speech-codec: its speech, its training, its table.

    python -m benchmarks.speech_codec speech DIR      WAV files of espeak-ng, with train.jsonl and valid.jsonl
    python -m benchmarks.speech_codec train DIR OUT   the dense codec, at most --minutes of processor time
    python -m benchmarks.speech_codec measure DIR OUT the table: codes, text, prompt, guidance; results/*.json
    python -m benchmarks.speech_codec asset DIR OUT   bf16 weights and a few rows as mu-law WAV

`speech` needs espeak-ng's library (`pip install espeakng-loader`, GPL-3: only this script loads it).
Sentences are templates over 60 words, in 32 voices; validation sentences are none of the training ones.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit_ft.files.atomic import write_text
from lowbit_ft.speech.names import AUTO
from lowbit_ft.speech.register import register
from lowbit_ft.speech.sample import Spoken, decode, encode, frames_of, sound_of
from lowbit_ft.speech.wav import read_wav, resampled, write_mulaw, write_wav
from lowbit_ft.tasks.speech_tokens import (
    Frames,
    SpeechBatches,
    SpeechTokens,
    Utterances,
    like,
    mel_error,
    use_of,
)

RATE = 8000
FAR = 12  # the held-out row whose codes the picture shows: another sentence than the first
WHO = "the cat,the dog,a bird,my friend,the king,a small boy,the old man,our teacher".split(",")
DOES = "sees,likes,wants,takes,finds,makes,brings,keeps".split(",")
WHAT = "a red box,the moon,nine apples,some water,a blue hat,the green tree,seven books,a long rope".split(
    ","
)
WHEN = "today,now,again,at home,in the rain,every day".split(",")
VOICES = [
    f"{tongue}{kind}"
    for tongue in ("en-us", "en", "en-gb-scotland", "en-029")
    for kind in ("", "+m1", "+m3", "+m7", "+f1", "+f2", "+f4", "+f5")
]


class Espeak:
    """The library, in this process."""

    def __init__(self) -> None:
        espeakng_loader = importlib.import_module("espeakng_loader")  # only this command needs it

        self.lib = ctypes.CDLL(espeakng_loader.get_library_path())
        self.rate = self.lib.espeak_Initialize(2, 0, espeakng_loader.get_data_path().encode(), 0)
        self.pieces: list[np.ndarray] = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self.heard = kind(self._heard)
        self.lib.espeak_SetSynthCallback(self.heard)

    def _heard(self, samples: Any, count: int, _: Any) -> int:
        if samples and count > 0:
            self.pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text: str, voice: str, pitch: int, speed: int) -> Tensor:
        """Samples at RATE."""
        self.pieces.clear()
        if self.lib.espeak_SetVoiceByName(voice.encode()):
            raise ValueError(f"espeak-ng has no voice {voice!r}")
        self.lib.espeak_SetParameter(3, pitch, 0)
        self.lib.espeak_SetParameter(1, speed, 0)
        data = text.encode() + b"\0"
        self.lib.espeak_Synth(data, len(data), 0, 1, 0, 1, None, None)
        self.lib.espeak_Synchronize()
        samples = torch.from_numpy(np.concatenate(self.pieces).astype(np.float32) / 32768)
        loud = (samples.abs() > 0.01).nonzero().flatten()
        samples = samples[max(0, int(loud[0]) - self.rate // 50) : int(loud[-1]) + self.rate // 25]
        samples = resampled(samples, self.rate, RATE)
        return samples / samples.abs().max() * 0.7


def speech(folder: Path, count: int, held: int, seed: int, one: str | None = None) -> None:
    """count + held utterances; one: the voice of all of them, at one pitch and speed."""
    draw, voice = random.Random(seed), Espeak()
    sentences = [f"{a} {b} {c} {d}" for a in WHO for b in DOES for c in WHAT for d in WHEN]
    draw.shuffle(sentences)
    (folder / "wav").mkdir(parents=True, exist_ok=True)
    rows = []
    for number, text in enumerate(sentences[: count + held]):
        manner = draw.choice(VOICES), draw.randint(30, 70), draw.randint(170, 230)
        samples = voice.say(text, *(manner if one is None else (one, 50, 200)))
        name = f"wav/{number:04d}.wav"
        write_wav(folder / name, samples, RATE)
        rows.append({"audio": name, "text": text})
    for name, part in (("train", rows[:count]), ("valid", rows[count:])):
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in part))


def tokenizer_of() -> Any:
    """A token for each letter."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<pad>", "<unk>", " ", "'", ",", "."] + [chr(ord("a") + i) for i in range(26)]
    made = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def rows_of(folder: Path, name: str, task: SpeechTokens, tokenizer: Any) -> Utterances:
    source = SimpleNamespace(
        path=str(folder / f"{name}.jsonl"), split=None, name=None, revision=None, limit=None, format=None
    )
    section = SimpleNamespace(sequence_len=256, on_bad_row="error")
    return task.examples(source, section, tokenizer)


def codec(folder: Path | None = None, **values: Any) -> Any:
    register({"model_type": "speech_codec"})
    import transformers

    from lowbit_ft.speech.codec import SpeechCodec
    from lowbit_ft.speech.config import SpeechCodecConfig

    if folder is not None:
        return getattr(transformers, AUTO).from_pretrained(folder).float()
    return SpeechCodec(SpeechCodecConfig(**values))


def train(
    folder: Path,
    out: Path,
    minutes: float,
    wall: float,
    seed: int,
    rate: float,
    batch: int,
    steps: int,
    sizes: Path | None,
) -> None:
    torch.manual_seed(seed)
    tokenizer = tokenizer_of()
    given = {"intermediate_size": 160} if sizes is None else json.loads(sizes.read_text(encoding="utf-8"))
    model = codec(None, **{**given, "vocab_size": len(tokenizer)})
    keys: dict[str, Any] = {key: getattr(model.config, key) for key in Frames.model_fields}
    plain = Frames(**{**keys, "mel_mean": 0.0, "mel_std": 1.0})
    examples = rows_of(folder, "train", SpeechTokens(frames=plain), tokenizer)
    mean, std = _normalised(examples)
    held = rows_of(folder, "valid", SpeechTokens(frames=plain), tokenizer)
    for row in [*examples, *held]:
        row["mel"] = (row["mel"] - mean) / std
    model.config.mel_mean, model.config.mel_std = mean, std
    task = SpeechTokens()
    batches = SpeechBatches(examples, batch, 0, seed, task=task)
    valid = SpeechBatches(held, 32, 0, seed, shuffle=False, task=task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    begun, clock, log = time.process_time(), time.monotonic(), []
    for step in range(steps):
        used = (time.process_time() - begun) / (60 * minutes), (time.monotonic() - clock) / (60 * wall)
        share = max(step / steps, *used)
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50) * min(1.0, 2 * (1 - share))
        found = next(batches)
        loss = _loss(task, model, found)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            with torch.no_grad():
                value = sum(float(_loss(task, model, b)) for b in valid.one_epoch()) / len(valid)
            log.append(
                {
                    "step": step,
                    "seconds": round(time.process_time() - begun, 1),
                    "train": round(loss.item(), 4),
                    "valid": round(value, 4),
                }
            )
            print(json.dumps(log[-1]), flush=True)
            if step % 400 == 0:
                model.save_pretrained(out)
                tokenizer.save_pretrained(out)
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    write_text(
        out / "training.json",
        json.dumps({"steps": step, "seed": seed, "batch": batch, "rate": rate, "log": log}, indent=1),
    )


def _loss(task: SpeechTokens, model: Any, batch: dict[str, Tensor]) -> Tensor:
    answers = {name: batch[name] for name in task.answers}
    outputs = model(**{k: v for k, v in batch.items() if k not in answers})
    return task.loss(outputs, answers) / task.count(batch)


def _normalised(examples: Utterances) -> tuple[float, float]:
    every = torch.cat([row["mel"] for row in examples])
    return round(float(every.mean()), 3), round(float(every.std()), 3)


@torch.no_grad()
def flow_loss(
    model: Any, task: SpeechTokens, rows: Utterances, change: Callable[[dict[str, Tensor]], Any]
) -> float:
    """Mean |v - v*| over the held-out rows, with something of each batch changed."""
    total = count = 0.0
    for batch in SpeechBatches(rows, 25, 0, 0, shuffle=False, task=task).one_epoch():
        wanted, counted = batch.pop("labels"), batch.pop("counted")
        change(batch)
        off = (model(**batch).velocity - wanted).abs().mean(-1)
        total, count = total + float((off * counted).sum()), count + float(counted.sum())
    return total / count


def _shuffled(batch: dict[str, Tensor]) -> None:
    """The sound that is encoded is the next row's; what is to be said, and noise, stay."""
    batch["mel"] = batch["mel"].roll(1, 0)


def _no_prompt(batch: dict[str, Tensor]) -> None:
    batch["prompt_mask"] = torch.zeros_like(batch["prompt_mask"])


FLOW: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "all": lambda batch: None,
    "no text": lambda batch: batch.update(attention_mask=0 * batch["attention_mask"]),
    "no codes": lambda batch: batch.update(keep=0 * batch["keep"]),
    "codes of another row": _shuffled,
    "no text, no codes": lambda batch: batch.update(
        attention_mask=0 * batch["attention_mask"], keep=0 * batch["keep"]
    ),
    "prompt not marked": _no_prompt,
}


@torch.no_grad()
def measure(folder: Path, model_folder: Path, out: Path, picture: Path | None) -> None:
    """What the codes carry, on the held-out rows: two tables, and a round trip over WAV files."""
    model = codec(model_folder).eval()
    config, tokenizer = model.config, tokenizer_of()
    task = SpeechTokens(frames=Frames(**{key: getattr(config, key) for key in Frames.model_fields}))
    rows = rows_of(folder, "valid", task, tokenizer)
    codes = [encode(model, row["mel"]) for row in rows]
    few = list(rows)[:24]
    own = [Spoken(c, row["input_ids"]) for c, row in zip(codes, few, strict=False)]
    other = [replace(one, codes=like(codes[i + 1], one.codes)) for i, one in enumerate(own)]
    ways = {
        "own codes": own,
        "own codes, no text": [replace(one, text=[]) for one in own],
        "own codes, text of another row": [replace(one, text=own[i - 1].text) for i, one in enumerate(own)],
        "codes of another row": other,
        "codes of another row, no text": [replace(one, text=[]) for one in other],
    }
    mel = {name: round(mel_error(model, spoken, few), 4) for name, spoken in ways.items()}
    mean = torch.cat([row["mel"] for row in rows]).mean(0)
    mel["the mean frame"] = round(
        float(torch.cat([(row["mel"] - mean).abs() for row in few]).mean()) * config.mel_std, 4
    )
    steps = {}
    for count, guidance in ((4, 1.0), (8, 1.0), (32, 1.0), (16, 0.0), (16, 2.0)):
        steps[f"{count} steps, guidance {guidance:g}"] = round(mel_error(model, own, few, count, guidance), 4)
    parameters = sum(p.numel() for p in model.parameters())
    found = {
        "model": {"parameters": parameters, "codes_per_second": config.codes_per_second},
        "bits_per_second": config.bits_per_second,
        "held_out_rows": len(rows),
        "flow_l1": {name: round(flow_loss(model, task, rows, change), 4) for name, change in FLOW.items()},
        "mel_error": mel,
        "mel_error_own_codes": steps,
        "codes": {"count": sum(map(len, codes)), **use_of(config.vectors, torch.cat(codes))},
        "round_trip": _round_trip(model, few),
    }
    write_text(out, json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))
    if picture is not None:
        shown = {
            "its own codes": own[0],
            "the codes of another sentence": replace(own[0], codes=like(codes[FAR], codes[0])),
        }
        draw(model, few[0]["mel"], {name: decode(model, [one])[0] for name, one in shown.items()}, picture)


def _round_trip(model: Any, rows: list[Any]) -> dict[str, float]:
    """Log-mel errors of sound: of Griffin-Lim alone, and of codes and Griffin-Lim, through 16-bit WAV."""
    config, alone, whole = model.config, [], []
    with tempfile.TemporaryDirectory() as place:
        for row in rows[:8]:
            made = decode(model, [Spoken(encode(model, row["mel"]), row["input_ids"])])[0]
            for found, mel in ((alone, row["mel"]), (whole, made)):
                path = Path(place) / "a.wav"
                write_wav(path, sound_of(config, mel), config.sample_rate)
                again = frames_of(config, read_wav(path).samples)
                found.append(float((again - row["mel"]).abs().mean()) * config.mel_std)
    return {"griffin_lim_alone": round(sum(alone) / 8, 4), "codes_and_griffin_lim": round(sum(whole) / 8, 4)}


def draw(model: Any, mel: Tensor, made: dict[str, Tensor], path: Path) -> None:
    """Spectrograms one above the other: what was said, and what is made of codes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    shown = {"spoken": mel, **{f"made of {name}": found for name, found in made.items()}}
    figure, axes = pyplot.subplots(len(shown), 1, figsize=(6.4, 4.8), sharex=True, layout="constrained")
    seconds = len(mel) * model.config.hop_length / model.config.sample_rate
    for axis, (name, values) in zip(axes, shown.items(), strict=True):
        log = values * model.config.mel_std + model.config.mel_mean
        axis.imshow(
            log.t(),
            origin="lower",
            aspect="auto",
            interpolation="nearest",
            vmin=-8,
            vmax=2.5,
            extent=(0, seconds, 0, len(log[0])),
        )
        axis.set_title(name, fontsize=9, loc="left")
        axis.set_ylabel("mel", fontsize=8)
        axis.tick_params(labelsize=8)
    axes[-1].set_xlabel("seconds; a code is 0.16 s", fontsize=8)
    figure.savefig(path, dpi=80)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)


def asset(folder: Path, model_folder: Path, out: Path, count: int, held: int) -> None:
    """The model in bfloat16, and the shortest rows as mu-law."""
    model = codec(model_folder)
    model.to(torch.bfloat16).save_pretrained(out / "speech-codec")
    tokenizer_of().save_pretrained(out / "speech-codec")
    sounds = out / "speech"
    sounds.mkdir(parents=True, exist_ok=True)
    for name, most in (("train", count), ("valid", held)):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        rows = sorted(rows, key=lambda row: (folder / row["audio"]).stat().st_size)[:most]
        for number, row in enumerate(rows):
            file = f"{name}-{number:02d}.wav"
            write_mulaw(sounds / file, read_wav(folder / row["audio"]).samples, RATE)
            row["audio"] = file
        write_text(sounds / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=["speech", "train", "measure", "asset"])
    parser.add_argument("folder", type=Path, help="of the speech")
    parser.add_argument("model", type=Path, nargs="?", help="folder of the codec")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--voice", help="of all sentences (speech); default: a draw of 32")
    parser.add_argument("--count", type=int)
    parser.add_argument("--held", type=int)
    parser.add_argument("--minutes", type=float, default=8.0, help="of processor time")
    parser.add_argument("--wall", type=float, default=60.0, help="minutes, where the machine is shared")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sizes", type=Path, help="config.json with the sizes of the codec (train)")
    a = parser.parse_args()
    if a.command == "speech":
        speech(a.folder, a.count or 900, a.held or 100, a.seed, a.voice)
    elif a.command == "train":
        train(a.folder, a.model, a.minutes, a.wall, a.seed, a.rate, a.batch, a.steps, a.sizes)
    elif a.command == "measure":
        measure(a.folder, a.model, a.out, a.picture)
    else:
        asset(a.folder, a.model, a.out, a.count or 14, a.held or 6)


if __name__ == "__main__":
    main()
