"""narrow_range: GLM-130B's equation, bit for bit, of one matrix and of models of its kind."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lowbit_ft.adapters.attach import packed_layers
from lowbit_ft.grid import IntGrid
from lowbit_ft.grid.calibrate import Stats
from lowbit_ft.grid.calibrate.narrow_range import narrow_range
from lowbit_ft.grid.estimators import SMALLEST_SCALE
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.sections.quant import QuantSection
from tests.architectures import CONFIGS, checkpoint_of


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_narrow_range_is_the_paper_s_equation_bit_for_bit(bits: int):
    """GLM-130B: s = fp16(max|w| / (2^(b-1) - 1)) of a row, q = round(w / s), no clamp: in float64."""
    weight = (torch.distributions.StudentT(4.0).sample((40, 96)) * 0.05 + 0.01).half()
    weight[3], weight[4, 1:] = 0, 0  # nothing at all, and one number
    top = 2 ** (bits - 1) - 1
    for row, step in (5, 2.0**-16), (6, 2.0**-20):  # scales that float16 holds as subnormals, of two sizes
        weight[row] *= top * step / weight[row].abs().max()
    packed = narrow_range(weight, IntGrid(bits=bits, group_size=-1, scale_dtype="float16"), Stats())
    exact = weight.double().numpy()
    scale = (np.abs(exact).max(1) / top).astype(np.float16)
    with np.errstate(invalid="ignore"):
        q = np.nan_to_num(np.round(exact / scale[:, None].astype(np.float64)))
    alive = scale >= SMALLEST_SCALE
    assert not alive[[3, 6]].any() and alive.sum() == 38, "the others are as the equation says"
    assert np.abs(q[alive]).max() == top, "without a clamp no code is beyond the grid"
    assert packed.scale.dtype == torch.float16
    np.testing.assert_array_equal(packed.scale[0].numpy()[alive], scale[alive])
    found = packed.unpack_codes().numpy().astype(int) - 2 ** (bits - 1)
    np.testing.assert_array_equal(found[alive], q[alive])
    assert not found[3].any() and found[4, 0] in (-top, top) and not packed.dequantize()[3].any()


@pytest.mark.parametrize("name", ["glm", "glm4"])
def test_glm_models_in_the_rows_of_glm_130b(name: str, tmp_path: Path) -> None:
    """W4 of whole rows, s = fp16(max|w| / 7) in float64, of every linear as it is in the files."""
    checkpoint = checkpoint_of(CONFIGS[name](), tmp_path)
    rows = QuantSection(
        bits=4, group_size=-1, scale_dtype="float16", calibrate="narrow_range", residual_bits=0
    )
    model, made = quantize(checkpoint, rows)
    layers = dict(packed_layers(model))
    assert len(layers) == len(made.quantized) == 12
    for path, layer in layers.items():
        dense = checkpoint.read(f"{path}.weight").double()
        scale = (dense.abs().amax(1, keepdim=True) / 7).half()
        assert torch.equal(layer.base.scale, scale.t()), path
        codes = layer.base.unpack_codes().double() - 8
        assert torch.equal(codes, (dense / scale.double()).round()) and codes.abs().max() == 7, path
