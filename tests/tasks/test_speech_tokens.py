"""task: speech_tokens: rows, batches and loss; a short run of the line; encode and decode with what it
left."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from lowbit_ft import pipeline
from lowbit_ft.cli.main import app, main
from lowbit_ft.data.errors import DataError
from lowbit_ft.export.reader import load_exported
from lowbit_ft.model.tokenizer import read_tokenizer
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.sections.data import DataSection
from lowbit_ft.speech.files import read_codes
from lowbit_ft.speech.sample import Spoken, encode
from lowbit_ft.speech.wav import read_wav, write_wav
from lowbit_ft.tasks.speech_tokens import Frames, SpeechBatches, SpeechTokens, like, mel_error, use_of
from lowbit_ft.vector_codes import BSQ
from tests.speech.codecs import codec, tokenizer, write_codec
from tests.speech.sounds import RATE, spoken, write_rows

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["aei", "ou", "a e", "iou", "ea", "uuo"]


def task_of(**changes: Any) -> SpeechTokens:
    config = codec().config
    return SpeechTokens(
        frames=Frames(**{key: getattr(config, key) for key in Frames.model_fields}), **changes
    )


def examples(path: Path, task: SpeechTokens, on_bad_row: str = "error") -> Any:
    source = SimpleNamespace(
        path=str(path), format=None, split=None, name=None, revision=None, limit=None, weight=None
    )
    section = SimpleNamespace(sequence_len=16, on_bad_row=on_bad_row)
    return task.examples(source, section, tokenizer())


def test_the_loss_is_its_equation(tmp_path: Path) -> None:
    """In float64, frame by frame: v* = x - e, x_t = t x + (1 - t) e, the prompt clean and not counted."""
    task, model = task_of(), codec()
    rows = examples(write_rows(tmp_path, TEXTS), task)
    batch = next(SpeechBatches(rows, 4, 0, seed=3, task=task))
    inputs = {name: value for name, value in batch.items() if name not in task.answers}
    outputs = model(**inputs)
    total, count = 0.0, 0
    for b in range(4):
        size, time = int(batch["frame_mask"][b].sum()), batch["time"][b].double()
        for f in range(size):
            x, moved = batch["mel"][b, f].double(), batch["noisy"][b, f].double()
            if batch["prompt_mask"][b, f]:
                assert torch.equal(batch["noisy"][b, f], batch["mel"][b, f]) and f < 0.25 * size
                continue
            noise = (moved - time * x) / (1 - time)
            total += (outputs.velocity[b, f].double() - (x - noise)).abs().mean().item()
            count += 1
        assert not batch["frame_mask"][b, size:].any() and not batch["mel"][b, size:].any()
    assert int(task.count(batch)) == count
    found = task.loss(outputs, {name: batch[name] for name in task.answers})
    assert found.item() == pytest.approx(total + count * outputs.code_loss.item(), rel=1e-4)
    assert outputs.code_loss.item() < 0, "14 bits in use are worth more than the doubt of a vector"


def test_calibrators_look_at_a_seeded_choice_of_rows(tmp_path: Path) -> None:
    task, path = task_of(), write_rows(tmp_path, TEXTS)
    source = SimpleNamespace(
        path=str(path), format=None, split=None, name=None, revision=None, limit=None, weight=None
    )
    section = DataSection.model_validate({"train": {"path": str(path)}})
    options: dict[str, Any] = {"rows": None, "samples": 4, "sequence_len": 16, "size": 3}
    first, again, other = (
        task.calibration(source, section, tokenizer(), seed=seed, **options) for seed in (1, 1, 2)
    )
    assert [len(batch["mel"]) for batch in first] == [3, 1]
    assert all(not set(task.answers) & batch.keys() for batch in first)
    assert codec()(**first[0]).velocity.isfinite().all()
    for a, b, c in zip(first, again, other, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a) and not torch.equal(a["time"], c["time"])


def test_what_is_drawn_depends_on_seed_epoch_and_row_alone(tmp_path: Path) -> None:
    task = task_of(drop_codes=0.5, drop_text=0.5)
    rows = examples(write_rows(tmp_path, TEXTS), task)
    first, again = (SpeechBatches(rows, 4, 0, seed=1, task=task) for _ in range(2))
    seen = [next(first) for _ in range(2)]
    state = first.state_dict()
    then = next(first)
    again.load_state_dict(json.loads(json.dumps(state)))
    assert all(torch.equal(value, then[name]) for name, value in next(again).items())
    kept = torch.cat([b["keep"] for b in seen]), torch.cat([b["attention_mask"].any(1) for b in seen])
    assert all(0 < int(one.sum()) < 8 for one in kept), "some lose their codes, some their text"
    measured = list(SpeechBatches(rows, 4, 0, seed=1, shuffle=False, task=task).one_epoch())
    assert all(bool(b["keep"].all() and b["attention_mask"].any(1).all()) for b in measured)
    assert len({float(t) for b in measured for t in b["time"]}) == 6


def test_rows_that_cannot_be_are_said_with_file_and_line(tmp_path: Path) -> None:
    path = write_rows(tmp_path, ["a", "e"])
    wrong = [
        ({"audio": "9.wav", "text": "a"}, "9.wav: missing"),
        ({"audio": "0.wav"}, "key 'text' is missing"),
        ({"audio": {"bytes": 1}, "text": "a"}, "'audio' must be a string"),
        ({"audio": "long.wav", "text": "a"}, r"long.wav: 0.3 s of sound; allowed: 0.2 \(task.max_seconds\)"),
    ]
    write_wav(tmp_path / "long.wav", spoken("ae"), RATE)
    task = task_of(max_seconds=0.2)
    for row, said in wrong:
        path.write_text(json.dumps({"audio": "0.wav", "text": "a"}) + "\n" + json.dumps(row) + "\n")
        with pytest.raises(DataError, match=rf"rows.jsonl.*2.*{said}"):
            examples(path, task)
        found = examples(path, task, "skip")
        assert (found.report.used, found.report.skipped) == (1, 1) and "0.2 s of sound" in str(found.report)
    before = examples(path, task, "skip").digest
    write_wav(tmp_path / "0.wav", spoken("i"), RATE)
    assert examples(path, task, "skip").digest != before, "a resumed run must be given the same sound"


def test_the_use_of_codes() -> None:
    assert use_of(BSQ(bits=2), torch.tensor([0, 1, 2, 3])) == {"codes_used": 1.0, "bit_entropy": 1.0}
    half = use_of(BSQ(bits=2), torch.tensor([0, 1, 1, 0]))
    assert (
        half == {"codes_used": 0.5, "bit_entropy": 0.5}
        and use_of(BSQ(), torch.zeros(5).long())["bit_entropy"] == 0
    )


def test_codes_of_the_asset_carry_what_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speech made of the codes of another sentence is farther away (42 % over 24 sentences and 16 steps)."""
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(ROOT / "recipes" / "quickstart-speech-tokens.yaml")
    model: Any = load_exported(recipe.model.path, dtype=torch.float32)
    task: Any = recipe.task.settled(recipe, model.config.to_dict())
    tokenizer = read_tokenizer(recipe.model.path)
    rows = list(task.examples(recipe.data.valid, recipe.data, tokenizer))[:4]
    assert tokenizer.decode(rows[0]["input_ids"]) == "the cat sees the moon again"
    codes = [encode(model, row["mel"]) for row in rows]
    own = [Spoken(c, row["input_ids"]) for c, row in zip(codes, rows, strict=True)]
    others = [replace(one, codes=like(codes[i - 1], one.codes)) for i, one in enumerate(own)]
    errors = [mel_error(model, spoken, rows, steps=4) for spoken in (own, others)]
    assert 1.0 < errors[0] < 1.6 and errors[1] > 1.15 * errors[0]


