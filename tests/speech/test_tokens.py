"""Codes as tokens of a language model: their rows of embedding and head, what ships of them, and speak."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from lowbit_ft import pipeline
from lowbit_ft.adapters.attach import load_adapter_state
from lowbit_ft.cli.main import app
from lowbit_ft.data.errors import DataError
from lowbit_ft.evaluate.speak import Drawing, OnlyCodes
from lowbit_ft.evaluate.speak import speak as codes_of
from lowbit_ft.export.reader import load_exported
from lowbit_ft.model.rows import NewRows, row_tables, train_rows
from lowbit_ft.model.tokenizer import read_tokenizer
from lowbit_ft.model.whole import untrained
from lowbit_ft.plan.model import skeleton
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.yaml import RecipeError
from lowbit_ft.session import resume
from lowbit_ft.speech.files import read_codes
from lowbit_ft.speech.tokens import END, START, AudioTokens, asked, audio_tokens, audio_tokens_of
from lowbit_ft.speech.wav import read_wav
from lowbit_ft.stages.models import adapter_of
from lowbit_ft.vector_codes import BSQ, FSQ, VectorCode
from tests.export.common import checkpoint
from tests.speech.codecs import write_codec
from tests.speech.sounds import write_rows
from tests.stages.test_modules import SIZE

ROOT = Path(__file__).resolve().parents[2]
OLD, BITS = 4096, 4
TEXTS = ["aei", "ou", "a e", "iou"]


def new_rows(code: VectorCode, width: int = 3, alone: int = 2, seed: int = 0) -> NewRows:
    """Rows of a table of 5 old ones, no two vectors alike."""
    torch.manual_seed(seed)
    found = NewRows(torch.zeros(5 + alone + code.size, width), range(5, 5 + alone + code.size), code.levels)
    with torch.no_grad():
        found.rows.normal_()
    return found


@given(st.lists(st.integers(3, 5), min_size=1, max_size=3), st.integers(1, 6), st.integers(0, 3))
@settings(max_examples=10, deadline=None)
def test_a_row_is_the_sum_of_the_vectors_of_its_digits(counts: list[int], bits: int, alone: int) -> None:
    """To the bit, added up in the order of the digits; and the shares of the backward say the same."""
    for code in (FSQ(counts=tuple(counts)), BSQ(bits=bits)):
        found = new_rows(code, alone=alone)
        vectors = list(found.rows.detach())
        assert len(vectors) == alone + 1 + sum(n - 1 for n in code.levels)
        digits = code.digits_of(torch.arange(code.size))
        for k in range(code.size):
            row, place = vectors[alone], alone + 1
            for digit, count in zip(digits[k].tolist(), code.levels, strict=True):
                row = row + vectors[place + digit - 1] if digit else row
                place += count - 1
            assert torch.equal(found.each[alone + k], row)
        assert found.shares is not None
        torch.testing.assert_close(found.shares.float() @ found.rows, found.each)
        seen = found.looked_up(torch.tensor([5 + alone, 2, 5 + alone + code.size - 1]))
        assert torch.equal(
            seen.bool(), torch.stack([found.shares[alone], 0 * found.shares[0], found.shares[-1]])
        )


@pytest.mark.parametrize("code", [BSQ(bits=5), FSQ(counts=(3, 4, 5))])
def test_the_softmax_over_all_codes_is_a_product_over_digits(code: VectorCode) -> None:
    """In float64: of bits, p(code) = prod sigmoid(+-x . e_i)."""
    found = new_rows(code, width=6, alone=0)
    vectors, x = found.rows.detach().double(), torch.randn(7, 6, dtype=torch.float64)
    rows = found.shares.double() @ vectors  # pyright: ignore[reportOptionalMemberAccess]
    whole = (x @ rows.t()).log_softmax(-1)
    digits, total, place = code.digits_of(torch.arange(code.size)), torch.zeros(7, code.size), 1
    for i, count in enumerate(code.levels):
        steps = torch.cat(
            [torch.zeros(7, 1, dtype=torch.float64), x @ vectors[place : place + count - 1].t()], 1
        )
        if count == 2:
            bit = torch.sigmoid(steps[:, 1:])
            torch.testing.assert_close(torch.cat([1 - bit, bit], 1).log(), steps.log_softmax(-1))
        total = total + steps.log_softmax(-1)[:, digits[:, i]]
        place += count - 1
    torch.testing.assert_close(whole, total, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tied", [False, True])
def test_the_vectors_have_the_gradients_of_the_whole_table(tied: bool) -> None:
    """Those of the whole table, summed by autograd over the rows that a vector is in."""
    code, first = BSQ(bits=3), 30
    config = transformers.LlamaConfig(
        **{**SIZE, "vocab_size": first + 2 + code.size}, tie_word_embeddings=tied
    )
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    new = list(range(first, first + 2 + code.size))
    with torch.no_grad():
        for table in (plain.get_input_embeddings().weight, plain.get_output_embeddings().weight):
            table[first + 2 :] = table[first + 2]
    ours = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    ours.load_state_dict(plain.state_dict())
    ours.requires_grad_(False)
    train_rows(ours, {"model.embed_tokens": new, "lm_head": new}, code.levels)
    ids = torch.tensor([[3, first, first + 4, first + 9, first + 1, 5, first + 4]])
    before = ours(ids).logits
    assert torch.equal(before, plain(ids).logits)
    tables = {name: rows for name, _, rows in row_tables(ours)}
    assert len(tables) == 2 - tied
    with torch.no_grad():
        for name, rows in tables.items():
            rows.rows.normal_(std=0.1)
            plain.get_submodule(name).weight[new] = rows.each
    for model in (plain, ours):
        model(ids).logits.square().sum().backward()
    for name, rows in tables.items():
        whole = plain.get_submodule(name).weight.grad[new]
        (wanted,) = torch.autograd.grad(rows.each, rows.rows, whole)
        assert rows.rows.shape == (2 + 4, SIZE["hidden_size"]) and rows.rows.grad is not None
        torch.testing.assert_close(rows.rows.grad, wanted, rtol=1e-4, atol=1e-4)
    with untrained(ours):
        assert torch.equal(ours(ids).logits, before)
    with pytest.raises(ValueError, match="rows are made of vectors here"):
        load_adapter_state(ours, {})


def recipe_of(root: Path, output: Path, *overrides: str) -> Path:
    values: dict[str, Any] = {
        "name": "speak",
        "model": {"path": str(root / "model"), "dtype": "bfloat16", "device": "cpu"},
        "quant": {"group_size": 32, "calibrate": "absmax"},
        "adapter": {"method": "lr_qat", "rank": 4},
        "data": {
            "train": {"path": str(root / "speak.jsonl"), "format": "completion"},
            "sequence_len": 64,
            "packing": False,
        },
        "train": {"max_steps": 2, "gradient_accumulation_steps": 1, "micro_batch_size": 2, "save_every": 1},
        "eval": {"perplexity": False, "window": 64},
        "export": {"format": "native", "verify": False},
        "output": str(output),
    }
    values["model"]["add_tokens"] = {"audio": {"codec": str(root / "codec"), "rows": "factorised"}}
    values["train"] |= {"modules_learning_rate": 0.02, "warmup_ratio": 0}
    file = root / "recipe.json"
    file.write_text(json.dumps(values))
    return file


def called(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A codec of 4 bits, its rows for a language model, and two steps of one whose head is its own."""
    root = tmp_path_factory.mktemp("speak")
    write_codec(root / "codec", code={"kind": "bsq", "bits": BITS})
    rows = write_rows(root / "data", TEXTS)
    said = called("encode", root / "codec", rows, root / "speak.jsonl", "--plain")
    assert "speak.jsonl: 4 rows, " in said
    checkpoint(root / "model", transformers.LlamaConfig(**SIZE))
    pipeline.train(load_recipe(recipe_of(root, root / "out")))
    return root


