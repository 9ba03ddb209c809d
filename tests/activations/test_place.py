"""A quantizer in its slot: shared by q, k and v, in training, the merge, folders, PEFT and a resumed run."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from peft import get_peft_model

from lowbit_ft.activations import Activation, Scheme, activation_of
from lowbit_ft.activations.place import hosts, place_activations, scheme_of
from lowbit_ft.adapters import Adapter
from lowbit_ft.adapters.attach import attach, base_digest
from lowbit_ft.export import EXPORTERS, LayerSpec
from lowbit_ft.export.native import layers_from_config
from lowbit_ft.export.reader import load_exported, read_weights
from lowbit_ft.export.writer import write_model
from lowbit_ft.integrations.peft import LowBitConfig
from lowbit_ft.integrations.transformers import mark_packed
from lowbit_ft.kv_cache import KVConfig, place_kv_cache
from lowbit_ft.merge import base_weights, merge, verify_merge
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.linear import packed_op_only
from lowbit_ft.model.unrounded import unrounded
from tests.adapters.common import randomize
from tests.export.common import checkpoint
from tests.loop_tools import go, stop_at
from tests.packed_tools import (
    IDS,
    adapted_llama,
    adapter_config,
    int_grid,
    packed_model,
    random_weights,
)
from tests.toy import equal, state

A4 = Scheme(kind="token", bits=4)
MIXED = [
    Scheme(kind="token", bits=4, symmetric=False, clip=0.9, mask=2.0),
    Scheme(kind="tensor", bits=8, dynamic=False, scale=(0.03125,), symmetric=False, zero=(5,)),
    Scheme(kind="group", bits=4, group_size=32),
    Scheme(kind="dual", bits=8),
]


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad(), packed_op_only(model):
        return model.eval()(ids).logits


def shake(model: Any) -> None:
    """The trained tensors of all adapters away from their start."""
    torch.manual_seed(3)
    for module in model.modules():
        if isinstance(module, Adapter):
            randomize(module, 0.3)


def placed(model: Any) -> dict[str, Scheme]:
    """A scheme of its own kind for every layer but the last."""
    schemes = {name: MIXED[i % len(MIXED)] for i, (name, _) in enumerate(hosts(model))}
    schemes.popitem()
    place_activations(model, schemes)
    return schemes


def test_layers_given_one_tensor_share_one_quantized_input(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Activation] = []
    quantize = Activation.quantize
    monkeypatch.setattr(Activation, "quantize", lambda self, x: made.append(self) or quantize(self, x))
    model = adapted_llama(adapter_config("lr_qat"), int_grid(residual_bits=4))
    plain = logits(model, IDS % 23)
    place_activations(model, {name: A4 for name, _ in hosts(model)})
    assert not torch.equal(logits(model, IDS % 23), plain)
    assert len(made) == 2 * 4, "q, k, v; o; gate, up; down, in two layers"
    with unrounded(model):
        made.clear()
        logits(model, IDS % 23)
    assert not made, "the unrounded model is in full precision, its inputs too"


def test_a_shared_input_is_never_stale() -> None:
    activation, other = activation_of(A4), activation_of(A4)
    x = torch.randn(3, 64)
    first = activation(x)
    assert other(x) is first and activation_of(Scheme(kind="token", bits=8))(x) is not first
    x.mul_(2)
    assert not torch.equal(activation(x), first), "written to in between"
    y = torch.randn(3, 64, requires_grad=True) * 1
    with torch.no_grad():
        assert not activation(y).requires_grad
    assert activation(y).requires_grad, "made without gradient before, wanted with one now"
    held, kept = weakref.ref(y), weakref.ref(activation(y))
    del y
    gc.collect()
    assert held() is None and kept() is None, "x^ goes with x"
    with torch.inference_mode():
        z = torch.randn(3, 64)
        before = activation(z).clone()
        z.mul_(2)
        assert not torch.equal(activation(z), before)


def test_sharing_gives_the_gradient_of_separate_quantizers() -> None:
    torch.manual_seed(0)
    start = torch.randn(4, 64, requires_grad=True)
    weights = [torch.randn(8, 64) for _ in range(3)]
    one = activation_of(MIXED[0])

    def gradient(quantize: Any) -> torch.Tensor:
        x = start * 1
        losses = [(quantize(x) @ w.t()).square().sum() for w in weights]
        return torch.autograd.grad(torch.stack(losses).sum(), start)[0]

    torch.testing.assert_close(gradient(one), gradient(one.quantize))


def test_train_merge_reload_is_the_same_model(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "c", vocab_size=64, hidden_size=128)
    model = packed_model(source, random_weights(source.empty_model(), int_grid(residual_bits=4)))
    schemes = placed(model)
    write_model(tmp_path / "base", source, base_weights(model), EXPORTERS["native"])
    based = load_exported(tmp_path / "base")
    assert {n: scheme_of(m) for n, m in hosts(based) if m.activation is not None} == schemes
    assert torch.equal(logits(based), logits(model))
    attach(based, adapter_config("lr_qat"))
    shake(based)
    merge(based, source, tmp_path / "merged")
    merged = load_exported(tmp_path / "merged")
    assert torch.equal(logits(merged), logits(based))
    assert {n: scheme_of(m) for n, m in hosts(merged) if m.activation is not None} == {
        name: scheme.shipped() for name, scheme in schemes.items()
    }
    merged.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load_exported(tmp_path / "again")), logits(merged))
    assert verify_merge(based, tmp_path / "merged").exact
    place_activations(based, {})
    with pytest.raises(ValueError, match="holds another model"):
        verify_merge(based, tmp_path / "merged")


def test_peft_computes_with_the_same_inputs(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "c", vocab_size=64, hidden_size=128)
    model = packed_model(source, random_weights(source.empty_model(), int_grid(residual_bits=4)))
    placed(model)
    mark_packed(model)
    plain = logits(model)
    wrapped = get_peft_model(model, LowBitConfig(method="lr_qat", options={"rank": 4}))
    torch.testing.assert_close(logits(wrapped), plain)
    shake(wrapped)
    trained = logits(wrapped)
    assert not torch.equal(trained, plain)
    unloaded = wrapped.merge_and_unload()
    assert torch.equal(logits(unloaded), trained)
    assert any(layer.activation is not None for _, layer in hosts(unloaded))


SEGMENTS = [
    Scheme(kind="token", bits=8, segments=(16,) * 4),
    Scheme(kind="tensor", bits=8, dynamic=False, scale=(0.03125, 0.0625), segments=(16, 48)),
]


@pytest.mark.parametrize("scheme", [*MIXED, *SEGMENTS], ids=str)
def test_compiled_whole_it_is_the_same(scheme: Scheme) -> None:
    torch.manual_seed(0)
    activation, x = activation_of(scheme), torch.randn(3, 64, requires_grad=True)
    compiled = torch.compile(activation, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), activation(x))
    (found,) = torch.autograd.grad(compiled(x).square().sum(), x)
    assert torch.equal(found, torch.autograd.grad(activation(x).square().sum(), x)[0])


def test_a_resumed_run_is_bit_equal(tmp_path: Path) -> None:
    def fresh(seed: int) -> Any:
        model = adapted_llama(adapter_config("lr_qat"), int_grid(residual_bits=4), seed=seed)
        place_activations(model, {name: MIXED[0] for name, _ in hosts(model)})
        return model

    straight, _ = go(tmp_path / "a", fresh(1), max_steps=4)
    go(tmp_path / "b", fresh(1), max_steps=4, on_step=stop_at(2))
    resumed, result = go(tmp_path / "b", fresh(9), max_steps=4, resume=True)
    assert result.steps == 4 and equal(state(straight), state(resumed))
    other = adapted_llama(adapter_config("lr_qat"), int_grid(residual_bits=4))
    without, _ = go(tmp_path / "c", other, max_steps=4)
    assert not equal(state(straight), state(without)), "the inputs were quantized"


BAD: dict[str, Any] = {
    "needs a list": lambda c: c | {"activations": {}},
    "kind: got 'rows'; allowed: token": lambda c: _changed(c, kind="rows"),
    "bits: got 5; allowed: 3, 4, 6, 8": lambda c: _changed(c, bits=5),
    "clip: got -1": lambda c: _changed(c, clip=-1),
    "needs a list of positive numbers": lambda c: _changed(c, scale=[float("inf")]),
    "kind token is dynamic": lambda c: _changed(c, dynamic=False),
    "needs an object with kind and bits": lambda c: _changed(c, colour="red"),
    "is no layer of grids": lambda c: _changed(c, layers=["model.nowhere"]),
    "is listed twice": lambda c: c | {"activations": c["activations"] * 2},
    "kind tensor takes 1 where it is static": lambda c: _changed(c, kind="tensor", dynamic=False),
    "a scheme's fields and `layers`": lambda c: c | {"activations": [{"kind": "token", "bits": 8}]},
}


def _changed(config: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return config | {"activations": [{**config["activations"][0], **fields}]}


@pytest.mark.parametrize("words", BAD)
def test_a_damaged_configuration_is_refused(words: str) -> None:
    layers = {f"m.{i}.proj": LayerSpec((8, 64), int_grid(), activation=A4 if i else None) for i in range(3)}
    config = json.loads(json.dumps(EXPORTERS["native"].model_config(layers, [])))
    assert layers_from_config(config) == layers
    with pytest.raises(ValueError, match=r"quantization_config\.activations") as told:
        layers_from_config(BAD[words](config))
    assert words in str(told.value)


def test_a_run_without_quantized_inputs_writes_what_it_wrote(tmp_path: Path) -> None:
    source = Checkpoint.open(checkpoint(tmp_path / "c", vocab_size=64, hidden_size=64).folder)
    weights = random_weights(source.empty_model(), int_grid(group_size=32))
    write_model(tmp_path / "m", source, weights, EXPORTERS["native"])
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert "activations" not in json.dumps(config)
    assert all(spec.activation is None for spec in read_weights(tmp_path / "m").specs.values())


def test_an_adapter_belongs_to_what_inputs_keys_and_values_were_on() -> None:
    model = adapted_llama(adapter_config("lr_qat"), int_grid(residual_bits=4))
    names = [name for name, _ in hosts(model)]
    seen = [base_digest(model)]
    for bits in (8, 4):
        place_activations(model, {name: Scheme(kind="token", bits=bits) for name in names})
        seen.append(base_digest(model))
    place_activations(model, {})
    assert base_digest(model) == seen[0], "one without has the digest that it had"
    for bits in (8, 4):
        place_kv_cache(model, KVConfig.of(bits, "token"))
        seen.append(base_digest(model))
    assert len(set(seen)) == 5, "codes are the same, the model is not"


@pytest.mark.parametrize("scheme", [A4, MIXED[0], MIXED[1]], ids=str)
def test_a_checkpointed_input_is_quantized_again(scheme: Scheme) -> None:
    """Where a packed layer is given what is checkpointed as it is (OLMo 2: no norm before attention)."""
    torch.manual_seed(0)
    layer, start = activation_of(scheme), torch.randn(2, 64)
    gradients = []
    for again in (False, True):
        leaf = start.clone().requires_grad_()
        x = leaf * 1.5
        y = forwarded(lambda x: layer(x) * layer(x).cos(), x, again)
        y.sum().backward()
        gradients.append(leaf.grad)
    assert gradients[0] is not None and gradients[1] is not None
    assert torch.equal(gradients[0], gradients[1])


def forwarded(forward: Any, x: torch.Tensor, again: bool) -> torch.Tensor:
    return torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=False) if again else forward(x)
