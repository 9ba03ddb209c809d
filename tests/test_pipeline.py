"""The straight line, end to end on the tiny Llama: every method, the files of a run, what it refuses."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from lowbit_ft import pipeline
from lowbit_ft.export.reader import load_exported
from lowbit_ft.files.manifest import MANIFEST, file_entry, open_sealed, sealed
from lowbit_ft.model.linear import PackedLinear
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.yaml import RecipeError
from lowbit_ft.rundir import RunDir
from tests.line_tools import QUICK, ROOT, recipe

pytestmark = pytest.mark.usefixtures("in_the_repository")


LINES = {
    "lr_qat": [],
    "dl_qat": ["adapter={method: dl_qat, rank: 4}", "quant.bits=3", "quant.symmetric=false"],
    "l4q": [
        "adapter={method: l4q, rank: 4, warmup_steps: 1}",
        "quant.symmetric=false",
        "quant.calibrate=gptq",
        "quant.calibration.samples=4",
        "quant.calibration.sequence_len=64",
    ],
    "scale": ["adapter={method: scale}", "quant.bits=2", "quant.group_size=64", "quant.residual_bits=0"],
    "alpha_tuning": [
        "adapter={method: alpha_tuning}",
        "quant={grid: binary, bits: 3}",
        "export.format=native",
    ],
    "lora": ["adapter={method: lora, rank: 4}", "quant.residual_bits=0"],
}


@pytest.mark.parametrize("method", LINES)
def test_the_whole_line(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    made = recipe(out, *LINES[method])
    folder = pipeline.run(made)
    rows = {row["stage"]: row for row in json.loads((out / "evaluation.json").read_text())["rows"]}
    shipped = ["merged"] + (["exported"] if folder.name == "exported" else [])
    assert {"base", "quantized", "trained", *shipped} == set(rows)
    for stage in shipped:
        if made.adapter.exact_merge:
            assert rows[stage]["loss"] == rows["trained"]["loss"], "what was trained is not what ships"
            assert rows[stage]["kl"] == rows["trained"]["kl"]
    if method == "lora":  # declared inexact: requantizing must be seen, not hidden
        assert rows["merged"]["loss"] != rows["trained"]["loss"]
        assert rows["exported"]["loss"] == rows["merged"]["loss"]
    assert rows["base"]["kl"] == 0 and rows["quantized"]["kl"] > 0
    assert rows["trained"]["loss"] != rows["quantized"]["loss"]
    printed = capsys.readouterr().out
    assert "serve it:" in printed or "use it:" in printed
    assert ("lora was merged by rounding again" in printed) == (method == "lora")
    assert "left alone (excluded by 'lm_head'): lm_head" in printed
    names = {
        "recipe.yaml",
        "environment.json",
        "metrics.jsonl",
        "quant.json",
        "trainable.json",
        "moved.json",
        "stages.json",
    }
    names |= {"evaluation.json", "samples.json", "report.html"}
    assert names <= {p.name for p in out.iterdir()}
    assert [s["stage"] for s in json.loads((out / "stages.json").read_text())] == [
        "quantize",
        "train",
        "merge",
        "export",
        "evaluate",
    ]
    moved = json.loads((out / "moved.json").read_text())
    assert moved["scale_change"] > 0 or method == "lora"
    for name in (
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "README.md",
    ):
        assert (folder / name).is_file(), name
    card = (folder / "README.md").read_text()
    assert "| trained |" in card and f"method: {method}" in card
    # later stages on their own, from the files
    assert pipeline.merge(out) == out / "merged"
    expected = "written ones"
    assert expected in capsys.readouterr().out
    if folder.name == "exported":
        pipeline.verify(folder)
    assert isinstance(pipeline.generate(out, "def f(x):", 3), str)


def test_merge_refuses_codes_that_are_not_the_written_ones(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    out = tmp_path / "run"
    pipeline.train(recipe(out))
    path = out / "adapter" / "adapter_model.safetensors"
    state = load_file(path)
    name = next(key for key in state if key.endswith(".B"))
    state[name] = state[name] + 0.5
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: its content is not the one"):
        pipeline.merge(out)
    facts = open_sealed(out / "adapter" / MANIFEST)  # as if it had been written so
    facts["files"][path.name] = file_entry(path)
    (out / "adapter" / MANIFEST).write_bytes(sealed(facts))
    RunDir(out).made("adapter")
    with pytest.raises(
        ValueError, match=r"is not what base/ and adapter/ merge to:\nmerge: .* are not the written ones"
    ):
        pipeline.merge(out)


def test_merged_stays_packed_and_base_is_reused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    pipeline.quantize(recipe(out))
    before = hashlib.sha256((out / "base" / "model.safetensors").read_bytes()).hexdigest()
    pipeline.train(recipe(out))
    assert "base: reusing" in capsys.readouterr().out
    assert hashlib.sha256((out / "base" / "model.safetensors").read_bytes()).hexdigest() == before
    model = load_exported(out / "merged")
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert len(packed) == 28
    for layer in packed:
        held = sum(b.numel() * b.element_size() for b in layer.buffers())
        assert held * 8 <= (4 + 1) * layer.in_features * layer.out_features
        assert not list(layer.parameters())


def test_a_run_folder_may_be_moved_and_a_damaged_base_is_packed_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    pipeline.train(recipe(out))
    before = json.loads((out / "environment.json").read_text())
    moved = out.rename(tmp_path / "elsewhere")
    pipeline.merge(moved)
    pipeline.export(moved)
    assert json.loads((moved / "environment.json").read_text()) == before
    path = moved / "base" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-40_000:-36_000] = bytes(4000)
    path.write_bytes(data)
    capsys.readouterr()
    pipeline.quantize(recipe(moved))
    assert "packing it again" in capsys.readouterr().out
    pipeline.merge(moved)  # the base it was trained on is back, bit for bit
    merged = moved / "merged" / "model.safetensors"
    data = bytearray(merged.read_bytes())
    data[-40_000] ^= 1
    merged.write_bytes(data)
    with pytest.raises(ValueError, match="model.safetensors: its content is not the one that was written"):
        pipeline.merge(moved)


def test_bf16_ships_what_it_trained(tmp_path: Path) -> None:
    """Enough of a learning rate that codes move, in the dtype a GPU trains in."""
    out = tmp_path / "run"
    pipeline.run(recipe(out, "model.dtype=bfloat16", "train.learning_rate=0.5", "eval.generate=[]"))
    rows = {row["stage"]: row for row in json.loads((out / "evaluation.json").read_text())["rows"]}
    assert (
        rows["trained"]["loss"]
        == rows["merged"]["loss"]
        == rows["exported"]["loss"]
        != rows["quantized"]["loss"]
    )
    moved = json.loads((out / "moved.json").read_text())
    del moved["scale_change"]
    assert sum(moved.values()) / len(moved) > 1e-3


def test_another_recipe_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    pipeline.quantize(recipe(out, "train.max_steps=5"))  # nothing is trained yet: the recipe may still change
    pipeline.train(recipe(out))
    with pytest.raises(ValueError, match=r"another recipe; these keys differ: adapter.rank, train.max_steps"):
        pipeline.quantize(recipe(out, "adapter.rank=4", "train.max_steps=7"))
    pipeline.quantize(recipe(out, "eval.windows=2"))  # measuring differently is the same run
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no run"):
        pipeline.quantize(
            load_recipe("recipes/quickstart.yaml", [*QUICK, f"output={tmp_path / 'full'}"], check=False)
        )


def test_a_run_killed_in_its_first_write_is_started_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / ".recipe.yaml.lowbit_ft-0123456789abcdef.partial").write_text("name: qu")
    assert RunDir.start(recipe(out)).recipe().name == recipe(out).name
    assert sorted(path.name for path in out.iterdir()) == [".lowbit_ft.lock", "recipe.yaml", "started.json"]


def test_stages_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not packed by lowbit_ft .* give the folder of a run"):
        pipeline.export(tmp_path)
    out = tmp_path / "run"
    pipeline.quantize(recipe(out))
    with pytest.raises(ValueError, match="no adapter yet"):
        pipeline.merge(out)
    with pytest.raises(ValueError, match="no merged model yet"):
        pipeline.export(out)
    with pytest.raises(ValueError, match="format: got 'tflite'"):
        pipeline.export(out, "tflite")


def test_a_mixture_of_experts_goes_the_whole_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Packed experts to a server's format, and with a packed head and embedding to our own; the trained loss
    ships in both.
    """
    torch.manual_seed(0)
    tokens = ROOT / "recipes" / "assets" / "tiny-llama"
    config = json.loads((tokens / "config.json").read_text())
    folder = tmp_path / "mixtral"
    AutoModelForCausalLM.from_config(
        MixtralConfig(
            vocab_size=config["vocab_size"],
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=256,
            bos_token_id=config["bos_token_id"],
            eos_token_id=config["eos_token_id"],
        )
    ).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tokens / name).is_file():
            (folder / name).write_bytes((tokens / name).read_bytes())
    served = ["export.format=compressed-tensors", "train.gradient_checkpointing=true"]
    ours = [
        "export.format=native",
        "quant.lm_head=8",
        "quant.embeddings=4",
        "quant.calibrate=gptq",
        "quant.calibration.samples=4",
        "quant.calibration.sequence_len=64",
        "adapter={method: l4q, rank: 2, warmup_steps: 1}",
    ]
    for name, own in (("served", served), ("ours", ours)):
        out = tmp_path / name
        made = recipe(out, f"model.path={folder}", "quant.group_size=32", "train.learning_rate=0.3", *own)
        pipeline.run(made)
        rows = {row["stage"]: row for row in json.loads((out / "evaluation.json").read_text())["rows"]}
        assert rows["merged"]["loss"] == rows["trained"]["loss"] != rows["quantized"]["loss"]
        if name == "served":
            assert rows["exported"]["loss"] == rows["trained"]["loss"]
        moved = json.loads((out / "moved.json").read_text())
        assert sum(share > 0 for layer, share in moved.items() if ".experts." in layer) > 8
        assert f"quantized {2 * (4 + 8) + (2 if name == 'ours' else 0)} layers" in capsys.readouterr().out
        again = pipeline.merge(
            out
        )  # the adapter of every expert is in adapter/, and merges to the same bytes
        assert again == out / "merged"
    with pytest.raises(RecipeError, match="embeddings in full precision only"):
        recipe(tmp_path / "x", f"model.path={folder}", "quant.group_size=32", "quant.embeddings=8")
