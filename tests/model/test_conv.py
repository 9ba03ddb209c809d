"""PackedConv2d: the convolution that torch computes with the dequantized weight, in float64; and the law.

One convolution and one image serve the whole table of methods, widths and grids; the geometries, which are
not the weight's business, are tried with one grid each.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lowbit_ft.activations import Scheme, activation_of
from lowbit_ft.activations.calibrate import choose
from lowbit_ft.activations.place import place
from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.export import EXPORTERS, LayerSpec
from lowbit_ft.grid import BinaryGrid, IntGrid, PackedWeight, Weight
from lowbit_ft.integrations.peft import LowBitLinear
from lowbit_ft.merge import merged_weight
from lowbit_ft.model.conv import PackedConv2d, conv_problem, matrix_of, rows_of
from lowbit_ft.model.kinds import matrix_shape, packed_in_place_of
from lowbit_ft.model.linear import deployed
from lowbit_ft.model.matrices import find_matrices, unpackable
from lowbit_ft.model.statistics import hold_statistics
from tests.activations.common import integer_product, schemes
from tests.adapters.common import base_of, trained
from tests.packed_tools import adapter_config

CONVOLUTIONS: dict[str, nn.Conv1d | nn.Conv2d] = {
    "padded": nn.Conv2d(4, 6, 3, padding=1),
    "patches": nn.Conv2d(4, 6, 4, stride=4),
    "1x1": nn.Conv2d(4, 6, 1, stride=2, bias=False),
    "uneven": nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 3)),
    "same": nn.Conv2d(4, 6, (4, 3), padding="same", dilation=(1, 2)),
    "valid": nn.Conv2d(4, 6, 2, padding="valid"),
    "groups": nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
    "depthwise": nn.Conv2d(4, 8, 3, padding=1, groups=4),
    "reflect": nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"),
    "circular": nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular", groups=2),
    "Conv1d": nn.Conv1d(4, 6, 3, stride=2, padding=1),
    "Conv1d of 1": nn.Conv1d(4, 6, 1),
    "Conv1d by channel": nn.Conv1d(4, 4, 4, padding=3, groups=4),
}
ASYMMETRIC = IntGrid(bits=4, group_size=32, symmetric=False, residual_bits=4)


def image(conv: nn.Conv1d | nn.Conv2d, size: tuple[int, ...] = (9, 7)) -> Tensor:
    return torch.randn(2, conv.in_channels, *size[: 2 - isinstance(conv, nn.Conv1d)])


def packed(
    conv: nn.Conv1d | nn.Conv2d, grid: IntGrid = ASYMMETRIC, method: str | None = None
) -> PackedConv2d:
    n, k = matrix_of(conv.weight).shape
    base = base_of(grid, (n, k))
    layer = packed_in_place_of(conv, base, conv.bias, torch.float32)
    assert isinstance(layer, PackedConv2d) and matrix_shape(conv) == (n, k) == base.shape
    if method is not None:
        layer.adapter = trained(adapter_config(method), base)
    return layer


def by_torch(conv: nn.Conv1d | nn.Conv2d, weight: Weight, x: Tensor) -> Tensor:
    """The module's own forward in float64, with this weight."""
    own = type(conv)(
        *(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation),  # pyright: ignore[reportArgumentType]
        groups=conv.groups,
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
        dtype=torch.float64,
    )
    own.weight.data = weight.dequantize().double().view(own.weight.shape)
    if own.bias is not None and conv.bias is not None:
        own.bias.data = conv.bias.detach().double()
    return own(x.double()).detach()


def near(found: Tensor, wanted: Tensor, most: float = 1e-5) -> bool:
    same = found.shape == wanted.shape
    return same and float((found.detach().double() - wanted).abs().max()) < most * float(wanted.abs().max())


EXACT = [m for m, c in ADAPTERS.items() if c.exact_merge and c.grid_name == "integer"]


