"""Scales by segment of an input: from calibration rows, in files and readers, in a recipe and its plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit_ft import pipeline
from lowbit_ft.activations import Scheme, activation_of
from lowbit_ft.activations.place import hosts, place_activations, scheme_of
from lowbit_ft.export import EXPORTERS, LayerSpec
from lowbit_ft.export.native import layers_from_config
from lowbit_ft.export.reader import load_exported
from lowbit_ft.export.verify import verify
from lowbit_ft.export.writer import write_model
from lowbit_ft.merge import merged_weights
from lowbit_ft.plan.model import skeleton
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.sections.activations import ActivationsSection, carried
from lowbit_ft.segments import segments_in
from tests.activations.test_calibrate import chosen
from tests.activations.test_export import logits
from tests.export.common import checkpoint
from tests.family_rows import TINY, recipe_file
from tests.packed_tools import int_grid, packed_model, random_weights

TOKEN = Scheme(kind="token", bits=8)
HEADS = Scheme(kind="token", bits=8, segments=(32,) * 4)
UNEVEN = Scheme(kind="token", bits=8, segments=(32, 96))


def test_static_scales_of_segments_by_hand() -> None:
    x = torch.zeros(4, 64)
    x[0, 0], x[1, 15], x[2, 16], x[3, 63] = 127.0, -1.0, 2.54, -1.27
    static = Scheme(kind="tensor", bits=8, dynamic=False, segments=(16, 48))
    wanted = torch.tensor([1.0, 2.54 / 127]).bfloat16().float().tolist()
    assert chosen([static], [x])[0].scheme.scale == tuple(wanted)
    asymmetric = Scheme(kind="tensor", bits=8, dynamic=False, segments=(16, 48), symmetric=False)
    made = chosen([asymmetric], [x])[0].scheme
    assert made.scale == tuple(torch.tensor([128 / 255, 3.81 / 255]).bfloat16().float().tolist())
    assert made.zero == (-126, -43)
    assert chosen([Scheme(kind="dual", bits=8, dynamic=False, segments=(16, 48))], [x])[0].scheme.scale == (
        *(1 / 128, 1.0),
        *torch.tensor([1.27 / 128, 2.54 / 127]).bfloat16().float().tolist(),
    )


def test_a_large_head_costs_the_others_nothing() -> None:
    """SegQuant's case, where it is real: heads of very different sizes, static scales."""
    torch.manual_seed(0)
    x = torch.randn(64, 64) * torch.tensor([1.0, 3.0, 8.0, 0.5]).repeat_interleave(16)
    whole = Scheme(kind="tensor", bits=8, dynamic=False)
    heads = Scheme(kind="tensor", bits=8, dynamic=False, segments=(16,) * 4)
    one = chosen([whole, heads], [x])[0]
    assert one.scheme.segments == (16,) * 4 and one.error is not None
    assert one.error < 0.5 * one.tried["A8 tensor static"]
    assert one.why == "the least output error of 2"


@pytest.mark.parametrize("format", ["native", "compressed-tensors"])
def test_what_is_written_is_read_back(format: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "c", hidden_size=128)
    model = packed_model(source, random_weights(source.empty_model(), int_grid(bits=4, group_size=32)))
    place_activations(model, {n: HEADS if n.endswith("o_proj") else TOKEN for n, _ in hosts(model)})
    wanted = logits(model)
    write_model(tmp_path / "m", source, merged_weights(model), EXPORTERS[format])
    assert verify(tmp_path / "m", merged_weights(model), model=model, source=source.folder).ok
    found = load_exported(tmp_path / "m")
    assert torch.equal(logits(found), wanted)
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    if format == "native":
        assert {n: scheme_of(m) for n, m in hosts(found)} == {n: scheme_of(m) for n, m in hosts(model)}
    else:
        inputs = {g["targets"][0]: g["input_activations"] for g in config["config_groups"].values()}
        assert {(one["strategy"], one["group_size"]) for one in inputs.values()} == {
            ("token", None),
            ("group", 32),
        }
    place_activations(model, {n: TOKEN for n, _ in hosts(model)})
    assert not torch.equal(logits(model), wanted)


