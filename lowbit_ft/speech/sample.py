"""Sound to codes and codes to sound, with a codec in memory.

    encode   samples -> mel -> one forward of the encoder -> codes
    decode   noise, then N Euler steps at t = (i + 1/2) / N:  x <- x + v(x, t) / N -> mel -> samples

Guidance: v = v1 + g (v1 - v0), v0 without text and codes; then its deviation is drawn back to that of v1, by
a share of `RESCALE` (arXiv 2508.16790, and its code; 2305.08891). A prompt is sound with its
codes in front: its frames are given clean, and cut off at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..vector_codes import VectorCode

if TYPE_CHECKING:
    from .config import SpeechCodecConfig

STEPS, GUIDANCE, RESCALE = 16, 1.0, 0.75  # steps: half of the paper's (no worse here, docs/speech-tokens.md)


def frames_of(config: Any, samples: Tensor) -> Tensor:
    """samples [n] at the codec's rate -> normalised mel [F, M]; silence fills the last code. config: the
    codec's, or the task's keys of it."""
    whole = F.pad(samples, (0, -len(samples) % config.samples_per_code))
    return (config.mel.frames(whole) - config.mel_mean) / config.mel_std


def sound_of(config: SpeechCodecConfig, mel: Tensor, seed: int = 0) -> Tensor:
    """The inverse, by Griffin-Lim: normalised mel [F, M] -> samples [F hop]."""
    return config.mel.sound(mel.float() * config.mel_std + config.mel_mean, seed=seed)


@torch.no_grad()
def encode(model: Any, mel: Tensor) -> Tensor:
    """Normalised mel [F, M] -> codes int64 [F / frames_per_code], on the CPU."""
    weight = model.velocity.weight
    seen = torch.ones(1, len(mel), dtype=torch.bool, device=weight.device)
    return model.body.encode(mel[None].to(weight.device, weight.dtype), seen)[1][0].cpu()


@dataclass(frozen=True)
class Spoken:
    """What is decoded. codes int64 [C]; text: token ids; prompt: normalised mel [P, M] of the frames of the
    first codes, P a multiple of frames_per_code, which are given and not made."""

    codes: Tensor
    text: list[int]
    prompt: Tensor | None = None


@torch.no_grad()
def decode(
    model: Any, rows: list[Spoken], steps: int = STEPS, guidance: float = GUIDANCE, seed: int = 0
) -> list[Tensor]:
    """Rows of any lengths -> normalised mel [F, M] of each, the prompt's frames left out, on the CPU. Noise
    is drawn by the row's place and the seed alone. ValueError for a code there is not."""
    config: SpeechCodecConfig = model.config
    device, code = model.velocity.weight.device, config.vectors
    sizes = [len(row.codes) * config.frames_per_code for row in rows]
    batch = _batch(config, code, rows, sizes, seed)
    batch = {name: value.to(device) for name, value in batch.items()}
    x, given = batch.pop("noise"), batch.pop("prompt")
    prompt = batch["prompt_mask"][..., None]
    for step in range(steps):
        now = torch.where(prompt, given, x)
        time = torch.full((len(rows),), (step + 0.5) / steps, device=device)
        v = _velocity(model, batch, now, time)
        if guidance:
            nothing = {"attention_mask": torch.zeros_like(batch["attention_mask"]), "keep": 0 * batch["keep"]}
            v = _guided(v, _velocity(model, batch | nothing, now, time), guidance, batch["frame_mask"])
        x = x + v.float() / steps
    return [
        found[0 if row.prompt is None else len(row.prompt) : size].cpu()
        for found, row, size in zip(x, rows, sizes, strict=True)
    ]


def _velocity(model: Any, batch: dict[str, Tensor], x: Tensor, time: Tensor) -> Tensor:
    return model.velocity(model.body.decode(noisy=x, time=time, **batch))


def _guided(v: Tensor, without: Tensor, guidance: float, seen: Tensor) -> Tensor:
    """v, without [B, F, M]; seen [B, F]."""
    far = v + guidance * (v - without)

    def deviation(values: Tensor) -> Tensor:
        real = seen[..., None] * values
        count = seen.sum(1)[:, None, None] * values.shape[-1]
        mean = real.sum((1, 2), keepdim=True) / count
        return ((seen[..., None] * (values - mean) ** 2).sum((1, 2), keepdim=True) / count).sqrt()

    drawn = far * deviation(v) / deviation(far).clamp_min(1e-6)
    return RESCALE * drawn + (1 - RESCALE) * far


def _batch(
    config: SpeechCodecConfig, code: VectorCode, rows: list[Spoken], sizes: list[int], seed: int
) -> dict[str, Tensor]:
    frames, length = max(sizes), max(1, *(len(row.text) for row in rows))
    ids = torch.full((len(rows), length), config.pad_token_id or 0)
    mask, seen = torch.zeros_like(ids), torch.zeros(len(rows), frames, dtype=torch.bool)
    prompt_mask = torch.zeros_like(seen)
    points = torch.zeros(len(rows), frames // config.frames_per_code, code.width)
    noise, given = (torch.zeros(len(rows), frames, config.num_mel_bins) for _ in range(2))
    for b, (row, size) in enumerate(zip(rows, sizes, strict=True)):
        ids[b, : len(row.text)], mask[b, : len(row.text)] = torch.tensor(row.text, dtype=torch.int64), 1
        seen[b, :size] = True
        points[b, : len(row.codes)] = code.decode(row.codes)
        generator = torch.Generator().manual_seed(seed + b)
        noise[b, :size] = torch.randn(size, config.num_mel_bins, generator=generator)
        if row.prompt is not None:
            prompt_mask[b, : len(row.prompt)], given[b, : len(row.prompt)] = True, row.prompt
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "frame_mask": seen,
        "prompt_mask": prompt_mask,
        "points": points,
        "keep": torch.ones(len(rows)),
        "noise": noise,
        "prompt": given,
    }
