"""Packed windows: loss and gradients are those of their segments alone, for every attention a CPU has, and
nothing is L x L.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import modeling_flash_attention_utils as flash

from lowbit_ft.data.batches import Batches, collate
from lowbit_ft.data.windows import Example, Examples
from lowbit_ft.evaluate.perplexity import Reference, evaluate
from lowbit_ft.model import attention
from lowbit_ft.model.attention import (
    Segments,
    attend,
    segment_attention,
    segment_inputs,
    segment_lengths,
    why_not,
)
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.load import load_model
from lowbit_ft.train.losses import ChunkedHead, Targets, count_targets, loss_forward
from lowbit_ft.train.offload import MemoryStore, Offload
from lowbit_ft.train.setup import activation_checkpointing
from tests.packed_tools import tiny_checkpoint

CPU = torch.device("cpu")
SIZE: dict[str, Any] = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
)
WIDE = SIZE | {"head_dim": 8}
ROPE = {"rope_theta": 1e4, "original_max_position_embeddings": 16}
LLAMA3 = ROPE | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Gemma's norms, and the scores of a capped or sunk softmax, are float32 in any dtype: those models are
# compared to 1e-6.
FAMILIES: dict[str, tuple[Callable[[], Any], bool]] = {
    "llama": (lambda: transformers.LlamaConfig(**SIZE), True),
    "llama 3 positions": (lambda: transformers.LlamaConfig(**SIZE, rope_parameters=LLAMA3), True),
    "yarn": (
        lambda: transformers.LlamaConfig(**SIZE, rope_parameters=ROPE | {"rope_type": "yarn", "factor": 4.0}),
        True,
    ),
    "mistral": (lambda: transformers.MistralConfig(**SIZE, sliding_window=3), True),
    "qwen2, one layer in a window": (
        lambda: transformers.Qwen2Config(
            **SIZE, sliding_window=3, use_sliding_window=True, max_window_layers=1
        ),
        True,
    ),
    "qwen3": (lambda: transformers.Qwen3Config(**WIDE), True),
    "phi3": (lambda: transformers.Phi3Config(**SIZE, sliding_window=3), True),
    "opt": (
        lambda: transformers.OPTConfig(
            vocab_size=97,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            dropout=0.0,
            max_position_embeddings=64,
        ),
        True,
    ),
    "gemma3": (
        lambda: transformers.Gemma3TextConfig(**WIDE, sliding_window=3, query_pre_attn_scalar=8),
        False,
    ),
    "gemma2, capped": (
        lambda: transformers.Gemma2Config(
            **WIDE, sliding_window=3, query_pre_attn_scalar=8, attn_logit_softcapping=0.5
        ),
        False,
    ),
    "mixtral": (
        lambda: transformers.MixtralConfig(**SIZE, num_local_experts=2),
        False,
    ),  # no grouped product in float64
    "gpt_oss, sinks": (
        lambda: transformers.GptOssConfig(
            **WIDE, sliding_window=3, num_local_experts=2, num_experts_per_tok=1
        ),
        False,
    ),
}
LENGTHS = [[5, 9, 1], [11]]  # a packed row, and one with padding behind it


def model_of(family: str, kind: str = "") -> Any:
    config, exact = FAMILIES[family]
    torch.manual_seed(0)
    for attend_by in (kind, "sdpa", "eager"):
        try:
            model = transformers.AutoModelForCausalLM.from_config(config(), attn_implementation=attend_by)
            break
        except ValueError:
            continue
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # large enough that who sees whom shows
            parameter.add_(torch.randn_like(parameter) * (1.0 if name.endswith("sinks") else 0.1))
    return (model.double() if exact else model).train()


def examples() -> list[Example]:
    g = torch.Generator().manual_seed(1)
    out = []
    for lengths in LENGTHS:
        ids = torch.randint(1, 97, (sum(lengths),), generator=g).tolist()
        labels = [i if k % 3 else -100 for k, i in enumerate(ids)]
        for start in torch.tensor([0, *lengths[:-1]]).cumsum(0).tolist():
            labels[start] = -100
        out.append(Example(ids, labels, lengths))
    return out


def gradients(model: Any, run: Callable[[], Any]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = run()
    loss.backward()
    return float(loss.detach()), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def alone(model: Any) -> Any:
    """The sum of the losses of every segment, each a batch of its own, with the model's own attention."""
    total = torch.zeros((), dtype=torch.float64)
    for example in examples():
        start = 0
        for length in example.segments:
            ids, labels = (
                torch.tensor(x[start : start + length])[None] for x in (example.input_ids, example.labels)
            )
            out = model(input_ids=ids, position_ids=torch.arange(length)[None], use_cache=False)
            total = total + torch.nn.functional.cross_entropy(
                out.logits[0, :-1].double(), labels[0, 1:], ignore_index=-100, reduction="sum"
            )
            start += length
    return total