def test_who_cannot_carry_segments_says_so() -> None:
    grid = int_grid(bits=8, group_size=-1)
    for format, scheme, words in (
        ("compressed-tensors", UNEVEN, "set activations.segments: none"),
        ("compressed-tensors", Scheme(kind="tensor", bits=8, segments=(64, 64)), "not kind tensor"),
        ("int-quantized", HEADS, "set activations.segments: none"),
        ("gguf", HEADS, "holds weights only"),
    ):
        reason = EXPORTERS[format].reject_activation(scheme, grid, 128)
        assert reason is not None and words in reason and "native" in reason
    assert EXPORTERS["compressed-tensors"].reject_activation(HEADS, grid, 128) is None
    assert EXPORTERS["native"].reject_activation(UNEVEN, grid, 128) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"segments": [64]}, "needs a list of two or more"),
        ({"segments": [0, 64]}, "needs a list of two or more"),
        (
            {"kind": "tensor", "dynamic": False, "segments": [64, 64], "scale": [1.0, 2.0], "learn": "x"},
            "segments do not learn",
        ),
        ({"segments": [32, 64]}, "which are 96 channels; m.proj has 64 inputs"),
        ({"kind": "group"}, "kind group has none"),
        ({"kind": "tensor", "dynamic": False, "scale": [1.0]}, "kind tensor takes 2"),
    ],
)
def test_a_damaged_scheme_is_refused(change: dict[str, Any], words: str) -> None:
    scheme = Scheme(kind="token", bits=8, segments=(32, 32))
    layers = {"m.proj": LayerSpec((8, 64), int_grid(), activation=scheme)}
    config = json.loads(json.dumps(EXPORTERS["native"].model_config(layers, [])))
    assert layers_from_config(config) == layers
    config["activations"][0] |= change
    with pytest.raises(ValueError, match=r"quantization_config\.activations\[0\]") as told:
        layers_from_config(config)
    assert words in str(told.value)


def test_candidates() -> None:
    grid, two = int_grid(bits=4), (32, 32)
    assert ActivationsSection().schemes("o_proj", two) == [TOKEN], "none is the default"
    section = ActivationsSection(segments="auto")
    assert section.schemes("o_proj", two) == [Scheme(kind="token", bits=8, segments=two)]
    assert section.schemes("q_proj") == [TOKEN]
    every = ActivationsSection(segments="auto", kind="auto")
    assert {(s.kind, s.symmetric, s.segments) for s in every.schemes("o_proj", two)} == {
        *((kind, flat, s) for kind in ("token",) for flat in (True, False) for s in ((), two)),
        *(("group", flat, ()) for flat in (True, False)),
        *(("dual", True, s) for s in ((), two)),
    }
    fits = carried(every, "o_proj", grid, 64, "compressed-tensors", (16, 48))
    assert {s.segments for s in fits} == {()}, "of kind auto what the format carries"
    static = ActivationsSection(segments="auto", kind="tensor", dynamic=False, symmetric=False)
    planned = static.planned("o_proj", two)
    assert planned is not None and planned.calibrated and len(planned.scale) == len(planned.zero) == 2
    activation_of(planned)(torch.randn(2, 64))


def test_the_line_and_its_plan_find_the_heads(tmp_path: Path) -> None:
    changes = {"quant.activations": {"segments": "auto"}, "quant.calibrate": "absmax"}
    recipe = load_recipe(recipe_file(tmp_path, changes))
    heads = segments_in(TINY)["model.layers.0.self_attn.o_proj"].widths
    assert len(heads) > 1
    (made, *_) = [block.module for block in skeleton(recipe, TINY).blocks]
    assert made.self_attn.o_proj.activation.scheme() == Scheme(kind="token", bits=8, segments=heads)
    assert made.self_attn.q_proj.activation.scheme() == TOKEN
    model = load_exported(pipeline.quantize(recipe))
    found = {n.rpartition(".")[2]: scheme_of(layer) for n, layer in hosts(model)}
    assert found.pop("o_proj") == Scheme(kind="token", bits=8, segments=heads)
    assert set(found.values()) == {TOKEN}
