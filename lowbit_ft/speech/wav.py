"""WAV files: read as one channel of floats at the rate that is asked for, written as 16-bit PCM.

RIFF is a list of chunks; `fmt ` says how samples lie in `data`. Read are PCM of 8, 16, 24 and 32 bits, floats
of 32 and 64 bits, and telephone's 8-bit mu-law (ITU-T G.711); channels are averaged. A file is data from a
stranger: sizes are compared with the file before anything is made of them.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..files.atomic import write_bytes
from ..files.jsonfile import read_bytes

MOST_BYTES = 1 << 30
RATES = (4000, 192_000)  # samples a second, the least and the most
MOST_CHANNELS = 64
LOUDEST = 1e3  # of floats, whose full scale is 1
PCM, FLOAT, MULAW, EXTENSIBLE = 1, 3, 7, 0xFFFE
_TAPS = 24  # zero crossings of the resampling filter, on each side


@dataclass(frozen=True)
class Wav:
    """samples fp32 [n] in -1..1, of one channel; rate: a second. channels, seconds: what the file had."""

    samples: Tensor
    rate: int
    channels: int

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate

    def at(self, rate: int) -> Tensor:
        """The samples at another rate."""
        return resampled(self.samples, self.rate, rate)


def read_wav(path: str | Path) -> Wav:
    """ValueError, naming the file, for everything that is wrong with it."""
    path = Path(path)
    data = read_bytes(path, "give a .wav file", MOST_BYTES)
    if len(data) < 12 or data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise ValueError(f"{path}: not a WAV file (it does not begin with RIFF ... WAVE); convert it first")
    chunks = _chunks(data, path)
    form, body = chunks.get(b"fmt "), chunks.get(b"data")
    if form is None or len(form) < 16 or body is None:
        raise ValueError(f"{path}: a WAV file without its fmt and data chunks; it is cut or damaged")
    kind, channels, rate, _, align, bits = struct.unpack("<HHIIHH", form[:16])
    if kind == EXTENSIBLE and len(form) >= 26:
        (kind,) = struct.unpack("<H", form[24:26])
    if not RATES[0] <= rate <= RATES[1]:
        raise ValueError(f"{path}: {rate} samples a second; allowed are {RATES[0]} to {RATES[1]}")
    if not 1 <= channels <= MOST_CHANNELS or not bits or bits % 8 or align != channels * bits // 8:
        raise ValueError(
            f"{path}: {channels} channels of {bits} bits in {align} bytes; the header is damaged"
        )
    samples = _samples(body[: len(body) - len(body) % align], kind, bits, path).reshape(-1, channels).mean(1)
    if not np.isfinite(samples).all() or (len(samples) and np.abs(samples).max() > LOUDEST):
        raise ValueError(
            f"{path}: it has samples that are no sound (NaN, Inf or beyond {LOUDEST:g}; full scale is 1)"
        )
    if not len(samples):
        raise ValueError(f"{path}: it has no sample")
    return Wav(torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32)), rate, channels)


def write_wav(path: Path, samples: Tensor, rate: int) -> None:
    """samples [n], clipped to -1..1, as 16-bit PCM; the file is there whole or not at all."""
    body = (
        (samples.detach().clamp(-1, 1) * 32767).round().to(torch.int16).cpu().numpy().astype("<i2").tobytes()
    )
    write_bytes(path, _riff(PCM, rate, 16, body))


def write_mulaw(path: Path, samples: Tensor, rate: int) -> None:
    """samples [n] as mu-law, a byte each (ITU-T G.711): small files of speech."""
    table = _mulaw_table()
    order = np.argsort(table, kind="stable")
    found = np.searchsorted((table[order][1:] + table[order][:-1]) / 2, samples.detach().clamp(-1, 1).numpy())
    write_bytes(path, _riff(MULAW, rate, 8, order[found].astype(np.uint8).tobytes()))


def _riff(kind: int, rate: int, bits: int, body: bytes) -> bytes:
    size = bits // 8
    form = struct.pack("<HHIIHH", kind, 1, rate, rate * size, size, bits)
    inside = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(body)) + body
    inside += b"\0" * (len(body) % 2)
    return b"RIFF" + struct.pack("<I", len(inside)) + inside


def _chunks(data: bytes, path: Path) -> dict[bytes, bytes]:
    """The first chunk of each name."""
    found: dict[bytes, bytes] = {}
    place = 12
    while place + 8 <= len(data):
        name, (size,) = data[place : place + 4], struct.unpack("<I", data[place + 4 : place + 8])
        if place + 8 + size > len(data):
            raise ValueError(f"{path}: its {name!r} says {size} bytes, and the file ends before; it is cut")
        found.setdefault(name, data[place + 8 : place + 8 + size])
        place += 8 + size + size % 2
    return found


def _samples(body: bytes, kind: int, bits: int, path: Path) -> np.ndarray:
    """The numbers of the data chunk, fp64, all channels."""
    if kind == PCM and bits == 8:
        return (np.frombuffer(body, np.uint8).astype(np.float64) - 128) / 128
    if kind == PCM and bits == 24:
        raw = np.frombuffer(body, np.uint8).reshape(-1, 3).astype(np.int32)
        value = raw[:, 0] | raw[:, 1] << 8 | raw[:, 2] << 16
        return (value - ((value & 1 << 23) << 1)) / float(1 << 23)
    if kind == PCM and bits in (16, 32):
        return np.frombuffer(body, f"<i{bits // 8}").astype(np.float64) / float(1 << bits - 1)
    if kind == FLOAT and bits in (32, 64):
        return np.frombuffer(body, f"<f{bits // 8}").astype(np.float64)
    if kind == MULAW and bits == 8:
        return _mulaw_table()[np.frombuffer(body, np.uint8)]
    raise ValueError(
        f"{path}: samples of kind {kind} with {bits} bits; read are PCM of 8, 16, 24, 32 bits, floats of "
        "32 and 64, and mu-law; convert it first"
    )


def _mulaw_table() -> np.ndarray:
    """The value of each byte: complemented, a sign, a segment of 3 bits and 4 bits in it; 14-bit steps."""
    code = ~np.arange(256) & 255
    size = (((code & 15) << 1) + 33 << (code >> 4 & 7)) - 33
    return np.where(code & 128, -size, size) / 8192.0


def resampled(samples: Tensor, rate: int, wanted: int) -> Tensor:
    """samples [n] at `rate` -> [ceil(n wanted / rate)] at `wanted`: band-limited interpolation by a windowed
    sinc, one filter for each of the `wanted` / gcd phases."""
    if rate == wanted:
        return samples
    up, down = wanted // math.gcd(rate, wanted), rate // math.gcd(rate, wanted)
    cut = min(1.0, up / down) * 0.97  # of the narrower of both bands
    half = math.ceil(_TAPS / cut)
    count = math.ceil(len(samples) * up / down)
    # Output j is at input j down / up: sample floor(.) + k by the filter at k - fraction.
    places = torch.arange(count, dtype=torch.int64) * down
    first, phase = places // up, places % up
    away = torch.arange(-half, half + 1, dtype=torch.float64)[None] - torch.arange(up)[:, None] / up
    inside = (away / (half + 1)).clamp(-1, 1)
    taps = (cut * torch.sinc(cut * away) * torch.cos(inside * math.pi / 2) ** 2).to(samples.dtype)
    windows = F.pad(samples, (half, half + 1)).unfold(0, 2 * half + 1, 1)
    return torch.cat(
        [(windows[f] * taps[p]).sum(-1) for f, p in zip(first.split(4096), phase.split(4096), strict=True)]
    )