def test_rows_are_the_codes_that_encode_writes(ran: Path) -> None:
    rows = [json.loads(line) for line in (ran / "speak.jsonl").read_text().splitlines()]
    for number, (row, text) in enumerate(zip(rows, TEXTS, strict=True)):
        called("encode", ran / "codec", ran / "data" / f"{number}.wav", ran / f"{number}.json")
        encoded = read_codes(ran / f"{number}.json")
        codes = encoded.codes
        assert row == {
            "codec": encoded.encoder,
            "prompt": f"{asked(text)}\n",
            "completion": START + "".join(f"<|audio_{code}|>" for code in codes) + END,
        }
    bad = ran / "data" / "bad.jsonl"
    for second, said in (
        ({"audio": "9.wav", "text": "a"}, r"bad.jsonl:2: .*9.wav"),
        ({"audio": "~nobody-of-that-name/9.wav", "text": "a"}, r"bad.jsonl:2: .*home directory"),
        ({"audio": "1.wav", "text": " "}, r"bad.jsonl:2: 'text' is blank"),
        ({"audio": "1.wav", "text": "a <|audio_3|>"}, r"bad.jsonl:2: the text has '<.audio_3.>' in it"),
    ):
        bad.write_text('{"audio": "0.wav", "text": "a"}\n' + json.dumps(second) + "\n")
        with pytest.raises(ValueError, match=said):
            pipeline.encode(ran / "codec", bad, ran / "no.jsonl")
    assert not (ran / "no.jsonl").exists()


