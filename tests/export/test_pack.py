"""pack and unpack of every format: inverse on every grid one accepts, and what cannot be held is refused
with a way out.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_ft.export import EXPORTERS, LayerSpec
from lowbit_ft.export.native import layers_from_config
from lowbit_ft.grid import BinaryGrid, IntGrid
from tests.export.common import BOTH, COMPRESSED, GGUF, GRIDS, NATIVE, OTHERS
from tests.packed_tools import int_grid, random_weight


@pytest.mark.parametrize("name", OTHERS)
def test_every_grid_a_format_accepts_comes_back_bit_for_bit(name: str) -> None:
    exporter, accepted = EXPORTERS[name], set()
    for grid, k in itertools.product(GRIDS, (96, 256, 768)):
        if exporter.reject_model({"m.0.x": LayerSpec((32, k), grid)}):
            continue
        weight = random_weight((32, k), grid, seed=k)
        layer, tensors = LayerSpec.of(weight), exporter.pack(weight)
        assert {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()} == exporter.specs(layer)
        assert exporter.unpack(tensors, layer).digest() == weight.digest(), (grid, k)
        accepted.add((grid.bits, grid.group_size, grid.symmetric))
        if not exporter.missing(exporter.reads_with):
            read = exporter.read_back(tensors, layer)
            assert torch.equal(read.codes, weight.unpack_codes()), (grid, k)
            assert torch.equal(read.scale.float(), weight.scale.float())
            assert (read.zero is None) == grid.symmetric and (
                grid.symmetric or torch.equal(read.zero, weight.zero)
            )
    everything = {(g.bits, g.group_size, g.symmetric) for g in GRIDS}
    assert (
        accepted
        == {
            "compressed-tensors": everything,
            "gguf": {key for key in everything if key[2]},
            "gptq": {key for key in everything if key[2] and key[0] != 6},
            "gptq_v2": {key for key in everything if key[0] != 6},
            "awq": {key for key in everything if key[0] == 4 and key[1] != -1}
            | {(4, -1, True), (4, -1, False)},
            "mlx": {key for key in everything if key[2] and key[1] in (32, 64, 128)},
            "torchao": everything,
            "onnx": everything,
            "int-quantized": {(8, -1, True)},
        }[name]
    )


@pytest.mark.parametrize("name", [name for name in OTHERS if name != "compressed-tensors"])
def test_tensors_that_are_not_ours_are_refused(name: str) -> None:
    exporter = EXPORTERS[name]
    only = {"int-quantized": int_grid(bits=8, group_size=-1)}
    weight = random_weight((32, 512), only.get(name, int_grid(group_size=64)))
    layer, tensors = LayerSpec.of(weight), exporter.pack(weight)
    for key in tensors:
        with pytest.raises(ValueError, match=f"missing {key}"):
            exporter.unpack({k: v for k, v in tensors.items() if k != key}, layer)
        with pytest.raises(ValueError, match=key):
            exporter.unpack(tensors | {key: torch.cat([tensors[key], tensors[key]])}, layer)
    if name == "gguf":
        blocks = tensors["weight"].clone()
        blocks[3, 1] += 1  # the scale of the first block, not of the second in the same group
        with pytest.raises(ValueError, match="differ in scale"):
            exporter.unpack({"weight": blocks}, layer)
        narrow = LayerSpec(layer.shape, int_grid(bits=2, group_size=64))
        with pytest.raises(ValueError, match="beyond 2 bits"):
            exporter.unpack(tensors, narrow)
        return
    if name == "torchao":
        with pytest.raises(ValueError, match="beyond 2 bits"):
            exporter.unpack(tensors, LayerSpec(layer.shape, int_grid(bits=2, group_size=64)))
        with pytest.raises(ValueError, match="zero points other than 8"):
            exporter.unpack(tensors | {"_weight_zero_point": tensors["_weight_zero_point"] + 1}, layer)
        return
    if name == "onnx":
        with pytest.raises(ValueError, match="blocks of one group differ, or scales are not bfloat16"):
            exporter.unpack(tensors | {"scale": tensors["scale"] * 1.0001}, layer)
        three = random_weight((32, 512), int_grid(bits=3))
        with pytest.raises(ValueError, match="beyond 3 bits"):
            exporter.unpack(exporter.pack(random_weight((32, 512), int_grid())), LayerSpec.of(three))
        eight = random_weight((32, 512), int_grid(bits=8))
        with pytest.raises(ValueError, match="zero points other than 128"):
            packed = exporter.pack(eight)
            exporter.unpack(packed | {"zero": packed["zero"] + 1}, LayerSpec.of(eight))
        return
    if name == "int-quantized":
        with pytest.raises(ValueError, match="weight_scale has values that are not bfloat16"):
            exporter.unpack(tensors | {"weight_scale": tensors["weight_scale"] * 1.0001}, layer)
        return
    scales = tensors["scales"].clone()
    scales[0, 0] *= 1.01
    with pytest.raises(ValueError, match="not a file of ours"):
        exporter.unpack(tensors | {"scales": scales}, layer)
    if name.startswith("gptq"):
        with pytest.raises(ValueError, match="g_idx"):
            exporter.unpack(tensors | {"g_idx": tensors["g_idx"].flip(0)}, layer)
    if name != "mlx":
        with pytest.raises(ValueError, match="zero points other than 8"):
            exporter.unpack(tensors | {"qzeros": tensors["qzeros"] ^ 1}, layer)


def test_what_a_format_cannot_hold_is_refused_with_a_way_out() -> None:
    def told(name: str, words: str, **fields: Any) -> None:
        layers = {"model.layers.0.mlp.x": LayerSpec((32, 256), int_grid(**fields))}
        problems = EXPORTERS[name].reject_model(layers)
        assert len(problems) == 1 and words in problems[0] and "native" in problems[0], problems

    told("gguf", "asymmetric", symmetric=False)
    told("gptq", "gptq_v2", symmetric=False)
    told("mlx", "asymmetric", symmetric=False)
    told("awq", "holds 4 bits, not 3", bits=3)
    told("mlx", "groups of 32, 64 and 128, not the whole row", group_size=-1)
    for name in OTHERS:
        exporter = EXPORTERS[name]
        assert "sign planes" in str(exporter.reject(BinaryGrid(bits=4))) or name == "awq"
        assert "float offset" in str(exporter.reject(int_grid(), offset=True))
    for name in ("gguf", "gptq", "awq"):
        assert "float32" in str(EXPORTERS[name].reject(int_grid(scale_dtype="float32")))
    assert "multiple of 32 inputs" in str(GGUF.reject_width(int_grid(), 100))
    assert GGUF.reject_width(int_grid(group_size=64), 96) is None  # a last group of 32
    two = {"m.0.a": LayerSpec((32, 256), int_grid()), "m.0.b": LayerSpec((32, 256), int_grid(bits=8))}
    assert "one grid for all layers" in EXPORTERS["gptq"].reject_model(two)[0]
    assert GGUF.reject_model(two) == EXPORTERS["mlx"].reject_model(two) == []
    here_only = {"m.0.a": LayerSpec((32, 256), int_grid()), "m.1.b": LayerSpec((32, 256), int_grid())}
    assert "block 1 leaves it dense" in EXPORTERS["gptq"].reject_model(here_only)[0]
    odd = {"m.0.a": LayerSpec((30, 256), int_grid())}
    assert "multiple of 8 outputs" in EXPORTERS["awq"].reject_model(odd)[0]
    assert "multiple of 8 outputs" in EXPORTERS["gptq"].reject_model(odd)[0]
    assert "head" in EXPORTERS["awq"].reject_model({"lm_head": LayerSpec((32, 256), int_grid())})[0]


def test_scales_that_float16_has_not_are_refused() -> None:
    weight = random_weight((32, 256), int_grid())
    weight.scale[0, 3] = 2.0**-20 * (1 + 2.0**-7)
    for name in ("gguf", "gptq", "awq"):
        with pytest.raises(ValueError, match=r"1 of 128 scales have no float16 value \(such as 9.61e-07\)"):
            EXPORTERS[name].pack(weight)
    weight.scale[0, 3] = 2.0**-17  # the smallest scale we ever train is exact
    assert GGUF.unpack(GGUF.pack(weight), LayerSpec.of(weight)).digest() == weight.digest()


INT_GRIDS = st.builds(
    IntGrid,
    bits=st.sampled_from([2, 3, 4, 6, 8]),
    group_size=st.sampled_from([32, 64, 128, 256, -1]),
    symmetric=st.booleans(),
    residual_bits=st.sampled_from([0, 1, 2, 4]),
    scale_dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
)
BINARY_GRIDS = st.builds(
    BinaryGrid, bits=st.sampled_from([1, 2, 3, 4]), group_size=st.sampled_from([32, 64, 128, 256, -1])
)


@pytest.mark.parametrize("name", list(EXPORTERS))
@settings(max_examples=60)
@given(grid=INT_GRIDS | BINARY_GRIDS, n=st.integers(1, 70), k=st.integers(1, 600), offset=st.booleans())
def test_unpack_is_the_inverse_of_pack(name: str, grid: Any, n: int, k: int, offset: bool) -> None:
    exporter, offset = EXPORTERS[name], offset and isinstance(grid, IntGrid)
    n = n * 32 if exporter.name.startswith(("gptq", "awq")) else n  # whole words of codes along N
    problems = exporter.reject_model({"a.0.b": LayerSpec((n, k), grid, offset)})
    if problems:
        way_out = ("native", "export.format: compressed-tensors")
        assert all(any(way in problem for way in way_out) for problem in problems)
        assert exporter is not NATIVE
        return
    if exporter is not NATIVE:
        grid = IntGrid(**({k: v for k, v in grid.to_json().items() if k != "grid"} | {"residual_bits": 0}))
    weight = random_weight((n, k), grid, offset=offset)
    layer = LayerSpec.of(weight)
    tensors = exporter.pack(weight)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == exporter.specs(layer)
    assert exporter.unpack(tensors, layer).digest() == weight.digest()
    if exporter.missing(exporter.reads_with):
        return
    read = exporter.read_back(tensors, layer)  # the library's own code finds the same
    assert torch.equal(read.codes, weight.unpack_codes()) and torch.equal(
        read.scale.float(), weight.scale.float()
    )
    for key in ("zero", "offset"):
        ours, theirs = getattr(weight, key, None), getattr(read, key)
        assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs))


def test_unpack_refuses_tensors_that_do_not_fit() -> None:
    for exporter in BOTH.values():
        weight = random_weight((6, 128), int_grid(symmetric=False))
        layer, tensors = LayerSpec.of(weight), exporter.pack(weight)
        for name in tensors:
            with pytest.raises(ValueError, match=f"missing {name}"):
                exporter.unpack({k: v for k, v in tensors.items() if k != name}, layer)
            with pytest.raises(ValueError, match=name):
                exporter.unpack(tensors | {name: torch.cat([tensors[name], tensors[name]])}, layer)
            with pytest.raises(ValueError, match=name):
                exporter.unpack(tensors | {name: tensors[name].to(torch.float64)}, layer)
        scale = "scale" if exporter is NATIVE else "weight_scale"
        with pytest.raises(ValueError, match="NaN" if exporter is NATIVE else "not bfloat16"):
            exporter.unpack(tensors | {scale: torch.full_like(tensors[scale], float("nan"))}, layer)
    with pytest.raises(ValueError, match="zero is 255"):
        tensors = NATIVE.pack(weight)
        NATIVE.unpack(tensors | {"zero": torch.full_like(tensors["zero"], 255)}, layer)
    with pytest.raises(ValueError, match="not bfloat16"):
        tensors = COMPRESSED.pack(weight)
        COMPRESSED.unpack(tensors | {"weight_scale": tensors["weight_scale"] * 1.0001}, layer)
    with pytest.raises(ValueError, match="weight_shape"):
        COMPRESSED.unpack(tensors | {"weight_shape": torch.tensor([128, 6])}, layer)


@settings(max_examples=40)
@given(grids=st.lists(INT_GRIDS | BINARY_GRIDS, min_size=1, max_size=4), offset=st.booleans())
def test_the_native_config_names_every_layer_and_grid(grids: list[Any], offset: bool) -> None:
    layers = {
        f"m.{i}.proj": LayerSpec((8 + i, 40), grid, offset and isinstance(grid, IntGrid))
        for i, grid in enumerate([*grids, grids[0]])
    }
    config = json.loads(json.dumps(NATIVE.model_config(layers, ["lm_head"])))
    assert layers_from_config(config) == layers
