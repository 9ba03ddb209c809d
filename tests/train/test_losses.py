"""The token loss against F.cross_entropy, value and gradient, masks and chunks; a model's loss in chunks
against its whole.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers.modeling_outputs import BaseModelOutputWithPast

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import attach
from lowbit_ft.grid import BinaryGrid, IntGrid
from lowbit_ft.model import heads
from lowbit_ft.model.linear import PackedLinear
from lowbit_ft.signals import tokens as token_sums
from lowbit_ft.train import losses
from lowbit_ft.train.losses import (
    ChunkedHead,
    Targets,
    count_targets,
    loss_forward,
    next_token_loss,
    target_logits,
)
from tests.packed_tools import random_weight, undrawn


def reference(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    flat = logits[:, :-1].reshape(-1, logits.shape[-1])
    return F.cross_entropy(flat, labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum")


def data(dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(3, 7, 11, generator=g) * 5).to(dtype)
    labels = torch.randint(0, 11, (3, 7), generator=g)
    labels[torch.rand(3, 7, generator=g) < 0.4] = -100
    return logits, labels


@pytest.mark.parametrize("chunk", [1, 30, 1 << 22])
def test_value_and_gradient(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_sums, "FLOATS_AT_A_TIME", chunk)
    logits, labels = data(torch.float64)
    exact = logits.clone().requires_grad_()
    reference(exact, labels).mul(0.7).backward()
    ours = logits.float().requires_grad_()
    loss = next_token_loss(ours, labels)
    loss.mul(0.7).backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), reference(exact, labels), rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)


def test_bf16_logits_are_summed_in_float32() -> None:
    logits, labels = data(torch.bfloat16)
    exact = logits.double().requires_grad_()
    reference(exact, labels).backward()
    ours = logits.clone().requires_grad_()
    loss = next_token_loss(ours, labels)
    loss.backward()
    torch.testing.assert_close(loss.double(), reference(exact, labels), rtol=1e-6, atol=0)
    assert ours.grad.dtype == torch.bfloat16
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-2, atol=1e-3)


def test_counts_and_masks() -> None:
    logits, labels = data(torch.float32)
    assert count_targets(labels) == int((labels[:, 1:] != -100).sum()) > 0
    nothing = torch.full_like(labels, -100)
    nothing[:, 0] = 5  # a first token has nothing before it: no target
    ours = logits.requires_grad_()
    loss = next_token_loss(ours, nothing)
    loss.backward()
    assert count_targets(nothing) == 0 and loss == 0 and not ours.grad.any()


def test_only_logits_and_one_number_per_row_are_kept() -> None:
    logits, labels = data(torch.bfloat16)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        next_token_loss(logits.requires_grad_(), labels)
    assert {(tuple(t.shape), t.dtype) for t in kept} == {
        ((21, 11), torch.bfloat16),
        ((21,), torch.int64),
        ((21,), torch.float32),
    }


def test_float64_logits_have_a_float64_loss() -> None:
    logits, labels = data(torch.float64)
    exact, ours = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    reference(exact, labels).backward()
    loss = next_token_loss(ours, labels)
    loss.backward()
    torch.testing.assert_close(loss, reference(exact, labels), rtol=1e-13, atol=0)
    torch.testing.assert_close(ours.grad, exact.grad, rtol=1e-11, atol=1e-14)


# ---------------------------------------------------------------- in chunks, on models

SIZE: dict[str, Any] = dict(
    vocab_size=520,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    pad_token_id=0,
)
# What stands between hidden states and logits: nothing, a tied weight, tanh, division, multiplication, a
# bias.
FAMILIES: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SIZE),
    "tied": lambda: transformers.LlamaConfig(**SIZE, tie_word_embeddings=True),
    "gemma2": lambda: transformers.Gemma2Config(**SIZE, final_logit_softcapping=0.5),
    "granite": lambda: transformers.GraniteConfig(**SIZE, logits_scaling=0.1),
    "cohere": lambda: transformers.CohereConfig(**SIZE, logit_scale=8.0),
    "phi": lambda: transformers.PhiConfig(**{k: v for k, v in SIZE.items() if k != "head_dim"}),
    "mixtral": lambda: transformers.MixtralConfig(**SIZE, num_local_experts=2),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=520,
        hidden_size=64,
        ffn_dim=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        word_embed_proj_dim=64,
        dropout=0.0,
    ),
}
ROWS = 5  # targets per chunk
CPU = torch.device("cpu")


def model_of(family: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family](), attn_implementation="eager").to(
        dtype
    )
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, so that each of them counts
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def batch_of() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 520, (3, 7), generator=g)
    labels = torch.where(torch.rand(3, 7, generator=g) < 0.4, -100, ids)
    positions = torch.arange(7).expand(3, 7)
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def compare(model: Any, monkeypatch: pytest.MonkeyPatch, tolerance: float) -> None:
    """Loss and gradients of `model` whole and in chunks; the head must have seen chunks."""
    batch = batch_of()
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    want = next_token_loss(model(**inputs, use_cache=False).logits, batch["labels"])
    (want * 0.3).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert grads and want > 0
    model.zero_grad()
    monkeypatch.setattr(heads, "LOGITS_AT_A_TIME", ROWS * 520)
    forward = loss_forward(model)
    seen: list[int] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _m, _a, out: seen.append(out.shape[-2]))
    loss = forward(model, **inputs, labels=Targets(batch["labels"], CPU))[0]
    (loss * 0.3).backward()
    hook.remove()
    targets = count_targets(batch["labels"])
    assert (
        targets == 12 and sorted(seen) == [2, 2] + [5] * 4
    )  # once, and again in the backward; not the 9 others
    assert loss.dtype == want.dtype
    torch.testing.assert_close(loss, want, rtol=tolerance, atol=0)
    ours = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == grads.keys()
    for name, grad in grads.items():
        error = (ours[name] - grad).abs().max()
        assert error <= tolerance * grad.abs().max(), (name, float(error), float(grad.abs().max()))
    assert "forward" not in vars(model.base_model)
    model.zero_grad()


@pytest.mark.parametrize(
    "family", [name for name in FAMILIES if name != "mixtral"]
)  # torch's grouped product has no float64
def test_chunks_are_the_whole_in_float64(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(model_of(family, torch.float64), monkeypatch, 1e-10)


@pytest.mark.parametrize("family", ["llama", "tied", "gemma2", "phi", "mixtral"])
def test_chunks_are_the_whole_in_float32_with_a_frozen_head(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(family).requires_grad_(False)
    name = next(n for n, _ in model.named_parameters() if "q_proj" in n)
    model.get_parameter(name).requires_grad_()
    compare(model, monkeypatch, 2e-5)


@pytest.mark.parametrize("method", ADAPTERS)
def test_chunks_with_a_packed_head_and_every_adapter(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = BinaryGrid(group_size=32) if ADAPTERS[method].grid_name == "binary" else IntGrid(group_size=32)
    model = model_of("llama").requires_grad_(False)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            base = random_weight((layer.out_features, layer.in_features), grid)
            model.set_submodule(name, PackedLinear(base))
    attach(model, undrawn(method))
    compare(model, monkeypatch, 2e-4)


def test_chunks_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compare(model, monkeypatch, 2e-2)


def test_only_the_hidden_states_are_kept_for_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "LOGITS_AT_A_TIME", ROWS * 520)
    model, labels = model_of("llama"), batch_of()["labels"]
    head = ChunkedHead(model.model, model.forward, 520)
    hidden = torch.randn(3, 7, 64, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        head.loss(BaseModelOutputWithPast(last_hidden_state=hidden), Targets(labels, CPU))  # pyright: ignore[reportArgumentType]
    assert kept.pop(hidden.untyped_storage().data_ptr()) == 21 * 64 * 4
    assert sum(kept.values()) <= 2 * 21 * 8 + 64, kept  # where the targets are and which, and a few scalars


def test_stretches_hold_so_many_targets_each(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.tensor([[9, -100, 3, -100, 5], [9, 6, 7, -100, -100]])  # targets at 1, 3, 5, 6
    lengths, pairs = Targets(labels, CPU).stretches(3)
    assert lengths == [6, 4] and [(p.tolist(), t.tolist()) for p, t, *_ in pairs] == [
        ([1, 3, 5], [3, 5, 6]),
        ([0], [7]),
    ]
    lengths, pairs = Targets(torch.full((1, 4), -100), CPU).stretches(3)  # none: one that counts nothing
    assert lengths == [4] and [(p.tolist(), t.tolist()) for p, t, *_ in pairs] == [([0], [-100])]
    # and what trains still has a gradient, of zeros: DDP waits for every one
    monkeypatch.setattr(heads, "LOGITS_AT_A_TIME", ROWS * 520)
    model = model_of("llama")
    batch = batch_of() | {"labels": Targets(torch.full((3, 7), -100), CPU)}
    loss = loss_forward(model)(model, **batch)[0]
    loss.backward()
    assert loss == 0 and all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_logits_of_the_targets_some_at_a_time(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_of(family), batch_of()
    targets = Targets(batch.pop("labels"), CPU)
    want = model(**batch, use_cache=False).logits.reshape(21, -1)[targets.where]
    monkeypatch.setattr(heads, "LOGITS_AT_A_TIME", ROWS * 520)
    for apart in (True, False):
        if not apart:
            monkeypatch.setattr(losses, "find_head", lambda *_: (None, "a test"))
        logits, tokens = zip(*target_logits(model)(batch, targets), strict=True)
        assert [len(t) for t in tokens] == [5, 5, 2] and not logits[0].requires_grad
        torch.testing.assert_close(torch.cat(logits), want, rtol=1e-4, atol=1e-5)
        assert torch.equal(torch.cat(tokens), targets.tokens)


class FakeLiger:
    """LigerFusedLinearCrossEntropyLoss, by its signature: what is passed, and in which order, is what is
    tested.
    """

    rows: list[int] = []

    def __init__(self, ignore_index: int = -100, reduction: str = "mean") -> None:
        self.options = {"ignore_index": ignore_index, "reduction": reduction}

    def __call__(
        self,
        lin_weight: torch.Tensor,
        _input: torch.Tensor,
        target: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert lin_weight.shape == (520, 64) and _input.shape == (len(target), 64)
        self.rows.append(len(target))
        return F.cross_entropy(F.linear(_input, lin_weight, bias), target, **self.options)


@pytest.mark.parametrize("family", ["llama", "phi", "opt"])
def test_liger_gets_the_targets_and_nothing_else(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        sys.modules, "liger_kernel.transformers", SimpleNamespace(LigerFusedLinearCrossEntropyLoss=FakeLiger)
    )
    FakeLiger.rows.clear()
    model, batch = model_of(family, torch.float64), batch_of()
    labels, inputs = batch["labels"], {k: v for k, v in batch.items() if k != "labels"}
    want = next_token_loss(model(**inputs, use_cache=False).logits, labels)
    want.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    forward = loss_forward(model, "liger")
    loss = forward(model, **inputs, labels=Targets(labels, CPU))[0]
    loss.backward()
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad, rtol=1e-9, atol=1e-11)
    with torch.no_grad():  # measuring goes through the chunks
        measured = forward(model, **inputs, labels=Targets(labels, CPU, measured=True))[0]
        torch.testing.assert_close(measured, want.detach(), rtol=1e-12, atol=0)
    assert FakeLiger.rows == [count_targets(labels)]


def test_liger_refuses_heads_it_would_compute_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in ("gemma2", "granite", "cohere"):
        with pytest.raises(
            ValueError, match="no scaling and no soft cap of logits, and .* has one; set train.loss: chunked"
        ):
            loss_forward(model_of(family), "liger")
    model = model_of("llama")
    with pytest.raises(
        ValueError,
        match=r"cannot be imported .*; pip install 'lowbit-ft\[liger\]', or set train.loss: chunked",
    ):
        monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
        loss_forward(model, "liger")
    model.lm_head = PackedLinear(random_weight((520, 64), IntGrid(group_size=32)))
    with pytest.raises(ValueError, match="the head of this model is a PackedLinear; set train.loss: chunked"):
        loss_forward(model, "liger")
    with pytest.raises(ValueError, match="the head cannot be taken off: Linear is no model of transformers"):
        loss_forward(torch.nn.Linear(2, 2), "liger")


class Shifted(transformers.LlamaForCausalLM):
    """Its logits depend on more than the hidden states: on how many tokens there are."""

    def forward(self, **inputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        out = super().forward(**inputs)
        assert out.logits is not None
        out.logits = out.logits + torch.arange(out.logits.shape[1])[None, :, None] * torch.arange(520)
        return out


def test_a_model_that_cannot_be_taken_apart_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = Shifted(FAMILIES["llama"]()), batch_of()
    monkeypatch.setattr(heads, "LOGITS_AT_A_TIME", ROWS * 520)
    forward = loss_forward(model)
    with pytest.warns(UserWarning, match="not a function of its hidden states alone"):
        loss = forward(model, **batch | {"labels": Targets(batch["labels"], CPU)})[0]
    want = next_token_loss(model(input_ids=batch["input_ids"], use_cache=False).logits, batch["labels"])
    torch.testing.assert_close(loss, want)


def test_without_labels_and_with_few_tokens_it_is_the_models_own_forward() -> None:
    model, batch = model_of("llama"), batch_of()
    forward, labels = loss_forward(model), batch.pop("labels")
    logits = model(**batch, use_cache=False).logits
    assert torch.equal(forward(model, **batch, use_cache=False).logits, logits)
    assert torch.equal(
        forward(model, **batch, labels=Targets(labels, CPU))[0], next_token_loss(logits, labels)
    )
    assert model.training == model.lm_head.training
