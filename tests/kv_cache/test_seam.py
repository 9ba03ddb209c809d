"""The seam in models: every attention sees k^ and v^, training learns through them, and what has none is
refused by name."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lowbit_ft.grid import IntGrid
from lowbit_ft.grid.calibrate import CALIBRATORS, Stats
from lowbit_ft.kv_cache import KVConfig, kv_config_of, place_kv_cache, reject_model, set_r3
from lowbit_ft.kv_cache.place import head_sizes
from lowbit_ft.model.attention import segment_attention, segment_inputs
from lowbit_ft.model.kv_seam import Seam, attention_modules, seams
from lowbit_ft.model.linear import PackedLinear
from lowbit_ft.model.meta import model_class
from lowbit_ft.model.unrounded import unrounded
from lowbit_ft.train.compiling import compile_layers
from tests.architectures import CONFIGS
from tests.kv_cache.models import BEFORE, GRIDS, SPREAD, llama, tokens

INT4 = GRIDS[1]


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Tensor, ...]]]:
    """(k, v, k^, v^) of every forward of an attention module without a cache."""
    found, plain = [], Seam.quantize

    def quantize(seam: Seam, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        made = plain(seam, key, value)
        found.append((key.detach(), value.detach(), *(x.detach() for x in made)))
        return made

    monkeypatch.setattr(Seam, "quantize", quantize)
    yield found


def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    return model(input_ids=ids, use_cache=False, **options).logits


@pytest.mark.parametrize("config", [*SPREAD, BEFORE], ids=str)
def test_every_attention_gets_the_same_values(config: KVConfig) -> None:
    found = []
    for attention in ("sdpa", "eager"):
        model = llama(attention)
        before = logits(model, tokens())
        place_kv_cache(model, config)
        assert kv_config_of(model) == config
        found.append(logits(model, tokens()))
        assert not torch.allclose(found[-1], before, atol=1e-3)
        place_kv_cache(model, None)
        assert torch.equal(logits(model, tokens()), before) and kv_config_of(model) is None
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_packed_rows_attend_segment_by_segment_over_the_same_values(passed: list[Any]) -> None:
    """Two rows in one window are the two rows alone; k^ of a token does not depend on its neighbours."""
    model, ids = llama(), tokens(2, 12)
    place_kv_cache(model, INT4)
    alone = logits(model, ids)
    positions = torch.arange(12).repeat(2)[None]
    with segment_attention(model):
        together = logits(
            model, ids.reshape(1, -1), position_ids=positions, **segment_inputs(model, positions)
        )
    torch.testing.assert_close(together.view(alone.shape), alone, rtol=1e-5, atol=1e-5)
    codec = INT4.codec(32)
    assert len(passed) % 2 == 0 and len(passed) >= 4
    for key, value, k_hat, v_hat in passed:
        assert torch.equal(codec.round(key), k_hat) and torch.equal(codec.round(value), v_hat)
        assert not torch.equal(key, k_hat)


@pytest.mark.parametrize("config", [INT4, BEFORE], ids=str)
def test_gradients_are_those_of_a_model_that_adds_the_rounding_as_a_constant(
    config: KVConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for way in ("ours", "constant", "checkpointed"):
        model = llama().train()
        place_kv_cache(model, config)
        kind = type(config.codec(32))
        if way == "constant":
            monkeypatch.setattr(kind, "fake", lambda self, x: x + (self.round(x) - x).detach())
        elif way == "checkpointed":
            monkeypatch.undo()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        logits(model, tokens()).square().mean().backward()
        found.append([p.grad for p in model.parameters()])
    for ours, constant, again in zip(*found, strict=True):
        torch.testing.assert_close(ours, constant, rtol=1e-3, atol=1e-6)
        assert torch.equal(ours, again)


def test_the_teacher_in_the_base_has_its_keys_and_values_as_they_come() -> None:
    model = llama()
    for module in list(model.model.layers):
        linear = module.mlp.up_proj
        base = CALIBRATORS["absmax"].run(linear.weight.detach(), IntGrid(bits=8, group_size=-1), Stats())
        module.mlp.up_proj = PackedLinear(base)
    with unrounded(model):
        want = logits(model, tokens())
    for config in (INT4, BEFORE):
        place_kv_cache(model, config)
        on = logits(model, tokens())
        with unrounded(model):
            assert torch.equal(logits(model, tokens()), want)
        assert torch.equal(logits(model, tokens()), on) and not torch.equal(on, want)


def test_copies_and_pickles_have_a_seam_of_their_own() -> None:
    for config in (INT4, BEFORE):
        model = llama()
        place_kv_cache(model, config)
        want = logits(model, tokens())
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(logits(other, tokens()), want)
            place_kv_cache(other, None)
            assert not torch.equal(logits(other, tokens()), want)
        assert torch.equal(logits(model, tokens()), want)


def test_before_rope_follows_a_projection_that_is_exchanged() -> None:
    model = llama()
    place_kv_cache(model, BEFORE)
    want = logits(model, tokens())
    for layer in model.model.layers:
        layer.self_attn.k_proj = copy.deepcopy(layer.self_attn.k_proj)
        layer.self_attn.k_proj._forward_hooks.clear()
    assert torch.equal(logits(model, tokens()), want)


def test_compiled_layers_are_whole_and_compute_the_same() -> None:
    model = llama().train()
    place_kv_cache(model, GRIDS[2])
    want = logits(model, tokens())
    undo = compile_layers(model, "eager")
    try:
        for _ in range(2):
            torch.testing.assert_close(logits(model, tokens()), want, rtol=1e-5, atol=1e-5)
    finally:
        undo()


KINDS_OF_MODEL = (
    "gemma2",
    "gpt2",
    "gpt_neo",
    "falcon",
    "bloom",
    "gpt_oss",
    "qwen3_next",
    "persimmon",
    "jetmoe",
)


@pytest.mark.parametrize("name", KINDS_OF_MODEL)
def test_architectures_that_cache_in_their_own_ways(name: str, passed: list[Any]) -> None:
    """Every attention module once per forward, in heads of the size that is planned; and one token at a time
    gives the logits of the whole."""
    torch.manual_seed(0)
    config = CONFIGS[name]()
    model = model_class(config).from_config(config).eval()
    place_kv_cache(model, INT4)
    ids, cache = tokens(2, 14), transformers.DynamicCache(config=config)
    with torch.no_grad():
        want = logits(model, ids)
        sizes = [(k.shape[1], k.shape[3]) for k, *_ in passed]
        text = config.get_text_config()
        assert sizes == [head_sizes(module, text) for module in attention_modules(model).values()]
        steps = [model(input_ids=ids[:, :9], past_key_values=cache).logits]
        steps += [model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in range(9, 14)]
    assert sum(getattr(layer, "packed", False) for layer in cache.layers) == len(sizes)
    torch.testing.assert_close(torch.cat(steps, 1), want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("mamba", INT4, "MambaForCausalLM puts no keys and values into a cache that is known here"),
        ("openai-gpt", INT4, "OpenAIGPTLMHeadModel puts no keys and values"),
        ("rwkv", INT4, "RwkvSelfAttention"),
        ("deepseek_v3", INT4, "DeepseekV3ForCausalLM caches one latent vector for keys and values"),
        ("gpt2", BEFORE, "GPT2Attention has no k_proj and v_proj of its own"),
        ("phi3", BEFORE, "set where: after_rope"),
        ("llama", GRIDS[7], "blocks of 32 numbers, and head_dim is 16; set kind: token_head"),
        ("llama", KVConfig.of(8, "token_head", r3=[0, 7]), "R3: there are no attention layers [7]"),
        ("llama", KVConfig.of(4, "token_head", r3=[0]), "rotates keys and values by itself"),
    ],
)
def test_what_has_no_seam_or_no_fit_is_refused_by_name(name: str, config: KVConfig, words: str) -> None:
    with torch.device("meta"):
        made = CONFIGS[name]()
        model = model_class(made).from_config(made)
    problems = reject_model(model, config)
    assert any(words in problem for problem in problems), problems
    with pytest.raises(ValueError, match="quant.kv_cache: "):
        place_kv_cache(model, config)
    assert not list(seams(model))


def test_set_r3_says_which_layers_and_needs_a_grid() -> None:
    model = llama()
    with pytest.raises(ValueError, match="set quant.kv_cache"):
        set_r3(model, [0])
    plain = KVConfig.of(4, "token_head", rotate=False)
    place_kv_cache(model, plain)
    before = logits(model, tokens())
    set_r3(model, [1])
    assert [seam.r3 for _, seam in seams(model)] == [False, True]
    assert kv_config_of(model) == KVConfig.of(4, "token_head", rotate=False, r3=[1])
    assert not torch.equal(logits(model, tokens()), before)
    set_r3(model, [])
    assert torch.equal(logits(model, tokens()), before) and kv_config_of(model) == plain
