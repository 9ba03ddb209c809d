"""The mel spectrogram, and sound from one again.

    S = |stft(x)|, frames of n_fft samples, a hop apart      mel = log max(S @ filters, 1e-5)
    back: S ~ filters^+ exp(mel), then a phase that fits it, by Griffin and Lim's iteration with momentum
          (Perraudin et al. 2013, eq. 8): no model, a telephone's sound at best

Filters are triangles between points equally spaced on the mel scale, 2595 log10(1 + f / 700), each with a
peak of 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

FLOOR = 1e-5  # the smallest magnitude whose logarithm is taken
MOMENTUM = 0.99


@dataclass(frozen=True)
class Mel:
    """rate: samples a second; a frame of n_fft samples every hop; mels: of a frame."""

    rate: int
    hop: int
    n_fft: int
    mels: int

    def frames(self, samples: Tensor) -> Tensor:
        """samples [n] -> [ceil(n / hop), mels], frame f around sample f hop + hop / 2."""
        count = math.ceil(len(samples) / self.hop)
        left = (self.n_fft - self.hop) // 2
        padded = F.pad(
            samples.float(), (left, count * self.hop - len(samples) + self.n_fft - self.hop - left)
        )
        found = torch.stft(
            padded, self.n_fft, self.hop, window=self._window, center=False, return_complex=True
        ).abs()
        return (found.t() @ self.filters).clamp_min(FLOOR).log()

    def sound(self, mel: Tensor, iterations: int = 60, seed: int = 0) -> Tensor:
        """mel [F, mels] -> samples [F hop]. The phase starts at random, of this seed."""
        wanted = (mel.float().exp() @ torch.linalg.pinv(self.filters)).clamp_min(0).t()
        start = torch.rand(wanted.shape, generator=torch.Generator().manual_seed(seed))
        phase = torch.polar(torch.ones_like(start), 2 * math.pi * start)
        before = torch.zeros_like(phase)
        for _ in range(iterations):
            again = self._spectrum(self._samples(wanted * phase))
            moved = again + MOMENTUM * (again - before)
            phase, before = moved / moved.abs().clamp_min(1e-8), again
        return self._samples(wanted * phase)

    @cached_property
    def filters(self) -> Tensor:
        """[n_fft / 2 + 1, mels]."""
        bins = torch.linspace(0, self.rate / 2, self.n_fft // 2 + 1)
        top = 2595 * math.log10(1 + self.rate / 2 / 700)
        points = 700 * (10 ** (torch.linspace(0, top, self.mels + 2) / 2595) - 1)
        rise = (bins[:, None] - points[:-2]) / (points[1:-1] - points[:-2])
        fall = (points[2:] - bins[:, None]) / (points[2:] - points[1:-1])
        return torch.minimum(rise, fall).clamp_min(0)

    @cached_property
    def _window(self) -> Tensor:
        return torch.hann_window(self.n_fft)

    def _spectrum(self, samples: Tensor) -> Tensor:
        """samples [F hop] -> [bins, F], as `frames` cuts them."""
        left = (self.n_fft - self.hop) // 2
        padded = F.pad(samples, (left, self.n_fft - self.hop - left))
        return torch.stft(
            padded, self.n_fft, self.hop, window=self._window, center=False, return_complex=True
        )

    def _samples(self, spectrum: Tensor) -> Tensor:
        """The inverse, by overlap-add: the samples whose spectrum is nearest, [F hop]."""
        count = spectrum.shape[1]
        pieces = torch.fft.irfft(spectrum.t(), self.n_fft) * self._window
        length, left = count * self.hop + self.n_fft - self.hop, (self.n_fft - self.hop) // 2
        places = torch.arange(count)[:, None] * self.hop + torch.arange(self.n_fft)

        def added(frames: Tensor) -> Tensor:
            return torch.zeros(length).index_add_(0, places.flatten(), frames.flatten())

        weights = added((self._window**2).repeat(count, 1)).clamp_min(1e-3)
        return (added(pieces) / weights)[left : left + count * self.hop]
