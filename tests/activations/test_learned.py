"""A static scale that learns (LSQ), and a clip: value and gradient by the equation, one per input, and what
ships."""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from lowbit_ft.activations import Activation, Scheme, activation_of, read_scheme
from lowbit_ft.activations.learned import LearnedClip, LearnedScale
from lowbit_ft.activations.place import hosts, place_activations, shipped_of
from lowbit_ft.adapters import Adapter, is_scale
from lowbit_ft.adapters.attach import adapter_state, adapters_off, attach, base_digest, load_adapter_state
from lowbit_ft.export import EXPORTERS
from lowbit_ft.export.reader import load_exported
from lowbit_ft.export.writer import write_model
from lowbit_ft.grid import PackedWeight
from lowbit_ft.integrations.peft import LowBitConfig
from lowbit_ft.integrations.transformers import mark_packed
from lowbit_ft.merge import base_weights, merge, merged_weight, verify_merge
from lowbit_ft.model.linear import PackedLinear
from lowbit_ft.train.optim import build_optimizer
from tests.activations.common import CLIPS, LEARNED, integer_product, learning
from tests.activations.test_place import forwarded, logits, shake
from tests.adapters.common import base_of, randomize
from tests.export.common import checkpoint
from tests.loop_tools import go, stop_at
from tests.packed_tools import adapted_llama, adapter_config, int_grid, packed_model, random_weights
from tests.toy import equal, section, state

CLIP = CLIPS[0]
SCHEMES = [
    LEARNED,
    replace(LEARNED, bits=4, scale=(0.375,), symmetric=False, zero=(-3,)),
    Scheme(kind="dual", bits=4, dynamic=False, scale=(0.25, 0.5), learn="layer"),
    replace(LEARNED, bits=3, scale=(0.75,)),
]


def host(scheme: Scheme, k: int = 128, size: float = 3.0) -> PackedLinear:
    """A packed layer with an adapter, alone on its input; its scale has moved."""
    layer = PackedLinear(base_of(int_grid(bits=4), (11, k)))
    place_activations(layer, {"": scheme})
    attach(layer, adapter_config("lr_qat"))
    assert isinstance(layer.adapter, Adapter)
    randomize(layer.adapter, size)
    if scheme.dynamic:
        with torch.no_grad():
            master = learned_of(layer).master
            master.copy_(torch.linspace(-0.3, 0.1, len(master)))
    return layer.train()


def learned_of(layer: PackedLinear) -> Any:
    return layer.adapter.get_submodule("input") if layer.adapter else None


def learning_llama(scheme: Scheme = LEARNED) -> Any:
    return learning(adapted_llama(adapter_config("lr_qat"), int_grid(residual_bits=4)), scheme)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_value_and_gradient_are_those_of_the_equation(scheme: Scheme) -> None:
    torch.manual_seed(0)
    layer = host(scheme)
    learned = learned_of(layer)
    assert isinstance(learned, LearnedScale) and layer.activation is not None
    x = (torch.randn(5, 128) * 2).requires_grad_()
    pull = torch.randn(5, 128)
    y = layer.activation(x)
    (y * pull).sum().backward()

    master = learned.log_input_scale.detach().double()
    exact = torch.tensor(scheme.scale, dtype=torch.float64) * master.exp()
    s = exact.bfloat16().double()  # straight-through
    assert bool((s != torch.tensor(scheme.scale)).all())
    z = float(scheme.zero[0]) if scheme.zero else 0.0
    value, slope, into = torch.zeros(5, 128).double(), torch.zeros(len(s)).double(), torch.zeros(5, 128)
    outside = 0
    for t in range(5):
        for i, v in enumerate(x[t].tolist()):
            side = int(v >= 0) if len(s) == 2 else 0
            u = v / float(s[side]) + z
            q = min(max(round(u), scheme.lowest), scheme.highest)
            clipped = round(u) != q
            value[t, i] = float(s[side]) * (q - z)
            slope[side] += float(pull[t, i]) * (q - z if clipped else q - u)
            into[t, i] = 0.0 if clipped else float(pull[t, i])
            outside += clipped
    assert 0 < outside < 300, "both branches"
    factor = 1 / math.sqrt(128 * scheme.highest)  # LSQ, section 2.2
    torch.testing.assert_close(y.double(), value, atol=1e-6, rtol=1e-6)
    assert x.grad is not None and torch.equal(x.grad, into)
    found = learned.log_input_scale.grad
    assert found is not None
    torch.testing.assert_close(found.double(), slope * exact * factor, rtol=1e-4, atol=1e-6)


