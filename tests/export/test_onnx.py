"""onnx through ONNX Runtime: one model with every operator in it, every kind of activation, and refusals."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers
from torch import nn

from lowbit_ft.activations import Scheme
from lowbit_ft.activations.place import place
from lowbit_ft.export import EXPORTERS, LayerSpec, base, onnx_graph
from lowbit_ft.export.base import Weights
from lowbit_ft.export.folder import read_manifest
from lowbit_ft.export.onnx_graph import trace
from lowbit_ft.export.onnx_layers import OnnxLinear
from lowbit_ft.export.reader import load_exported
from lowbit_ft.export.verify import verify
from lowbit_ft.export.verify_logits import NUDGES, Expected, compare_logits, logits_of, moves_of
from lowbit_ft.export.writer import check_writable, write_model
from lowbit_ft.files.manifest import MANIFEST, file_entry, sealed
from lowbit_ft.grid import BinaryGrid, IntGrid
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.linear import PackedLinear
from lowbit_ft.model.matrices import Matrix
from tests.export.common import NATIVE, checkpoint, needs_reader
from tests.packed_tools import int_grid, random_weight

ONNX = EXPORTERS["onnx"]
TOKEN = Scheme(kind="token", bits=8)
STATIC = Scheme(kind="tensor", bits=8, dynamic=False, scale=(0.03125,))
OFF_ZERO = Scheme(kind="tensor", bits=8, symmetric=False, dynamic=False, scale=(0.046875,), zero=(-9,))
ROW = {"group_size": -1}
# One layer of a GPT-2, whose linears are Conv1Ds: (grid, what its input is on, the operator).
LAYERS: dict[str, tuple[IntGrid, Scheme | None, str]] = {
    "transformer.wte": (int_grid(bits=2, group_size=32, symmetric=False), None, "GatherBlockQuantized"),
    "transformer.h.0.attn.c_attn": (int_grid(symmetric=False, group_size=32), None, "MatMulNBits"),
    "transformer.h.0.attn.c_proj": (int_grid(bits=3, **ROW), STATIC, "MatMulNBits"),
    "transformer.h.0.mlp.c_fc": (int_grid(bits=8, symmetric=False, **ROW), TOKEN, "MatMulInteger"),
    "transformer.h.0.mlp.c_proj": (int_grid(bits=6, group_size=32), OFF_ZERO, "DequantizeLinear"),
    "lm_head": (int_grid(bits=2, group_size=128), None, "MatMulNBits"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Weights, Path]:
    """(checkpoint in bfloat16 with a tied head, its weights, the folder)."""
    for modules in (ONNX.writes_with, ONNX.reads_with):
        if reason := ONNX.missing(modules):
            pytest.skip(f"onnx {reason}")
    folder = tmp_path_factory.mktemp("onnx")
    config = transformers.GPT2Config(
        vocab_size=4096, n_embd=32, n_layer=1, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    source = checkpoint(folder / "c", config, dtype="bfloat16")
    source.empty_model()
    made = {
        name: random_weight(source.matrices[name].shape, grid, seed=at)
        for at, (name, (grid, _, _)) in enumerate(LAYERS.items())
    }
    specs = {name: LayerSpec(w.shape, w.grid, activation=LAYERS[name][1]) for name, w in made.items()}
    weights = Weights(specs, made.__getitem__)
    write_model(folder / "m", source, weights, ONNX)
    return source, weights, folder / "m"


def test_onnx_runtime_computes_what_was_trained(written: Any, tmp_path: Path) -> None:
    source, weights, folder = written
    write_model(tmp_path / "n", source, weights, NATIVE)
    packed = load_exported(tmp_path / "n", dtype=torch.float32)
    report = verify(folder, weights, model=packed, source=source.folder)
    assert not report.failed and report.dtype == "float32" and report.answers is not None
    assert report.answers.same == report.answers.tokens
    # Far below what verify allows where a tie may fall otherwise.
    ids = torch.arange(3, 20)[None]
    model = load_exported(folder)
    found, wanted = model(ids).logits, packed(ids).logits
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    # What is allowed beyond a share of the largest is twice what nudges do, which leave nothing behind.
    own = logits_of(packed, {"input_ids": ids})
    moves = max(moves_of(packed, {"input_ids": ids}, own, by) for by in NUDGES)
    assert 0 < moves < 0.1 * own.abs().max() and torch.equal(logits_of(packed, {"input_ids": ids}), own)
    for off, fits in ((1.9, True), (2.1, False)):
        wide = Expected(own, [], "cpu", float(own.abs().max()))
        found = compare_logits(wide, model, own + off * own.abs().max(), ONNX, weights, torch.float32, False)
        assert (found[0] <= found[1]) == fits
    # Texts that share a row do not see each other, and an answer ends.
    places = torch.cat([torch.arange(9), torch.arange(8)])[None]
    assert torch.equal(model(ids, places).logits[:, 9:], model(ids[:, 9:]).logits)
    assert (
        model.generate(ids, max_new_tokens=2)[0, 17:].tolist()
        == packed.generate(ids, max_new_tokens=2, do_sample=False)[0, 17:].tolist()
    )
    other = Weights(weights.specs, lambda n: random_weight(weights.specs[n].shape, LAYERS[n][0], seed=77))
    with pytest.raises(ValueError, match="6 of 6 layers differ"):
        verify(folder, other)


def test_the_graph_has_the_operators_and_names_that_others_look_for(written: Any) -> None:
    import onnx

    _, weights, folder = written
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    outside = {t.name: t for t in graph.initializer if t.external_data}
    assert {f"{name}.codes" for name in weights} < outside.keys()
    for name, (_, _, operator) in LAYERS.items():
        (node,) = [n for n in graph.node if f"{name}.codes" in n.input]
        if node.op_type in ("Reshape", "Transpose"):
            (node,) = [n for n in graph.node if node.output[0] in n.input]
        assert node.op_type == operator, name
    ops = [n.op_type for n in graph.node]
    assert ops.count("MatMulInteger") == ops.count("QuantizeLinear") == 1 and ops.count("MatMulNBits") == 3
    assert all(
        a.i == 1 for n in graph.node if n.op_type == "MatMulNBits" for a in n.attribute if "level" in a.name
    )
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    heads = ["batch_size", 4, "past_sequence_length", 8]
    assert shapes["input_ids"] == shapes["position_ids"] == ["batch_size", "sequence_length"]
    assert shapes["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert shapes["past_key_values.0.key"] == shapes["past_key_values.0.value"] == heads
    assert shapes["present.0.value"] == ["batch_size", 4, "total_sequence_length", 8]
    assert shapes["logits"] == ["batch_size", "sequence_length", 4096]


PROJ, C_PROJ = "transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_proj"


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        (f"{C_PROJ}.input_zero", lambda v: v + 1),
        (f"{PROJ}.input_scale", lambda v: v * 1.01),
        (f"{PROJ}.input_scale", lambda v: numpy.nextafter(v, v + 1)),
        (f"{C_PROJ}.input_zero", None),
    ],
)
def test_an_input_of_the_graph_is_that_of_training_bit_for_bit(
    written: Any, tmp_path: Path, name: str, changed: Any
) -> None:
    """However little the logits move: what the reader computes with is another quantizer. Where the number
    is none of the graph's own (folded into its nodes), nobody can see which it is."""
    import onnx
    from onnx import numpy_helper

    _, weights, folder = written
    shutil.copytree(folder, tmp_path / "m")
    file = tmp_path / "m" / "model.onnx"
    model = onnx.load(file, load_external_data=False)
    (tensor,) = [t for t in model.graph.initializer if t.name == name]
    if changed is None:
        tensor.name = "val_7"
        for node in model.graph.node:
            node.input[:] = ["val_7" if one == name else one for one in node.input]
    else:
        values = changed(numpy_helper.to_array(tensor)).astype("float32")
        tensor.CopyFrom(numpy_helper.from_array(values, name))
    file.write_bytes(model.SerializeToString())
    manifest = read_manifest(tmp_path / "m")
    manifest["files"]["model.onnx"] = file_entry(file)
    (tmp_path / "m" / MANIFEST).write_bytes(sealed(manifest))
    words = rf"1 of 6 layers differ:\n +{name.rpartition('.')[0]}: 0 codes, 1 scales"
    with pytest.raises(ValueError, match=words):
        verify(tmp_path / "m", weights)


