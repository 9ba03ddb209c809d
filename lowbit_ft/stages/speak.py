"""encode of rows, and speak: what a language model learns speech from, and what it says."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ..data.errors import BadRow, DataError
from ..data.read import read_rows
from ..evaluate.speak import Drawing, speak
from ..export.reader import load_exported
from ..files.atomic import write_text
from ..model.config import read_config
from ..model.tokenizer import read_tokenizer
from ..recipe.sections.data import DataSource
from ..speech.files import encoder_digest
from ..speech.sample import encode, frames_of
from ..speech.tokens import AUDIO_CODEC, CODEC, AudioTokens, asked, audio_tokens_of, row_of
from ..speech.wav import write_wav
from ..tasks.rows import place_of, text_of
from ..vector_codes import vector_code
from .begun import Begun
from .runnable import torch_folder
from .speech import Making, Voice, codec_in, codes_of, refuse_suffix, sound_in, spoken_by


def encode_rows(
    folder: Path, rows: Path, output: Path, plain: bool = False, device: str = "auto"
) -> list[int]:
    """Rows {audio, text} to rows that a language model learns to speak from (speech/tokens.py). Writes
    `output`; returns how many codes each row has. Codes are kept as they come, and the same call goes on
    behind them (begun.py). ValueError naming file and row for one that is not what it should be."""
    refuse_suffix(output, ".jsonl")
    found = list(read_rows(DataSource(path=str(rows))))
    if not found:
        raise DataError("no row", str(rows))
    model, _ = codec_in(folder, device)
    digest = encoder_digest(model)
    lines, sizes = [], []
    console = Console(stderr=True)
    with Begun(output, vector_code(model.config.code).size) as begun:
        for row in track(found, "encode", console=console, disable=not console.is_terminal, transient=True):
            try:
                if row.value is None:
                    raise BadRow(row.problem or "cannot be read")
                sound = sound_in(place_of(text_of(row.value, "audio"), Path(row.file).parent))
                if not (text := text_of(row.value, "text")).strip():
                    raise BadRow("'text' is blank, and nothing is asked for by it")
                asked(text)
            except (ValueError, RuntimeError) as error:
                raise DataError(str(error), row.file, row.number) from None
            samples = sound.at(model.config.sample_rate)
            codes = begun.codes(_named(digest, samples), partial(_codes, model, samples))
            lines.append(json.dumps(row_of(text, codes, plain) | {CODEC: digest}) + "\n")
            sizes.append(len(codes))
        write_text(output, "".join(lines))
    return sizes


def _codes(model: Any, samples: Tensor) -> list[int]:
    return encode(model, frames_of(model.config, samples)).tolist()


def _named(codec: str, samples: Tensor) -> str:
    """A sound and the codec that makes its codes, in one word."""
    sha = hashlib.sha256(codec.encode())
    sha.update(samples.contiguous().numpy().tobytes())
    return sha.hexdigest()


def speak_text(
    folder: Path,
    codec: Path,
    text: str,
    output: Path,
    drawing: Drawing,
    making: Making,
    voice: Voice | None = None,
    plain: bool = False,
    codes: Path | None = None,
    device: str = "auto",
) -> tuple[int, float]:
    """Writes `output`, a WAV file, and `codes` as `encode` writes them, where asked. Returns the number of
    codes and the seconds. ValueError for files or values that are not what they should be."""
    refuse_suffix(output, ".wav")
    if codes is not None:
        refuse_suffix(codes, ".json")
    if not text.strip():
        raise ValueError(f"TEXT: got {text!r}; give what is to be said")
    folder = torch_folder(folder)
    audio, tokenizer = _audio_of(folder)
    model, letters = codec_in(codec, device)
    size = model.config.vectors.size
    if size != len(audio.codes):
        raise ValueError(
            f"{folder} has tokens for {len(audio.codes):,} codes, and {codec} makes {size:,} "
            f"({model.config.vectors}); give the codec whose codes it was trained on"
        )
    _refuse_other_codec(folder, encoder_digest(model), codec)
    front = spoken_by(model, voice)
    before, whole = (
        ([], text) if voice is None or front is None else (front[0].tolist(), f"{voice.text} {text}".strip())
    )
    language: Any = load_exported(folder, device=str(model.device))
    said = speak(language.eval(), tokenizer, audio, whole, drawing, plain=plain, before=before)
    del language
    sound = making.sound(model, letters, torch.tensor(said), text, voice, front)
    if codes is not None:
        codes_of(model, said, len(sound)).write(codes)
    write_wav(output, sound, model.config.sample_rate)
    return len(said), len(sound) / model.config.sample_rate


def _refuse_other_codec(folder: Path, found: str, codec: Path) -> None:
    """ValueError where the model was trained on the codes of another codec; a warning where its rows did not
    say of which."""
    wanted = read_config(folder).get(AUDIO_CODEC)
    if wanted is None:
        Console(stderr=True, soft_wrap=True).print(
            f"warning: the rows that {folder} was trained on did not say which codec made their codes; of "
            "another than this one they are other sounds",
            markup=False,
        )
    elif wanted != found:
        raise ValueError(
            f"{folder} was trained on codes of the encoder {str(wanted)[:12]}..., and that of {codec} is "
            f"{found[:12]}...: its codes are other sounds; give the codec that its rows were encoded with"
        )


def _audio_of(folder: Path) -> tuple[AudioTokens, Any]:
    """Where a language model's tokenizer has the audio tokens, and the tokenizer."""
    kind = read_config(folder).get("model_type")
    tokenizer = read_tokenizer(folder)
    audio = audio_tokens_of(tokenizer)
    if audio is None:
        raise ValueError(
            f"{folder} holds a {kind!r} without audio tokens, so it cannot speak; a language model gets them "
            "by model.add_tokens: {audio: {codec: FOLDER}}, and learns from rows that `lowbit-ft encode` "
            "writes (docs/speech-tokens.md)"
        )
    return audio, tokenizer