def test_the_rows_of_the_asset_are_those_of_its_codec(tmp_path: Path) -> None:
    assets = ROOT / "recipes" / "assets"
    pipeline.encode(assets / "speech-codec", assets / "speech" / "valid.jsonl", tmp_path / "a.jsonl")
    assert (tmp_path / "a.jsonl").read_text() == (assets / "speech" / "speak-valid.jsonl").read_text()


def test_only_new_rows_train_and_ordinary_rows_ship(ran: Path) -> None:
    """The old rows are the checkpoint's bytes, new ones the rounded sums of what trained; merged again they
    are the same."""
    old, shipped = (load_file(ran / name / "model.safetensors") for name in ("model", "out/merged"))
    steps = load_file(max((ran / "out/checkpoints").glob("step-*")) / "adapter.safetensors")
    code, config = BSQ(bits=BITS), json.loads((ran / "out/merged/config.json").read_text())
    assert config["vocab_size"] == OLD + 2 + code.size
    for name in ("model.embed_tokens", "lm_head"):
        table, vectors = shipped[f"{name}.weight"], steps[f"{name}.trained_rows.rows"]
        assert torch.equal(table[:OLD], old[f"{name}.weight"]) and vectors.shape == (2 + 1 + BITS, 32)
        made = NewRows(torch.zeros(len(table), 32), range(OLD, len(table)), code.levels)
        made.rows.data.copy_(vectors)
        assert torch.equal(table[OLD:], made.each.detach().bfloat16())
        assert len(table[OLD + 2 :].unique(dim=0)) > 2, "they began alike"
    before = (ran / "out/merged/model.safetensors").read_bytes()
    pipeline.merge(ran / "out")  # from the rows of adapter/, compared with what training wrote
    assert (ran / "out/merged/model.safetensors").read_bytes() == before
    assert load_recipe(ran / "out/recipe.yaml").model.add_tokens.audio.code == code.to_json()  # pyright: ignore[reportOptionalMemberAccess]
    with resume(ran / "out") as session:
        assert adapter_of(session).token_levels == code.levels
    tokenizer = AutoTokenizer.from_pretrained(ran / "out/merged")
    assert tokenizer.convert_tokens_to_ids(audio_tokens(code.size)) == list(range(OLD, OLD + 2 + code.size))


def test_a_codec_is_found_beside_the_recipe_as_every_other_path_is(ran: Path) -> None:
    """From whatever folder the command is given."""
    made = load_recipe(recipe_of(ran, ran / "no"), ["model.add_tokens.audio.codec=codec"])
    audio = made.model.add_tokens.audio  # pyright: ignore[reportOptionalMemberAccess]
    assert audio is not None and audio.codec == str(ran / "codec")
    assert audio.code == BSQ(bits=BITS).to_json()


