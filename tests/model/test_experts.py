"""Experts and Conv1D as separate linears: the same numbers as the model's own, read one at a time, written
and read back.
"""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import adapted_layers, attach
from lowbit_ft.export import EXPORTERS
from lowbit_ft.export.reader import load_exported, read_weights
from lowbit_ft.export.writer import check_model, write_model
from lowbit_ft.grid import IntGrid
from lowbit_ft.merge import merge, merged_weights
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.experts import Experts, StandIn
from lowbit_ft.model.load import load_model, materialize
from lowbit_ft.model.matrices import find_matrices, stand_in, unpackable
from lowbit_ft.model.names import Part
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.layers import read_shapes
from lowbit_ft.recipe.sections.quant import QuantSection
from tests.architectures import CONFIGS, checkpoint_of
from tests.packed_tools import nudge
from tests.whole_line import tokens, train

MIXTURES = ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "phimoe", "deepseek_v3"]
REFUSED = {"llama4_text", "dbrx", "jetmoe", "rwkv"}


def attention_of(name: str) -> str:
    return "eager" if name == "gpt_oss" else "sdpa"


@pytest.mark.parametrize("name", [*MIXTURES, "gpt2"])
def test_stand_ins_are_the_model(name: str, tmp_path: Path) -> None:
    """Dense: every matrix that is kept another way read as [N, K] into an nn.Linear gives the model's own
    logits.
    """
    checkpoint = checkpoint_of(CONFIGS[name](), tmp_path)
    own = load_model(checkpoint, attention_of(name))
    model = checkpoint.empty_model(attention_of(name))
    stand_in(model, [name for name, matrix in checkpoint.matrices.items() if not matrix.embedding])
    assert any(isinstance(m, StandIn) for m in model.modules())
    materialize(model, checkpoint)
    ids = tokens()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, own(ids).logits, rtol=1e-5, atol=1e-6)
    for layer, matrix in find_matrices(own).items():
        value = own.get_parameter(matrix.parameter)
        value = value if matrix.expert is None else value[matrix.expert]
        assert torch.equal(checkpoint.matrix(layer), value.t() if matrix.transposed else value)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_gradients_are_those_of_the_fused_experts(name: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(CONFIGS[name](), tmp_path)
    fused: Any = next(m for m in load_model(checkpoint, "eager").modules() if hasattr(m, "is_transposed"))
    experts = Experts(copy.deepcopy(fused)).train()
    for key in (experts.first, experts.second):
        for e in range(experts.num_experts):
            value = fused.get_parameter(key)[e]
            value = value.t() if fused.is_transposed else value
            experts.get_submodule(f"{e}.{key}").weight = nn.Parameter(value.detach().clone())  # pyright: ignore[reportAttributeAccessIssue]
    x, y = torch.randn(9, 64, requires_grad=True), torch.randn(9, 64, requires_grad=True)
    y.data.copy_(x)
    chosen = torch.randint(0, 3, (9, 2))  # no token goes to expert 3
    chosen[:, 1] = (chosen[:, 0] + 1) % 3
    weights = torch.rand(9, 2)
    a, b = fused(x, chosen, weights), experts(y, chosen, weights)
    torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
    a.square().sum().backward()
    b.square().sum().backward()
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-4, atol=1e-6)
    for key in (experts.first, experts.second):
        for e in range(experts.num_experts):
            expected = fused.get_parameter(key).grad[e]
            grad = experts.get_submodule(f"{e}.{key}").weight.grad  # pyright: ignore[reportAttributeAccessIssue]
            torch.testing.assert_close(
                grad, expected.t() if fused.is_transposed else expected, rtol=1e-4, atol=1e-6
            )
    idle = experts.get_submodule(f"3.{experts.first}").weight.grad  # pyright: ignore[reportAttributeAccessIssue]
    assert idle is not None and not idle.any(), "DDP waits for the gradient of every expert"