def test_a_text_in_pieces_and_padding_on_the_left_give_the_same_logits(written: Any) -> None:
    session = load_exported(written[2]).session

    def run(ids: torch.Tensor, mask: torch.Tensor, past: list[Any]) -> list[Any]:
        places = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        names = [value.name for value in session.get_inputs()]
        given = [ids.numpy(), mask.numpy(), places.numpy(), *past]
        return session.run(None, dict(zip(names, given, strict=True)))

    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    none = [torch.zeros(2, 4, 0, 8).numpy()] * 2
    whole = torch.from_numpy(run(ids, mask, none)[0])
    first = run(ids[:, :7], mask[:, :7], none)
    rest = run(ids[:, 7:], mask, first[1:])
    assert torch.allclose(torch.from_numpy(rest[0]), whole[:, 7:], atol=1e-5)
    alone = torch.from_numpy(run(ids[:1, 3:], mask[:1, 3:], [torch.zeros(1, 4, 0, 8).numpy()] * 2)[0])
    assert torch.allclose(whole[:1, 3:], alone, atol=1e-5)


KINDS = [
    Scheme(kind="token", bits=8, symmetric=False, clip=0.9),
    Scheme(kind="token", bits=4, segments=(32, 32)),
    Scheme(kind="group", bits=8, group_size=24),
    Scheme(kind="dual", bits=8),
    Scheme(kind="tensor", bits=8),
    Scheme(kind="tensor", bits=4, symmetric=False, dynamic=False, scale=(0.2,), zero=(-3,)),
    Scheme(kind="tensor", bits=3, dynamic=False, scale=(0.5,)),
    Scheme(kind="token", bits=6, symmetric=False),
    Scheme(kind="dual", bits=8, dynamic=False, scale=(0.02, 0.03)),
    replace(OFF_ZERO, scale=(0.1, 0.02), zero=(3, -40), segments=(24, 40)),
    Scheme(kind="dual", bits=6, dynamic=False, scale=(0.1, 0.2, 0.3, 0.05), segments=(32, 32)),
]


