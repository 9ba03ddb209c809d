"""What calibration rows decide: static scales by hand, clip factors and kinds by the error of the output."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from lowbit_ft.activations import Scheme, activation_of
from lowbit_ft.activations.calibrate import NEAR, RANGES, Choice, choose, needs_rows
from lowbit_ft.grid import IntGrid
from lowbit_ft.model.linear import PackedLinear
from tests.adapters.common import base_of

GRID = IntGrid(bits=4, group_size=-1, residual_bits=0)
TOKEN, STATIC = Scheme(kind="token", bits=8), Scheme(kind="tensor", bits=8, dynamic=False)


class Pair(nn.Module):
    """Two layers that are given one tensor, and one behind them that is given another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (PackedLinear(base_of(GRID, (16, 64))) for _ in range(3))

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> None:
        self.a(x)
        self.b(x)
        self.c(x * 2 if other is None else other)


def chosen(
    candidates: list[Scheme], batches: list[torch.Tensor], rule: str = "moving_average", **options: Any
) -> list[Choice]:
    model, names = Pair(), ("a", "b", "c")
    return choose(
        model,
        dict.fromkeys(names, candidates),
        len(batches),
        lambda i: model(batches[i], **options),
        rule,
    )


def test_static_scales_by_hand() -> None:
    first, second = torch.zeros(4, 64), torch.zeros(4, 64)
    first[0, 0], first[1, 1], second[0, 0], second[1, 1] = 127.0, -1.0, 64.0, -1.0
    made = chosen([STATIC], [first, second])
    assert [one.layers for one in made] == [["a", "b"], ["c"]]
    mean = 0.9 * 127 + 0.1 * 64  # the moving average of the largest
    wanted = torch.tensor([mean / 127, 2 * mean / 127]).bfloat16().float().tolist()
    assert [one.scheme.scale for one in made] == [(wanted[0],), (wanted[1],)]
    whole = chosen([STATIC], [second, first], "minmax")  # what the largest batch had, wherever it came
    assert [one.scheme.scale for one in whole] == [(1.0,), (2.0,)]
    halves = chosen([replace(STATIC, segments=(32, 32))], [second, first.roll(32, 1)], "minmax")
    assert halves[0].scheme.scale == tuple((torch.tensor([64.0, 127.0]) / 127).bfloat16().tolist())
    asymmetric = chosen([Scheme(kind="tensor", bits=8, dynamic=False, symmetric=False)], [first])[0].scheme
    assert asymmetric.scale == (torch.tensor(128 / 255).bfloat16().item(),) and asymmetric.zero == (-126,)
    dual = chosen([Scheme(kind="dual", bits=8, dynamic=False)], [first])[0].scheme
    assert dual.scale == (1 / 128, 1.0)


def test_every_range_covers_what_it_says() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 64)
    x[3, 5] = 60.0  # one outlier, 1 of 16384
    scale = {rule: chosen([STATIC], [x], rule)[0].scheme.scale[0] for rule in RANGES}
    assert scale["moving_average"] == pytest.approx(60 / 127, rel=2**-8)
    assert scale["percentile"] == pytest.approx(3.1 / 127, rel=0.05), "0.1 % on either side of a normal"

    assert scale["lsq"] == pytest.approx(float(2 * x.double().abs().mean() / 127**0.5), rel=2**-8)

    def off(value: float) -> float:
        scheme = Scheme(kind="tensor", bits=8, dynamic=False, scale=(value,))
        return float((activation_of(scheme).quantize(x) - x).square().sum())

    assert off(scale["mse"]) <= min(off(60 / 127 * i / 20) for i in range(1, 21)) * 1.01


def test_the_start_of_lsq_has_a_mean_of_each_sign() -> None:
    """2 mean |x| / sqrt(largest code): of dual over the negative and over the positive ones."""
    torch.manual_seed(0)
    x = torch.randn(64, 32)
    x[x < 0] *= 0.1
    narrow = Scheme(kind="dual", bits=4, dynamic=False)
    low, high = chosen([narrow], [x], "lsq")[0].scheme.scale
    assert low == pytest.approx(-2 * float(x[x < 0].mean()) / 8**0.5, rel=2**-8)
    assert high == pytest.approx(2 * float(x[x > 0].mean()) / 7**0.5, rel=2**-8)
    assert chosen([STATIC], [torch.zeros(4, 32)], "lsq")[0].scheme.scale == (1.0,)


def test_auto_takes_the_least_output_error_and_says_why() -> None:
    torch.manual_seed(0)
    negative = -torch.rand(64, 64) * 0.2
    negative[:, ::16] += torch.rand(64, 4) * 8  # as behind a GELU
    half = torch.randn(64, 32)
    balanced = torch.cat((half, -half), dim=1)  # as large below zero as above
    kinds = [TOKEN, Scheme(kind="dual", bits=8)]
    one = chosen(kinds, [negative], other=balanced)
    assert one[0].scheme.kind == "dual" and one[0].tried["A8 dual"] == one[0].error
    assert one[0].error is not None and one[1].error is not None
    assert one[0].error < 0.2 * one[0].tried["A8 token"] and one[0].why == "the least output error of 2"
    assert one[1].scheme.kind == "token", "two products buy nothing where signs are balanced"
    assert one[1].error <= NEAR * min(one[1].tried.values())
    clips = [TOKEN, Scheme(kind="token", bits=4), Scheme(kind="token", bits=4, clip=0.5)]
    assert chosen(clips, [torch.randn(32, 64)])[0].scheme == TOKEN
    json = one[0].to_json()
    assert json["scheme"] == {"kind": "dual", "bits": 8} and json["layers"] == ["a", "b"] and json["why"]


def test_rows_are_asked_for_only_where_they_decide() -> None:
    assert not needs_rows({"a": [TOKEN]})
    assert needs_rows({"a": [STATIC]}) and needs_rows({"a": [TOKEN, Scheme(kind="token", bits=4)]})
    made = choose(Pair(), {"a": [TOKEN], "c": [TOKEN]})
    assert made == [Choice(["a", "c"], TOKEN)] and made[0].why == "as the recipe says"


def test_a_layer_that_no_token_reached() -> None:
    model = Pair()
    found = choose(
        model, {"a": [TOKEN, STATIC], "c": [TOKEN, STATIC]}, 1, lambda _: model.a(torch.randn(2, 64))
    )
    assert [(one.layers, one.error is None) for one in found] == [(["a"], False), (["c"], True)]
    with pytest.raises(ValueError, match="no calibration token reached 1 layers"):
        choose(model, {"a": [STATIC], "c": [STATIC]}, 1, lambda _: model.a(torch.randn(2, 64)))