def test_only_the_expert_that_is_asked_for_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mixtral", "gpt_oss"):
        checkpoint = checkpoint_of(CONFIGS[name](), tmp_path / name)
        largest, read = 0, Checkpoint.read

        def watched(self: Checkpoint, *args: Any, _read: Any = read, **kwargs: Any) -> torch.Tensor:
            nonlocal largest
            out = _read(self, *args, **kwargs)
            largest = max(largest, out.numel())
            return out

        monkeypatch.setattr(Checkpoint, "read", watched)
        one = checkpoint.matrix("model.layers.1.mlp.experts.2.gate_up_proj")
        assert one.shape == (192, 64) and largest <= one.numel()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_are_exported_one_by_one(name: str, tmp_path: Path) -> None:
    """In compressed-tensors under the checkpoint's own names, gate and up apart; in our format under the
    model's.
    """
    checkpoint = checkpoint_of(CONFIGS[name](), tmp_path / "checkpoint")
    model, _ = quantize(checkpoint, QuantSection(group_size=32, calibrate="absmax"))
    train(model)
    merge(model, checkpoint, tmp_path / "native")
    weights = read_weights(tmp_path / "native")
    manifest = write_model(tmp_path / "ct", checkpoint, weights, EXPORTERS["compressed-tensors"])
    files = load_file(tmp_path / "ct" / "model.safetensors")
    ours = load_file(tmp_path / "native" / "model.safetensors")
    dense = set(checkpoint.names())
    packed = {key.removesuffix("_packed") for key in files if key.endswith(".weight_packed")}
    assert (
        packed <= dense
        and not packed & set(files)
        and len([key for key in packed if ".experts." in key]) == 2 * 4 * 3
    )
    assert sum(key.endswith(".codes") and ".experts." in key for key in ours) == 2 * 4 * 2
    assert not any(".experts." in key and key in dense for key in ours)
    layer = "model.layers.0.mlp.experts.1.gate_up_proj"
    gate, up = manifest["layers"][layer]["stored_as"].split("+")
    assert f"{gate}.weight" in dense and f"{up}.weight" in dense
    scale = torch.cat([files[f"{gate}.weight_scale"], files[f"{up}.weight_scale"]])
    assert torch.equal(scale, weights[layer].scale.t().float())
    ignored = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]["ignore"]
    routers = {key.removesuffix(".weight") for key in dense if key.endswith("gate.weight")}
    assert routers | {"lm_head"} <= set(ignored) and not any("experts" in name for name in ignored)
    assert not any(
        n.endswith("experts.gate_up_proj") for n, _ in load_exported(tmp_path / "native").named_parameters()
    )


def test_what_a_format_cannot_hold_is_refused_before_training(tmp_path: Path) -> None:
    ct = EXPORTERS["compressed-tensors"]
    for name, options, why in (
        ("gpt2", {}, "and 4 more: a Conv1D keeps its weight turned"),
        ("gpt_oss", {}, "one tensor per expert"),
        ("mixtral", {"symmetric": False}, "without their zero points"),
        ("mixtral", {"lm_head": 8}, "where all layers have one grid"),
        ("mixtral", {"exclude": ["lm_head", "*.experts.*"]}, "does not read dense experts"),
        ("llama", {"embeddings": 8}, "embeddings in full precision only"),
    ):
        folder = tmp_path / f"{name}{len(options)}{why[:3]}"
        checkpoint = checkpoint_of(CONFIGS[name](), folder)
        model, _ = quantize(
            checkpoint, QuantSection(group_size=32, calibrate="minmax", **options), attention="eager"
        )  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match=why):
            check_model(checkpoint, merged_weights(model).specs, ct)
        check_model(checkpoint, merged_weights(model).specs, EXPORTERS["native"])