# ------------------------------------------------------------------------------------------------ the line


@dataclass(frozen=True)
class Line:
    codec: Path
    data: Path
    run: Path

    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["stage"]: row for row in json.loads((self.run / "evaluation.json").read_text())["rows"]}


def recipe_of(folder: Path, model: Path, data: Path, **changes: Any) -> Path:
    recipe = {
        "name": "speech",
        "model": {"path": str(model), "dtype": "float32", "device": "cpu"},
        "task": "speech_tokens",
        "quant": {"bits": 4, "group_size": 32, "calibrate": "mse", "exclude": ["*.encoder.*", "*.scale"]},
        "adapter": {"method": "lr_qat", "rank": 2},
        "data": {"train": {"path": str(data)}, "sequence_len": 16},
        "train": {
            "max_steps": 3,
            "micro_batch_size": 3,
            "gradient_accumulation_steps": 1,
            "learning_rate": 0.02,
        },
        "export": {"format": "native"},
        "output": str(folder / "run"),
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({**recipe, **changes}))
    return file


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    folder = tmp_path_factory.mktemp("speech")
    found = Line(write_codec(folder / "codec"), write_rows(folder / "data", TEXTS), folder / "run")
    pipeline.run(load_recipe(recipe_of(folder, found.codec, found.data)))
    return found