def plain(x: float, scale: float, zero: float, scheme: Scheme) -> tuple[float, float, bool]:
    """(x^, d x^ / d scale straight-through, whether it is clipped) of one number."""
    u = x / scale + zero
    q = min(max(round(u), scheme.lowest), scheme.highest)
    clipped = round(u) != q
    return scale * (q - zero), q - zero if clipped else q - u, clipped


@pytest.mark.parametrize("scheme", CLIPS, ids=str)
def test_the_gradient_of_a_clip_is_that_of_the_equation(scheme: Scheme) -> None:
    """And where only what is clipped counts, the slope of the forward itself."""
    torch.manual_seed(0)
    layer = host(scheme)
    learned, activation = learned_of(layer), layer.activation
    assert isinstance(learned, LearnedClip) and isinstance(activation, Activation)
    x, pull = (torch.randn(5, 128) * torch.linspace(0.5, 2, 128)).requires_grad_(), torch.randn(5, 128)
    (activation(x) * pull).sum().backward()
    clips = torch.tensor(scheme.clips * (len(learned.master) // len(scheme.clips))).double()
    clips = clips * learned.master.detach().double().exp()
    assert activation.shipped().clips == tuple(learned().tolist()) and bool((clips < 1).all())
    torch.testing.assert_close(learned().double(), clips, rtol=1e-6, atol=0)

    _, scale, zero = activation.codes(x.detach())
    steps = activation.spread(scale, x.detach()).double().expand(5, 128)
    zeros = torch.zeros(5, 128) if zero is None else activation.spread(zero, x.detach()).expand(5, 128)
    owner = (
        torch.arange(128) * 0
        if len(clips) == 1
        else torch.arange(len(clips)).repeat_interleave(torch.tensor(scheme.segments))
    )
    slope, outside = torch.zeros(len(clips)).double(), torch.zeros(5, 128, dtype=torch.bool)
    for t in range(5):
        for i, v in enumerate(x[t].tolist()):
            part = int(owner[i])
            _, by_scale, outside[t, i] = plain(v, float(steps[t, i]), float(zeros[t, i]), scheme)
            slope[part] += float(pull[t, i]) * by_scale * float(steps[t, i] / clips[part])
    assert 0 < int(outside.sum()) < 300 and x.grad is not None
    assert torch.equal(x.grad, pull.masked_fill(outside, 0))
    factor = 1 / math.sqrt(128 // len(clips) * scheme.highest)
    found = learned.master.grad
    torch.testing.assert_close(found.double(), slope * clips * factor, rtol=1e-4, atol=1e-5)

    def forward(a: Tensor) -> Tensor:
        clip = tuple(a.tolist()) if scheme.segments else float(a)
        return activation_of(replace(scheme.shipped(), clip=clip))(x.detach()).double()

    margin = 1 if scheme.bits == 4 else 4  # further out than a clip that is moved by h reaches
    exact = x.detach() / steps + zeros
    kept = pull * ((exact < scheme.lowest - margin) | (exact > scheme.highest + margin))
    learned.master.grad = None
    (activation(x.detach()) * kept).sum().backward()
    h = 1e-2
    wanted = float(((forward(clips * (1 + h)) - forward(clips * (1 - h))) * kept).sum()) / (2 * h) * factor
    assert abs(wanted) > 1e-3 and float(learned.master.grad.sum()) == pytest.approx(wanted, rel=1e-3)


def test_a_clip_stays_at_one_and_comes_back() -> None:
    """A step that would make it larger is none; one that makes it smaller is."""
    learned = LearnedClip(Scheme(kind="token", bits=4), 64, "bfloat16", torch.device("cpu"))
    for master, direction, moves in (
        (0.2, -1.0, False),
        (0.0, -1.0, False),
        (0.2, 1.0, True),
        (-0.1, -1.0, True),
    ):
        learned.master.data.fill_(master)
        learned.master.grad = None
        value = learned()
        (value * direction).backward()
        assert float(value.detach()) == pytest.approx(min(1.0, math.exp(master)))
        assert bool(learned.master.grad) == moves


def test_without_adapters_inputs_are_on_the_scales_of_the_base() -> None:
    """The row of the quantized model is that of base/, not of base/ on trained scales."""
    torch.manual_seed(1)
    layer, x = host(LEARNED), torch.randn(7, 128)
    trained, alone = layer(x), PackedLinear(layer.base)
    place_activations(alone, {"": LEARNED})
    with adapters_off(layer):
        assert torch.equal(layer(x), alone(x))
    assert torch.equal(layer(x), trained) and shipped_of(layer) != LEARNED.shipped()


@pytest.mark.parametrize("scheme", [*SCHEMES, *CLIPS], ids=str)
def test_what_ships_is_what_was_trained(scheme: Scheme) -> None:
    """The law with the trained scale or clip."""
    torch.manual_seed(1)
    layer, x = host(scheme), torch.randn(7, 128)
    shipped, weight = shipped_of(layer), merged_weight(layer)
    assert shipped is not None and isinstance(weight, PackedWeight)
    assert shipped.learn is None and shipped.zero == scheme.zero and read_scheme(shipped.to_json()) == shipped
    assert (shipped.scale != scheme.scale) != (shipped.clips != scheme.clips), "the one that trains"
    assert len(shipped.clips) == (max(1, len(scheme.segments)) if scheme.dynamic else 1)
    assert torch.tensor(shipped.scale).bfloat16().float().tolist() == list(shipped.scale)
    y = layer(x)
    assert layer.activation is not None and torch.equal(layer.activation(x), activation_of(shipped)(x))
    wanted = integer_product(activation_of(shipped), x, weight)
    assert float((y.detach().double() - wanted).abs().max() / wanted.abs().max()) < 1e-5


def test_one_scale_for_all_that_are_given_one_tensor() -> None:
    model = learning_llama()
    names = [name for name in state(model) if name.endswith("log_input_scale")]
    ends = [name.partition(".layers.0.")[2] for name in names if ".layers.0." in name]
    assert len(names) == 8 and [end.partition(".adapter")[0] for end in ends] == [
        "self_attn.q_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.down_proj",
    ]
    attention = model.model.layers[0].self_attn
    assert attention.k_proj.activation.learned is attention.q_proj.adapter.get_submodule("input")
    optimizer = build_optimizer(
        ((n, p) for n, p in model.named_parameters() if p.requires_grad),
        section(scale_learning_rate=0.5, weight_decay=0.1),
    )
    groups = {group["name"]: group for group in optimizer.param_groups}
    masters = dict(model.named_parameters())
    assert all(any(p is masters[name] for p in groups["scale"]["params"]) for name in names)
    assert groups["scale"]["weight_decay"] == 0 and is_scale(names[0])
    assert all(masters[name].dtype == torch.float32 for name in names)
    model.to(torch.bfloat16)
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if n in names)


def test_the_first_layer_that_trains_owns_the_scale() -> None:
    model = adapted_llama(adapter_config("lr_qat"), int_grid(residual_bits=4))
    for _, layer in hosts(model):
        layer.adapter = None
    place_activations(model, {n: replace(LEARNED, learn="one") for n, _ in hosts(model) if "self_attn" in n})
    attach(model, adapter_config("lr_qat", targets=["*.v_proj"]))
    (name,) = (n for n in state(model) if n.endswith("log_input_scale"))
    assert ".layers.0.self_attn.v_proj." in name
    attach(model, adapter_config("lr_qat", targets=["*.down_proj"]))


@pytest.mark.parametrize("scheme", [LEARNED, CLIP], ids=str)
def test_train_merge_reload_is_the_same_model(scheme: Scheme, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "c", vocab_size=64, hidden_size=128)
    model = packed_model(source, random_weights(source.empty_model(), int_grid(residual_bits=4)))
    learning(model, scheme)
    digest = base_digest(model)
    write_model(tmp_path / "base", source, base_weights(model), EXPORTERS["native"])
    based = load_exported(tmp_path / "base")
    assert base_digest(based) == digest
    attach(based, adapter_config("lr_qat"))
    shake(based)
    assert base_digest(based) == digest, "the start belongs to the base, what is trained to the adapter"
    again = load_exported(tmp_path / "base")
    attach(again, adapter_config("lr_qat"))
    load_adapter_state(again, adapter_state(based))
    assert torch.equal(logits(again), logits(based)), "adapter/ has the scales"
    merge(based, source, tmp_path / "merged")
    merged = load_exported(tmp_path / "merged")
    assert torch.equal(logits(merged), logits(based)) and verify_merge(again, tmp_path / "merged").exact
    schemes = [shipped_of(layer) for _, layer in hosts(merged)]
    assert {(s.scale, s.clip) for s in schemes if s} != {(scheme.scale, scheme.clip)}
    assert all(s and s.learn is None for s in schemes)
    mark_packed(again := load_exported(tmp_path / "base"))
    with pytest.raises(ValueError, match="trains with the adapter"):
        get_peft_model(again, LowBitConfig(method="lr_qat"))


@pytest.mark.parametrize("way", ["scale", "clip", "clip by zeroth order"])
def test_a_resumed_run_is_bit_equal(way: str, tmp_path: Path) -> None:
    scheme, options = CLIP if "clip" in way else LEARNED, dict[str, Any](max_steps=3)
    if "order" in way:
        options |= {"gradient": {"kind": "zeroth_order", "scope": "scales", "momentum": 0.5}}
    straight, _ = go(tmp_path / "a", learning_llama(scheme), **options)
    go(tmp_path / "b", learning_llama(scheme), on_step=stop_at(2), **options)
    resumed, result = go(tmp_path / "b", learning_llama(scheme), resume=True, **options)
    assert result.steps == 3 and equal(state(straight), state(resumed))
    moved = [p for n, p in state(straight).items() if n.endswith(("log_input_scale", "log_input_clip"))]
    assert len(moved) == 8 and all(float(p.abs()) > 0 for p in moved)


@pytest.mark.parametrize("scheme", [SCHEMES[1], CLIPS[5]], ids=str)
def test_compiled_and_checkpointed_it_is_the_same(scheme: Scheme) -> None:
    torch.manual_seed(0)
    layer, start = host(scheme), torch.randn(3, 128)
    activation: Any = layer.activation

    def gradients(call: Any, again: bool = False) -> list[Tensor]:
        x = start.clone().requires_grad_()
        y = forwarded(call, x * 1.5, again)
        return [y, *torch.autograd.grad(y.square().sum(), [x, activation.learned.master])]

    compiled = torch.compile(activation, backend="aot_eager", fullgraph=True)
    plain = gradients(activation)
    for other in (gradients(activation, again=True), gradients(compiled)):
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
    x = torch.randn(2, 128) * 1
    first = activation(x)
    with torch.no_grad():
        activation.learned.master.sub_(0.3)
    assert not torch.equal(activation(x), first), "a shared x^ is never of another scale"
    held, kept = weakref.ref(x), weakref.ref(activation(x))
    del x, first
    gc.collect()
    assert held() is None and kept() is None, "x^ goes with x, also where nobody asks for gradients"


def test_a_scheme_that_learns_in_a_file() -> None:
    for scheme in [*SCHEMES, *CLIPS]:
        assert read_scheme(scheme.to_json()) == scheme and "learn" not in scheme.shipped().to_json()
    two = {"segments": [64, 64]}
    for entry, words in (
        (LEARNED.to_json() | {"learn": 3}, "learn: got 3"),
        (LEARNED.to_json() | two | {"scale": [1.0, 1.0]}, "learn: the static scales of segments"),
        (CLIPS[0].to_json() | two | {"clip": [0.5]}, "clip: got 1 for 2 segments"),
        (CLIPS[0].to_json() | two | {"clip": [0.5, 0]}, "clip: got .*or one for each segment"),
    ):
        with pytest.raises(ValueError, match=words):
            read_scheme(entry)