@pytest.mark.parametrize(
    "format",  # onnx has a graph of its own: tests/export/test_onnx.py
    [n for n in EXPORTERS if n not in ("native", "compressed-tensors", "int-quantized", "onnx")],
)
def test_other_formats_refuse_what_is_no_plain_linear_by_name(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = EXPORTERS[format]
    monkeypatch.setattr(
        type(exporter), "reject_checkpoint", lambda self, config, folder: []
    )  # gguf refuses these models before
    monkeypatch.setattr(
        type(exporter), "reject_model", lambda self, layers: []
    )  # and others the mixed widths of tiny models
    for name, section, named in (
        ("mixtral", {}, "the experts of a mixture"),
        ("gpt2", {}, "a Conv1D"),
        ("llama", {"embeddings": 8}, "an embedding"),
    ):
        checkpoint = checkpoint_of(CONFIGS[name](), tmp_path / name)
        model, rows = quantize(
            checkpoint, QuantSection(group_size=32, calibrate="absmax", residual_bits=0, **section)
        )
        with pytest.raises(
            ValueError, match=f"(?s){format} cannot hold this model.*{named}; set export.format: native"
        ) as caught:
            check_model(checkpoint, merged_weights(model).specs, exporter)
        assert any(row.layer in str(caught.value) for row in rows.quantized)
    llama = checkpoint_of(CONFIGS["llama"](), tmp_path / "fused")
    layer, two = "model.layers.0.mlp.up_proj", [Part("a.weight", 0, 1), Part("b.weight", 1, 2)]
    for parts in (two, None):  # made of two tensors of the files, or of none as it is
        reason = exporter.reject_matrix(llama.matrices[layer], IntGrid(group_size=32), parts)
        assert reason is not None and "one tensor per layer" in reason
    assert exporter.reject_matrix(llama.matrices[layer], IntGrid(group_size=32), llama.parts(layer)) is None


def test_save_pretrained_of_packed_experts_loads_again(tmp_path: Path) -> None:
    for name in ("mixtral", "gpt_oss", "gpt2"):
        folder = tmp_path / name
        checkpoint = checkpoint_of(CONFIGS[name](), folder / "checkpoint")
        model, _ = quantize(
            checkpoint, QuantSection(group_size=32, embeddings=8, lm_head=4), attention="eager"
        )
        model.save_pretrained(folder / "packed")
        again = load_exported(folder / "packed", attention="eager")
        with torch.no_grad():
            assert torch.equal(again(tokens()).logits, model(tokens()).logits)
        assert copy.deepcopy(again)(tokens()).logits.shape == (2, 24, 128)


def test_embeddings_are_packed_and_never_adapted(tmp_path: Path) -> None:
    from lowbit_ft.adapters import LRQATConfig

    checkpoint = checkpoint_of(CONFIGS["llama"](), tmp_path)
    model, _ = quantize(checkpoint, QuantSection(group_size=32, embeddings=8, lm_head=8))
    attach(model, LRQATConfig(rank=2))  # pyright: ignore[reportCallIssue]
    names = [name for name, _ in adapted_layers(model)]
    assert "lm_head" in names and "model.embed_tokens" not in names
    assert "model.embed_tokens" in merged_weights(model)


@pytest.mark.parametrize(
    "name", [name for name in CONFIGS if name not in REFUSED and "multimodal" not in name]
)
def test_headers_alone_tell_the_same_layers(name: str, tmp_path: Path) -> None:
    """What the recipe checks and `plan` see in the files' headers are the layers that quantize finds in the
    model.
    """
    checkpoint, quant = checkpoint_of(CONFIGS[name](), tmp_path), QuantSection()
    shapes = read_shapes(tmp_path)
    seen = {x.name: (x.out_features, x.in_features) for x in [*shapes.linears, *shapes.convolutions]}
    real = {layer: matrix.shape for layer, matrix in checkpoint.matrices.items() if not matrix.embedding}
    assert {n: s for n, s in seen.items() if quant.skip_reason(n) is None} == {
        n: s for n, s in real.items() if quant.skip_reason(n) is None
    }


def test_a_linear_with_its_own_forward_is_not_taken_for_a_plain_one() -> None:
    class Grouped(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": Grouped(4, 4)})
    assert set(find_matrices(model)) == {"a"}
    assert "Grouped is an nn.Linear with a forward of its own" in str(unpackable(model["b"]))


@pytest.mark.parametrize("name", ["gemma3 (multimodal)", "llava (multimodal)", "qwen2_5_vl (multimodal)"])
def test_the_other_towers_ship_untouched(name: str, tmp_path: Path) -> None:
    """Of a multimodal checkpoint the text tower is packed; every other tensor is in the export under its
    name, byte for byte.
    """
    checkpoint = checkpoint_of(CONFIGS[name](), tmp_path / "checkpoint")
    model, rows = quantize(checkpoint, QuantSection(group_size=32, calibrate="absmax"))
    assert all("language_model" in row.layer for row in rows.quantized) and len(rows.quantized) == 14
    merge(model, checkpoint, tmp_path / "native")
    write_model(
        tmp_path / "ct", checkpoint, read_weights(tmp_path / "native"), EXPORTERS["compressed-tensors"]
    )
    for folder in ("native", "ct"):
        files = load_file(tmp_path / folder / "model.safetensors")
        towers = [key for key in checkpoint.names() if "vision" in key or "visual" in key]
        assert len(towers) > 10
        for key in towers:
            assert torch.equal(files[key], checkpoint.read(key)), key


@pytest.mark.parametrize("method", ADAPTERS)
@pytest.mark.parametrize("name", ["mixtral", "gpt2"])
def test_every_method_trains_and_ships_experts_and_conv1d(name: str, method: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(CONFIGS[name](), tmp_path / "checkpoint")
    config: Any = ADAPTERS[method](method=method)
    quant: dict[str, Any] = {"grid": config.grid_name, "group_size": 32, "bits": 3}
    model, _ = quantize(
        checkpoint, QuantSection(**quant | ({} if config.grid_name == "binary" else {"symmetric": False}))
    )
    attach(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()(tokens()).logits.square().mean().backward()
    assert trained and all(p.grad is not None for p in trained)
    with torch.no_grad():
        for p in trained:
            nudge(p, 0.02, config)
        expected = model.eval()(tokens()).logits
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="lora: the merge rounds again")
        merge(model, checkpoint, tmp_path / "native")
    with torch.no_grad():
        found = load_exported(tmp_path / "native")(tokens()).logits
    assert torch.equal(found, expected) == config.exact_merge
