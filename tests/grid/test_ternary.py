"""ternary: TWN's levels, written out in float64; and the lowest code that stays unused, over every integer
method: in the base, in every forward, in the merge."""

from dataclasses import replace

import lowbit_kernels as kernels
import pytest
import torch

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.latent import apart
from lowbit_ft.export.base import check_values
from lowbit_ft.grid import IntGrid, PackedWeight, grid_from_json
from lowbit_ft.grid.calibrate import Stats
from lowbit_ft.grid.calibrate.ternary import ternary
from lowbit_ft.recipe.sections.quant import QuantSection
from tests.adapters.common import trained
from tests.adapters.test_law import configs
from tests.kernels.common import K, dense, error, integer_args
from tests.packed_tools import adapter_config

GRID = IntGrid(bits=2, group_size=32, narrow=True)


@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_ternary_is_twn_s_equation_in_float64(group_size: int) -> None:
    weight = torch.distributions.StudentT(4.0).sample((9, 200)) * 0.05 + 0.01
    weight[3] = 0
    grid = replace(GRID, group_size=group_size)
    packed = ternary(weight, grid, Stats())
    codes, wide = packed.unpack_codes().double() - 2, packed.dequantize_unrounded().double()
    size = 200 if group_size == -1 else group_size
    for g, start in enumerate(range(0, 200, size)):
        part = weight[:, start : start + size].double()
        chosen = part.abs() > 0.7 * part.abs().mean(1, keepdim=True)
        level = (part.abs() * chosen).sum(1) / chosen.sum(1).clamp_min(1)
        assert torch.equal(packed.scale[g], level.clamp_min(2.0**-17).bfloat16())
        assert torch.equal(codes[:, start : start + size], part.sign() * chosen)
        step = packed.scale[g].double()[:, None]
        inside = (part / step - part.sign() * chosen).abs() < 0.5
        off = (wide[:, start : start + size] - part).abs() / step
        assert off[inside].max() <= 1 / 32 and inside.double().mean() > 0.8, "the residual is the rest"
    assert not codes[3].any() and {-1.0, 0.0, 1.0} == set(codes.unique().tolist())


def test_the_lowest_code_stays_unused_under_every_integer_method() -> None:
    base = ternary(torch.randn(48, K) + 0.1, GRID, Stats())
    eye, names = torch.eye(K), set()
    for config in (c for m in ADAPTERS if ADAPTERS[m].grid_name == "integer" for c in configs(m)):
        if config.reject(base.grid) is not None:
            continue
        names.add(config.method)
        adapter = trained(config, base)
        merged = adapter.merge(base)
        assert (
            isinstance(merged, PackedWeight)
            and merged.grid == config.shipped(GRID)
            and not merged.grid.narrow
        )
        codes = merged.unpack_codes()
        assert int(codes.min()) == 1 and int(codes.max()) == 3, config
        assert config.method == "scale" or not torch.equal(codes, base.unpack_codes()), "nothing moved"
        assert torch.equal(adapter(eye, base), merged.dequantize().t())
        args = adapter.grid_args(base)
        if args.moves:  # what pulls to the grid (cage) pulls to the levels that are there
            ends = [e for _, e in apart(base, base.on_grid(args), skip_clipped=False)]
            value = torch.cat([e.flatten(1)[:, :K] for e in ends])
            assert value.min() < -0.51, "values below the first level are pulled up to it"
    assert (
        names == {m for m, c in ADAPTERS.items() if c.grid_name == "integer"} - {"lora"} and len(names) >= 7
    )
    assert "lr_qat, dl_qat, l4q or full_qat" in str(adapter_config("lora").reject(GRID))
    for method, offset in (("l4q", "integer"), ("l4q", "float"), ("lota", "float")):
        assert "set offset: none" in str(adapter_config(method, offset=offset).reject(GRID))


@pytest.mark.parametrize("units", ["grid", "live"])
@pytest.mark.parametrize("clip_first", [False, True])
def test_gradients_of_a_narrow_grid(units: str, clip_first: bool) -> None:
    """Against the equations in float64, cut at the first code that is used."""
    args = integer_args(2, units=units, zero=False, clip_first=clip_first, lowest=1)
    _, weight, leaves = dense(args, K)
    x, dy = torch.randn(5, K), torch.randn(5, 13)
    ours = {name: args[name].clone().requires_grad_() for name in leaves}
    y = kernels.grid_linear(x, **{**args, **ours})
    torch.testing.assert_close(y.double(), x.double() @ weight.t(), rtol=1e-5, atol=1e-5)
    (y * dy).sum().backward()
    ((x.double() @ weight.t()) * dy.double()).sum().backward()
    for name, leaf in leaves.items():
        assert error(ours[name].grad, leaf.grad) < 1e-5, name


def test_a_narrow_grid_is_kept_checked_and_refused() -> None:
    base = ternary(torch.randn(8, 64), GRID, Stats())
    assert grid_from_json(GRID.to_json()) == GRID and "narrow" not in GRID.deployed.to_json()
    assert str(GRID) == "W2 g32 sym narrow" and base.rows(1, 3).grid == GRID
    check_values(base)
    with pytest.raises(ValueError, match="codes: 64 are 0, the lowest"):
        check_values(replace(base, codes=torch.cat([torch.zeros_like(base.codes[:1]), base.codes[1:]])))
    with pytest.raises(ValueError, match="asymmetric grid"):
        IntGrid(bits=2, symmetric=False, narrow=True)
    quant = QuantSection(bits=2, calibrate="ternary", group_size=32, lm_head=8, embeddings=4)
    grids = [quant.grid_for(name) for name in ("m.0.q", "lm_head", "embed_tokens")]
    assert [grid.narrow for grid in grids] == [True, False, False]
