"""The grids of keys and values: bytes give the values of training, and these are those of the servers."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowbit_ft.export.gguf_model import Names
from lowbit_ft.kv_cache import KINDS, Codec, KVConfig
from lowbit_ft.kv_cache.token_head import TokenHead, vllm_signs, walsh
from tests.kv_cache.models import GRIDS

DIM = 96  # 3 blocks of 32, and no power of two


def codecs(dim: int = DIM) -> list[Codec]:
    made = [config.codec(dim).turned() if config.r3 else config.codec(dim) for config in GRIDS]
    assert {codec.name for codec in made} == set(KINDS), "every kind of the table is tried"
    return made


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Heads with an outlier channel, one row of zeros and one tiny one."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x[..., 3] *= 20
    x[0, 0, 0], x[0, 0, 1] = 0, 1e-9
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("number", range(len(GRIDS)), ids=[str(c) for c in GRIDS])
def test_bytes_give_what_training_saw_whatever_comes_at_once(number: int, dtype: torch.dtype) -> None:
    codec, x = codecs()[number], values(2, 3, 7, DIM, dtype=dtype)
    seen = codec.fake(x)
    stored = codec.encode(x)
    assert stored.dtype == torch.uint8 and stored[0, :, 0].numel() == codec.row_bytes(3, DIM)
    assert torch.equal(codec.decode(stored, 3, DIM, dtype), seen) and seen.dtype == dtype
    one_by_one = torch.cat([codec.encode(x[:, :, i : i + 1]) for i in range(7)], 2)
    assert torch.equal(one_by_one, stored)
    transposed = x.transpose(1, 2).contiguous().transpose(1, 2)  # as models hand them over
    assert torch.equal(codec.encode(transposed), stored)


def test_bytes_per_token_are_codes_and_scales() -> None:
    got = [codec.row_bytes(3, DIM) for codec in codecs()]
    assert got == [3 * 100, 3 * 52, 3 * 52, 3 * 52, 3 * 100, 292, 148, 3 * 3 * 34, 3 * 3 * 18]


@pytest.mark.parametrize("number", range(len(GRIDS)), ids=[str(c) for c in GRIDS])
def test_the_gradient_passes_straight_through(number: int) -> None:
    x = values(1, 2, 3, DIM).requires_grad_()
    up = torch.randn(1, 2, 3, DIM)
    (codecs()[number].fake(x) * up).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, up)


def nearest(x: Tensor) -> Tensor:
    """Halves away from zero, in float64."""
    return torch.sign(x) * torch.floor(x.abs() + 0.5)


@pytest.mark.parametrize("bits", [8, 4])
def test_symmetric_rows_against_the_equation_in_float64(bits: int) -> None:
    x, top = values(2, 3, 5, DIM), (1 << (bits - 1)) - 1
    per_head = KVConfig.of(bits, "token_head", symmetric=True, rotate=False).codec(DIM)
    scale = x.double().abs().amax(-1, keepdim=True) / top
    want = nearest(x.double() / scale.clamp_min(1e-6)) * scale.clamp_min(1e-6)
    torch.testing.assert_close(per_head.fake(x).double(), want, rtol=1e-6, atol=1e-9)
    whole = KVConfig.of(bits, "token").codec(DIM)
    scale = x.double().abs().amax((1, 3), keepdim=True) / top
    want = nearest(x.double() / scale.clamp_min(1e-6)) * scale.clamp_min(1e-6)
    torch.testing.assert_close(whole.fake(x).double(), want, rtol=1e-6, atol=1e-9)


def test_halves_are_rounded_away_from_zero() -> None:
    """Where scales are 1: the largest is 127, and the range is 15."""
    x = torch.tensor([127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0]).view(1, 1, 1, 8)
    want = [127, 1, 2, 3, -1, -2, -3, 0]
    assert KVConfig.of(8, "token_head").codec(8).fake(x).flatten().tolist() == want
    assert KVConfig.of(8, "token").codec(8).fake(x).flatten().tolist() == want
    x = torch.tensor([0, 15, 0.5, 1.5, 2.5, 3.5, 4, 7]).view(1, 1, 1, 8)
    codec = KVConfig.of(4, "token_head", rotate=False).codec(8)
    assert codec.fake(x).flatten().tolist() == [0, 15, 1, 2, 3, 4, 4, 7]


@pytest.mark.parametrize("dim", [64, 96, 32])
def test_int4_with_vllms_rotation_against_the_equation_in_float64(dim: int) -> None:
    x, block = values(2, 3, 5, dim), dim & -dim
    h = torch.tensor([[1.0]], dtype=torch.float64)
    while len(h) < block:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    turn = torch.block_diag(*[torch.diag(torch.tensor(vllm_signs(dim)).double()) @ h] * (dim // block))
    turned = x.double() @ turn
    low, high = turned.amin(-1, keepdim=True), turned.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp_min(1e-6)
    zero = nearest(-low / scale).clamp(0, 15)
    rounded = (nearest(turned / scale + zero).clamp(0, 15) - zero) * scale
    want = rounded @ turn.T / block
    # The zero point stands in the last 4 bits of the scale, 2^-19 of it at most.
    torch.testing.assert_close(
        KVConfig.of(4, "token_head").codec(dim).fake(x).double(), want, rtol=4e-6, atol=4e-6
    )


def test_the_signs_are_those_that_vllm_draws() -> None:
    """Read off vLLM 0.32: the first 16 for a head of 64."""
    assert vllm_signs(64)[:16] == (1, -1, 1, 1, -1, -1, -1, -1, 1, -1, -1, 1, 1, -1, 1, -1)
    assert vllm_signs(96) == vllm_signs(32) and len(vllm_signs(96)) == 32


@pytest.mark.parametrize("block", [8, 16])
def test_the_rotation_is_sums_alone(block: int) -> None:
    """Whole numbers stay whole: nothing is multiplied by a rounded 1 / sqrt(block)."""
    x = torch.randint(-1000, 1000, (5, 3 * block), generator=torch.Generator().manual_seed(0)).float()
    again = walsh(walsh(x, block), block)
    assert torch.equal(again, x * block) and torch.equal(walsh(x, block), walsh(x, block).round())


@pytest.mark.parametrize(("bits", "kind"), [(8, "Q8_0"), (4, "Q4_0")])
def test_blocks_are_those_of_llama_cpp(bits: int, kind: str) -> None:
    """The gguf package follows llama.cpp's own code bit for bit."""
    x = values(2, 3, 5, DIM)
    kinds = gguf.GGMLQuantizationType
    packed = gguf.quantize(x.numpy().reshape(-1, 32), kinds[kind])
    want = gguf.dequantize(packed, kinds[kind])
    got = KVConfig.of(bits, "block").codec(DIM).fake(x)
    assert np.array_equal(got.numpy().reshape(-1, 32), want)


