"""The recipe: what is accepted, what is refused with which words, and that nothing else ever comes out."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.cli.init import write_recipe
from lowbit_ft.grid import BinaryGrid, IntGrid
from lowbit_ft.grid.calibrate import CALIBRATORS
from lowbit_ft.names import matches
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.check import notes
from lowbit_ft.recipe.layers import read_shapes
from lowbit_ft.recipe.recipe import Recipe, check_recipe, load_recipe, recipe_schema
from lowbit_ft.recipe.yaml import RecipeError

ROOT = Path(__file__).parents[2]
TINY = ROOT / "recipes" / "assets" / "tiny-llama"
CHAT = ROOT / "recipes" / "assets" / "docstrings" / "train.jsonl"

# Line numbers below count in this text: keep one key per line.
GOOD = f"""\
name: test
model:
  path: {TINY}
  dtype: float32
  device: cpu
quant:
  bits: 4
  group_size: 128
adapter:
  method: lr_qat
  rank: 8
data:
  train:
    path: {CHAT}
    format: chat
  sequence_len: 256
train:
  max_steps: 10
  learning_rate: 1e-4
output: runs/test
"""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(text: str, name: str = "r.yaml") -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


def refused(text: str, overrides: tuple[str, ...] = ()) -> list[str]:
    """The problems of a recipe that must be refused."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(text), overrides)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


# ---------------------------------------------------------------- what is accepted


def test_good_recipe_and_its_defaults():
    recipe = load_recipe(write(GOOD))
    assert recipe.train.learning_rate == 1e-4  # text to PyYAML
    assert (recipe.quant.calibrate, recipe.quant.residual_bits, recipe.export.format) == (
        "mse",
        4,
        "compressed-tensors",
    )
    assert recipe.adapter.method == "lr_qat" and recipe.output == Path("runs/test")
    assert check_recipe(recipe) == []
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.seed = 3


def test_yaml_round_trip_is_equal():
    recipe = load_recipe(write(GOOD), ["quant.overrides=[{match: '*.down_proj', bits: 8}]", "train.eps=1e-6"])
    again = load_recipe(write(recipe.to_yaml(), "again.yaml"))
    assert again == recipe and again.to_yaml() == recipe.to_yaml()


def test_numbers_written_as_text_and_unquoted_no():
    text = GOOD.replace("rank: 8", "rank: 1e1").replace(
        "max_steps: 10", "max_steps: 1e3\n  mixed_precision: no"
    )
    recipe = load_recipe(write(text))
    assert recipe.adapter.rank == 10 and recipe.train.max_steps == 1000  # type: ignore[attr-defined]
    assert recipe.train.mixed_precision == "no"


def test_overrides_reach_into_sections_lists_and_new_sections():
    recipe = load_recipe(
        write(GOOD),
        [
            "train.max_steps=7",
            "quant.overrides=[{match: '*.down_proj', bits: 8}]",
            "quant.overrides.0.bits=3",
            "eval.generate=['a b', c]",
            "adapter={method: scale}",
            "model.revision=",
        ],
    )
    assert recipe.train.max_steps == 7 and recipe.quant.overrides[0].bits == 3
    assert recipe.eval.generate == ["a b", "c"] and recipe.adapter.method == "scale"
    assert recipe.model.revision is None


def test_grid_for_last_override_wins():
    overrides = "[{match: '*.mlp.*', bits: 3, group_size: 64}, {match: '*.down_proj', bits: 8}]"
    quant = load_recipe(write(GOOD), [f"quant.overrides={overrides}"]).quant
    assert quant.grid_for("model.layers.0.mlp.down_proj") == IntGrid(bits=8, group_size=64)
    assert quant.grid_for("model.layers.0.mlp.up_proj") == IntGrid(bits=3, group_size=64)
    assert quant.grid_for("model.layers.0.self_attn.q_proj") == IntGrid(bits=4, group_size=128)


def test_binary_grid():
    recipe = load_recipe(
        write(GOOD),
        ["quant.grid=binary", "quant.bits=3", "adapter={method: alpha_tuning}", "export.format=native"],
    )
    assert recipe.quant.calibrate == "greedy"
    assert recipe.quant.grid_for("x") == BinaryGrid(bits=3, group_size=128)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("proj", "model.layers.0.self_attn.q_proj", False),
        ("*.layers.0.*", "model.layers.0.mlp.up_proj", True),
        (r".*\.(q|k)_proj", "model.layers.1.self_attn.k_proj", True),
        ("lm_head", "lm_head", True),
        ("(", "(", True),
        ("(", "x", False),
    ],
)
def test_matches(pattern, name, expected):
    assert matches(pattern, name) is expected


@pytest.mark.parametrize(
    ("name", "skipped"),
    [
        ("model.layers.3.mlp.gate_proj", False),
        ("model.decoder.layers.0.fc1", False),
        ("model.layers.0.mlp.experts.5.w1", False),
        ("lm_head", True),
        ("model.layers.0.mlp.gate", True),
        ("model.decoder.project_in", True),
        ("model.vision_tower.layers.0.fc1", True),
    ],
)
def test_all_linear_means_the_linears_of_decoder_layers(name, skipped):
    reason = load_recipe(write(GOOD)).quant.skip_reason(name)
    assert (reason is not None) is skipped


