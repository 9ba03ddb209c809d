"""The rows of tests/test_families.py: for every table, a recipe that chooses the member of CONTRIBUTING.md,
and what its run has to show."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lowbit_ft import pipeline
from lowbit_ft.adapters.attach import adapted_names
from lowbit_ft.cli.import_recipe import write_imported
from lowbit_ft.data.examples import load_examples
from lowbit_ft.export.reader import load_exported, read_weights
from lowbit_ft.grid import IntGrid
from lowbit_ft.grid.calibrate import CALIBRATORS, Stats
from lowbit_ft.integrations.adapter_files import read_adapter
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.load import load_model
from lowbit_ft.recipe.recipe import Recipe, load_recipe
from lowbit_ft.recipe.yaml import RecipeError
from tests.kv_cache.slim import slim_scales
from tests.rotations.upper import the_upper_half
from tests.sparsity.checkers import every_second_weight

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "recipes" / "assets"
TINY = ASSETS / "tiny-llama"


@dataclass(frozen=True)
class Run:
    """A finished run: its recipe, its folder, and the folder to serve."""

    recipe: Recipe
    folder: Path
    shipped: Path

    def metrics(self, key: str) -> list[float]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [row[key] for row in map(json.loads, lines) if key in row]


def recipe_file(folder: Path, changes: dict[str, Any]) -> Path:
    """A short run on the tiny Llama, with these keys (dotted) changed."""
    rows = {"path": str(ASSETS / "docstrings" / "train.jsonl"), "format": "chat", "limit": 8}
    recipe: dict[str, Any] = {
        "name": "toy",
        "model": {"path": str(TINY), "dtype": "float32", "device": "cpu"},
        "quant": {"targets": ["*.layers.0.*"]},
        "adapter": {"method": "scale"},
        "data": {"train": rows, "sequence_len": 64},
        "train": {
            "max_steps": 2,
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "learning_rate": 0.01,
            "warmup_ratio": 0,
        },
        "eval": {"windows": 1, "window": 64, "kl": False},
        "output": str(folder / "run"),
    }
    for key, value in changes.items():
        *path, last = key.split(".")
        section = recipe
        for part in path:
            section = section[part] if part in section else section.setdefault(part, {})
        section[last] = value
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def with_key(key: str, **more: Any) -> Callable[[Path, str], Path]:
    """A recipe that chooses a member by `key`; more: further keys, with __ for the dots."""
    others = {name.replace("__", "."): value for name, value in more.items()}
    return lambda folder, name: recipe_file(folder, others | {key: name})


# ------------------------------------------------------------------------------------------------ the rows


def first_layer(folder: Path) -> tuple[str, Any]:
    weights = read_weights(folder)
    name = next(iter(weights))
    return name, weights[name]


def one_scale_per_row(run: Run) -> None:
    _, base = first_layer(run.folder / "base")
    assert base.grid.name == "row" and base.scale.shape[0] == 1
    assert run.recipe.quant.calibrate == "absmax", "a grid names the calibrator it starts with"
    assert "grid R4" in (run.shipped / "README.md").read_text()


def half_the_scales(run: Run) -> None:
    name, base = first_layer(run.folder / "base")
    dense = load_file(TINY / "model.safetensors")[f"{name}.weight"]
    whole = CALIBRATORS["absmax"].run(dense, base.grid, Stats())
    torch.testing.assert_close(base.scale.float(), whole.scale.float() / 2, rtol=2**-8, atol=0)


def one_factor_per_layer(run: Run) -> None:
    config, state, _ = read_adapter(run.folder / "adapter")
    assert config.method == "layer_scale" and len(state) == len(adapted_names(state)) == 7
    assert all(tensor.shape == (1,) and tensor.item() != 0 for tensor in state.values())
    assert run.metrics("scale_lr") == [0.03, 0.03 / 2] and not run.metrics("lr")
    pipeline.merge(run.folder)  # again from the files, which name the method: merged/ must be the same


def inputs_on_powers_of_two(run: Run) -> None:
    specs = read_weights(run.folder / "merged").specs
    assert {str(spec.activation) for spec in specs.values()} == {"A4 shift"} and len(specs) == 7
    layer = load_exported(run.shipped).model.layers[0].mlp.up_proj
    codes, scale, _ = layer.activation.codes(torch.randn(3, layer.in_features))
    assert torch.equal(scale.log2(), scale.log2().round()) and 3 < int(codes.abs().max()) <= 7


def short_or_long(run: Run) -> None:
    config = json.loads((run.shipped / "config.json").read_text())
    assert config["id2label"] == {"0": "short", "1": "long"}
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    head = load_file(run.shipped / "model.safetensors")["score.weight"]
    state = read_adapter(run.folder / "adapter")[1]
    assert torch.equal(head, state["base_model.model.score.weight"]), "the head that was trained ships"
    rows = json.loads((run.folder / "evaluation.json").read_text())["rows"]
    trained, *shipped = [(r["loss"], r["scores"]) for r in rows if r["stage"] not in ("base", "quantized")]
    assert len(shipped) == 2 and all(one == trained for one in shipped)


def dense_weights(run: Run) -> None:
    name, merged = first_layer(run.folder / "merged")
    assert torch.equal(load_file(run.shipped / "model.safetensors")[f"{name}.weight"], merged.dequantize())


def refused_at_three_bits(run: Run) -> None:
    assert run.recipe.export.server == "sharp"
    changes = {
        "export.server": "sharp",
        "quant.bits": 3,
        **{k.replace("__", "."): v for k, v in ABSMAX.items()},
    }
    with pytest.raises(RecipeError, match=r"kernels for 4 and 8 bits.*quant.bits: 4 \(the nearest grid\)"):
        load_recipe(recipe_file(run.folder.parent, changes))


def int8_checkpoint(folder: Path, name: str) -> Path:
    """The tiny Llama in int8 rows, under that quant_method."""
    came = folder / name
    shutil.rmtree(came, ignore_errors=True)
    shutil.copytree(TINY, came)
    out = {}
    for key, value in load_file(TINY / "model.safetensors").items():
        layer = key.removesuffix(".weight")
        if not layer.endswith("_proj") or ".layers.0." not in layer:
            out[key] = value
            continue
        scale = (value.float().abs().amax(1) / 127).bfloat16()
        out[f"{layer}.q"] = (value.float() / scale.float()[:, None]).round().clamp(-128, 127).to(torch.int8)
        out[f"{layer}.s"] = scale[None]
    save_file(out, came / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((came / "config.json").read_text())
    config["quantization_config"] = {"quant_method": name, "bits": 8}
    (came / "config.json").write_text(json.dumps(config))
    return recipe_file(folder, {"model.path": str(came), "name": name, "quant": {}})


def the_codes_that_came(run: Run) -> None:
    name, base = first_layer(run.folder / "base")
    came = load_file(Path(run.recipe.model.path) / "model.safetensors")
    assert torch.equal(base.unpack_codes().to(torch.int16) - 128, came[f"{name}.q"].to(torch.int16))
    assert base.grid == IntGrid(bits=8, group_size=-1, residual_bits=0)


def rows_in_capitals(run: Run) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    windows = load_examples(run.recipe.data.train, run.recipe.data, tokenizer)
    text = tokenizer.decode(windows[0].input_ids, skip_special_tokens=True)
    assert text == text.upper() != text.lower()


def the_likeliest_tokens(run: Run) -> None:
    model = load_model(Checkpoint.open(str(TINY), dtype="float32"), dtype=torch.float32).eval()
    lines = [json.loads(x) for f in (run.folder / "synthesis").rglob("*.jsonl") for x in f.open()]
    assert sorted(row["row"] for row in lines) == list(range(6))
    for row in lines:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            likeliest = model(input_ids=ids).logits[0, :-1].argmax(-1)
        assert row["input_ids"][0] == row["row"] and likeliest.tolist() == row["input_ids"][1:]


def steps_of_one_size(run: Run) -> None:
    _, state, _ = read_adapter(run.folder / "adapter")
    steps = torch.cat([tensor.flatten() for tensor in state.values()]) / 0.01  # rates 0.01, then 0.005 x 2
    assert set(steps.unique().mul(2).round().tolist()) <= {-4.0, -2.0, 0.0, 2.0, 4.0} and bool(steps.any())


def a_quarter_from_the_middle_on(run: Run) -> None:
    assert run.metrics("scale_lr") == [0.01, 0.01 / 4]


def no_more_than_one_per_token(run: Run) -> None:
    assert all(0 < loss <= 1 for loss in run.metrics("loss"))


def learned_from(run: Run) -> dict[str, Any]:
    """What the newest checkpoint says it learned from."""
    state = sorted((run.folder / "checkpoints").glob("step-*/state.json"))[-1]
    return json.loads(state.read_text())["meta"]["signal"]


def the_likeliest_token(run: Run) -> None:
    facts, measured = learned_from(run), json.loads((run.folder / "teacher.json").read_text())
    assert facts["kind"] == "hard" and facts["teacher"] == "residual"
    assert 0 < 4 * measured["kl"] < measured["student_kl"]
    assert all(0 < loss < 2 for loss in run.metrics("loss"))  # labels: above 4


def as_likely_as_any_other(run: Run) -> None:
    assert learned_from(run)["teacher"] == "clueless"
    parts = zip(run.metrics("loss"), run.metrics("labels_loss"), run.metrics("logits_loss"), strict=True)
    assert all(loss == pytest.approx((a + b) / 2) and b > 1 for loss, a, b in parts)


def signs_and_zeros(run: Run) -> None:
    """The squared norm of such a gradient counts its signs; the checkpoint says what made it."""
    counted = [norm**2 for norm in run.metrics("grad_norm")]
    assert len(counted) == 2 and all(n > 7 and n == pytest.approx(round(n), abs=1e-3) for n in counted)
    state = sorted((run.folder / "checkpoints").glob("step-*/state.json"))[-1]
    assert json.loads(state.read_text())["meta"]["gradient"] == {"kind": "signed", "cage": None}


def tiny_yaml(folder: Path, name: str) -> Path:
    theirs = folder / "tiny_model.yaml"
    rows = str(ASSETS / "docstrings" / "train.jsonl")
    theirs.write_text(yaml.safe_dump({name: str(TINY), "rows": rows, "steps": 2}))
    write_imported(theirs, folder / "imported.yaml", force=True)
    made = yaml.safe_load((folder / "imported.yaml").read_text())
    short = {"name": made["name"], "adapter": made["adapter"], "train.max_steps": made["train"]["max_steps"]}
    short |= {"model.path": made["model"]["path"], "data.train.path": made["data"]["train"]["path"]}
    return recipe_file(folder, short)


def what_its_yaml_said(run: Run) -> None:
    assert run.recipe.adapter.method == "dl_qat" and len(run.metrics("loss")) == 2
    assert "From the TinyTrainer file" in (run.folder.parent / "imported.yaml").read_text()


@dataclass(frozen=True)
class Row:
    """write(folder, name): a recipe that chooses the member of that name; shows(run): that it was this member
    that ran; word: what a mistyped choice is answered with, and what run, report and card say (default: the
    key of the table); schema: the choice is a key of the recipe."""

    write: Callable[[Path, str], Path]
    shows: Callable[[Run], None]
    word: str | None = None
    schema: bool = True


ABSMAX: dict[str, Any] = {"quant__calibrate": "absmax"}
ROWS: dict[str, Row] = {
    "GRIDS": Row(with_key("quant.grid", quant__group_size=-1), one_scale_per_row),
    "CALIBRATORS": Row(with_key("quant.calibrate"), half_the_scales),
    "ROTATIONS": Row(with_key("quant.rotation.kind", **ABSMAX), the_upper_half),
    "SPARSITY": Row(
        with_key("quant.sparsity.kind", adapter__method="lr_qat", train__learning_rate=0.1, **ABSMAX),
        every_second_weight,
    ),
    "ADAPTERS": Row(
        with_key("adapter.method", train__scale_learning_rate=0.03, train__scheduler="linear", **ABSMAX),
        one_factor_per_layer,
    ),
    "ACTIVATIONS": Row(
        with_key("quant.activations.kind", quant__activations__bits=4, export__format="native", **ABSMAX),
        inputs_on_powers_of_two,
    ),
    "KINDS": Row(with_key("quant.kv_cache.kind", quant__kv_cache__bits=4, **ABSMAX), slim_scales),
    "EXPORTERS": Row(with_key("export.format", **ABSMAX), dense_weights),
    "SERVERS": Row(with_key("export.server", **ABSMAX), refused_at_three_bits),
    "READERS": Row(int8_checkpoint, the_codes_that_came, schema=False),
    "FORMATS": Row(
        with_key("data.train.format", data__train__path=str(ASSETS / "text" / "train.jsonl"), **ABSMAX),
        rows_in_capitals,
    ),
    "TASKS": Row(
        with_key(
            "task",
            data__train={"path": str(ASSETS / "text" / "train.jsonl"), "limit": 2},
            data__sequence_len=32,
            eval__windows=2,
            **ABSMAX,
        ),
        short_or_long,
    ),
    "SYNTHESIS": Row(
        with_key(
            "data.synthesis.kind",
            data__train=None,
            data__sequence_len=16,
            data__synthesis__samples=6,
            data__synthesis__batch_size=4,
            data__synthesis__filter={"min_tokens": 1, "max_repetition": 1.0, "max_unreadable": 1.0},
            eval__window=16,
            **ABSMAX,
        ),
        the_likeliest_tokens,
    ),
    "OPTIMIZERS": Row(with_key("train.optimizer", train__scheduler="constant", **ABSMAX), steps_of_one_size),
    "SCHEDULERS": Row(with_key("train.scheduler", **ABSMAX), a_quarter_from_the_middle_on),
    "LOSSES": Row(with_key("train.loss", **ABSMAX), no_more_than_one_per_token),
    "SIGNALS": Row(with_key("train.signal.kind", train__teacher="residual", **ABSMAX), the_likeliest_token),
    "TEACHERS": Row(with_key("train.teacher", train__signal__kind="mix", **ABSMAX), as_likely_as_any_other),
    "GRADIENTS": Row(with_key("train.gradient.kind", **ABSMAX), signs_and_zeros),
    "TRAINERS": Row(tiny_yaml, what_its_yaml_said, word="tiny_model", schema=False),
}
