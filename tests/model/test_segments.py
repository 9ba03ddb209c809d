"""Segments by themselves: lengths from positions, masks, tiles, and the models that are left alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers

from lowbit_ft.data.batches import Batches
from lowbit_ft.data.windows import Example, Examples
from lowbit_ft.model import attention
from lowbit_ft.model.attention import Segments, attend, segment_attention, segment_lengths, why_not
from tests.model.attention_models import WIDE


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
