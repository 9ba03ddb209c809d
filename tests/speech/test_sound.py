"""WAV files, rates and the spectrogram, against scipy and against equations."""

from __future__ import annotations

import io
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import wavfile

from lowbit_ft.speech.mel import Mel
from lowbit_ft.speech.wav import read_wav, resampled, write_mulaw, write_wav
from tests.speech.sounds import RATE, spoken

MEL = Mel(rate=RATE, hop=160, n_fft=640, mels=64)


@pytest.mark.parametrize("kind", ["uint8", "int16", "int32", "float32", "float64"])
def test_what_scipy_writes_is_read(kind: str, tmp_path: Path) -> None:
    wanted = spoken("aei")[:1001].double().numpy()
    stereo = np.stack([wanted, 0.5 * wanted], 1)
    scale, zero = {"uint8": (127, 128), "int16": (32767, 0), "int32": (2**31 - 1, 0)}.get(kind, (1, 0))
    wavfile.write(tmp_path / "a.wav", 22050, (stereo * scale + zero).astype(kind))
    found = read_wav(tmp_path / "a.wav")
    assert (found.rate, found.channels, len(found.samples)) == (22050, 2, 1001)
    assert found.seconds == pytest.approx(1001 / 22050)
    bound = {"uint8": 1.2e-2, "int16": 5e-5}.get(kind, 1e-6)
    np.testing.assert_allclose(found.samples.numpy(), 0.75 * wanted, atol=bound)


def test_what_is_written_is_read_by_scipy_and_by_us(tmp_path: Path) -> None:
    sound = spoken("ou")
    write_wav(tmp_path / "a.wav", 2 * sound, RATE)
    rate, there = wavfile.read(tmp_path / "a.wav")
    assert rate == RATE and there.dtype == np.int16
    np.testing.assert_allclose(there / 32767, (2 * sound).clamp(-1, 1).numpy(), atol=2e-5)
    write_mulaw(tmp_path / "b.wav", sound, RATE)
    small = read_wav(tmp_path / "b.wav")
    off = (small.samples - sound).abs()
    assert (off <= 0.04 * sound.abs() + 3e-4).all(), "a sixteenth of the segment that a sample is in"
    assert (tmp_path / "b.wav").stat().st_size < 0.6 * (tmp_path / "a.wav").stat().st_size
    write_mulaw(tmp_path / "c.wav", small.samples, RATE)
    assert torch.equal(read_wav(tmp_path / "c.wav").samples, small.samples)


def test_24_bits_and_extensible_headers(tmp_path: Path) -> None:
    values = [0, 1, -1, 2**23 - 1, -(2**23)]
    body = b"".join(value.to_bytes(3, "little", signed=True) for value in values)
    form = struct.pack("<HHIIHHHHIH14x", 0xFFFE, 1, 8000, 24000, 3, 24, 22, 24, 0, 1)
    inside = b"WAVE" + b"LIST" + struct.pack("<I", 3) + b"abc\0"
    inside += b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(body)) + body
    (tmp_path / "a.wav").write_bytes(b"RIFF" + struct.pack("<I", len(inside)) + inside)
    found = read_wav(tmp_path / "a.wav").samples
    torch.testing.assert_close(found, torch.tensor(values) / 2**23)


