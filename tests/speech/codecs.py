"""A codec of a few thousand numbers, with a tokenizer of letters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lowbit_ft.speech.codec import SpeechCodec
from lowbit_ft.speech.config import SpeechCodecConfig
from lowbit_ft.speech.register import register

LETTERS = ["<pad>", "<unk>", " ", *"abcdefghijklmnopqrstuvwxyz"]
SMALL: dict[str, Any] = {
    "vocab_size": len(LETTERS),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "encoder_layers": 1,
    "num_hidden_layers": 2,
    "num_mel_bins": 24,
}


def codec(seed: int = 0, **changes: Any) -> SpeechCodec:
    """In eval mode; norms and last matrix are not at their start, so that all of it says something."""
    register({"model_type": "speech_codec"})
    torch.manual_seed(seed)
    model = SpeechCodec(SpeechCodecConfig(**{**SMALL, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def tokenizer() -> Any:
    made = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>")


def write_codec(folder: Path, seed: int = 0, **changes: Any) -> Path:
    codec(seed, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def batch(rows: int = 3, frames: int = 40, mels: int = 24, text: int = 9) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(2, len(LETTERS), (rows, text), generator=draw),
        "attention_mask": torch.ones(rows, text, dtype=torch.int64),
        "mel": torch.randn(rows, frames, mels, generator=draw),
        "noisy": torch.randn(rows, frames, mels, generator=draw),
        "time": torch.rand(rows, generator=draw),
        "frame_mask": torch.ones(rows, frames, dtype=torch.bool),
        "prompt_mask": torch.arange(frames)[None].expand(rows, -1) < 5,
        "keep": torch.ones(rows),
    }
