"""encode, decode: a WAV file becomes codes in a file, and they become a WAV file, by a codec folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..export.folder import check_if_ours
from ..export.reader import load_exported
from ..model.config import read_config
from ..model.tokenizer import read_tokenizer
from ..rundir import shipped
from ..speech.files import CodesFile, encoder_digest, read_codes
from ..speech.names import MODEL_TYPE
from ..speech.sample import GUIDANCE, STEPS, Spoken, decode, encode, frames_of, sound_of
from ..speech.wav import Wav, read_wav, write_wav

MOST_SECONDS = 600.0  # one forward attends over all frames of a file
MOST_STEPS = 1000
MOST_LETTERS = 4096


@dataclass(frozen=True)
class Voice:
    """Sound whose manner is gone on with, and what is said in it."""

    wav: Path
    text: str = ""


def encode_wav(folder: Path, wav: Path, output: Path, device: str = "auto") -> CodesFile:
    """Writes `output` and returns what is in it. ValueError for files that are not what they should be."""
    _refuse_suffix(output, ".json")
    sound = _sound(wav)
    model, _ = _codec(folder, device)
    found = _encoded(model, sound)
    found.write(output)
    return found


def decode_codes(
    folder: Path,
    codes: Path,
    output: Path,
    text: str = "",
    prompt: Voice | None = None,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    seed: int = 0,
    device: str = "auto",
) -> float:
    """Writes `output`, a WAV file at the codec's rate, and returns its seconds. ValueError for files or
    values that are not what they should be."""
    _refuse_suffix(output, ".wav")
    if not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"--steps: got {steps}; allowed are 1 to {MOST_STEPS}")
    if not 0 <= guidance <= 100:
        raise ValueError(f"--guidance: got {guidance}; allowed are 0 (none) to 100")
    given = read_codes(codes)
    voice = _sound(prompt.wav) if prompt is not None else None
    model, tokenizer = _codec(folder, device)
    _refuse_other(model, given, codes)
    ids, front, frames = torch.tensor(given.codes), [], None
    if prompt is not None and voice is not None:
        samples = voice.at(model.config.sample_rate)
        samples = samples[: max(1, len(samples) // given.samples_per_code) * given.samples_per_code]
        frames = frames_of(model.config, samples)
        ids, front = (
            torch.cat([encode(model, frames), ids]),
            _tokens(tokenizer, f"{prompt.text} ", "--prompt-text"),
        )
    said = Spoken(ids, front + _tokens(tokenizer, text, "--text"), frames)
    mel = decode(model, [said], steps, guidance, seed)[0]
    samples = sound_of(model.config, mel, seed)[: given.samples]
    write_wav(output, samples, model.config.sample_rate)
    return len(samples) / model.config.sample_rate


def _codec(folder: Path, device: str) -> tuple[Any, Any]:
    """The model of a codec folder (or of a run) on a device, and its tokenizer."""
    folder = shipped(folder)
    check_if_ours(folder)
    kind = read_config(folder).get("model_type")
    if kind != MODEL_TYPE:
        raise ValueError(
            f"{folder} holds a {kind!r}; encode and decode take a speech codec (model_type {MODEL_TYPE}), "
            "which task: speech_tokens trains"
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_exported(folder, dtype=torch.float32, device=device), read_tokenizer(folder)


def _encoded(model: Any, sound: Wav) -> CodesFile:
    config = model.config
    samples = sound.at(config.sample_rate)
    return CodesFile(
        encoder=encoder_digest(model),
        code=config.code,
        sample_rate=config.sample_rate,
        samples_per_code=config.samples_per_code,
        samples=len(samples),
        codes=encode(model, frames_of(config, samples)).tolist(),
    )


def _sound(path: Path) -> Wav:
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


def _refuse_suffix(path: Path, wanted: str) -> None:
    if path.suffix.lower() != wanted:
        raise ValueError(f"got {path}; what is written is a {wanted} file: give a name that ends so")
    if not path.parent.is_dir():
        raise ValueError(f"got {path}; there is no folder {path.parent}; make it first")