def test_paths_beside_the_recipe_are_found(tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    shutil.copy(CHAT, folder / "rows.jsonl")
    recipe = load_recipe(write(GOOD.replace(str(CHAT), "rows.jsonl"), "elsewhere/r.yaml"))
    assert recipe.data.train.path == "elsewhere/rows.jsonl" or Path(recipe.data.train.path).is_file()


def test_hub_ids_pass_unchecked():
    recipe = load_recipe(
        write(GOOD), ["model.path=some-org/some-model", "data.train.path=some-org/some-data"]
    )
    assert any("hub id" in note for note in notes(recipe))


def test_every_shipped_recipe_is_valid(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    files = sorted((ROOT / "recipes").glob("*.yaml"))
    assert len(files) >= 6
    for file in files:
        recipe = load_recipe(file)
        assert recipe.name == file.stem and recipe.output == Path("runs") / file.stem
        text = file.read_text(encoding="utf-8")
        assert f"lowbit-ft run  recipes/{file.name}" in text or f"lowbit-ft run recipes/{file.name}" in text
        resolved = tmp_path / file.name
        resolved.write_text(recipe.to_yaml(), encoding="utf-8")
        assert load_recipe(resolved) == recipe


# ---------------------------------------------------------------- what is refused, and how it is said

BAD = [
    # (what, changed text, override, place and words that must be in one line)
    (
        "unknown key",
        ("max_steps: 10", "max_steps: 10\n  stpes: 3"),
        (),
        "r.yaml:19: train.stpes: unknown key; did you mean",
    ),
    (
        "unknown key near",
        ("dtype: float32", "dtpye: float32"),
        (),
        "r.yaml:4: model.dtpye: unknown key; did you mean 'dtype'?; allowed: path",
    ),
    ("unknown section", ("data:\n", "dta:\n"), (), "r.yaml:12: dta: unknown key; did you mean 'data'?"),
    (
        "unknown method",
        ("lr_qat", "lr_qta"),
        (),
        "r.yaml:10: adapter.method: got 'lr_qta'; allowed: lr_qat, dl_qat",
    ),
    ("key of another method", ("rank: 8", "planes: all"), (), "r.yaml:11: adapter.planes: unknown key"),
    (
        "literal",
        ("device: cpu", "device: gpu"),
        (),
        "r.yaml:5: model.device: got 'gpu'; allowed: auto, cpu, cuda; did you mean 'cpu'?",
    ),
    (
        "number",
        ("learning_rate: 1e-4", "learning_rate: fast"),
        (),
        "r.yaml:19: train.learning_rate: got 'fast'; allowed: a number",
    ),
    (
        "bool for number",
        ("max_steps: 10", "max_steps: true"),
        (),
        "r.yaml:18: train.max_steps: got True; allowed: a number",
    ),
    (
        "bool for adapter number",
        ("rank: 8", "rank: true"),
        (),
        "r.yaml:11: adapter.rank: got 'true'; allowed: an integer",
    ),
    (
        "range",
        ("rank: 8", "rank: 0"),
        (),
        "r.yaml:11: adapter.rank: got 0; allowed: greater than or equal to 1",
    ),
    (
        "infinite",
        ("rank: 8", "alpha: .inf"),
        (),
        "r.yaml:11: adapter.alpha: got inf; allowed: a finite number",
    ),
    ("missing", ("    format: chat\n", ""), (), "r.yaml:13: data.train.format: missing; add `format: ...`"),
    (
        "missing section",
        ("train:\n  max_steps: 10\n  learning_rate: 1e-4\n", ""),
        (),
        "train: got max_steps None and epochs None; allowed: exactly one",
    ),
    (
        "both lengths",
        ("max_steps: 10", "max_steps: 10\n  epochs: 2"),
        (),
        "r.yaml:17: train: got max_steps 10 and epochs 2.0; allowed: exactly one",
    ),
    (
        "value for section",
        ("quant:\n  bits: 4\n  group_size: 128\n", "quant: 4\n"),
        (),
        "r.yaml:6: quant: got 4; allowed: a mapping with the keys grid, bits",
    ),
    (
        "duplicate key",
        ("bits: 4", "bits: 4\n  bits: 3"),
        (),
        "r.yaml:8: quant.bits: got the key twice (first on line 7); keep one",
    ),
    ("tag", ("bits: 4", "bits: !!python/name:os.system"), (), "r.yaml:7: quant.bits: got the tag"),
    ("merge key", ("bits: 4", "<<: {bits: 4}"), (), "r.yaml:7: quant: got '<<'; merge keys are not allowed"),
    ("bits", ("bits: 4", "bits: 5"), (), "r.yaml:7: quant.bits: got 5; allowed: 1, 2, 3, 4, 8"),
    (
        "bits of the grid",
        ("bits: 4", "bits: 1"),
        (),
        "r.yaml:7: quant.bits: got 1; allowed on quant.grid integer: 2, 3, 4, 8",
    ),
    (
        "group size",
        ("group_size: 128", "group_size: 100"),
        (),
        "r.yaml:8: quant.group_size: got 100; allowed: 32, 64, 128, 256, -1",
    ),
    (
        "calibrator",
        ("bits: 4", "bits: 4\n  calibrate: gtpq"),
        (),
        "r.yaml:8: quant.calibrate: got 'gtpq'; allowed: absmax, minmax, mse, gptq; did you mean 'gptq'?",
    ),
    (
        "calibrator of the other grid",
        ("bits: 4", "bits: 4\n  calibrate: greedy"),
        (),
        "r.yaml:8: quant.calibrate: got 'greedy', which works on binary grids",
    ),
    (
        "calibrator needs zero points",
        ("bits: 4", "bits: 4\n  calibrate: minmax"),
        (),
        "r.yaml:8: quant.calibrate: got 'minmax', which needs quant.symmetric: false",
    ),
    (
        "targets",
        ("bits: 4", "bits: 4\n  targets: all-liner"),
        (),
        "r.yaml:8: quant.targets: got 'all-liner'; allowed: all-linear",
    ),
    (
        "target matches nothing",
        ("bits: 4", "bits: 4\n  targets: [q_prj]"),
        (),
        "r.yaml:8: quant.targets.0: got 'q_prj', which matches no linear layer; did you mean 'q_proj'?",
    ),
    (
        "exclude matches nothing",
        ("bits: 4", "bits: 4\n  exclude: [lm_haed]"),
        (),
        "r.yaml:8: quant.exclude.0: got 'lm_haed', which matches no linear layer; did you mean 'lm_head'?",
    ),
    (
        "bad regex",
        ("bits: 4", "bits: 4\n  exclude: ['q_proj)']"),
        (),
        "r.yaml:8: quant.exclude.0: got 'q_proj)', not a name, glob or regex",
    ),
    (
        "nothing left",
        ("bits: 4", "bits: 4\n  exclude: ['*.layers.*']"),
        (),
        "quant.targets: got 'all-linear' less exclude: no layer is left; the model has",
    ),
    (
        "override matches nothing",
        ("bits: 4", "bits: 4\n  overrides: [{match: '*.down', bits: 8}]"),
        (),
        "r.yaml:8: quant.overrides.0.match: got '*.down', which matches no quantized layer; did you mean "
        "'down_proj'?",
    ),
    (
        "override says nothing",
        ("bits: 4", "bits: 4\n  overrides: [{match: '*'}]"),
        (),
        "r.yaml:8: quant.overrides.0: got an override that changes nothing",
    ),
    (
        "method against residual",
        ("lr_qat", "l4q"),
        ("quant.residual_bits=0",),
        "r.yaml:10: adapter.method: got 'l4q': l4q re-grids",
    ),
    (
        "warm-up as long as the run",
        ("lr_qat", "l4q\n  warmup_steps: 10"),
        (),
        "r.yaml:11: adapter.warmup_steps: got 10, but train.max_steps is 10",
    ),
    (
        "cheap gradients that cost more",
        ("rank: 8", "rank: 64\n  low_rank_gradient: factorised"),
        ("adapter.scale_grad_tokens=0.25",),
        "r.yaml:12: adapter.low_rank_gradient: got 'factorised', which with rank 64, group size 128 and "
        "scale_grad_tokens 0.25 costs 1.25 products",
    ),
    (
        "corrected from all tokens",
        ("rank: 8", "rank: 8\n  low_rank_gradient: corrected"),
        (),
        "costs 1.12 products of a layer's size where exact costs 1",
    ),
    (
        "drawn tokens beside exact",
        ("rank: 8", "rank: 8\n  scale_grad_tokens: 0.5"),
        (),
        "scale_grad_tokens 0.5 with low_rank_gradient exact, whose third GEMM is of all tokens",
    ),
    (
        "no tokens drawn",
        ("lr_qat\n  rank: 8", "scale\n  scale_grad_tokens: 0"),
        (),
        "r.yaml:11: adapter.scale_grad_tokens: got 0; allowed: greater than 0",
    ),
    (
        "nothing to keep",
        ("rank: 8", "rank: 8\n"),
        ("adapter={method: lora}", "train.keep_codes=true"),
        "train.keep_codes: got true, but lora rounds nothing while it trains",
    ),
    (
        "kept codes of shards",
        ("max_steps: 10", "max_steps: 10\n  keep_codes: true\n  sharding: fsdp"),
        (),
        "r.yaml:19: train.keep_codes: got true with train.sharding: fsdp, where no "
        "process holds whole layers",
    ),
    (
        "alpha_tuning on integers",
        ("lr_qat\n  rank: 8", "alpha_tuning"),
        (),
        "r.yaml:10: adapter.method: got 'alpha_tuning', which works on quant.grid: binary; the recipe has "
        "integer; set quant.grid: binary",
    ),
    (
        "integer method on planes",
        ("bits: 4", "grid: binary\n  bits: 3"),
        (),
        "adapter.method: got 'lr_qat', which works on quant.grid: integer",
    ),
    (
        "zero points on planes",
        ("bits: 4", "grid: binary\n  symmetric: false"),
        (),
        "r.yaml:8: quant.symmetric: got false; sign planes have no zero point",
    ),
    (
        "export format",
        ("output:", "export: {format: ggfu}\noutput:"),
        (),
        "r.yaml:20: export.format: got 'ggfu'; allowed: native, compressed-tensors",
    ),
    (
        "export of planes",
        ("lr_qat\n  rank: 8", "alpha_tuning"),
        ("quant.grid=binary", "export.format=compressed-tensors"),
        "export.format=compressed-tensors'",
    ),
    (
        "export of float offsets",
        ("lr_qat", "l4q\n  offset: float"),
        ("export.format=compressed-tensors",),
        "holds no float offset per group; l4q with this adapter.offset ships one",
    ),
    ("no such model", (str(TINY), str(TINY) + "x"), (), "r.yaml:3: model.path: got"),
    (
        "model is a file",
        (str(TINY), str(TINY / "config.json")),
        (),
        "a file; give the folder that holds config.json",
    ),
    (
        "revision of a folder",
        ("dtype: float32", "dtype: float32\n  revision: main"),
        (),
        "r.yaml:5: model.revision: got 'main'; a local folder has no revisions",
    ),
    (
        "no such data",
        ("train.jsonl", "trian.jsonl"),
        (),
        "there is no such file; did you mean 'train.jsonl'?",
    ),
    ("glob without files", ("train.jsonl", "*.parquet"), (), "no file matches"),
    (
        "no such calibration text",
        ("bits: 4", "bits: 4\n  calibration: {path: no.txt}"),
        (),
        "r.yaml:8: quant.calibration.path: got 'no.txt'; there is no such file",
    ),
    (
        "window beyond the model",
        ("sequence_len: 256", "sequence_len: 2048"),
        (),
        "r.yaml:16: data.sequence_len: got 2048; allowed: at most the 1024 positions",
    ),
    (
        "optimizer",
        ("max_steps: 10", "max_steps: 10\n  optimizer: adamw8bits"),
        (),
        "r.yaml:19: train.optimizer: got 'adamw8bits'; allowed: adamw",
    ),
    (
        "eval without data",
        ("max_steps: 10", "max_steps: 10\n  eval_every: 5"),
        (),
        "r.yaml:19: train.eval_every: got 5, but there is no data.valid",
    ),
    (
        "best without eval",
        ("max_steps: 10", "max_steps: 10\n  keep_best: true"),
        (),
        "r.yaml:19: train.keep_best: got true, but nothing is evaluated",
    ),
    (
        "streaming epochs",
        ("max_steps: 10", "epochs: 2"),
        ("data.streaming=true",),
        "r.yaml:18: train.epochs: got 2 with data.streaming",
    ),
    (
        "wsd ratios",
        ("max_steps: 10", "max_steps: 10\n  scheduler: wsd\n  decay_ratio: 1.0"),
        (),
        "r.yaml:20: train.decay_ratio: got 1.0; with warmup_ratio the sum is 1.05",
    ),
    ("fp16 on a CPU", ("dtype: float32", "dtype: float16"), (), "r.yaml:4: model.dtype: got fp16 on a CPU"),
    (
        "flash attention on a CPU",
        ("dtype: float32", "attention: flash_attention_2"),
        (),
        "r.yaml:4: model.attention: got 'flash_attention_2', but there is no GPU",
    ),
    (
        "flex attention on a CPU",
        ("dtype: float32", "attention: flex_attention"),
        (),
        "r.yaml:4: model.attention: got 'flex_attention', whose backward PyTorch has on GPUs "
        "only; allowed here: sdpa",
    ),
    (
        "fused loss on a CPU",
        ("max_steps: 10", "max_steps: 10\n  loss: liger"),
        (),
        "its kernels run on a GPU only; set loss: chunked",
    ),
    (
        "fused loss of a packed head",
        ("max_steps: 10", "max_steps: 10\n  loss: liger"),
        ("quant.lm_head=8",),
        "quant.lm_head packs the head in 8 bits",
    ),
    (
        "offload without checkpointing",
        ("max_steps: 10", "max_steps: 10\n  offload: disk"),
        (),
        "gradient_checkpointing: true, or offload: no",
    ),
    (
        "output is a file",
        ("runs/test", "r.yaml"),
        (),
        "r.yaml:20: output: got 'r.yaml', a file; choose a folder",
    ),
    (
        "output under a file",
        ("runs/test", "r.yaml/run"),
        (),
        "r.yaml:20: output: got 'r.yaml/run', but 'r.yaml' is not a folder",
    ),
    (
        "output of something else",
        ("runs/test", "."),
        (),
        "r.yaml:20: output: got '.', which holds other files",
    ),
    (
        "output is a list",
        ("runs/test", "[a]"),
        (),
        "r.yaml:20: output: got ['a']; allowed: the path of a folder",
    ),
    ("name with a slash", ("name: test", "name: a/b"), (), "r.yaml:1: name: got 'a/b'; allowed: "),
    ("override unknown", ("", ""), ("train.lr=3",), "override 'train.lr=3': train.lr: unknown key"),
    (
        "override without value",
        ("", ""),
        ("train.max_steps",),
        "override 'train.max_steps': got no key.path=value",
    ),
    (
        "override not YAML",
        ("", ""),
        ("train.betas=[",),
        "override 'train.betas=[': got '[', which is not YAML",
    ),
    (
        "override through a value",
        ("", ""),
        ("name.x=3",),
        "override 'name.x=3': name is 'test', a value without keys",
    ),
    (
        "override beyond a list",
        ("", ""),
        ("quant.exclude=[a]", "quant.exclude.4=b"),
        "override 'quant.exclude.4=b': quant.exclude is a list: got index '4'; allowed 0..0",
    ),
    (
        "override of a wrong value",
        ("", ""),
        ("quant.bits=7",),
        "override 'quant.bits=7': quant.bits: got 7; allowed: 1, 2, 3, 4, 8",
    ),
]


@pytest.mark.parametrize(
    ("change", "overrides", "words"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD]
)
def test_bad_recipe_is_refused_with_its_line(change, overrides, words):
    before, after = change
    assert before in GOOD
    problems = refused(GOOD.replace(before, after, 1) if before else GOOD, overrides)
    assert any(words in problem for problem in problems), "\n".join(problems)


def test_cheaper_gradients_where_they_are_cheaper():
    """Row-wise frozen grids need no tokens for their scales, and a live grid no groups for A and B."""
    cheap = ("adapter.low_rank_gradient=factorised",)
    load_recipe(write(GOOD), (*cheap, "adapter.scale_grad_tokens=0.25"))
    load_recipe(write(GOOD), (*cheap, "quant.group_size=-1"))
    load_recipe(write(GOOD), (*cheap, "adapter.train_scale=false"))
    load_recipe(
        write(GOOD),
        (
            "adapter={method: l4q, rank: 64, low_rank_gradient: corrected, scale_grad_tokens: 0.5}",
            "quant.group_size=32",
        ),
    )
    load_recipe(write(GOOD), ("adapter={method: scale, scale_grad_tokens: 0.25}", "train.keep_codes=true"))
    costs = [
        (ADAPTERS["lr_qat"](rank=16), 128, 1.0),
        (ADAPTERS["lr_qat"](rank=16, low_rank_gradient="factorised", scale_grad_tokens=0.25), 128, 0.5),
        (ADAPTERS["dl_qat"](rank=16, low_rank_gradient="factorised", scale_grad_tokens=0.25), -1, 0.0),
        (ADAPTERS["dl_qat"](rank=16, low_rank_gradient="corrected", scale_grad_tokens=0.25), -1, 0.25),
        (ADAPTERS["l4q"](rank=16, low_rank_gradient="factorised", scale_grad_tokens=0.25), 32, 0.25),
        (ADAPTERS["lr_qat"](rank=16, low_rank_gradient="factorised", train_scale=False), 64, 0.5),
    ]
    assert [c.gradient_cost(IntGrid(group_size=g)) for c, g, _ in costs] == [cost for _, _, cost in costs]


def test_all_problems_at_once_and_in_order():
    text = (
        GOOD.replace("dtype: float32", "dtpye: float32")
        .replace("rank: 8", "rnak: 8")
        .replace("chat\n", "caht\n")
    )
    problems = refused(text.replace("group_size: 128", "group_size: 256"), ("train.stpes=3",))
    # a wrong key does not hide the others
    assert [problem.split(": ")[0] for problem in problems] == [
        "r.yaml:4",
        "r.yaml:11",
        "r.yaml:15",
        "override 'train.stpes=3'",
    ]
    # ... and the cross checks run on the sections that are right
    assert refused(GOOD.replace("rank: 8", "rnak: 8").replace("bits: 4", "bits: 1"))[0].startswith(
        "r.yaml:7: quant.bits: got 1"
    )


def test_group_size_that_does_not_divide(tmp_path):
    import torch
    from safetensors.torch import save_file

    folder = tmp_path / "model"
    folder.mkdir()
    shape = {"q_proj": (64, 96), "o_proj": (96, 64)}
    tensors = {
        f"model.layers.{i}.self_attn.{n}.weight": torch.zeros(s) for i in range(2) for n, s in shape.items()
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 512}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    text = GOOD.replace(str(TINY), str(folder)).replace("group_size: 128", "group_size: 64")
    (problem,) = refused(text)
    assert problem.startswith(
        "r.yaml:8: quant.group_size: got 64, which does not divide the 96 inputs of "
        "model.layers.0.self_attn.q_proj and 1 more"
    )
    assert "allowed for all layers: 32, -1;" in problem and "export.format: native" in problem
    assert load_recipe(write(text), ["export.format=native"]).export.format == "native"
    fixed = load_recipe(write(text), ["quant.overrides=[{match: '*.q_proj', group_size: 32}]"])
    assert fixed.quant.grid_for("model.layers.1.self_attn.q_proj").group_size == 32
    write_recipe(str(folder), tmp_path / "init.yaml")
    assert load_recipe("init.yaml", check=False).quant.group_size == 32


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json: missing"),
        (lambda f: (f / "config.json").write_text("{"), "not readable JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "got a JSON list"),
        (lambda f: (f / "model.safetensors").write_bytes(b"PK" * 10), "not a safetensors file"),
        (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "only pickle weights"),
        (
            lambda f: (f / "config.json").write_text('{"quantization_config": {"quant_method": "hqq"}}'),
            "already quantized by 'hqq'; allowed: gptq",
        ),
    ],
)
def test_bad_checkpoints_are_told_with_the_recipe_line(tmp_path, break_it, words):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    break_it(folder)
    (problem,) = refused(GOOD.replace(str(TINY), str(folder)))
    assert problem.startswith("r.yaml:3: model.path: got ") and words in problem


def test_chat_needs_a_template(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    (folder / "chat_template.jinja").unlink()
    (problem,) = refused(GOOD.replace(str(TINY), str(folder)))
    assert (
        problem.startswith("r.yaml:15: data.train.format: got 'chat', but") and "no chat template" in problem
    )
    write_recipe(str(folder), Path("plain.yaml"))
    assert load_recipe("plain.yaml", check=False).data.train.format == "text"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["model.dtype=bfloat16"],
            "model.dtype: got bf16, which Old GPU does not have; allowed: float16, float32",
        ),
        (["train.mixed_precision=bf16"], "train.mixed_precision: got bf16, which Old GPU does not have"),
        (["model.attention=flash_attention_2"], "the package flash-attn is not installed"),
        (
            ["train.optimizer=adamw8bit"],
            "got 'adamw8bit', from bitsandbytes, which is not installed; run pip install bitsandbytes",
        ),
    ],
)
def test_gpu_without_bf16(monkeypatch, overrides, words):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "Old GPU")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    text = GOOD.replace("device: cpu", "device: cuda")
    assert any(words in problem for problem in refused(text, tuple(overrides)))
    assert load_recipe(write(text), ["model.dtype=float16"]).model.dtype == "float16"


