"""encode, decode: a WAV file becomes codes in a file, and they become a WAV file, by a codec folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..export.reader import load_exported
from ..model.config import read_config
from ..model.tokenizer import read_tokenizer
from ..speech.files import CodesFile, encoder_digest, read_codes
from ..speech.names import MODEL_TYPE
from ..speech.sample import GUIDANCE, STEPS, Spoken, decode, encode, frames_of, sound_of
from ..speech.wav import Wav, read_wav, write_wav
from .runnable import torch_folder

MOST_SECONDS = 600.0  # one forward attends over all frames of a file
MOST_STEPS = 1000
MOST_LETTERS = 4096


@dataclass(frozen=True)
class Voice:
    """Sound whose manner is gone on with, and what is said in it."""

    wav: Path
    text: str = ""


@dataclass(frozen=True)
class Making:
    """How sound is made of codes: steps and guidance of the decoder, the seed of its noise. ValueError for
    what cannot be."""

    steps: int = STEPS
    guidance: float = GUIDANCE
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MOST_STEPS:
            raise ValueError(f"--steps: got {self.steps}; allowed are 1 to {MOST_STEPS}")
        if not 0 <= self.guidance <= 100:
            raise ValueError(f"--guidance: got {self.guidance}; allowed are 0 (none) to 100")

    def sound(
        self,
        model: Any,
        tokenizer: Any,
        codes: Tensor,
        text: str,
        voice: Voice | None = None,
        front: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """codes int64 [C] -> samples, behind those of the voice, whose codes and frames are `front`."""
        frames, before = None, []
        if voice is not None and front is not None:
            codes, frames = torch.cat([front[0], codes]), front[1]
            before = _tokens(tokenizer, f"{voice.text} ", "--prompt-text")
        said = Spoken(codes, before + _tokens(tokenizer, text, "--text"), frames)
        mel = decode(model, [said], self.steps, self.guidance, self.seed)[0]
        return sound_of(model.config, mel, self.seed)


def encode_wav(folder: Path, wav: Path, output: Path, device: str = "auto") -> CodesFile:
    """Writes `output` and returns what is in it. ValueError for files that are not what they should be."""
    refuse_suffix(output, ".json")
    sound = sound_in(wav)
    model, _ = codec_in(folder, device)
    samples = sound.at(model.config.sample_rate)
    found = codes_of(model, encode(model, frames_of(model.config, samples)).tolist(), len(samples))
    found.write(output)
    return found


def decode_codes(
    folder: Path,
    codes: Path,
    output: Path,
    text: str = "",
    prompt: Voice | None = None,
    making: Making | None = None,
    device: str = "auto",
) -> float:
    """Writes `output`, a WAV file at the codec's rate, and returns its seconds. ValueError for files or
    values that are not what they should be."""
    refuse_suffix(output, ".wav")
    making = making or Making()
    given = read_codes(codes)
    if (seconds := given.samples / given.sample_rate) > MOST_SECONDS:
        raise ValueError(f"{codes}: codes of {seconds:.0f} s of sound; allowed: {MOST_SECONDS:g} s at a time")
    model, tokenizer = codec_in(folder, device)
    _refuse_other(model, given, codes)
    front = spoken_by(model, prompt)
    samples = making.sound(model, tokenizer, torch.tensor(given.codes), text, prompt, front)[: given.samples]
    write_wav(output, samples, model.config.sample_rate)
    return len(samples) / model.config.sample_rate


def spoken_by(model: Any, voice: Voice | None) -> tuple[Tensor, Tensor] | None:
    """Codes int64 [C] and frames [C frames_per_code, M] of a voice, as long as whole codes are of it."""
    if voice is None:
        return None
    size = model.config.samples_per_code
    samples = sound_in(voice.wav).at(model.config.sample_rate)
    frames = frames_of(model.config, samples[: max(1, len(samples) // size) * size])
    return encode(model, frames), frames


def codec_in(folder: Path, device: str) -> tuple[Any, Any]:
    """The model of a codec folder (or of a run) on a device, and its tokenizer."""
    folder = torch_folder(folder)
    kind = read_config(folder).get("model_type")
    if kind != MODEL_TYPE:
        raise ValueError(
            f"{folder} holds a {kind!r}; encode, decode and speak take a speech codec (model_type "
            f"{MODEL_TYPE}), which task: speech_tokens trains"
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_exported(folder, dtype=torch.float32, device=device), read_tokenizer(folder)


def codes_of(model: Any, codes: list[int], samples: int) -> CodesFile:
    """Codes of a codec as a file says them. samples: of the sound they are of."""
    config = model.config
    return CodesFile(
        encoder=encoder_digest(model),
        code=config.code,
        sample_rate=config.sample_rate,
        samples_per_code=config.samples_per_code,
        samples=samples,
        codes=codes,
    )


def sound_in(path: Path) -> Wav:
    found = read_wav(path)
    if found.seconds > MOST_SECONDS:
        raise ValueError(
            f"{path}: {found.seconds:.0f} s of sound; allowed: {MOST_SECONDS:g} s; cut it into parts, each "
            "of which is encoded by itself"
        )
    return found


def _tokens(tokenizer: Any, text: str, option: str) -> list[int]:
    if len(text) > MOST_LETTERS:
        raise ValueError(f"{option}: got {len(text)} characters; allowed are {MOST_LETTERS}")
    return list(tokenizer(text, verbose=False)["input_ids"]) if text.strip() else []


def _refuse_other(model: Any, given: CodesFile, path: Path) -> None:
    config = model.config
    facts = (given.code, given.sample_rate, given.samples_per_code, given.encoder)
    if facts != (config.code, config.sample_rate, config.samples_per_code, encoder_digest(model)):
        raise ValueError(
            f"{path}: its codes were made by another codec, whose encoder has other weights; decode them "
            "with that one, or encode the sound again with this one"
        )


def refuse_suffix(path: Path, wanted: str) -> None:
    if path.suffix.lower() != wanted:
        raise ValueError(f"got {path}; what is written is a {wanted} file: give a name that ends so")
    if not path.parent.is_dir():
        raise ValueError(f"got {path}; there is no folder {path.parent}; make it first")
