"""The law: before any rounding the folded model's logits are the original's, over every architecture that is
not refused; those that are, are refused by name and with the way out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.load import load_model
from lowbit_ft.rotations import FAMILIES, FoldedCheckpoint, Rotation, Structure
from tests.architectures import CONFIGS, checkpoint_of

SITES = ("r1", "r2", "r4")
POST_NORM = ("gemma2", "gemma3", "olmo2", "glm4", "exaone4", "openai-gpt")
# architecture -> the sites that are refused, with a word of the reason; "all": it has no line
REFUSED: dict[str, dict[str, str]] = {
    **{name: {"r1": "a norm with a gain stands between"} for name in POST_NORM},
    "bloom": {"r1": "behind its embedding"},
    **{
        name: {"r4": "experts"}
        for name in (
            "mixtral qwen2_moe qwen3_moe olmoe phimoe gpt_oss granitemoe jamba glm4_moe granitemoehybrid "
            "minimax_m2 ernie4_5_moe hunyuan_v1_moe deepseek_v3"
        ).split()
    },
    "qwen3_next": {"r2": "gate", "r4": "experts"},
    "qwen3_5_text": {"r2": "gate"},
    "mamba": {"r2": "no attention", "r4": "no MLP"},
    "mamba2": {"r2": "no attention", "r4": "no MLP"},
    **{
        name: {"all": "no architecture"}
        for name in (
            "gemma3 (multimodal)",
            "llava (multimodal)",
            "qwen2_5_vl (multimodal)",
            "llama4_text",
            "dbrx",
            "jetmoe",
            "rwkv",
        )
    },
}


def uneven(folder: Path) -> Checkpoint:
    """The random checkpoint, with gains that are not all one and norms with biases."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    torch.manual_seed(1)
    for name, value in tensors.items():
        if value.dim() == 1 and value.is_floating_point() and not name.endswith(("A_log", "dt_bias")):
            noise = 0.3 * torch.rand(value.shape) * value.float() + 0.1 * torch.rand(value.shape)
            tensors[name] = (value.float() + noise).to(value.dtype)
    save_file(tensors, path, {"format": "pt"})
    return Checkpoint.open(folder, dtype="float32")


@torch.no_grad()
def logits(checkpoint: Checkpoint) -> torch.Tensor:
    model: Any = load_model(checkpoint, "eager")
    ids = torch.arange(3, 27).view(2, 12)
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folded_model_has_the_logits_of_the_original(name: str, tmp_path: Path) -> None:
    checkpoint_of(CONFIGS[name](), tmp_path)
    checkpoint = uneven(tmp_path)
    refused = REFUSED.get(name, {})
    if "all" in refused:
        with pytest.raises(ValueError, match=f"{refused['all']}.*set quant.rotation.kind: none"):
            FoldedCheckpoint(checkpoint, Rotation(r1=True))
        return
    structure = Structure.of(checkpoint.empty_model("eager"), checkpoint.config)
    for site in SITES:
        problems = structure.problems(**{key: key == site for key in SITES}, smooth=False)
        assert bool(problems) == (site in refused), (site, problems)
        assert all(refused[site] in text and f"{site}: false" in text for text in problems)
    count = len(structure.layers)
    assert count == 2
    norms = [norm.name for layer in structure.layers for norm in layer.norms if structure.weight(norm.name)]
    smooth = {}
    if not FAMILIES[checkpoint.config.model_type].no_smooth:
        factors = torch.linspace(0.25, 4, structure.hidden, dtype=torch.float64)
        smooth = {norm: factors for norm in norms}
        assert smooth
    r1, r2, r4 = (site not in refused for site in SITES)
    rotation = Rotation(3, r1=r1, r2=(r2,) * count, r4=(r4,) * count, smooth=smooth)
    folded = FoldedCheckpoint(checkpoint, rotation)
    want = logits(checkpoint)
    assert float((logits(folded) - want).abs().max()) < 1e-4 * float(want.abs().max())
    moved = [
        n for n in structure.parameters if not torch.equal(checkpoint.weight_for(n), folded.weight_for(n))
    ]
    assert moved and len(moved) == len(folded.folds)  # and every fold does something


def test_every_architecture_that_is_refused_is_one_of_ours() -> None:
    assert REFUSED.keys() <= CONFIGS.keys()
    assert CONFIGS.keys() - REFUSED.keys(), "nothing is rotated"


def test_a_model_with_a_parameter_that_its_line_does_not_know_is_refused(tmp_path: Path) -> None:
    checkpoint_of(CONFIGS["qwen3"](), tmp_path)
    checkpoint = Checkpoint.open(tmp_path, dtype="float32")
    checkpoint.config.model_type = "llama"  # whose line has no norms of q and k
    structure = Structure.of(checkpoint.empty_model("eager"), checkpoint.config)
    (problem,) = structure.problems(True, True, False, False)
    assert "q_norm.weight and 3 more" in problem and "kind: none" in problem