@pytest.mark.parametrize("method", EXACT)
def test_what_is_trained_is_what_ships(method: str) -> None:
    """Every integer method at 2, 3, 4 and 8 bits, symmetric and not: the forward and its gradient are those
    of torch's convolution with the merged weight, whose integers two formats hold."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 24, 3, stride=2, padding=1)
    x = image(conv, (6, 5))
    for bits, symmetric in itertools.product((2, 3, 4, 8), (True, False)):
        grid = IntGrid(bits=bits, group_size=32 if bits == 4 else -1, symmetric=symmetric, residual_bits=4)
        layer = packed(conv, grid, method).train()
        assert layer.adapter is not None
        shipped = merged_weight(layer)
        assert isinstance(shipped, PackedWeight) and not torch.equal(
            shipped.dequantize(), layer.base.dequantize()
        )
        wanted = by_torch(conv, shipped, x)
        seen = x.clone().requires_grad_()
        y = layer(seen)
        assert near(y, wanted), (method, grid)
        upstream = torch.randn_like(y)
        (found,) = torch.autograd.grad(y, seen, upstream)
        pull = nn.functional.grad.conv2d_input(  # pyright: ignore[reportAttributeAccessIssue]
            x.shape, shipped.dequantize().double().view(conv.weight.shape), upstream.double(), 2, 1
        )
        assert near(found, pull)
        merged = deployed(layer, shipped)
        assert isinstance(merged, PackedConv2d) and torch.equal(merged(x), y)
        for format in ("native", "onnx"):
            if EXPORTERS[format].reject(shipped.grid, shipped.offset is not None) is None:
                made = EXPORTERS[format].pack(shipped)
                assert EXPORTERS[format].unpack(made, LayerSpec.of(shipped)).digest() == shipped.digest()


def test_the_weights_train() -> None:
    """The gradient of A, through patches and with groups through the weight, is that of torch's own
    convolution with the weight read off."""
    torch.manual_seed(1)
    for name in ("padded", "groups", "depthwise", "Conv1d by channel"):
        conv = CONVOLUTIONS[name]
        layer, x = packed(conv, method="lr_qat").train(), image(conv)
        assert layer.adapter is not None
        parameters = [p for p in layer.adapter.parameters() if p.requires_grad]
        y = layer(x)
        upstream = torch.randn_like(y)
        found = torch.autograd.grad(y, parameters, upstream)
        own = (nn.functional.conv1d if isinstance(conv, nn.Conv1d) else nn.functional.conv2d)(
            x,
            layer.weight,
            None,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,  # pyright: ignore[reportArgumentType]
        )
        assert layer.weight.shape == conv.weight.shape and len(found) >= 3
        for one, other in zip(found, torch.autograd.grad(own, parameters, upstream), strict=True):
            assert float(other.abs().max()) > 0
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_every_geometry(name: str) -> None:
    torch.manual_seed(2)
    conv = CONVOLUTIONS[name]
    layer, x = packed(conv, method="dl_qat").eval(), image(conv)
    shipped = merged_weight(layer)
    wanted = by_torch(conv, shipped, x)
    with torch.no_grad():
        y = layer(x)
        assert near(y, wanted) and near(layer(x[0]), wanted[0])
        assert torch.equal(layer.weight.flatten(1), shipped.dequantize())
        assert near(layer.patches.convolve(x, shipped.dequantize(), conv.bias), wanted)
        assert near(layer.bfloat16()(x.bfloat16()), wanted, 0.05) and layer.weight.dtype == torch.bfloat16
    alone = packed(conv)
    assert near(alone(x), by_torch(conv, alone.base, x))
    assert (alone.kernel_size, alone.stride, alone.groups) == (conv.kernel_size, conv.stride, conv.groups)
    rows = rows_of(conv, x)
    assert (rows is None) == (conv.groups > 1)
    assert rows is None or torch.equal(rows, layer.rows(x))


def test_planes_are_convolved_too() -> None:
    conv = CONVOLUTIONS["padded"]
    for name in ("padded", "groups"):
        conv = CONVOLUTIONS[name]
        n, k = matrix_of(conv.weight).shape
        layer = packed_in_place_of(conv, base_of(BinaryGrid(bits=2), (n, k)), conv.bias, torch.float32)
        layer.adapter = trained(adapter_config("alpha_tuning"), layer.base)
        x = image(conv)
        assert near(layer(x), by_torch(conv, merged_weight(layer), x))


@pytest.mark.parametrize("scheme", schemes(), ids=str)
def test_inputs_on_a_grid(scheme: Scheme) -> None:
    """The output is the product of the shipped integers with the codes of the patches; a padded zero is 0
    with a zero point too, in images that are nowhere near 0."""
    torch.manual_seed(3)
    conv = nn.Conv2d(16, 6, (2, 4), padding=(1, 2), stride=2)  # 128 inputs, rows of zeros at the edge
    x = torch.rand(2, 16, 6, 8) * 3 + 5
    x[1] -= 6
    layer = packed(conv, IntGrid(bits=4, group_size=32, symmetric=False, residual_bits=4), "lr_qat")
    place(layer.train(), scheme)
    shipped = merged_weight(layer)
    assert isinstance(shipped, PackedWeight)
    rows, bias = layer.rows(x), layer.bias
    assert bias is not None
    flat = rows.flatten(0, -2)
    wanted = integer_product(activation_of(scheme.shipped()), flat, shipped).view(*rows.shape[:-1], 6)
    wanted = (wanted + bias.detach().double()).movedim(-1, 1)
    assert near(layer(x), wanted)
    beyond = layer.patches.rows(torch.ones_like(x)) == 0
    assert beyond.any() and not layer.seen(x)[beyond].any(), "padding is exact"
    zero = activation_of(scheme).codes(flat)[2]
    shifted = isinstance(zero, Tensor) and bool(zero.any())
    assert shifted == (not scheme.symmetric), "zero points that are none would make the test empty"


def test_inputs_of_groups_on_a_grid() -> None:
    """Each group's part of a patch is a token of its own; one static scale is that of the pixels."""
    torch.manual_seed(4)
    conv = CONVOLUTIONS["groups"]
    layer, x = packed(conv).eval(), image(conv) + 1
    static = Scheme(kind="tensor", bits=8, symmetric=False, dynamic=False, scale=(0.04,), zero=(-40,))
    place(layer, static)
    assert near(layer(x), by_torch(conv, layer.base, activation_of(static)(x)))
    place(layer, Scheme(kind="token", bits=4))
    first = packed(nn.Conv2d(2, 3, 3, stride=2, padding=1))  # the first of the two groups, by itself
    first.fill(layer.base.rows(0, 3))
    place(first, Scheme(kind="token", bits=4))
    with torch.no_grad():
        assert conv.bias is not None and first.bias is not None
        first.bias.copy_(conv.bias[:3])
        assert near(layer(x)[:, :3], first(x[:, :2]).double())


