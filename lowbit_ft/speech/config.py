"""config.json of a speech codec: the sizes of the model, the spectrogram it was made for, its code.

Sizes of the paper (arXiv 2508.16790): width 1024, 16 heads, 4096 inside, 8 layers of encoder and 16 of
decoder, 24 kHz, hop 480, 128 mels. The defaults are the small ones that are trained here
(docs/speech-tokens.md)."""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedConfig

from ..vector_codes import VectorCode, vector_code
from .mel import Mel
from .names import MODEL_TYPE

_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "encoder_layers",
    "num_hidden_layers",
    "sample_rate",
    "hop_length",
    "n_fft",
    "num_mel_bins",
    "frames_per_code",
)
MOST = 1 << 24  # of any of them: what is beyond cannot be held, and is a mistake in the file
_NUMBERS = {  # key -> what it is above
    "mel_mean": -math.inf,
    "mel_std": 0.0,
    "rms_norm_eps": 0.0,
    "rope_theta": 0.0,
    "initializer_range": 0.0,
    "entropy_weight": -math.inf,
}


class SpeechCodecConfig(PreTrainedConfig):
    """num_hidden_layers: of the decoder. mel_mean, mel_std: by which frames have mean 0 and deviation 1.
    code: a vector code as its `to_json` says it. ValueError for a size that cannot be."""

    model_type = MODEL_TYPE

    def __init__(
        self,
        vocab_size: int = 32,
        hidden_size: int = 64,
        intermediate_size: int = 192,
        num_attention_heads: int = 4,
        encoder_layers: int = 2,
        num_hidden_layers: int = 4,
        sample_rate: int = 8000,
        hop_length: int = 160,
        n_fft: int = 640,
        num_mel_bins: int = 64,
        frames_per_code: int = 8,
        mel_mean: float = -4.92,
        mel_std: float = 2.85,
        code: dict[str, Any] | None = None,
        entropy_weight: float = 0.1,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        initializer_range: float = 0.02,
        pad_token_id: int | None = 0,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_attention_heads, self.encoder_layers = num_attention_heads, encoder_layers
        self.num_hidden_layers = num_hidden_layers
        self.sample_rate, self.hop_length, self.n_fft = sample_rate, hop_length, n_fft
        self.num_mel_bins, self.frames_per_code = num_mel_bins, frames_per_code
        self.mel_mean, self.mel_std = mel_mean, mel_std
        self.code = {"kind": "bsq", "bits": 14} if code is None else code
        self.entropy_weight, self.rms_norm_eps = entropy_weight, rms_norm_eps
        self.rope_theta, self.initializer_range = rope_theta, initializer_range
        super().__init__(**{"pad_token_id": pad_token_id, **kwargs})
        self._check()

    def _check(self) -> None:
        for key in _COUNTS:
            value = getattr(self, key)
            if type(value) is not int or not 1 <= value <= MOST:
                raise ValueError(f"{key}: got {value!r}; allowed is a count of 1 to {MOST}")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size: got {self.hidden_size}, and {self.num_attention_heads} heads need a "
                f"multiple of {2 * self.num_attention_heads}"
            )
        if self.n_fft < self.hop_length:
            raise ValueError(f"n_fft: got {self.n_fft}; at least hop_length, {self.hop_length}")
        for key, least in _NUMBERS.items():
            value = getattr(self, key)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value <= least:
                above = f" above {least:g}" if math.isfinite(least) else ""
                raise ValueError(f"{key}: got {value!r}; allowed is a finite number{above}")
        vector_code(self.code)

    @property
    def vectors(self) -> VectorCode:
        return vector_code(self.code)

    @property
    def mel(self) -> Mel:
        return Mel(self.sample_rate, self.hop_length, self.n_fft, self.num_mel_bins)

    @property
    def samples_per_code(self) -> int:
        return self.hop_length * self.frames_per_code

    @property
    def codes_per_second(self) -> float:
        return self.sample_rate / self.samples_per_code

    @property
    def bits_per_second(self) -> float:
        return self.codes_per_second * self.vectors.id_bits
