"""Grids as facts, and packed weights as named tensors."""

import dataclasses

import pytest
import torch

from lowbit_ft.grid import GRIDS, BinaryGrid, IntGrid, PackedWeight, empty_weight, grid_from_json
from lowbit_ft.grid.estimators import SMALLEST_SCALE, cast, cast_scale, round_clip, scale_gradient
from tests.adapters.common import base_of

ALL_GRIDS = [IntGrid(bits=3, group_size=64, symmetric=False, residual_bits=2), IntGrid(), BinaryGrid(bits=2)]


@pytest.mark.parametrize("grid", ALL_GRIDS, ids=str)
def test_json_round_trip(grid):
    assert grid_from_json(grid.to_json()) == grid and GRIDS[grid.name] is type(grid)
    assert hash(grid_from_json(grid.to_json())) == hash(grid)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 5}, "bits: got 5; allowed are 2, 3, 4, 6, 8"),
        ({"bits": True}, "bits: got True"),
        ({"group_size": 48}, "group_size: got 48"),
        ({"symmetric": 1}, "symmetric: got 1"),
        ({"residual_bits": 3}, "residual_bits: got 3"),
        ({"scale_dtype": "int8"}, "scale_dtype"),
        ({"bit": 4}, "bit"),
        ({"grid": "float"}, "allowed are integer, binary"),
    ],
)
def test_a_bad_grid_is_refused(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        grid_from_json({"grid": "integer", **fields})


@pytest.mark.parametrize("grid", ALL_GRIDS, ids=str)
def test_from_tensors_refuses_what_does_not_fit(grid):
    base = base_of(grid)
    tensors = base.to_tensors()
    kind = type(base)
    first = next(iter(tensors))
    with pytest.raises(ValueError, match="needs"):
        kind.from_tensors({n: t for n, t in tensors.items() if n != first}, base.shape, grid)
    with pytest.raises(ValueError, match="scale: got"):
        kind.from_tensors({**tensors, "scale": tensors["scale"].float()}, base.shape, grid)
    with pytest.raises(ValueError, match=f"{first}: got"):
        kind.from_tensors({**tensors, first: tensors[first][..., :-1]}, base.shape, grid)
    with pytest.raises(ValueError, match="needs"):
        kind.from_tensors({**tensors, "other": tensors["scale"]}, base.shape, grid)


def test_digest_sees_every_bit_and_the_meaning_of_the_bits():
    base = base_of(IntGrid(bits=4, group_size=-1, symmetric=False), (8, 128))
    assert isinstance(base, PackedWeight)
    digests = {base.digest(), base.without_residual().digest()}
    for name, tensor in base.to_tensors().items():
        changed = tensor.clone()
        changed.view(torch.uint8).reshape(-1)[-1] ^= 1
        digests.add(dataclasses.replace(base, **{name: changed}).digest())
    # The same bytes read as 8-bit codes of half the columns are another weight.
    other = dataclasses.replace(base, grid=dataclasses.replace(base.grid, bits=8), shape=(8, 64))
    assert len(digests | {other.digest()}) == 2 + 4 + 1
    assert dataclasses.replace(base, codes=base.codes.clone()).digest() == base.digest()


def test_nbytes_counts_what_is_held():
    base = base_of(IntGrid(bits=4, group_size=128, residual_bits=0), (64, 1024))
    assert base.nbytes == 64 * 1024 // 2 + 8 * 64 * 2


@pytest.mark.parametrize("grid", ALL_GRIDS, ids=str)
def test_empty_weight_has_the_specified_tensors(grid):
    base, empty = base_of(grid), empty_weight((13, 200), grid, "meta")
    assert {n: (t.shape, t.dtype) for n, t in empty.to_tensors().items()} == {
        n: (t.shape, t.dtype) for n, t in base.to_tensors().items()
    }


def test_estimators():
    value = torch.tensor([0.1, 1.00001, -3.0], requires_grad=True)
    cast(value, "bfloat16").sum().backward()
    assert torch.equal(cast(value, "bfloat16"), value.detach().bfloat16().float())
    assert torch.equal(value.grad, torch.ones(3))

    value = torch.tensor([-1.0, -1e-9, 0.0, 1e-9, 0.5], requires_grad=True)
    used = cast_scale(value, "bfloat16")
    assert used.tolist() == [-1.0, -SMALLEST_SCALE, SMALLEST_SCALE, SMALLEST_SCALE, 0.5]
    assert torch.tensor(SMALLEST_SCALE).half().float() == SMALLEST_SCALE
    used.sum().backward()
    assert value.grad.tolist() == [1, 0, 0, 0, 1]

    value = torch.tensor([-0.7, 1.5, 2.5, 9.0], requires_grad=True)
    used = round_clip(value, 0, 3)
    used.sum().backward()
    assert used.tolist() == [0, 2, 2, 3] and value.grad.tolist() == [0, 1, 1, 0]

    value = torch.tensor([2.0], requires_grad=True)
    used = scale_gradient(value, 0.25)
    used.backward()
    assert used.item() == 2.0 and value.grad.item() == 0.25


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_of_a_weight_are_a_weight(bits: int, symmetric: bool) -> None:
    """As an exporter splits gate and up, and an embedding looks rows up: the same codes, scales and dense
    rows, nothing rounded anew.
    """
    from tests.packed_tools import random_weight

    for grid in (
        IntGrid(bits=bits, group_size=32, symmetric=symmetric, residual_bits=2),
        BinaryGrid(bits=3, group_size=32),
    ):
        weight = random_weight((20, 100), grid, offset=isinstance(grid, IntGrid))
        part = weight.rows(3, 11)
        assert part.shape == (8, 100) and torch.equal(part.dequantize(), weight.dequantize()[3:11])
        back = type(weight).from_tensors(part.to_tensors(), part.shape, grid)  # pyright: ignore[reportArgumentType]
        assert back.digest() == part.digest()
        picked = torch.tensor([7, 0, 7, 19])
        assert torch.equal(
            weight.chosen(picked).dequantize(torch.bfloat16), weight.dequantize(torch.bfloat16)[picked]
        )