def test_a_static_scale_is_found_on_patches() -> None:
    """Two convolutions of one image share it only where their patches are the same; groups are judged by
    their own weights."""
    torch.manual_seed(5)
    names = ("padded", "patches", "depthwise")
    again = nn.Conv2d(4, 5, 3, padding=1)
    model = nn.ModuleDict({n: packed(CONVOLUTIONS[n]) for n in names} | {"again": packed(again)})
    x = image(CONVOLUTIONS["padded"]) * 2 + 1
    static = Scheme(kind="tensor", bits=8, symmetric=False, dynamic=False)
    found = choose(
        model,
        dict.fromkeys(model, [static, Scheme(kind="token", bits=8)]),
        1,
        lambda _: [layer(x) for layer in model.values()],
    )
    assert [one.layers for one in found] == [["padded", "again"], ["patches"], ["depthwise"]]
    for one in found:
        layer = model[one.layers[0]]
        assert isinstance(layer, PackedConv2d) and one.error is not None and 0 < one.error < 1e-3
        for text, error in one.tried.items():
            scheme = one.scheme if str(one.scheme) == text else None
            if scheme is None:
                continue
            rows = layer.rows(x)
            off = activation_of(scheme).quantize(rows) - rows
            whole, lost = (layer.product(r, layer.base.linear).square().sum() for r in (rows, off))
            assert error == pytest.approx(float(lost / whole), rel=0.2), "on some of the rows"