@pytest.mark.parametrize("bits", [8, 4])
def test_keys_of_a_llama_have_the_blocks_of_its_gguf_file(bits: int) -> None:
    """The blocks are those of a key whose rows stand where the file has them, and come back in our order."""
    config = {"model_type": "llama", "num_attention_heads": 3, "num_key_value_heads": 3}
    order = Names({**config, "num_hidden_layers": 1}).rows("model.layers.0.self_attn.k_proj.weight", 3 * DIM)
    assert order is not None and not torch.equal(order, torch.arange(3 * DIM))
    codec, x = KVConfig.of(bits, "block").codec(DIM), values(2, 3, 5, DIM)
    as_filed = x.transpose(1, 2).flatten(2)[..., order].unflatten(-1, (3, DIM)).transpose(1, 2)
    want = codec.fake(as_filed).transpose(1, 2).flatten(2)[..., order.argsort()].unflatten(-1, (3, DIM))
    keys = codec.of_keys("llama")
    assert torch.equal(keys.fake(x), want.transpose(1, 2)) and not torch.equal(keys.fake(x), codec.fake(x))
    assert torch.equal(keys.decode(keys.encode(x), 3, DIM, torch.float32), keys.fake(x))
    assert torch.equal(codec.of_keys("qwen3").fake(x), codec.fake(x))


def test_r3_rounds_in_the_rotated_basis_and_turns_back() -> None:
    """Scores of the rotated query with the rotated key are those of the query with what comes back."""
    from lowbit_kernels.hadamard import hadamard

    plain = KVConfig.of(4, "token_head", symmetric=True, rotate=False).codec(DIM)
    q, k = values(1, 2, 4, DIM, seed=1), values(1, 2, 6, DIM, seed=2)
    got = q @ plain.turned().fake(k).mT
    want = hadamard(q, DIM) @ plain.fake(hadamard(k, DIM)).mT
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    outlier = (plain.fake(k) - k).square().mean()
    assert (plain.turned().fake(k) - k).square().mean() < outlier / 4, "an outlier channel is what R3 is for"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=32, max_size=32),
    st.sampled_from([c for c in GRIDS if not c.rotate and not c.r3]),
)
def test_no_value_is_further_than_its_step(row: list[float], config: KVConfig) -> None:
    """Half a step where the scale reaches both ends, a whole one where zero is no end of the row."""
    x = torch.tensor(row).view(1, 1, 1, 32)
    codec = config.codec(32)
    codes, scale = codec.scales(codec.rows(x))
    step = scale.float().abs().view(-1)[0]
    assert bool((codes >= 0).all() and (codes < 1 << config.bits).all())
    spread_over_zero = config.symmetric or (x.min() <= 0 <= x.max())
    steps = 1.01 if config.kind == "block" and config.bits == 4 else 0.51  # the end opposite to the largest
    if spread_over_zero:
        slack = 1e-3 * x.abs().max() + 1e-6
        assert bool(((codec.fake(x) - x).abs() <= steps * step + slack).all())


def test_sizes_that_do_not_fit_are_named() -> None:
    assert "head_dim 7 is odd; set bits: 8" in str(TokenHead(4, True).reject(2, 7))
    assert "blocks of 32 numbers, and head_dim is 80; set kind: token_head" in str(
        KINDS["block"](8, True).reject(2, 80)
    )
    assert KINDS["token"](4, True).reject(2, 7) is None and "set bits: 8" in str(
        KINDS["token"](4, True).reject(1, 7)
    )
