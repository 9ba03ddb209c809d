"""Folders of diffusers as models of the house: the same numbers as diffusers, their segments, what is
refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowbit_ft.diffusion import names
from lowbit_ft.diffusion.names import AUTO
from lowbit_ft.diffusion.traits import TRAITS
from lowbit_ft.diffusion.transformer import example
from lowbit_ft.files.tensorfile import CheckpointError
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.config import load_config, read_config
from lowbit_ft.model.images import patches
from lowbit_ft.model.load import load_model
from lowbit_ft.model.purpose import Purpose, head_parts
from lowbit_ft.recipe.layers import read_shapes
from lowbit_ft.segments import Segment, segments_in
from tests.diffusion import dits

pytest.importorskip("diffusers")


def ranges(*widths: int) -> tuple[Segment, ...]:
    return tuple(Segment(sum(widths[:i]), width) for i, width in enumerate(widths))


ADALN = {n: ranges(*[32] * n) for n in (2, 3, 6)}
TIME = "timestep_embedder.linear_1"  # sines and cosines, side by side
# Class -> {name without its number: (segments of the inputs, of the outputs)}. Nothing else has any.
WANTED = {
    "DiTTransformer2DModel": {
        f"transformer_blocks.*.norm1.emb.{TIME}": (ranges(128, 128), ()),
        "transformer_blocks.*.norm1.linear": ((), ADALN[6]),
        "transformer_blocks.*.attn1.to_out.0": (ranges(16, 16), ()),
        "proj_out_1": ((), ADALN[2]),
    },
    "SD3Transformer2DModel": {
        f"time_text_embed.{TIME}": (ranges(128, 128), ()),
        "transformer_blocks.*.norm1.linear": ((), ADALN[6]),
        "transformer_blocks.0.norm1_context.linear": ((), ADALN[6]),
        "transformer_blocks.1.norm1_context.linear": ((), ADALN[2]),  # the last one gives no text on
        "transformer_blocks.*.attn.to_out.0": (ranges(8, 8, 8, 8), ()),
        "transformer_blocks.0.attn.to_add_out": (ranges(8, 8, 8, 8), ()),
        "norm_out.linear": ((), ADALN[2]),
    },
    "FluxTransformer2DModel": {
        f"time_text_embed.{TIME}": (ranges(128, 128), ()),
        "transformer_blocks.*.norm1.linear": ((), ADALN[6]),
        "transformer_blocks.*.norm1_context.linear": ((), ADALN[6]),
        "transformer_blocks.*.attn.to_out.0": (ranges(16, 16), ()),
        "transformer_blocks.*.attn.to_add_out": (ranges(16, 16), ()),
        "single_transformer_blocks.*.norm.linear": ((), ADALN[3]),
        "single_transformer_blocks.*.proj_out": (ranges(32, 128), ()),  # attention and MLP: unequal
        "norm_out.linear": ((), ADALN[2]),
    },
}


@pytest.mark.parametrize("name", WANTED)
def test_it_computes_what_diffusers_computes_and_its_plan_is_known(name: str, tmp_path: Path) -> None:
    assert set(WANTED) == set(TRAITS)
    folder = dits.write(tmp_path, name)
    theirs = dits.made(name)
    checkpoint = Checkpoint.open(folder, dtype="float32", purpose=Purpose(AUTO, {}))
    ours = load_model(checkpoint)
    given = example(read_config(folder))
    with torch.no_grad():
        places = {}
        if name.startswith("Flux"):  # ours makes them, theirs wants them
            places["txt_ids"] = torch.zeros(6, 3)
            places["img_ids"] = torch.tensor([[0.0, row, column] for row in range(4) for column in range(4)])
        assert torch.equal(ours(**given).sample, theirs(**given, **places, return_dict=False)[0])
    assert ours.state_dict().keys() == theirs.state_dict().keys(), "the names are those of its files"
    assert not head_parts(ours)
    wanted = {
        key.replace("*", str(i)): both
        for key, both in WANTED[name].items()
        for i in (range(dits.SIZES[name]["num_layers"]) if "*" in key else (0,))
    }
    found = {key: (one.inputs, one.outputs) for key, one in segments_in(folder).items()}
    assert found == wanted


def test_blocks_that_are_alike_have_the_segments_of_the_first(tmp_path: Path) -> None:
    """Only the first of a kind is traced; a text that two blocks hand on arrives at the third."""
    deep = {"num_layers": 3}
    for name in ("SD3Transformer2DModel", "FluxTransformer2DModel"):
        folder = dits.write(tmp_path / name, name, **deep)
        found = segments_in(folder)
        for key in (key for key in found if key.startswith("transformer_blocks.0.")):
            assert found[key.replace(".0.", ".1.", 1)] == found[key]
        assert f"transformer_blocks.{1 if name.startswith('SD3') else 2}.attn.to_add_out" in found


def test_what_older_files_call_it(tmp_path: Path) -> None:
    folder = dits.write(tmp_path)
    values = json.loads((folder / "config.json").read_text()) | {"_class_name": "Transformer2DModel"}
    (folder / "config.json").write_text(json.dumps(values))
    assert load_config(folder).class_name == "DiTTransformer2DModel"
    assert patches(read_config(folder)) == read_shapes(folder).positions == 16
    (folder / "config.json").write_text(json.dumps(values | {"norm_type": "ada_norm_single"}))
    with pytest.raises(CheckpointError, match="_class_name: got 'Transformer2DModel'; allowed: DiTTrans"):
        load_config(folder)


@pytest.mark.parametrize("key", ["sample_size", "in_channels", "num_embeds_ada_norm", "patch_size"])
def test_a_count_that_is_none_is_named(key: str, tmp_path: Path) -> None:
    folder = dits.write(tmp_path, num_layers=1)
    values = json.loads((folder / "config.json").read_text())
    for wrong in (None, True, "8", -1, 0, 3.0, 1 << 40):
        (folder / "config.json").write_text(json.dumps(values | {key: wrong}))
        with pytest.raises(CheckpointError, match=f"config.json.*{key}: got .*; allowed: whole num"):
            load_config(folder)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if k != key}))
    with pytest.raises(CheckpointError, match=f"{key}: got None"):
        load_config(folder)
    (folder / "config.json").write_text(json.dumps(values | {"_class_name": ["DiT"]}))
    with pytest.raises(CheckpointError, match="_class_name: got"):
        load_config(folder)


def test_without_diffusers_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = dits.write(tmp_path)
    monkeypatch.setattr(names.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"needs diffusers.*pip install 'lowbit-ft\[diffusion\]'"):
        Checkpoint.open(folder, dtype="float32", purpose=Purpose(AUTO, {})).empty_model()


def test_nothing_imports_diffusers_before_a_model_is_built() -> None:
    code = (
        "import sys, lowbit_ft, transformers.models.auto.modeling_auto, lowbit_ft.tasks;"
        "from transformers import AutoConfig; AutoConfig.for_model('diffusers_transformer');"
        "sys.exit(any(name.partition('.')[0] == 'diffusers' for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