def test_inputs_are_on_the_grid_of_training() -> None:
    """Through the identity, whose products are x^ itself: bit for bit."""
    needs_reader("onnx")

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            specs = [LayerSpec((64, 64), int_grid(bits=4, group_size=64), activation=s) for s in KINDS]
            self.layers = nn.ModuleList(OnnxLinear(spec, ONNX.specs(spec), None) for spec in specs)
            for layer in self.layers:
                for name, tensor in ONNX.pack(eye).items():
                    layer.register_buffer(name, tensor)

        def forward(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
            return tuple(layer(inputs["x"]) for layer in self.layers)

    eye = random_weight((64, 64), int_grid(bits=4, group_size=64))
    ones = PackedLinear(
        type(eye).quantize(torch.eye(64), torch.ones(1, 64), None, eye.grid)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    )
    eye = ones.base.without_residual()
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    x[0, 0], x[0, 1, 3] = 0, 40.0
    for scheme, values in zip(KINDS, ran(Layers(), x, len(KINDS)), strict=True):
        place(ones, scheme)
        assert torch.equal(values, ones.seen(x)), scheme


def ran(layers: nn.Module, x: torch.Tensor, outputs: int) -> list[torch.Tensor]:
    """What ONNX Runtime, with the optimizations it has unless told otherwise, makes of x [2, 5, 64]."""
    import onnx_ir
    import onnxruntime

    names = [f"y{i}" for i in range(outputs)]
    made = onnx_graph._export(layers, {"x": x}, {"x": ("", "", "")}, names)
    data = onnx_ir.serde.serialize_model(made).SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(values) for values in session.run(None, {"x": x.numpy()})]