def test_cuda_where_there_is_none(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (problem,) = refused(GOOD.replace("device: cpu", "device: cuda"))
    assert problem.startswith("r.yaml:5: model.device: got 'cuda', but PyTorch sees no GPU here")


def test_packages_that_are_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    problems = refused(GOOD, ("train.trackers=[wandb]", "eval.tasks=[arc_easy]"))
    assert any(
        "train.trackers.0: got 'wandb', which is not installed; run pip install wandb" in p for p in problems
    )
    missing = "eval.tasks.0: got 'arc_easy', but lm-eval is not installed; run pip install 'lowbit-ft[eval]'"
    assert any(missing in p for p in problems)


def test_folder_that_cannot_be_written(monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert any("is not writable; choose another folder" in problem for problem in refused(GOOD))


def test_existing_run_is_noted_not_refused():
    Path("runs/test").mkdir(parents=True)
    Path("runs/test/recipe.yaml").write_text(GOOD)
    assert any("continued" in note for note in notes(load_recipe(write(GOOD))))


def test_lora_is_noted_as_inexact():
    recipe = load_recipe(write(GOOD), ["adapter.method=lora"])
    assert any("does not merge exactly" in note for note in notes(recipe))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"name: \xff\n", "r.yaml:1: got byte 0xff, not UTF-8 text"),
        (b"name: a\x00b\n", "not YAML"),
        (b"a: b: c\n", "r.yaml:1: not YAML: mapping values are not allowed here"),
        (b"a:\n\tb: 1\n", "r.yaml:2: not YAML"),
        (b"- a\n- b\n", "r.yaml:1: got a list; a recipe is a mapping"),
        (b"just text\n", "r.yaml:1: got a str"),
        (b"a: &x [*x]\n", "an alias that contains itself"),
        (b"[" * 3000, "nested too deep"),
        (b"a: " + b"[" * 80 + b"]" * 80, "nested deeper than"),
        (b'a: "\\UFFFFFFFF"\n', "cannot be read"),
        (b"name: !!int abc\n", "not a readable int"),
        (b"? [a]\n: b\n", "got a list or mapping as a key"),
        (b"#" * (1 << 19), "a recipe has at most"),
        (
            b"a: &a [x,x,x,x,x,x,x,x,x,x]\n"
            + b"".join(
                b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 10)) for i in range(6)
            ),
            "more than 100000 values",
        ),
    ],
)
def test_not_a_recipe(data, words):
    Path("r.yaml").write_bytes(data)
    with pytest.raises(RecipeError) as caught:
        load_recipe("r.yaml")
    assert words in str(caught.value)