def damaged(change: str) -> bytes:
    file = io.BytesIO()
    wavfile.write(file, 8000, np.zeros(100, np.int16))
    data = bytearray(file.getvalue())
    if change == "text":
        return b"hello"
    if change == "cut":
        return bytes(data[:-10])
    if change == "rate":
        data[24:28] = struct.pack("<I", 7)
    if change == "kind":
        data[20:22] = struct.pack("<H", 85)
    if change == "channels":
        data[22:24] = struct.pack("<H", 0)
    if change == "empty":
        data[40:44] = struct.pack("<I", 0)
        return bytes(data[:44])
    if change == "no data":
        data[36:40] = b"junk"
    if change == "no bits":
        data[32:36] = struct.pack("<HH", 0, 0)
    if change == "loud":
        file = io.BytesIO()
        wavfile.write(file, 8000, np.array([0.0, 1e300], np.float64))
        return file.getvalue()
    if change == "nan":
        file = io.BytesIO()
        wavfile.write(file, 8000, np.array([0.0, np.nan], np.float32))
        return file.getvalue()
    return bytes(data)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("text", "not a WAV file"),
        ("cut", "it is cut"),
        ("rate", "7 samples a second; allowed are 4000 to 192000"),
        ("kind", "samples of kind 85 with 16 bits"),
        ("channels", "0 channels"),
        ("empty", "it has no sample"),
        ("no data", "without its fmt and data"),
        ("nan", "no sound"),
        ("loud", "no sound"),
        ("no bits", "1 channels of 0 bits"),
    ],
)
def test_a_damaged_file_is_said(change: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(damaged(change))
    with pytest.raises(ValueError, match=rf"a\.wav: .*{said}"):
        read_wav(tmp_path / "a.wav")


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=80))
def test_any_bytes_behind_the_header_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, body: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.wav"
    path.write_bytes(b"RIFF\0\0\0\0WAVE" + body)
    with pytest.raises(ValueError, match="any.wav"):
        read_wav(path)


@pytest.mark.parametrize(("rate", "wanted"), [(22050, 8000), (16000, 8000), (8000, 11025)])
def test_a_tone_keeps_its_wave_at_another_rate_and_what_does_not_fit_goes(rate: int, wanted: int) -> None:
    time, then = (torch.arange(n // 4).double() / n for n in (rate, wanted))
    tone = torch.sin(2 * math.pi * 700 * time)
    found = resampled(tone, rate, wanted)
    assert len(found) == math.ceil(len(tone) * wanted / rate)
    inside = slice(100, min(len(found), len(then)) - 100)
    assert (found[inside] - torch.sin(2 * math.pi * 700 * then)[inside]).abs().max() < 2e-3
    if wanted < rate:
        above = torch.sin(2 * math.pi * 0.6 * wanted * time)
        assert resampled(above, rate, wanted)[100:-100].abs().max() < 5e-3


def test_the_spectrogram_is_its_equation() -> None:
    """Frame by frame in float64; filters are triangles, each with its peak behind the one before."""
    sound = spoken("aeiou")[:6000]
    found = MEL.frames(sound)
    assert found.shape == (38, 64)
    padded = np.pad(sound.double().numpy(), (240, 240 + 38 * 160 - 6000))
    window = 0.5 - 0.5 * np.cos(2 * math.pi * np.arange(640) / 640)
    frames = np.stack([padded[160 * f : 160 * f + 640] * window for f in range(38)])
    want = np.log(np.maximum(np.abs(np.fft.rfft(frames)) @ MEL.filters.double().numpy(), 1e-5))
    loud = want > -6  # below it fp32's own rounding shows
    assert 0.4 < loud.mean() < 1 and want.min() >= math.log(1e-5)
    np.testing.assert_allclose(found.numpy()[loud], want[loud], atol=2e-3)
    hertz = np.arange(321) * 12.5
    points = 700 * (10 ** (np.linspace(0, 2595 * math.log10(1 + 4000 / 700), 66) / 2595) - 1)
    for i in (0, 20, 63):
        low, peak, high = points[i : i + 3]
        plain = np.clip(np.minimum((hertz - low) / (peak - low), (high - hertz) / (high - peak)), 0, None)
        np.testing.assert_allclose(MEL.filters[:, i].numpy(), plain, atol=1e-3)
        assert plain.max() > 0.3


def test_griffin_lim_makes_a_sound_of_this_spectrogram() -> None:
    sound = spoken("aeo")
    mel = MEL.frames(sound)
    made = MEL.sound(mel, iterations=30)
    assert len(made) == len(mel) * 160 and torch.equal(made, MEL.sound(mel, iterations=30))
    loud = mel > -2
    off, chance = (MEL.frames(made) - mel)[loud].abs().mean(), (mel.roll(20, 0) - mel)[loud].abs().mean()
    assert off < 0.35 and off < 0.25 * chance