def test_peft_wraps_it() -> None:
    torch.manual_seed(6)
    for name in ("padded", "groups"):
        conv = CONVOLUTIONS[name]
        layer, x = packed(conv), image(conv)
        wrapped = LowBitLinear(layer).train()
        wrapped.update_layer("default", adapter_config("lr_qat"))
        wrapped.set_adapter("default")
        adapter = wrapped.lowbit_adapters["default"]
        with torch.no_grad():
            adapter.get_parameter("B").normal_()
        y = wrapped(x)
        assert not torch.equal(y, layer(x))
        made = wrapped.unload_and_optionally_merge_module(True, True, None)
        assert isinstance(made, PackedConv2d) and torch.equal(made(x), y) and torch.equal(wrapped(x), y)


def test_few_rows_go_by_the_kernels_of_decoding() -> None:
    """In bfloat16 in eval mode the int4 kernel may serve; never a convolution with groups."""
    torch.manual_seed(7)
    conv = nn.Conv2d(64, 64, 1)
    layer = packed(conv, IntGrid(bits=4, group_size=32, symmetric=True, residual_bits=0)).bfloat16().eval()
    x = torch.randn(1, 64, 2, 2).bfloat16()
    with torch.no_grad():
        served = layer._int4_for(layer.rows(x)) is not None
        assert served and near(layer(x), by_torch(conv, layer.base, x.float()), 0.05)
    apart = packed(CONVOLUTIONS["groups"]).bfloat16().eval()
    assert not apart._repacks(apart.rows(image(CONVOLUTIONS["groups"]).bfloat16()))


class _Own(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def test_what_cannot_be_packed_is_named() -> None:
    normed = parametrizations.weight_norm(nn.Conv1d(4, 4, 3))
    assert conv_problem(normed) == "ParametrizedConv1d: its weight is computed from other tensors"
    assert conv_problem(_Own(4, 4, 3)) == "_Own is an nn.Conv2d with a forward of its own"
    model = nn.ModuleDict({"a": normed, "b": _Own(4, 4, 3), "c": nn.Conv2d(2, 4, 3), "d": nn.Conv3d(2, 4, 3)})
    assert list(find_matrices(model)) == ["c"] and find_matrices(model)["c"].conv
    assert [unpackable(module) is None for module in model.values()] == [False, False, True, True]
    matrix = find_matrices(model)["c"]
    for name, exporter in EXPORTERS.items():
        said = exporter.reject_matrix(matrix, ASYMMETRIC, None)
        assert (said is None) == (name in ("native", "onnx")), name
        assert said is None or "convolution" in said and "native" in said


class _Rectified(nn.BatchNorm2d):
    """timm's BatchNormAct2d in small."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


def test_statistics_of_a_batch_norm_are_held() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm1d(4, track_running_stats=False))
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
    norm.running_mean.fill_(2.0)
    assert hold_statistics(model) == 1 == hold_statistics(model)
    model.train()
    x = torch.randn(2, 4, 3, 3)
    assert model.training and not norm.training and isinstance(norm, nn.BatchNorm2d)
    assert torch.allclose(norm(x), (x - 2) / (1 + norm.eps) ** 0.5, atol=1e-6)
    assert bool((norm.running_mean == 2).all())
    assert model[2].training, "it divides by the batch in inference too"
    model = nn.Sequential(_Rectified(4))
    assert hold_statistics(model) == 1
    model.train()(x)
    rectified = model[0]
    assert isinstance(rectified, _Rectified) and not rectified.get_buffer("running_mean").any()
    assert bool((model(x) >= 0).all()) and copy.deepcopy(model).train()[0].training is False