def test_missing_file_names_the_nearest():
    write(GOOD, "train.yaml")
    with pytest.raises(FileNotFoundError, match="no recipe at trian.yaml; did you mean 'train.yaml'"):
        load_recipe("trian.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(".")


def test_empty_recipe_lists_what_it_needs():
    text = "\n".join(refused(""))
    for key in ("name", "model.path", "adapter.method", "data.train", "output"):
        assert f"{key}: missing" in text, text


# ---------------------------------------------------------------- nothing else ever comes out


def outcome(path: str, overrides: tuple[str, ...] = ()) -> None:
    """A Recipe or a RecipeError with at least one line; anything else is a bug."""
    try:
        assert isinstance(load_recipe(path, overrides), Recipe)
    except RecipeError as error:
        assert error.problems and all(
            isinstance(problem, str) and "\n" not in problem for problem in error.problems
        )


FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
WORDS = sorted(
    {"all-linear", "chat", "lm_head", "cpu", "*", "(", "1e-4", "a\x00b", "~", "/", "x" * 300}
    | set(ADAPTERS)
    | set(CALIBRATORS)
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 9),
    st.floats(),
    st.sampled_from(WORDS),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
)
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3)
)


@FUZZ
@given(st.binary(max_size=200))
def test_fuzz_bytes(data):
    Path("f.yaml").write_bytes(data)
    outcome("f.yaml")