def test_what_is_trained_is_what_ships_and_the_codes_stay(line: Line) -> None:
    rows = line.rows()
    assert (
        rows["merged"]["loss"] == rows["trained"]["loss"] != rows["quantized"]["loss"] != rows["base"]["loss"]
    )
    assert rows["merged"]["scores"] == rows["trained"]["scores"]
    assert rows["trained"]["loss"] < rows["quantized"]["loss"]
    for name in ("codes_used", "bit_entropy"):
        assert len({row["scores"][name] for row in rows.values()}) == 1, "the encoder is dense, and frozen"
    assert all(
        math.isfinite(value) and value > 0 for row in rows.values() for value in row["scores"].values()
    )
    layers = json.loads((line.run / "trainable.json").read_text())
    assert "body.decoder.layers.0.mlp.up_proj" in json.dumps(layers) and "velocity" in json.dumps(layers)
    heard = json.loads((line.run / "speech.json").read_text())
    mels = {row["stage"]: torch.tensor(row["mel"]) for row in heard["rows"]}
    assert list(mels) == ["spoken", "base", "quantized", "trained", "merged"]
    letters = {text.replace(" ", "") for text in TEXTS}
    assert heard["text"].replace(" ", "") in letters, "its tokenizer writes blanks between letters"
    assert torch.equal(mels["merged"], mels["trained"]) and not torch.equal(mels["base"], mels["quantized"])
    page = (line.run / "report.html").read_text()
    assert '<section id="speech">' in page and "spectrograms of one sentence" in page
    card = (line.run / "merged" / "README.md").read_text()
    assert "lowbit-ft encode PATH speech.wav speech.json" in card and "AutoModelForAudioTokenization" in card


def test_encode_and_decode_on_the_command_line(
    line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_wav(tmp_path / "in.wav", spoken("aeiou")[:6000], RATE)

    def call(*arguments: object) -> str:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
        assert result.exit_code == 0
        return result.output

    said = call("encode", line.run, tmp_path / "in.wav", tmp_path / "a.json")
    assert "5 codes for 0.75 s, 9 bytes of information (93.3 bits a second)" in said
    call("encode", line.codec, tmp_path / "in.wav", tmp_path / "dense.json")
    assert (tmp_path / "a.json").read_text() == (tmp_path / "dense.json").read_text(), (
        "tokens of before stay good"
    )
    short = ("--steps", 2, "--text", "aeiou")
    assert "out.wav: 0.75 s" in call(
        "decode", line.run, tmp_path / "dense.json", tmp_path / "out.wav", *short
    )
    voice = ("--prompt", line.data.parent / "1.wav", "--prompt-text", "ou", "--guidance", 0)
    call("decode", line.run, tmp_path / "dense.json", tmp_path / "b.wav", *short, *voice)
    made = [read_wav(tmp_path / name) for name in ("out.wav", "b.wav")]
    assert all((one.rate, len(one.samples)) == (RATE, 6000) and one.samples.std() > 1e-4 for one in made)
    assert not torch.equal(made[0].samples, made[1].samples)

    def refused(*arguments: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        assert left.value.code == 2
        return capsys.readouterr().err

    codes, out = tmp_path / "a.json", tmp_path / "new.wav"
    assert "exists; nothing was written" in refused("decode", line.run, codes, tmp_path / "out.wav")
    other = write_codec(tmp_path / "other", seed=5)
    assert "made by another codec" in refused("decode", other, codes, out)
    assert "is a .wav file" in refused("decode", line.run, codes, tmp_path / "new.mp3")
    assert "there is no folder" in refused("decode", line.run, codes, tmp_path / "x" / "new.wav")
    assert "--steps: got 0" in refused("decode", line.run, codes, out, "--steps", 0)
    assert "not JSON" in refused("decode", line.run, tmp_path / "in.wav", out)
    found = read_codes(codes).model_dump()
    codes.write_text(json.dumps({**found, "codes": found["codes"][:-1]}))
    assert "4 codes of 1280 samples do not fit 6000" in refused("decode", line.run, codes, out)
    codes.write_text(json.dumps({**found, "codes": [*found["codes"][:-1], 1 << 14]}))
    assert "codes: got 16384; bsq of 14 bits" in refused("decode", line.run, codes, out)
    assert "a.json: not a WAV" in refused("encode", line.run, codes, tmp_path / "b.json")
    assert not out.exists() and not (tmp_path / "b.json").exists()


def test_what_does_not_go_together_is_refused_before_anything_is_made(line: Line, tmp_path: Path) -> None:
    tiny = ROOT / "recipes" / "assets" / "tiny-llama"
    with pytest.raises(
        ValueError, match="transformers has no AutoModelForAudioTokenization of model_type 'llama'"
    ):
        load_recipe(recipe_of(tmp_path, tiny, line.data))
    with pytest.raises(ValueError, match="encode, decode and speak take a speech codec"):
        pipeline.encode(tiny, line.data.parent / "0.wav", tmp_path / "a.json")
    file = recipe_of(tmp_path, line.codec, line.data)
    said = CliRunner().invoke(app, ["plan", str(file), "--no-search"]).output
    assert "fits: " in said and "speech_tokens" in said and "estimate" not in said
    with pytest.raises(ValueError, match="is for AudioTokenization and writes no text"):
        pipeline.generate(line.run, "hello")
