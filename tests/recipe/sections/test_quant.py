"""The quant section: which layers, which grid, and what is refused."""

import pytest

from lowbit_ft.cli.init import write_recipe
from lowbit_ft.grid import BinaryGrid, IntGrid
from lowbit_ft.names import matches
from lowbit_ft.recipe.recipe import load_recipe
from tests.recipe.recipe_text import GOOD, TINY, bad_recipes, refused, refused_with, write

BAD = [
    # (what, changed text, overrides, place and words that must be in one line)
    (
        "value for section",
        ("quant:\n  bits: 4\n  group_size: 128\n", "quant: 4\n"),
        (),
        "r.yaml:6: quant: got 4; allowed: a mapping with the keys grid, bits",
    ),
    (
        "bits",
        ("bits: 4", "bits: 5"),
        (),
        "r.yaml:7: quant.bits: got 5; allowed: 2, 3, 4, 6, 8; the nearest is 4",
    ),
    (
        "bits of the grid",
        ("bits: 4", "bits: 1"),
        (),
        "r.yaml:7: quant.bits: got 1; allowed on quant.grid integer: 2, 3, 4, 6, 8",
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
        "quant.calibrate: got 'gtpq'; allowed: auto, absmax, narrow_range, ternary, minmax, mse, gptq, "
        "signround, recover; did you",
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
        "zero points on planes",
        ("bits: 4", "grid: binary\n  symmetric: false"),
        (),
        "r.yaml:8: quant.symmetric: got false; sign planes have no zero point",
    ),
    (
        "no such calibration text",
        ("bits: 4", "bits: 4\n  calibration: {path: no.txt}"),
        (),
        "r.yaml:8: quant.calibration.path: got 'no.txt'; there is no such file",
    ),
]


@bad_recipes(BAD)
def test_bad_recipe_is_refused_with_its_line(change, overrides, words):
    refused_with(change, overrides, words)


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
