"""The codec: what it depends on and what not, its steps in time, and sampling."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForAudioTokenization

from lowbit_ft.plan.plan import no_card, plan
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.speech.codec import SpeechCodec
from lowbit_ft.speech.config import SpeechCodecConfig
from lowbit_ft.speech.files import encoder_digest
from lowbit_ft.speech.sample import RESCALE, Spoken, decode, encode, frames_of, sound_of
from tests.speech.codecs import SMALL, batch, codec, write_codec
from tests.speech.sounds import RATE, spoken

ROOT = Path(__file__).resolve().parents[2]


@torch.no_grad()
def test_nothing_depends_on_padding() -> None:
    model, one = codec(), {name: value[:1] for name, value in batch().items()}
    wide = {
        name: F.pad(value, (0, 0, 0, 16), value=3.0)
        if value.dim() == 3
        else F.pad(value, (0, 4 if name in ("input_ids", "attention_mask") else 16))
        if value.dim() == 2
        else value
        for name, value in one.items()
    }
    found, there = model(**wide), model(**one)
    torch.testing.assert_close(found.velocity[:, :40], there.velocity, rtol=0, atol=2e-6)
    assert found.codes.tolist() == [[*there.codes[0].tolist(), -1, -1]]
    torch.testing.assert_close(found.code_loss, there.code_loss)


@torch.no_grad()
def test_time_is_cut_and_stretched_as_linear_interpolation_does() -> None:
    model, hidden, counts = codec(), torch.randn(2, 48, 32), torch.tensor([48, 48])
    codes = model.body.codes
    vectors = codes.narrow(hidden, counts)[2]
    short = F.interpolate(hidden.transpose(1, 2), scale_factor=1 / 8, mode="linear").transpose(1, 2)
    torch.testing.assert_close(vectors, codes.to_code(short))
    points = codes.code.quantize(vectors)[0]
    long = F.interpolate(codes.from_code(points).transpose(1, 2), scale_factor=8, mode="linear")
    torch.testing.assert_close(codes.wide(points, counts), long.transpose(1, 2))
    half = codes.narrow(hidden, torch.tensor([48, 20]))
    assert half[3].tolist() == [[True] * 6, [True] * 3 + [False] * 3] and (half[1][1, 3:] == -1).all()


def test_the_gradient_comes_through_the_codes_and_not_where_they_are_dropped() -> None:
    model, inputs = codec(), batch()
    norms = []
    for keep in (1.0, 0.0):
        model.zero_grad()
        (model(**{**inputs, "keep": torch.full((3,), keep)}).velocity ** 2).mean().backward()
        grad = model.body.mel_in.weight.grad
        norms.append(0.0 if grad is None else float(grad.norm()))
    assert norms[0] > 1e-6 and norms[1] == 0


@torch.no_grad()
def test_each_input_is_heard() -> None:
    model, inputs = codec(), batch()
    plain = model(**inputs).velocity
    for name in ("input_ids", "mel", "noisy", "time", "prompt_mask", "keep", "attention_mask"):
        changed = {**inputs, name: torch.zeros_like(inputs[name])}
        assert (model(**changed).velocity - plain).abs().max() > 1e-4, name
    for name, parameter in model.named_parameters():
        if name.endswith("scale.weight"):
            parameter.zero_()  # as at the start
    fresh = model(**inputs).velocity
    torch.testing.assert_close(model(**{**inputs, "time": 1 - inputs["time"]}).velocity, fresh)


@torch.no_grad()
def test_decode_is_its_equation_and_a_row_is_alone_in_its_batch() -> None:
    model, prompt = codec(), torch.randn(16, 24)
    rows = [Spoken(torch.tensor([5, 900, 16383]), [3, 4, 5], prompt), Spoken(torch.tensor([77]), [])]
    found = decode(model, rows, steps=3, guidance=2.0, seed=7)
    assert [mel.shape for mel in found] == [(8, 24), (8, 24)]
    x = torch.randn(24, 24, generator=torch.Generator().manual_seed(7))[None]
    points = model.config.vectors.decode(rows[0].codes)[None]
    seen, front = torch.ones(1, 24, dtype=torch.bool), torch.arange(24)[None] < 16
    for step in range(3):
        x[:, :16] = prompt
        velocities = [
            model.velocity(
                model.body.decode(
                    torch.tensor([[3, 4, 5]]),
                    torch.full((1, 3), given),
                    x,
                    torch.tensor([(step + 0.5) / 3]),
                    seen,
                    front,
                    points,
                    torch.tensor([float(given)]),
                )
            )
            for given in (1, 0)
        ]
        far = velocities[0] + 2 * (velocities[0] - velocities[1])
        drawn = far * velocities[0].std(correction=0) / far.std(correction=0)
        x = x + (RESCALE * drawn + (1 - RESCALE) * far) / 3
    torch.testing.assert_close(found[0], x[0, 16:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decode(model, rows[:1], 3, 2.0, seed=7)[0], found[0], rtol=1e-4, atol=1e-5)
    assert not torch.equal(decode(model, rows[:1], 3, 2.0, seed=8)[0], found[0])
    assert not torch.allclose(decode(model, rows[:1], 3, 0.0, seed=7)[0], found[0])


@torch.no_grad()
def test_sound_to_codes_and_frames_to_sound() -> None:
    model, sound = codec(), spoken("aei")[:3000]
    mel = frames_of(model.config, sound)
    assert mel.shape == (24, 24), "three codes, the last one filled with silence"
    ids = encode(model, mel)
    inputs = {**batch(1, 24), "mel": mel[None]}
    assert torch.equal(ids, model(**inputs).codes[0]) and ids.dtype == torch.int64
    assert len(sound_of(model.config, mel)) == 24 * 160
    assert (model.config.codes_per_second, model.config.bits_per_second) == (6.25, 87.5)
    assert model.config.sample_rate == RATE


def test_a_folder_is_read_by_the_auto_class_and_what_is_asked_is_always_the_same(tmp_path: Path) -> None:
    model, again = codec(), AutoModelForAudioTokenization.from_pretrained(write_codec(tmp_path))
    ids = torch.arange(5)[None]
    assert torch.equal(model.probe(ids), model.probe(ids)) and model.probe(ids).std() > 1e-3
    torch.testing.assert_close(again.eval().probe(ids), model.probe(ids), rtol=1e-4, atol=1e-5)
    assert again.config.vectors == model.config.vectors


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 30}, "hidden_size: got 30, and 2 heads need a multiple of 4"),
        ({"encoder_layers": 0}, "encoder_layers: got 0"),
        ({"hop_length": 4000}, "n_fft: got 640; at least hop_length"),
        ({"mel_std": 0}, "mel_std: got 0"),
        ({"mel_std": float("inf")}, "mel_std: got inf; allowed is a finite number above 0"),
        ({"mel_mean": "loud"}, "mel_mean: got 'loud'; allowed is a finite number"),
        ({"sample_rate": 10**12}, "sample_rate: got 1000000000000; allowed is a count of 1 to"),
        ({"code": {"kind": "vq"}}, "code: got kind 'vq'"),
    ],
)
def test_sizes_that_cannot_be_are_said(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SpeechCodecConfig(**{**SMALL, **changes})  # pyright: ignore[reportArgumentType]


def test_the_digest_names_what_the_codes_depend_on() -> None:
    """The same weights behind another spectrogram make other codes; what just training reads, the same."""
    whole = encoder_digest(codec())
    assert encoder_digest(codec(mel_mean=-4.0)) != whole and encoder_digest(codec(n_fft=800)) != whole
    assert encoder_digest(codec(entropy_weight=0.2)) == whole


def test_the_sizes_of_the_paper_are_planned_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """134 million numbers in the encoder, 303 in the decoder, 33 in the embedding of the text."""
    monkeypatch.chdir(ROOT)
    folder = ROOT / "recipes" / "assets" / "speech-codec-500m"
    recipe = load_recipe("recipes/speech-codec-500m-w4.yaml")
    with torch.device("meta"):
        body = SpeechCodec(SpeechCodecConfig.from_pretrained(folder)).body
    sizes = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in body.named_children()}
    assert {name: round(sizes[name]) for name in ("encoder", "decoder", "embed_tokens")} == {
        "encoder": 134,
        "decoder": 303,
        "embed_tokens": 33,
    }
    made = plan(recipe, folder, no_card())
    assert made is not None and not made.notes and made.stages["training"] < 3e9
    assert sum(row.base_bytes for row in made.rows) == pytest.approx(268_435_456 * (4 + 16 / 128) / 8)


def test_other_codes_fit_the_same_codec() -> None:
    model = codec(code={"kind": "fsq", "counts": [5, 5, 3]})
    found = model(**batch())
    assert 0 <= int(found.codes.min()) and int(found.codes.max()) < 75 and model.config.vectors.width == 3
    found.velocity.mean().backward()
    assert math.log2(75) == pytest.approx(model.config.vectors.id_bits)