def test_a_product_of_integers_keeps_its_bias() -> None:
    """W8A8 with a bias, as encoders have it: ONNX Runtime 1.32 makes one operator of sums times a product of
    scales plus a bias, and where the scales are those of tokens it multiplies the bias with them, too."""
    needs_reader("onnx")
    chance = torch.Generator().manual_seed(3)
    weight = random_weight((48, 64), int_grid(bits=8, group_size=-1))
    bias = nn.Parameter(10 * torch.randn(48, generator=chance), requires_grad=False)
    narrow = (
        replace(TOKEN, bits=3),
        replace(STATIC, bits=6, scale=(0.05,)),
    )  # clipped in front of their bytes
    schemes = (TOKEN, Scheme(kind="tensor", bits=8), STATIC, *narrow)
    six = random_weight((48, 64), int_grid(bits=6, group_size=-1))  # in bytes, like those of 8 bits
    cases = [*((weight, scheme) for scheme in schemes), (six, TOKEN)]

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            specs = [LayerSpec((48, 64), own.grid, activation=scheme) for own, scheme in cases]
            self.layers = nn.ModuleList(OnnxLinear(spec, ONNX.specs(spec), bias) for spec in specs)
            for layer, (own, _) in zip(self.layers, cases, strict=True):
                for name, tensor in ONNX.pack(own).items():
                    layer.register_buffer(name, tensor)

        def forward(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
            return tuple(layer(inputs["x"]) for layer in self.layers)

    x = torch.randn(2, 5, 64, generator=chance)
    for (own, scheme), found in zip(cases, ran(Layers(), x, len(cases)), strict=True):
        packed = PackedLinear(own, bias=bias)
        place(packed, scheme)
        wanted = packed(x)
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max(), scheme


def test_what_onnx_cannot_carry_is_refused_with_the_way_out(
    written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, weights, folder = written
    assert "sign planes" in str(ONNX.reject(BinaryGrid(bits=2)))
    assert "float offset" in str(ONNX.reject(int_grid(), offset=True))
    expert = Matrix("m.0.up", "m.up", (64, 32), expert=0)
    assert "experts" in str(ONNX.reject_matrix(expert, int_grid(), None))
    table = Matrix("e", "e.weight", (64, 100), embedding=True)
    assert "32 does not divide 100" in str(ONNX.reject_matrix(table, int_grid(group_size=32), None))
    assert "quant.kv_cache: null" in str(ONNX.reject_kv_cache())
    assert ONNX.no_online is not None

    def broken(*args: Any) -> None:
        raise RuntimeError("a data-dependent branch\nand where it is")

    monkeypatch.setattr(onnx_graph, "_export", broken)
    words = "GPT2LMHeadModel cannot be traced .*: a data-dependent branch.; set export.format"
    with pytest.raises(ValueError, match=words):
        check_writable(source, weights.specs, ONNX)
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"reading onnx needs onnx, onnxruntime.*'lowbit-ft\[onnx\]'"):
        load_exported(folder)


def test_a_layer_that_no_output_comes_from_is_named(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source, weights, _ = written
    monkeypatch.setattr(onnx_graph, "_export", lambda *_: _Empty())
    with pytest.raises(ValueError, match="is in no path from the inputs to the outputs"):
        trace(onnx_graph.Layout(source, weights.specs, ONNX), source, ONNX)


class _Empty:
    """An onnx_ir model without a node."""

    def __new__(cls) -> Any:
        import onnx_ir

        graph = onnx_ir.Graph([], [], nodes=[], opset_imports={"": 21})
        return onnx_ir.Model(graph, ir_version=10)