def test_rows_are_handed_over_to_a_run_of_the_same_tokens(ran: Path) -> None:
    """Sums of vectors go on as rows of their own, and are those that shipped; never as rows of others."""
    rates = ("learning_rate", "scale_learning_rate", "modules_learning_rate")
    start = [f"train.start_from={ran / 'out'}", "train.max_steps=1", *(f"train.{r}=1e-30" for r in rates)]
    with pytest.raises(RecipeError, match="audio.rows: got factorised beside train.start_from"):
        load_recipe(recipe_of(ran, ran / "no"), start)
    each = [*start, "model.add_tokens.audio.rows=each"]
    with pytest.raises(
        ValueError, match=r"model.add_tokens: .* in .*out \(train.start_from\), <new>, <.start"
    ):
        pipeline.train(load_recipe(recipe_of(ran, ran / "no"), [*each, "model.add_tokens.tokens=[<new>]"]))
    pipeline.train(load_recipe(recipe_of(ran, ran / "each"), each))
    one, two = (load_file(ran / name / "merged" / "model.safetensors") for name in ("out", "each"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_plan_counts_the_vectors(ran: Path) -> None:
    def planned(*overrides: str) -> Any:
        return skeleton(load_recipe(recipe_of(ran, ran / "no"), list(overrides)), ran / "model")

    none, each, bits = (
        planned("model.add_tokens=null"),
        planned("model.add_tokens.audio.rows=each"),
        planned("model.add_tokens={audio: {code: {kind: bsq, bits: 4}, rows: factorised}}"),
    )
    assert each.trainable - none.trainable == 2 * 18 * 32  # two tables
    assert bits.trainable - none.trainable == 2 * (2 + 1 + BITS) * 32
    assert bits.trained_bytes - none.trained_bytes == 4 * 2 * (2 + 1 + BITS) * 32
    assert bits.held["embeddings"] == each.held["embeddings"] > none.held["embeddings"]
    assert bits.table_bytes == 2 * (2 + 1 + BITS) * 32


def test_the_codec_of_the_rows_ships_and_another_is_refused(ran: Path, tmp_path: Path) -> None:
    """Of the same number of codes, which is all that tokens say. Rows of two are none to learn from."""
    digest = json.loads((ran / "speak.jsonl").read_text().splitlines()[0])["codec"]
    assert json.loads((ran / "out/merged/config.json").read_text())["audio_codec"] == digest
    other = write_codec(tmp_path / "codec", code={"kind": "bsq", "bits": BITS}, seed=1)
    with pytest.raises(ValueError, match=f"trained on codes of the encoder {digest[:12]}.*give the codec"):
        pipeline.speak(ran / "out", other, "a", tmp_path / "no.wav")
    pipeline.encode(other, ran / "data" / "rows.jsonl", tmp_path / "other.jsonl", plain=True)
    paths = (ran / "speak.jsonl", tmp_path / "other.jsonl")
    two = [f"data.train=[{', '.join(f'{{path: {path}, format: completion}}' for path in paths)}]"]
    with pytest.raises(DataError, match=r"other.jsonl:1: 'codec': got .*encode all rows with one codec"):
        pipeline.train(load_recipe(recipe_of(ran, tmp_path / "two"), two))
    assert not (tmp_path / "two" / "base").exists()


def test_the_folder_of_a_model_does_not_say_how_codes_are_drawn(ran: Path) -> None:
    """Its generation_config is made for text: what it suppresses, its penalties, its beams."""
    model, tokenizer = load_exported(ran / "out/merged").eval(), read_tokenizer(ran / "out/merged")
    audio, how = audio_tokens_of(tokenizer), Drawing(least=4, most=6, temperature=0.0)
    assert audio is not None
    plain = codes_of(model, tokenizer, audio, "aei", how, plain=True)
    model.generation_config.suppress_tokens = [audio.codes[plain[0]]]
    model.generation_config.num_beams, model.generation_config.repetition_penalty = 2, 50.0
    assert codes_of(model, tokenizer, audio, "aei", how, plain=True) == plain
    assert model.generation_config.num_beams == 2, "and has it afterwards"


def test_nothing_but_codes_is_drawn(ran: Path) -> None:
    audio = AudioTokens(start=4, end=5, codes=(6, 7))
    logits = torch.randn(1, 9)
    for length, allowed in ((3, [6, 7]), (4, [6, 7]), (5, [5, 6, 7])):
        made = OnlyCodes(audio, 3, 2)(torch.zeros(1, length, dtype=torch.int64), logits)
        assert made.isfinite()[0].nonzero().flatten().tolist() == allowed
        assert torch.equal(made[0, allowed], logits[0, allowed])
    assert audio_tokens_of(read_tokenizer(ran / "model")) is None
    found = audio_tokens_of(read_tokenizer(ran / "out/merged"))
    assert found == AudioTokens(OLD, OLD + 1, tuple(range(OLD + 2, OLD + 2 + 16)))


def test_a_text_is_spoken(ran: Path) -> None:
    """Greedy codes are those of a loop over transformers' own forward, with all else masked; a voice in front
    is cut off."""
    few = ("--least", 3, "--most", 5, "--steps", 2, "--plain")
    said = called(
        "speak",
        ran / "out",
        ran / "codec",
        "aei",
        ran / "a.wav",
        "--temperature",
        0,
        "--codes",
        ran / "a.json",
        *few,
    )
    codes = read_codes(ran / "a.json").codes
    assert f"{len(codes)} codes, {len(codes) * 0.16:.2f} s" in said and 3 <= len(codes) <= 5
    model, tokenizer = load_exported(ran / "out/merged").eval(), read_tokenizer(ran / "out/merged")
    ids = [*tokenizer(f"{asked('aei')}\n")["input_ids"], OLD]
    found: list[int] = []
    while len(found) < 5:
        scores: Tensor = model(torch.tensor([ids])).logits[0, -1].float()
        choice = [*range(OLD + 2, OLD + 18), *([OLD + 1] if len(found) >= 3 else [])]
        ids.append(choice[int(scores[choice].argmax())])
        if ids[-1] == OLD + 1:
            break
        found.append(ids[-1] - OLD - 2)
    assert codes == found
    called("decode", ran / "codec", ran / "a.json", ran / "b.wav", "--text", "aei", "--steps", 2)
    assert (ran / "a.wav").read_bytes() == (ran / "b.wav").read_bytes()
    voice = ("--prompt", ran / "data/1.wav", "--prompt-text", "ou")
    called("speak", ran / "out", ran / "codec", "aei", ran / "c.wav", *few, *voice)
    assert 3 * 1280 <= len(read_wav(ran / "c.wav").samples) <= 5 * 1280


def test_what_cannot_be_is_refused(ran: Path) -> None:
    out = ran / "no.wav"
    with pytest.raises(ValueError, match="without audio tokens, so it cannot speak"):
        pipeline.speak(ran / "model", ran / "codec", "a", out)
    with pytest.raises(ValueError, match="has tokens for 16 codes, and .* makes 16,384"):
        pipeline.speak(ran / "out", write_codec(ran / "other"), "a", out)
    with pytest.raises(ValueError, match="speak take a speech codec"):
        pipeline.speak(ran / "out", ran / "model", "a", out)
    with pytest.raises(ValueError, match="positions: too few for 12 codes more"):
        pipeline.speak(ran / "out", ran / "codec", "a " * 4000, out)
    for wrong in (
        {"least": 5, "most": 4},
        {"top_k": 0},
        {"top_p": 0.0},
        {"temperature": -1.0},
        {"temperature": 1e-300},
    ):
        with pytest.raises(ValueError, match="allowed"):
            Drawing(**wrong)  # pyright: ignore[reportArgumentType]
    assert not out.exists()
    for said, words in (
        ("{audio: {codec: nowhere}}", "nowhere/config.json: missing"),
        (f"{{audio: {{codec: {ran / 'model'}}}}}", "no speech codec"),
        (f"{{audio: {{codec: {ran / 'codec'}, code: {{kind: bsq, bits: 5}}}}}}", "has bsq of 4 bits"),
        ("{audio: {code: {kind: bsq, bits: 40}}}", "each a row of a table; allowed are 262,144"),
        ("{audio: {}}", "no code; give codec: FOLDER"),
        ("{special: true}", "no token; give tokens"),
        ("{tokens: ['<|audio_3|>'], audio: {code: {kind: bsq, bits: 4}}}", "got '<|audio_3|>' twice"),
    ):
        with pytest.raises(RecipeError) as error:
            load_recipe(recipe_of(ran, ran / "no"), [f"model.add_tokens={said}"])
        assert words in str(error.value), str(error.value)