@FUZZ
@given(st.text(alphabet="abn:-[]{}&*!|>'\"%@`#,?<\n\t \\0123456789.eu~", max_size=80))
def test_fuzz_yaml_text(text):
    Path("f.yaml").write_text(text, encoding="utf-8")
    outcome("f.yaml")


@FUZZ
@given(st.data())
def test_fuzz_one_wrong_value_anywhere(data):
    tree = load_recipe(write(GOOD), check=False).model_dump(mode="json")
    path = data.draw(st.sampled_from(sorted(paths(tree))))
    target = tree
    for part in path[:-1]:
        target = target[part]
    target[path[-1]] = data.draw(VALUES)
    write(yaml.safe_dump(tree), "f.yaml")
    outcome("f.yaml")


@FUZZ
@given(
    st.sampled_from(["quant", "adapter", "train", "data", "eval", "export", "model", "name", "output"]),
    st.data(),
)
def test_fuzz_sections(section, data):
    keys = ["method", "rank", "path", "format", "bits", "overrides", "train", "generate", "betas"]
    tree = yaml.safe_load(GOOD)
    tree[section] = data.draw(st.dictionaries(st.sampled_from(keys), VALUES, max_size=4))
    write(yaml.safe_dump(tree), "f.yaml")
    outcome("f.yaml")


