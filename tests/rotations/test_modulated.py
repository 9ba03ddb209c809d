"""quant.smooth of diffusion transformers: the factors go into AdaLN and v without a trace, by an equation
in float64 and by the model's own forward; they are chosen by the error; what is packed is what was folded."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit_ft import pipeline
from lowbit_ft.diffusion.names import AUTO
from lowbit_ft.diffusion.traits import TRAITS
from lowbit_ft.diffusion.transformer import example
from lowbit_ft.export.reader import read_weights
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.config import read_config
from lowbit_ft.model.load import load_model
from lowbit_ft.model.purpose import Purpose
from lowbit_ft.quantize.smooth import Reader, Smoother
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.yaml import RecipeError
from lowbit_ft.rotations import MODULATED, FoldedCheckpoint, Rotation
from lowbit_ft.rotations.modulated import ModulatedStructure
from tests.diffusion import dits
from tests.tasks.test_image_generation import recipe

pytest.importorskip("diffusers")
DIT, SD3, FLUX = MODULATED
TWO = {"dual_attention_layers": (0,)}  # SD3.5's
# class and what is changed of its size -> {site: in how many layers}
SITES: list[tuple[str, dict[str, Any], dict[str, int]]] = [
    (DIT, {}, {"norm1.attention": 2, "norm1.mlp": 2, "attn1.values": 2}),
    (
        SD3,
        {},
        {
            "norm1.attention": 2,
            "norm1.mlp": 2,
            "norm1_context.attention": 2,
            "norm1_context.mlp": 1,
            "attn.values": 2,
        },
    ),
    (
        SD3,
        TWO,
        {
            "norm1.attention": 2,
            "norm1.mlp": 2,
            "norm1_context.attention": 2,
            "norm1_context.mlp": 1,
            "attn.values": 2,
            "attn2.values": 1,
            "norm1.attention2": 1,
        },
    ),
    (
        FLUX,
        {},
        {
            "norm1.attention": 1,
            "norm1.mlp": 1,
            "norm1_context.attention": 1,
            "norm1_context.mlp": 1,
            "attn.values": 2,
            "norm.both": 1,
        },
    ),
]


def opened(folder: Path, name: str, **changes: Any) -> Checkpoint:
    dits.write(folder, name, **changes)
    return Checkpoint.open(folder, dtype="float32", purpose=Purpose(AUTO, {}))


def some_factors(structure: ModulatedStructure) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return {
        site.name: torch.rand(site.width, generator=draw, dtype=torch.float64) * 3 + 0.2
        for site in structure.scaled
    }


@pytest.mark.parametrize(("name", "changes", "wanted"), SITES)
def test_a_folded_model_says_what_the_original_says(
    name: str, changes: dict[str, Any], wanted: dict[str, int], tmp_path: Path
) -> None:
    """The folds in float64, one linear at a time, put into diffusers' own model in float64; and in fp32."""
    checkpoint = opened(tmp_path, name, **changes)
    structure = ModulatedStructure.of(checkpoint.empty_model(), name)
    found = [site.name.split(".", 2)[2] for site in structure.scaled]
    assert {key: found.count(key) for key in found} == wanted
    folded = FoldedCheckpoint(checkpoint, Rotation(smooth=some_factors(structure)))
    given = example(read_config(tmp_path))
    with torch.no_grad():
        plain, smooth = (load_model(one, "sdpa").eval()(**given).sample for one in (checkpoint, folded))
        assert float((plain - smooth).norm() / plain.norm()) < 1e-5
        exact = load_model(checkpoint, "sdpa").eval().double()
        given = {key: value.double() if value.is_floating_point() else value for key, value in given.items()}
        want = exact(**given).sample
        before = {key: value.clone() for key, value in exact.state_dict().items()}
        by_hand(exact, structure, folded.rotation.smooth)
        assert float((exact(**given).sample - want).norm() / want.norm()) < 1e-12
    moved = {key for key, value in exact.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == set(folded.folds)
    for key in moved:
        torch.testing.assert_close(
            folded.weight_for(key).double(), exact.state_dict()[key], atol=1e-6, rtol=1e-6
        )


def by_hand(model: Any, structure: ModulatedStructure, smooth: dict[str, Tensor]) -> None:
    """The equation, site by site."""
    for site in structure.scaled:
        s = smooth[site.name]
        for linear, first in site.readers:
            model.get_submodule(linear).weight[:, first : first + site.width] *= s
        for linear, first in (*site.shifts, *((site.scale,) if site.scale else ())):
            module, at = model.get_submodule(linear), slice(first, first + site.width)
            module.weight[at] /= s[:, None]
            module.bias[at] /= s
            if (linear, first) == site.scale:
                module.bias[at] += 1 / s - 1


def test_the_scale_keeps_its_digits_in_16_bits(tmp_path: Path) -> None:
    """1 + scale' of a factor above 1 is a small difference; capped at 1 nothing is lost by the fold."""
    checkpoint = opened(tmp_path, DIT)
    structure = ModulatedStructure.of(checkpoint.empty_model(), DIT)
    wide = {
        site.name: 10 ** torch.linspace(-2, 2, site.width, dtype=torch.float64) for site in structure.scaled
    }
    capped = {name: factors / factors.max() for name, factors in wide.items()}
    given, off = example(read_config(tmp_path)), {}
    with torch.no_grad():
        exact = load_model(checkpoint, "sdpa").eval()(**given).sample
        for key, smooth in (("none", {}), ("wide", wide), ("capped", capped)):
            folded = FoldedCheckpoint(checkpoint, Rotation(smooth=smooth)) if smooth else checkpoint
            model = load_model(folded, "sdpa", dtype=torch.bfloat16).eval()
            off[key] = float((model(**given).sample.float() - exact).norm() / exact.norm())
    assert off["capped"] < 1.5 * off["none"] < off["wide"], off


def test_a_channel_that_nothing_reads_leaves_the_others_in_reach_of_fp16() -> None:
    """Its factor is the largest by far; 1 / s of the others would else be no number of 16 bits any more."""
    x, weight = torch.ones(8, 4), torch.ones(16, 4)
    weight[:, 0] = 1e-12
    smoother = Smoother(0.5, lambda name: None, lambda name, value: value, capped=True)
    found = smoother.chosen(x.amax(0), [Reader(weight, x, "read")])
    assert found is not None and found[0][0] == 1.0
    assert bool((1 / found[0] < 5000).all()) and len(set(found[0][1:].tolist())) == 1


def test_factors_of_another_model_are_refused(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, DIT)
    site = "transformer_blocks.0.norm1.mlp"
    for smooth in (
        {site: torch.ones(31)},
        {"transformer_blocks.7.norm1.mlp": torch.ones(32)},
        {site: -torch.ones(32)},
        {site: torch.full((32,), torch.inf)},
    ):
        with pytest.raises(ValueError, match="are none of this DiTTransformer2DModel"):
            FoldedCheckpoint(checkpoint, Rotation(smooth=smooth))
    with pytest.raises(ValueError, match="is modulated by the time; set quant.rotation.kind: none"):
        FoldedCheckpoint(checkpoint, Rotation(r1=True))


def outliers(folder: Path) -> Path:
    """A DiT of which one channel behind AdaLN, and one of v, is far larger than the others."""
    model = dits.made(num_layers=1)
    with torch.no_grad():
        block = model.transformer_blocks[0]
        for chunk in (1, 4):
            block.norm1.linear.bias[32 * chunk + 5] += 60.0
        block.attn1.to_v.weight[3] *= 60.0
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Errors of the velocity with and without; and the folder with."""
    root, errors = tmp_path_factory.mktemp("smooth"), {}
    checkpoint = outliers(root / "model")
    for smooth in (None, "auto"):
        folder = root / str(smooth)
        folder.mkdir()
        file = recipe(
            folder,
            checkpoint,
            quant={"bits": 8, "activations": {"kind": "tensor", "dynamic": True}, "smooth": smooth},
            adapter={"segments": "none"},
            task={"samples": 0},
            train={"max_steps": 2},
        )
        pipeline.run(load_recipe(file))
        rows = json.loads((folder / "run" / "evaluation.json").read_text())["rows"]
        errors[smooth] = {row["stage"]: row["scores"]["velocity_error"] for row in rows}
    return SimpleNamespace(errors=errors, run=root / "auto" / "run", model=checkpoint)


def test_smooth_auto_lowers_the_error_and_what_is_trained_ships(ran: SimpleNamespace) -> None:
    assert ran.errors["auto"]["quantized"] < 0.7 * ran.errors[None]["quantized"]
    assert ran.errors["auto"]["trained"] == ran.errors["auto"]["merged"]
    found = json.loads((ran.run / "merged" / "rotation.json").read_text())
    assert "transformer_blocks.0.norm1.attention" in found["smooth"]
    factors = found["smooth"]["transformer_blocks.0.norm1.attention"]
    assert max(factors) == factors[5] == 1.0  # the channel that was large is the one that is divided most
    from transformers import AutoModelForImageToImage

    model = AutoModelForImageToImage.from_pretrained(ran.run / "merged").eval()
    layers = dict(model.named_modules())
    for name, weight in read_weights(ran.run / "merged").items():
        assert torch.equal(layers[name].base.unpack_codes(), weight.unpack_codes())
    bias = copy.deepcopy(layers["transformer_blocks.0.norm1.linear"].bias.detach()).double()
    plain = dits.made(num_layers=1).transformer_blocks[0].norm1.linear.bias.detach().double()
    plain[32 + 5] += 60
    s = torch.tensor(factors, dtype=torch.float64)
    torch.testing.assert_close(bias[32:64], plain[32:64] / s + 1 / s - 1, atol=1e-5, rtol=1e-5)


def test_encoders_are_still_refused(tmp_path: Path) -> None:
    assert set(MODULATED) == set(TRAITS)
    with pytest.raises(RecipeError, match="quant.rotation.kind"):
        load_recipe(recipe(tmp_path, dits.write(tmp_path / "m"), quant={"rotation": {"kind": "hadamard"}}))