def packed(model: Any, sizes: tuple[int, ...] = (2,), mask_dtype: torch.dtype | None = None) -> Any:
    """The same from packed windows, `sizes` of them per micro-batch."""
    left, total, forward = examples(), torch.zeros((), dtype=torch.float64), loss_forward(model)
    for size in sizes:
        batch, left = collate(left[:size], 0, mask_dtype=mask_dtype), left[size:]
        labels = Targets(batch.pop("labels"), CPU)
        total = total + forward(model, labels=labels, **batch, **segment_inputs(model, batch["position_ids"]))
    return total


def assert_same(a: tuple[float, dict[str, Any]], b: tuple[float, dict[str, Any]], tolerance: float) -> None:
    assert b[0] > 10 and abs(a[0] - b[0]) <= tolerance * b[0], (a[0], b[0])
    assert a[1].keys() == b[1].keys()
    most = max(float(g.abs().max()) for g in b[1].values())
    for name, grad in b[1].items():  # a bias of keys has no gradient but rounding: hence the largest of all
        error = float((a[1][name] - grad).abs().max())
        assert error <= tolerance * max(float(grad.abs().max()), 0.01 * most), (name, error)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_window_is_its_segments(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "WINDOW_TILE", 1)  # tiles of 3 rows where the window is 3
    monkeypatch.setattr(attention, "SCORES_AT_A_TIME", 4 * 11 * 4)
    model = model_of(family)
    before, tolerance = (
        model.get_decoder().config._attn_implementation,
        1e-12 if FAMILIES[family][1] else 3e-6,
    )
    want = gradients(model, lambda: alone(model))
    assert why_not(model) == "" and model.training
    with segment_attention(model):
        assert model.get_decoder().config._attn_implementation == attention.NAME
        assert_same(gradients(model, lambda: packed(model)), want, tolerance)
        assert_same(gradients(model, lambda: packed(model, (1, 1))), want, tolerance)
        for offload in (None, Offload(MemoryStore())):
            activation_checkpointing(model, True, offload)
            assert_same(gradients(model, lambda: packed(model)), want, tolerance)
            activation_checkpointing(model, False)
    assert model.get_decoder().config._attn_implementation == before
    # what it replaces agrees: the masks that transformers makes, or an explicit one where it makes none
    if not family.startswith("gpt_oss"):  # whose masks know no segments, in transformers 5.23
        assert_same(
            gradients(model, lambda: packed(model, mask_dtype=model.dtype if family == "opt" else None)),
            want,
            tolerance,
        )
    # and joining the segments does not: the comparison can fail
    monkeypatch.setattr(
        attention, "segment_lengths", lambda positions: [[positions.shape[1]]] * len(positions)
    )
    with segment_attention(model):
        assert abs(gradients(model, lambda: packed(model))[0] - want[0]) > 1e-4


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "eager"), ("mistral", "eager"), ("qwen3", "eager"), ("gemma3", "eager")]
)
def test_eager_is_left_alone_and_agrees(family: str, kind: str) -> None:
    model = model_of(family, kind)
    assert why_not(model) == "its attention is eager" and segment_inputs(model, torch.arange(3)[None]) == {}
    want = gradients(model, lambda: alone(model))
    with segment_attention(model):
        assert_same(gradients(model, lambda: packed(model)), want, 3e-6)  # its softmax is float32


def varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int] = (-1, -1),
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """flash_attn_varlen_func by its documentation: [tokens, heads, D], lower right causal, inclusive
    windows.
    """
    assert (
        causal
        and not dropout_p
        and torch.equal(cu_seqlens_q, cu_seqlens_k)
        and cu_seqlens_q.dtype == torch.int32
    )
    ends = cu_seqlens_q.tolist()
    assert max_seqlen_q == max_seqlen_k == max(b - a for a, b in zip(ends, ends[1:], strict=False)) and ends[
        -1
    ] == len(q)
    out = []
    for a, b in zip(ends, ends[1:], strict=False):
        gap = torch.arange(b - a)[:, None] - torch.arange(b - a)
        seen = (gap >= 0) & ((gap <= window_size[0]) | (window_size[0] < 0))
        parts = (t[a:b].transpose(0, 1).repeat_interleave(q.shape[1] // t.shape[1], 0) for t in (q, k, v))
        out.append(
            torch.nn.functional.scaled_dot_product_attention(
                *parts, attn_mask=seen, scale=softmax_scale
            ).transpose(0, 1)
        )
    return torch.cat(out)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2, one layer in a window"])
def test_flash_attention_is_told_the_lengths_of_every_row(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernel needs a GPU. What it is given does not: here a function of its signature takes its place."""
    model = model_of(family)
    want = gradients(model, lambda: alone(model))
    process = flash._lazy_define_process_function(varlen)
    monkeypatch.setattr(
        flash, "lazy_import_flash_attention", lambda *_: ((None, varlen, None, None, None), (process, None))
    )
    model.config._attn_implementation_internal = "flash_attention_2"
    assert why_not(model) == "its attention is flash_attention_2"
    assert_same(gradients(model, lambda: packed(model)), want, 1e-12)
    # two rows with restarts, which transformers takes for one row each unless it is told
    assert attention.segment_inputs(model, torch.tensor([[0, 1, 0], [0, 1, 2]]))[
        "cu_seq_lens_q"
    ].tolist() == [0, 2, 3, 6]


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operator made inside."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements = max(
            [
                self.elements,
                *(
                    t.untyped_storage().nbytes() // t.itemsize
                    for t in tree_leaves(out)
                    if isinstance(t, torch.Tensor)
                ),
            ]
        )
        return out


@pytest.mark.parametrize(
    "family",
    ["llama", "mistral", "qwen2, one layer in a window", "gemma3", "gemma2, capped", "gpt_oss, sinks"],
)
@pytest.mark.parametrize("lengths", [[300, 212], [512]])
def test_nothing_is_length_x_length(family: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "WINDOW_TILE", 32)
    monkeypatch.setattr(attention, "SCORES_AT_A_TIME", 1 << 14)
    size = sum(lengths)
    model, ids = model_of(family), [k % 96 + 1 for k in range(size)]
    batch = collate([Example(ids, ids, lengths)], 0)
    labels = Targets(batch.pop("labels"), CPU)
    found = []
    for way in (segment_attention(model), nullcontext()):
        with way, Largest() as largest:
            loss_forward(model)(
                model, labels=labels, **batch, **segment_inputs(model, batch["position_ids"])
            ).backward()
        found.append(largest.elements)
    assert found[0] <= size * 97, found  # the logits of this tiny batch
    if family not in ("llama", "gemma3") or len(lengths) > 1:  # what transformers does: a mask, or scores
        assert found[1] >= size * size, found


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2, capped"])
def test_the_step_asks_the_device_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors have no values: whatever would make the host wait for a number raises."""
    monkeypatch.setattr(attention, "WINDOW_TILE", 1)
    meta = torch.device("meta")
    model = model_of(family).to(meta)
    head = ChunkedHead(model.model, model.forward, 97)
    head.rows = 5
    batch = collate(examples(), 0)

    def step() -> None:
        labels = Targets(batch["labels"], meta)
        inputs = {k: v.to(meta) for k, v in batch.items() if k != "labels"}
        head.loss(
            model.model(**inputs, use_cache=False, **segment_inputs(model, batch["position_ids"])), labels
        ).backward()

    with pytest.raises(RuntimeError, match="item|meta"):  # transformers looks on the device for restarts
        step()
    attention.switch(model.get_decoder())
    step()
    assert all(p.grad is not None for p in model.parameters())


def test_stages_are_measured_without_masks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path), dtype="float32")
    model, batch = load_model(checkpoint), collate(examples(), 0)
    batch = {k: v % 64 if k == "input_ids" else v for k, v in batch.items()}
    batch["labels"] = torch.where(batch["labels"] < 0, -100, batch["input_ids"])
    options: dict[str, Any] = {"attention": "sdpa", "device": CPU, "dtype": torch.float32}
    reference = Reference(checkpoint, [batch], segments=True, **options)
    row = evaluate(model, [batch], "base", reference)
    assert row.kl == 0 and row.loss == reference.row().loss and row.tokens == count_targets(batch["labels"])
    monkeypatch.setattr(attention, "why_not", lambda _: "a test")
    masked = evaluate(model, [batch], "base", Reference(checkpoint, [batch], **options))
    assert masked.kl == 0 and row.loss == pytest.approx(masked.loss, rel=1e-6)
    joined = {**batch, "position_ids": torch.arange(15).repeat(2, 1)}
    assert abs(evaluate(model, [joined], "base").loss - masked.loss) > 1e-4


def test_lengths_are_read_off_the_positions() -> None:
    assert segment_lengths(torch.tensor([[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5]])) == [[3, 1, 2], [6]]
    assert segment_lengths(torch.tensor([[7, 8, 9]])) == [[3]]
    with pytest.raises(AssertionError, match="on the CPU|read before"):
        segment_lengths(torch.zeros((1, 2), dtype=torch.int64, device="meta"))
    windows = [Example([1] * 7, [1] * 7, [3, 4]), Example([1] * 5, [1] * 5, [5])]
    batch = next(Batches(Examples(windows), 2, 0, shuffle=False))
    assert segment_lengths(batch["position_ids"]) == [[3, 4], [7]]  # padding goes on in the last segment


def test_models_with_masks_of_their_own_keep_them() -> None:
    falcon = transformers.FalconForCausalLM(
        transformers.FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    )
    assert "masks of its own" in why_not(falcon)
    assert why_not(torch.nn.Linear(2, 2)) == "Linear is no model of transformers"
    jamba = transformers.Qwen3NextConfig(
        **WIDE,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    )
    torch.manual_seed(0)
    hybrid = transformers.AutoModelForCausalLM.from_config(jamba)
    assert "mixes segments in other layers" in why_not(hybrid)
    for model in (falcon, hybrid):
        before = model.get_decoder().config._attn_implementation
        with segment_attention(model):
            assert model.get_decoder().config._attn_implementation == before
    assert falcon.training


def test_a_given_mask_is_used_and_dropout_in_tiles_refused() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 6, 4, generator=g) for _ in range(3))
    module = torch.nn.Module()
    mask = attention.block_diagonal_mask(torch.tensor([[0, 1, 2, 0, 1, 2]] * 2), torch.float32)
    masked = attend(module, q, k, v, mask)[0]
    cut = attend(module, q, k, v, None, segments=Segments([[3, 3], [3, 3]]))[0]
    torch.testing.assert_close(cut, masked)
    assert not torch.allclose(attend(module, q, k, v, None)[0], masked)
    with pytest.raises(ValueError, match="attention_dropout 0.1 with a sliding window"):
        attend(module, q, k, v, None, dropout=0.1, sliding_window=2)
    with pytest.raises(AssertionError, match="segments"):
        attend(module, q, k, v, None, segments=Segments([[3, 4], [3, 3]]))


def test_flex_attention_cannot_train_on_a_cpu() -> None:
    """Why the recipe refuses it there; when this no longer fails, so may the refusal."""
    from torch.nn.attention.flex_attention import flex_attention

    q = torch.randn(1, 1, 8, 16, requires_grad=True)
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        flex_attention(q, q, q)


def test_tiles_cover_every_visible_pair_once() -> None:
    def seen(size: int, window: int | None, tiles: Iterator[tuple[slice, slice]]) -> torch.Tensor:
        count = torch.zeros(size, size, dtype=torch.int64)
        for rows, keys in tiles:
            count[rows, keys] += 1
        gap = torch.arange(size)[:, None] - torch.arange(size)
        return count[(gap >= 0) & (gap < (window or size))]

    for size, window, written in [
        (1300, 7, False),
        (1300, 600, False),
        (40, None, True),
        (600, 33, True),
        (513, 512, False),
    ]:
        tiles = attention._tiles(torch.empty(1, 1, size, 1), window, written)
        assert seen(size, window, iter(tiles)).unique().tolist() == [1]