@FUZZ
@given(
    st.lists(
        st.text(max_size=20) | st.builds("train.{}={}".format, st.text(max_size=4), st.text(max_size=8)),
        max_size=3,
    )
)
def test_fuzz_overrides(overrides):
    outcome(write(GOOD), tuple(overrides))


def paths(tree: object, prefix: tuple = ()) -> set[tuple]:
    """Every key path of a nested dict."""
    found = set()
    if isinstance(tree, dict):
        for key, value in tree.items():
            found |= {(*prefix, key)} | paths(value, (*prefix, key))
    return found


# ---------------------------------------------------------------- schema, init, layers


def test_schema_is_one_schema_per_method():
    schema = json.loads(json.dumps(recipe_schema()))
    assert schema["$schema"].endswith("2020-12/schema") and schema["type"] == "object"
    assert set(schema["required"]) == {"name", "model", "adapter", "data", "train", "output"}
    assert schema["additionalProperties"] is False
    adapter = schema["properties"]["adapter"]
    assert len(adapter["oneOf"]) == len(ADAPTERS) and set(adapter["discriminator"]["mapping"]) == set(
        ADAPTERS
    )
    pending, seen = [schema], 0
    while pending:  # every reference leads somewhere, every object is closed
        node = pending.pop()
        if isinstance(node, dict):
            seen += 1
            if isinstance(node.get("$ref"), str):
                assert node["$ref"].removeprefix("#/$defs/") in schema["$defs"]
            if "properties" in node and isinstance(node.get("type"), str):
                assert node["additionalProperties"] is False
            pending += node.values()
        elif isinstance(node, list):
            pending += node
    assert seen > 100
    for section in ("ModelSection", "QuantSection", "TrainSection"):
        assert all("description" in entry for entry in schema["$defs"][section]["properties"].values())


