"""recover: weights that lie on a grid come back as they are, others are refused with their share; and such a
checkpoint becomes a GGUF that holds it bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowbit_ft.export import EXPORTERS
from lowbit_ft.export.gguf_model import FILE
from lowbit_ft.export.writer import write_model
from lowbit_ft.grid import IntGrid
from lowbit_ft.grid.calibrate import CALIBRATORS, OffGridError, Stats
from lowbit_ft.merge import base_weights
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.check import notes
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.sections.quant import QuantSection
from tests.recipe.recipe_text import GOOD, TINY, problems_with, write

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def on_grid(
    grid: IntGrid, dtype: torch.dtype, seed: int, shape: tuple[int, int] = (6, 96)
) -> tuple[Tensor, ...]:
    """(weight as its file has it, codes, scale, zero): drawn, with the outermost codes in every group."""
    g = torch.Generator().manual_seed(seed)
    n, k = shape
    size = k if grid.group_size == -1 else grid.group_size
    groups = -(-k // size)
    scale = torch.empty(n, groups).uniform_(1e-3, 0.03, generator=g).to(getattr(torch, grid.scale_dtype))
    codes = torch.randint(0, grid.levels, (n, groups * size), generator=g)
    codes[:, ::size], codes[:, 1::size] = 0, grid.levels - 1
    zero = torch.full((n, groups), grid.levels // 2)
    if grid.symmetric and grid.bits <= 4:
        scale *= torch.randint(0, 2, scale.shape, generator=g) * 2 - 1
    if not grid.symmetric:
        zero = torch.randint(0, grid.levels, zero.shape, generator=g)
    wide = [x.float().repeat_interleave(size, 1) for x in (scale, zero)]
    weight = (codes - wide[1]) * wide[0]
    return weight[:, :k].to(dtype), codes[:, :k], scale, zero


@settings(max_examples=25, deadline=None)
@given(
    bits=st.sampled_from((2, 3, 4)),
    group_size=st.sampled_from((32, 64, -1)),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(("float16", "bfloat16", "float32")),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
)
def test_what_lies_on_a_grid_comes_back(
    bits: int, group_size: int, symmetric: bool, scale_dtype: str, dtype: torch.dtype, seed: int
) -> None:
    """Codes and zero points are those that were put there; the weight is the file's, bit for bit; the scales
    are the very ones where the file's dtype tells them apart."""
    grid = IntGrid(bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    weight, codes, scale, zero = on_grid(grid, dtype, seed)
    base = CALIBRATORS["recover"].run(weight, grid, Stats())
    assert torch.equal(base.dequantize().to(dtype), weight)
    assert torch.equal(base.unpack_codes().long(), codes)
    found = base.to_tensors().get("zero")
    assert (found is None) == symmetric and (found is None or torch.equal(found.t().long(), zero))
    if scale_dtype == "bfloat16" or dtype == torch.float32:
        assert torch.equal(base.scale.t(), scale)
    torch.testing.assert_close(base.scale.t().float(), scale.float(), rtol=2**-8, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_eight_bits_and_groups_of_zeros(dtype: torch.dtype) -> None:
    grid = IntGrid(bits=8, group_size=32, scale_dtype="float16", residual_bits=0)
    weight, codes, _, _ = on_grid(grid, dtype, 3)
    weight[2, 32:64] = 0
    weight[3, :32] = -weight[3, :32].abs()
    weight[3, 1:32] = 0  # one number: any code is as good
    base = CALIBRATORS["recover"].run(weight, grid, Stats())
    assert torch.equal(base.dequantize().to(dtype), weight)
    same = base.unpack_codes().long() == codes
    assert same[[0, 1, 4, 5]].all() and (base.unpack_codes()[2, 32:64] == 128).all()


def test_a_plain_weight_is_not_on_it_and_neither_is_one_changed_number() -> None:
    grid = IntGrid(group_size=32, scale_dtype="float16")
    torch.manual_seed(0)
    with pytest.raises(OffGridError, match="18 of 18 groups"):
        CALIBRATORS["recover"].run(torch.randn(6, 96).bfloat16(), grid, Stats())
    weight = on_grid(grid, torch.bfloat16, 1)[0]
    weight[4, 40] = torch.nextafter(weight[4, 40], torch.tensor(9.0).bfloat16())
    with pytest.raises(OffGridError, match="1 of 18 groups"):
        CALIBRATORS["recover"].run(weight, grid, Stats())
    weight = on_grid(IntGrid(bits=8, group_size=32), torch.bfloat16, 1)[0]
    with pytest.raises(OffGridError, match="18 of 18 groups"):
        CALIBRATORS["recover"].run(weight, grid, Stats())


def q4_0(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """llama.cpp's rounding, by the description of its format: d = the largest number over -8, float16; codes
    floor(w / d + 8.5). (The numbers in bfloat16, codes [N, K], d [N, K / 32])."""
    groups = weight.float().view(weight.shape[0], -1, 32)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
    d = (largest / -8).half()
    codes = (groups / (largest / -8)[..., None] + 8.5).floor().clamp(0, 15)
    values = (codes - 8) * d.float()[..., None]
    return values.view(weight.shape).bfloat16(), codes.view(weight.shape), d


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[Tensor, Tensor]]]:
    """The tiny Llama with the linears of its first layer put on Q4_0; their codes and scales."""
    folder = tmp_path_factory.mktemp("qat") / "tiny"
    shutil.copytree(TINY, folder)
    tensors, truth = load_file(TINY / "model.safetensors"), {}
    for name in list(tensors):
        if ".layers.0." in name and name.endswith("_proj.weight"):
            tensors[name], codes, d = q4_0(tensors[name].float() * 1.013)
            truth[name.removesuffix(".weight")] = (codes, d)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert len(truth) == 7
    return folder, truth


def test_the_scales_of_a_bfloat16_master_are_the_very_ones() -> None:
    torch.manual_seed(0)
    weight, codes, d = q4_0(torch.randn(24, 256).bfloat16())
    grid = IntGrid(group_size=32, scale_dtype="float16", residual_bits=0)
    base = CALIBRATORS["recover"].run(weight, grid, Stats())
    assert torch.equal(base.scale.t(), d) and torch.equal(base.unpack_codes().float(), codes)


def recovered(folder: Path, **changes: Any) -> Any:
    """The packed model, and its checkpoint."""
    quant = {
        "bits": 4,
        "group_size": 32,
        "scale_dtype": "float16",
        "residual_bits": 0,
        "calibrate": "recover",
    }
    section = QuantSection.model_validate(quant | {"targets": ["*.layers.0.*"]} | changes)
    checkpoint = Checkpoint.open(str(folder), dtype="float32")
    return checkpoint, *quantize(checkpoint, section)


def test_a_q4_0_checkpoint_becomes_the_gguf_that_holds_it(checkpoint: Any, tmp_path: Path) -> None:
    from gguf import GGUFReader, dequantize

    folder, truth = checkpoint
    source, model, table = recovered(folder)
    base, stored = base_weights(model), load_file(folder / "model.safetensors")
    same = 0
    for name, (codes, d) in truth.items():
        weight = base[name]
        assert torch.equal(weight.unpack_codes().float(), codes)
        assert torch.equal(weight.dequantize().bfloat16(), stored[f"{name}.weight"])
        assert (weight.scale.t().float() / d.float() - 1).abs().max() <= 2**-8
        same += int((weight.scale.t() == d).sum())
    # The others give the same bfloat16 numbers.
    assert same > 0.2 * sum(d.numel() for _, d in truth.values())
    assert max(row.error for row in table.quantized) < 1e-2
    write_model(tmp_path / "gguf", source, base, EXPORTERS["gguf"])
    blocks = {t.name: t for t in GGUFReader(tmp_path / "gguf" / FILE).tensors}
    for ours, theirs in (("o_proj", "attn_output"), ("down_proj", "ffn_down"), ("up_proj", "ffn_up")):
        name = next(n for n in truth if n.endswith(ours))
        tensor = blocks[f"blk.0.{theirs}.weight"]
        assert tensor.tensor_type.name == "Q4_0"
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(values.bfloat16(), stored[f"{name}.weight"])


def test_a_plain_checkpoint_is_refused_with_its_share(checkpoint: Any) -> None:
    with pytest.raises(ValueError, match="recover") as caught:
        recovered(TINY)
    text = str(caught.value)
    assert "groups looked at (100.0%) are not on the grid W4 g32 sym with float16 scales" in text
    assert "model.layers.0.self_attn.q_proj (100.0%), model.layers.0.self_attn.k_proj (100.0%)" in text
    assert "set quant.calibrate: auto" in text
    wider = "with scales of float16 all of them are: set quant.scale_dtype: float16"
    with pytest.raises(ValueError, match=wider):
        recovered(checkpoint[0], scale_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"6,144 of 30,720 groups looked at \(20.0%\)"):
        recovered(checkpoint[0], targets=["*.layers.0.*", "*.layers.1.*"])


def test_what_it_does_not_go_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recover = ("quant.calibrate=recover",)
    assert problems_with(GOOD, recover) == []
    assert any("rounds nothing" in note for note in notes(load_recipe(write(GOOD), recover)))
    quiet = (*recover, "quant.residual_bits=0")
    assert not any("rounds nothing" in note for note in notes(load_recipe(write(GOOD), quiet)))
    for more, words in (
        ("quant.rotation={kind: hadamard}", "got a fold beside quant.calibrate: recover"),
        ("quant.smooth=0.5", "got a fold beside quant.calibrate: recover"),
        ("train.teacher=residual", "recover rounds nothing, so the base is all there is: no teacher"),
    ):
        signal = ("train.signal={kind: logits}",) if "teacher" in more else ()
        found = problems_with(GOOD, (*recover, *signal, more))
        assert any(words in line for line in found), found
