"""Packed caches: what generates is what was trained, in the bytes that are announced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from lowbit_ft.kv_cache import KVConfig, bytes_per_token, cache_line, place_kv_cache
from lowbit_ft.kv_cache.cache import PackedLayer, PackedSlidingLayer, cache_bytes, packed_like
from lowbit_ft.model.kv_seam import Passage, Seam
from tests.kv_cache.models import BEFORE, GRIDS, SPREAD, llama, tokens

INT4 = GRIDS[1]
PLAIN: dict[str, Any] = dict(do_sample=False, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True)


def generate(model: Any, ids: Tensor, new: int = 12, **options: Any) -> Any:
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, **{**PLAIN, **options})


def stored(cache: Any) -> torch.dtype:
    """What the first layer of a cache keeps its keys in."""
    return cache.layers[0].keys.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", SPREAD, ids=str)
def test_generated_logits_are_those_of_the_training_forward(config: KVConfig, dtype: torch.dtype) -> None:
    model, ids = llama(dtype=dtype), tokens(2, 8)
    place_kv_cache(model, config)
    done = generate(model, ids, output_logits=True)
    with torch.no_grad():
        want = model(done.sequences, use_cache=False).logits[:, 7:-1].float()
    exact = dtype == torch.float32
    torch.testing.assert_close(torch.stack(done.logits, 1), want, rtol=0, atol=2e-6 if exact else 2e-2)
    assert all(type(layer) is PackedLayer for layer in done.past_key_values.layers)
    held, cached = bytes_per_token(model, dtype.itemsize)[0], 2 * (done.sequences.shape[1] - 1)
    assert cache_bytes(done.past_key_values) == held * cached
    assert sum(layer.nbytes for layer in done.past_key_values.layers) == held * cached


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("config", GRIDS, ids=str)
def test_a_cache_gives_the_bits_that_training_saw(config: KVConfig, window: int | None) -> None:
    """The law, for every grid: with the same k and v, all at once without a cache and token by token."""
    codec = config.codec(32)
    seam = Seam(codec, codec, r3=bool(config.r3), layer=packed_like)
    key, value = (torch.randn(2, 3, 9, 32, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    trained = Passage(seam, None).update(key, value, 0)
    cache = DynamicCache()
    if window is not None:
        from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

        cache = Cache(layers=[DynamicSlidingWindowLayer(window)])
    for start, end in ((0, 3), (3, 4), (4, 9)):
        got = Passage(seam, cache).update(key[:, :, start:end], value[:, :, start:end], 0)
        first = 0 if window is None else max(0, start - window + 1)
        for ours, want in zip(got, trained, strict=True):
            assert torch.equal(ours, want[:, :, first:end])
    assert type(cache.layers[0]) is (PackedLayer if window is None else PackedSlidingLayer)
    assert stored(cache) == torch.uint8


def test_beams_crops_and_selections_keep_codes_and_scales_together() -> None:
    model, ids = llama(), tokens(3, 8)
    place_kv_cache(model, INT4)
    torch.testing.assert_close(
        generate(model, ids, num_beams=3).sequences,
        generate(model, ids, num_beams=3, use_cache=False).sequences,
    )
    drafted = generate(model, ids[:1], prompt_lookup_num_tokens=3).sequences  # crops what was guessed wrong
    assert torch.equal(drafted, generate(model, ids[:1]).sequences)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        cache.crop(-3)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([4, 1]))
        cache.reorder_cache(torch.tensor([1, 0]))
        got = model(ids[[0, 2], 5:], past_key_values=cache).logits
        want = model(ids[[0, 2]], use_cache=False).logits[:, 5:]
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


def test_other_caches_hold_the_same_values_and_are_not_packed() -> None:
    model, ids = llama(), tokens(2, 8)
    place_kv_cache(model, INT4)
    want = generate(model, ids).sequences
    static = StaticCache(model.config, max_cache_len=24)
    assert torch.equal(generate(model, ids, past_key_values=static).sequences, want)
    assert stored(static) == torch.float32
    place_kv_cache(model, BEFORE)
    done = generate(model, ids, output_logits=True)
    assert stored(done.past_key_values) == torch.float32
    with torch.no_grad():
        whole = model(done.sequences, use_cache=False).logits[:, 7:-1]
    torch.testing.assert_close(torch.stack(done.logits, 1), whole, rtol=0, atol=2e-6)


def test_a_cache_in_training_holds_floats_and_a_packed_one_refuses_a_gradient() -> None:
    """transformers makes a cache in every forward unless it is told not to."""
    model, ids = llama().train(), tokens()
    place_kv_cache(model, INT4)
    one, two = model(ids, use_cache=True), model(ids, use_cache=False)
    assert torch.equal(one.logits, two.logits) and stored(one.past_key_values) == torch.float32
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="no gradient passes; train without a cache"):
        model(ids, past_key_values=cache)


def test_the_line_says_bytes_per_token() -> None:
    model = llama()
    assert cache_line(model, torch.bfloat16) is None
    place_kv_cache(model, INT4)
    line = cache_line(model, torch.bfloat16)
    assert line is not None and line.endswith("160 bytes per token (512 in bfloat16)")
    place_kv_cache(model, BEFORE)
    assert "no cache keeps these packed; 512 bytes per token" in str(cache_line(model, torch.bfloat16))