def test_init_writes_a_recipe_that_loads():
    write_recipe(str(TINY), Path("new.yaml"))
    recipe = load_recipe("new.yaml", [f"data.train.path={CHAT}"])
    assert recipe.quant.group_size == 128 and recipe.data.sequence_len == 1024
    assert recipe.data.train.format == "chat" and recipe.model.path == str(TINY)
    before = Path("new.yaml").read_bytes()
    with pytest.raises(ValueError, match="exists; nothing was written"):
        write_recipe(str(TINY), Path("new.yaml"))
    assert Path("new.yaml").read_bytes() == before
    write_recipe("some-org/3-B", Path("new.yaml"), force=True)
    assert load_recipe("new.yaml", [f"data.train.path={CHAT}"]).model.path == "some-org/3-B"
    with pytest.raises(ValueError, match="no such folder"):
        write_recipe("./nothing", Path("other.yaml"))
    assert sorted(p.name for p in Path().iterdir()) == ["new.yaml"]


def test_init_of_an_odd_path_stays_yaml(tmp_path):
    folder = tmp_path / "my: model #1"
    shutil.copytree(TINY, folder)
    write_recipe(str(folder), Path("odd.yaml"))
    assert load_recipe("odd.yaml", [f"data.train.path={CHAT}"]).model.path == str(folder)


def test_shapes_of_the_tiny_model():
    shapes = read_shapes(TINY)
    layers = {layer.name: (layer.out_features, layer.in_features) for layer in shapes.linears}
    assert len(layers) == 28 and layers["model.layers.3.mlp.down_proj"] == (256, 768)
    assert not any("embed" in name for name in layers)
    assert shapes.number("max_position_embeddings") == 1024 and shapes.number("absent") is None


