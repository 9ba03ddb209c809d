"""A ViT and a ResNet, their convolutions packed: adapted, trained, merged, read back and exported."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, ResNetConfig, ViTConfig

from lowbit_ft.activations import Scheme
from lowbit_ft.activations.place import place_activations
from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import attach, packed_layers
from lowbit_ft.export import EXPORTERS
from lowbit_ft.export.writer import check_writable, write_model
from lowbit_ft.merge import merge, merged_weights, verify_merge
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.conv import PackedConv2d
from lowbit_ft.model.purpose import Purpose
from lowbit_ft.plan.model import _pack
from lowbit_ft.quantize.quantize import Packing, quantize
from lowbit_ft.quantize.table import QuantTable
from lowbit_ft.recipe.layers import read_shapes
from lowbit_ft.recipe.sections.export import _check_kinds
from lowbit_ft.recipe.sections.quant import QuantSection

CONFIGS: dict[str, Any] = {
    "vit": ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=16,
        patch_size=4,
    ),
    "resnet": ResNetConfig(
        embedding_size=8,
        hidden_sizes=[16],
        depths=[1],
        layer_type="basic",
        downsample_in_first_stage=True,
    ),
}
PACKED = {"vit": 7, "resnet": 4}  # linears of a layer and the projection; stem, two of a block and a shortcut
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 1, 0])
PROJECTION = "vit.embeddings.patch_embeddings.projection"
# Zero points where there is padding, and a scale for each patch.
INPUTS: dict[str, dict[str, Scheme]] = {
    "vit": {PROJECTION: Scheme(kind="token", bits=8)},
    "resnet": {
        "resnet.encoder.stages.0.layers.0.layer.0.convolution": Scheme(
            kind="tensor", bits=8, symmetric=False, dynamic=False, scale=(0.03125,), zero=(-128,)
        )
    },
}


def section(**keys: Any) -> QuantSection:
    given = {
        "bits": 4,
        "group_size": 32,
        "calibrate": "absmax",
        "convolutions": True,
        "exclude": ["classifier*"],
    }
    return QuantSection.model_validate(given | keys)


@dataclass(frozen=True)
class Made:
    kind: str
    checkpoint: Checkpoint
    model: Any
    table: QuantTable
    folder: Path

    def read(self, folder: Path, **options: Any) -> Any:
        kept = {"dtype": torch.float32, "attn_implementation": "eager"}
        return AutoModelForImageClassification.from_pretrained(folder, **kept, **options).eval()


def norms(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if "normalization" in key}


@pytest.fixture(scope="module", params=CONFIGS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A model with a trained adapter in every packed layer, and merged/."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    dense = AutoModelForImageClassification.from_config(CONFIGS[kind])
    for module in dense.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 2)
    dense.save_pretrained(folder / "dense")
    checkpoint = Checkpoint.open(
        folder / "dense", dtype="float32", purpose=Purpose("AutoModelForImageClassification", {})
    )
    model, table = quantize(checkpoint, section(), dtype=torch.float32, attention="eager")
    place_activations(model, INPUTS[kind])
    attach(model, ADAPTERS["lr_qat"].model_validate({"method": "lr_qat", "rank": 2, "alpha": 4}))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.3)
    before = norms(model.train())
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(pixel_values=IMAGES).logits, LABELS).backward()
        optimizer.step()
    assert len(before) == {"vit": 0, "resnet": 20}[kind]
    assert all(torch.equal(value, before[key]) for key, value in norms(model).items()), "held"
    merge(model.eval(), checkpoint, folder / "merged")
    return Made(kind, checkpoint, model, table, folder)


def test_what_is_trained_is_what_ships(made: Made) -> None:
    layers = dict(packed_layers(made.model))
    convs = [name for name, layer in layers.items() if isinstance(layer, PackedConv2d)]
    assert len(layers) == PACKED[made.kind] and len(convs) == {"vit": 1, "resnet": 4}[made.kind]
    assert {row.layer for row in made.table.quantized} == set(layers)
    report = verify_merge(made.model, made.folder / "merged")
    assert report.exact and {row.layer for row in report.rows} == set(layers)
    for name in convs:
        assert not torch.equal(
            merged_weights(made.model)[name].unpack_codes(), layers[name].base.unpack_codes()
        )
    read = made.read(made.folder / "merged")
    assert [type(layer) for _, layer in packed_layers(read)] == [type(layer) for layer in layers.values()]
    with torch.no_grad():
        assert torch.equal(read(IMAGES).logits, made.model(IMAGES).logits)
        # as stored by transformers, and in the dtype in which most models are served
        read.save_pretrained(made.folder / "again")
        again = made.read(made.folder / "again")
        assert torch.equal(again(IMAGES).logits, read(IMAGES).logits)
        narrow = again.bfloat16()(IMAGES.bfloat16()).logits
        assert narrow.dtype == torch.bfloat16 and float((narrow - read(IMAGES).logits).abs().max()) < 0.1


def test_onnx_runtime_computes_what_was_trained(made: Made) -> None:
    exporter = EXPORTERS["onnx"]
    for modules in (exporter.writes_with, exporter.reads_with):
        if reason := exporter.missing(modules):
            pytest.skip(f"onnx {reason}")
    import onnxruntime

    write_model(made.folder / "onnx", made.checkpoint, merged_weights(made.model), exporter)
    session = onnxruntime.InferenceSession(made.folder / "onnx" / "model.onnx")
    sizes = [(1, 16, 16), (3, 16, 16)] + [(2, 24, 40)] * (made.kind == "resnet")
    for count, high, wide in sizes:
        x = torch.randn(count, 3, high, wide)
        found = torch.from_numpy(session.run(["logits"], {"pixel_values": x.numpy()})[0])
        with torch.no_grad():
            wanted = made.model(x).logits
        assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


def test_formats_for_language_models_refuse_by_name(made: Made) -> None:
    weights = merged_weights(made.model)
    shapes, quant = read_shapes(made.checkpoint.folder), section()
    convs = [layer.name for layer in shapes.packed(quant) if layer.conv]
    specs = {name: replace(spec, activation=None) for name, spec in weights.specs.items()}
    whole = {name: replace(spec, grid=replace(spec.grid, group_size=-1)) for name, spec in specs.items()}
    with pytest.raises(
        ValueError, match="read convolutions in full precision only; set export.format: native"
    ):
        check_writable(made.checkpoint, whole, EXPORTERS["compressed-tensors"])
    adapter = SimpleNamespace(trains=lambda *_: True)
    recipe = SimpleNamespace(
        quant=quant, export=SimpleNamespace(format="compressed-tensors"), adapter=adapter
    )
    said = [str(problem) for problem in _check_kinds(recipe, shapes)]
    assert len(said) == 1 and convs[0] in said[0] and "convolutions in full precision only" in said[0]
    recipe.export.format = "native"
    assert not list(_check_kinds(recipe, shapes))
    assert {
        f"{made.kind}.{name}".replace(f"{made.kind}.{made.kind}.", f"{made.kind}.") for name in convs
    } <= set(weights)


def test_left_alone_they_are_named(made: Made) -> None:
    """Without the key nothing is new; a pattern leaves single ones out; a model of nothing else says so."""
    if made.kind == "resnet":
        with pytest.raises(
            ValueError, match=r"its convolutions are resnet\.embedder.*quant.convolutions: true"
        ):
            Packing(made.checkpoint, section(convolutions=False), attention="eager")
        rows = Packing(
            made.checkpoint, section(exclude=["classifier*", "*shortcut*"]), attention="eager"
        ).rows
        assert [(row.layer.split(".")[-2], row.reason) for row in rows] == [
            ("shortcut", "excluded by '*shortcut*'"),
            ("classifier", "excluded by 'classifier*'"),
        ]
        return
    packing = Packing(made.checkpoint, section(convolutions=False), attention="eager")
    reasons = {row.layer: row.reason for row in packing.rows}
    assert reasons[f"{PROJECTION}.weight"] == "Conv2d: no linear layer, stays in float32"
    assert PROJECTION not in packing.specs and len(packing.specs) == 6


def test_rows_that_calibrate(made: Made) -> None:
    """gptq sums the patches that the walk passes: the outputs of a convolution err less than rounded. What
    the walk does not pass says so."""
    batches = [{"pixel_values": IMAGES[:2]}, {"pixel_values": IMAGES[2:]}]
    keys = {"bits": 2, "calibrate": "gptq", "symmetric": False}
    options: dict[str, Any] = {"dtype": torch.float32, "attention": "eager"}
    model, table = quantize(made.checkpoint, section(**keys), calibration=lambda: batches, **options)
    notes = {row.layer: row.reason for row in table.quantized}
    outside = [name for name, note in notes.items() if note]
    assert outside == [{"vit": PROJECTION, "resnet": "resnet.embedder.embedder.convolution"}[made.kind]]
    assert notes[outside[0]] == "outside the decoder layers: calibrated by mse"
    if made.kind == "vit":
        return
    rounded, _ = quantize(made.checkpoint, section(**keys | {"calibrate": "mse"}), **options)
    name, dense = "resnet.encoder.stages.0.layers.0.layer.0.convolution", made.read(made.checkpoint.folder)
    seen: list[tuple[Tensor, Tensor]] = []
    dense.get_submodule(name).register_forward_hook(lambda _, given, out: seen.append((given[0], out)))
    with torch.no_grad():
        dense(IMAGES)
        ((x, wanted),) = seen
        off = [(m.get_submodule(name)(x) - wanted).square().sum() for m in (model, rounded)]
    assert off[0] < 0.8 * off[1]


def test_planned_with_the_memory_that_it_will_have(made: Made) -> None:
    """The skeleton that `plan` counts: the same tensors, on meta."""
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(CONFIGS[made.kind], dtype=torch.float32)
    for name, layer in packed_layers(made.model):
        if isinstance(layer, PackedConv2d):
            config = ADAPTERS["lr_qat"].model_validate({"method": "lr_qat", "rank": 2, "alpha": 4})
            _pack(model, [(name, layer.grid, config, None)], torch.float32)
            planned = model.get_submodule(name)
            facts = [{k: (v.shape, v.dtype) for k, v in m.state_dict().items()} for m in (planned, layer)]
            assert facts[0] == facts[1] and isinstance(planned, PackedConv2d) and planned.codes.is_meta