def test_chat_needs_a_tokenizer(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    (problem,) = refused(GOOD.replace(str(TINY), str(folder)))
    assert (
        problem.startswith("r.yaml:3: model.path: got ")
        and "which has no tokenizer (tokenizer.json" in problem
    )


@pytest.mark.parametrize(
    "name, overrides, expected",
    [
        ("gpt2", [], "export.format: .* a Conv1D keeps its weight turned"),
        ("gpt_oss", [], "export.format: .*experts.0.* one tensor per expert"),
        ("mixtral", ["quant.symmetric=false"], "export.format: .* without their zero points"),
        ("llama", ["quant.embeddings=8"], "export.format: .* embeddings in full precision only"),
        (
            "mixtral",
            ["quant.overrides=[{match: '*.experts.*.down_proj', bits: 8}]"],
            "export.format: .* where all layers have one grid",
        ),
        ("mixtral", [], None),
        ("llama", ["quant.lm_head=8"], None),
    ],
)
def test_kinds_of_layers_meet_the_format_before_anything_is_loaded(
    name: str, overrides: list[str], expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowbit_ft.plan.plan import plan
    from tests.architectures import CONFIGS, checkpoint_of

    monkeypatch.chdir(ROOT)
    checkpoint = checkpoint_of(CONFIGS[name](), tmp_path / "model")
    changes = [
        f"model.path={tmp_path / 'model'}",
        "model.attention=eager",
        "quant.group_size=32",
        "eval.window=64",
        "data.sequence_len=64",
        "eval.generate=[]",
    ]
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "model" / "chat_template.jinja").write_text("x")
    recipe = ROOT / "recipes" / "quickstart.yaml"
    if expected is not None:
        with pytest.raises(RecipeError, match=expected):
            load_recipe(recipe, [*changes, *overrides, f"output={tmp_path / 'run'}"])
        changes.append("export.format=native")
    made = load_recipe(recipe, [*changes, *overrides, f"output={tmp_path / 'run'}"])
    counted = plan(made)
    assert counted is not None
    model, rows = quantize(checkpoint, made.quant, attention="eager")
    packed = sum(row.packed_bytes for row in rows.quantized)
    assert sum(row.base_bytes + row.residual_bytes for row in counted.rows) == packed
    parts = counted.parts
    rest = sum(p.numel() for p in model.parameters()) * 4
    others = [
        parts[name]
        for name in ("codes", "residual", "scales and zeros", "embeddings", "head", "norms and other")
    ]
    assert sum(others) - packed == pytest.approx(rest, rel=0.02)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["gptq", "awq", "torchao"])
def test_a_packed_head_meets_the_format_tied_or_not(name: str, tied: bool, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    from tests.packed_tools import SIZE, tiny_checkpoint

    tiny_checkpoint(tmp_path / "model", LlamaConfig(**SIZE, tie_word_embeddings=tied))
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TINY / file, tmp_path / "model" / file)
    text = (
        GOOD.replace(str(TINY), str(tmp_path / "model"))
        .replace("sequence_len: 256", "sequence_len: 64")
        .replace("group_size: 128", "group_size: 32")
    )
    assert ("lm_head.weight" in read_shapes(tmp_path / "model").tensors) != tied
    changes = (f"export={{format: {name}, verify: false}}", "adapter.method=lr_qat", "eval={window: 64}")
    assert [p for p in problems_with(text, changes) if "head" in p] == []
    problems = problems_with(text, (*changes, "quant.lm_head=8"))
    assert all("lm_head: " in p for p in problems) and "readers keep the head dense" in problems[-1]
    assert (
        f"quant.lm_head: got 8, and export.format is {name}: lm_head: {name} readers keep the head dense; "
        "quant.lm_head: null" in problems[-1]
    )


def test_a_tied_head_and_an_embedding_have_their_real_widths(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    from tests.packed_tools import SIZE, tiny_checkpoint

    config = LlamaConfig(
        **(SIZE | dict(hidden_size=40, num_attention_heads=2, num_key_value_heads=2, head_dim=32)),
        tie_word_embeddings=True,
    )
    tiny_checkpoint(tmp_path / "model", config)
    text = GOOD.replace(str(TINY), str(tmp_path / "model")).replace("group_size: 128", "group_size: 32")
    changes = (
        "export={format: gguf, verify: false}",
        "quant.targets=['*.o_proj']",
        "quant.exclude=[]",
        "quant.lm_head=8",
    )
    assert any(
        "cannot hold lm_head" in p and "multiple of 32 inputs" in p or "40 inputs of lm_head" in p
        for p in problems_with(text, changes)
    )


def problems_with(text: str, overrides: tuple[str, ...]) -> list[str]:
    try:
        load_recipe(write(text), overrides)
    except RecipeError as error:
        return error.problems
    return []


def test_plan_does_not_print_keys_that_are_unset(capsys: pytest.CaptureFixture[str]) -> None:
    from lowbit_ft.cli.plan import show_plan

    show_plan(load_recipe(write(GOOD)))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(" adapter")]
    assert "rank 8" in line and "None" not in line
