"""modules_to_save and trainable_token_indices: trained beside the integers, saved, loaded and merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from lowbit_ft.adapters.attach import packed_layers
from lowbit_ft.grid import IntGrid
from lowbit_ft.grid.calibrate import CALIBRATORS, Stats
from lowbit_ft.integrations.peft import LowBitConfig
from lowbit_ft.integrations.transformers import mark_packed
from lowbit_ft.model.linear import PackedLinear
from tests.integrations.loading import load
from tests.integrations.peft_models import INTEGER, LAYERS, logits, packed_model, train

NEW_TOKENS = [3, 7, 20]


def wrapped(tied: bool, **keys: Any) -> Any:
    return get_peft_model(packed_model(tied=tied), LowBitConfig(rank=4, task_type="CAUSAL_LM", **keys))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "keys",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": NEW_TOKENS},
        {"trainable_token_indices": {"embed_tokens": NEW_TOKENS}},
        {"trainable_token_indices": {"lm_head": NEW_TOKENS}},
        # what TRL makes of a chat template with new tokens
        {"trainable_token_indices": {"embed_tokens": NEW_TOKENS}, "modules_to_save": ["lm_head"]},
    ],
)
@pytest.mark.filterwarnings("ignore:trainable_token_indices.*is trained whole")
def test_whole_modules_and_tokens(keys: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    """One model, trained, saved, loaded again and merged; what was named has moved, and only that; a tied
    pair is still one matrix, in the file transformers writes too."""
    before = packed_model(tied=tied)
    model = wrapped(tied, **keys)
    losses = train(model, steps=4)
    assert losses[-1] < losses[0]
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(packed_model(tied=tied), tmp_path / "adapter")
    assert torch.equal(logits(again), expected)

    merged = model.merge_and_unload()
    assert torch.equal(logits(merged), expected)
    assert sum(isinstance(module, PackedLinear) for module in merged.modules()) == LAYERS
    head, embedding = merged.lm_head.weight, merged.get_input_embeddings().weight
    assert (head.data_ptr() == embedding.data_ptr()) == tied == merged.config.tie_word_embeddings
    moved = {
        name: sorted({int(row) for row in (new != old).any(-1).nonzero()[:, 0]})
        for name, new, old in [
            ("lm_head", head, before.lm_head.weight),
            ("embed_tokens", embedding, before.model.embed_tokens.weight),
        ]
    }
    whole, rows = keys.get("modules_to_save", []), keys.get("trainable_token_indices", [])
    named = set(whole) | set(rows if isinstance(rows, dict) else ["embed_tokens"] if rows else [])
    for name, changed in moved.items():
        if name in whole or (tied and whole):
            assert len(changed) > len(NEW_TOKENS)
        elif name in named or tied:
            assert changed == NEW_TOKENS
        else:
            assert changed == []
    mark_packed(merged)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged")), expected)


def test_two_adapters_have_their_own_heads(tmp_path: Path) -> None:
    model = wrapped(False, modules_to_save=["lm_head"])
    model.add_adapter("second", LowBitConfig(rank=2, modules_to_save=["lm_head"]))
    train(model)
    first = logits(model)
    model.set_adapter("second")
    assert not torch.equal(logits(model), first)
    train(model, seed=9)
    second = logits(model)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(packed_model(), tmp_path)
    again.load_adapter(tmp_path / "second", "second")
    assert torch.equal(logits(again), first)
    again.set_adapter("second")
    assert torch.equal(logits(again), second)
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(packed_model()))


@pytest.mark.parametrize(
    "keys", [{}, {"trainable_token_indices": [65, 69]}, {"modules_to_save": ["lm_head"]}]
)
def test_a_resized_vocabulary_travels_with_the_adapter(keys: dict[str, Any], tmp_path: Path) -> None:
    base = packed_model()
    base.save_pretrained(tmp_path / "config")  # PEFT compares its vocabulary with the model's
    base.name_or_path = str(tmp_path / "config")
    base.resize_token_embeddings(70)
    model = get_peft_model(base, LowBitConfig(rank=4, **keys))
    train(model)
    expected = logits(model)
    with pytest.warns(UserWarning, match="embedding layer has been resized"):
        model.save_pretrained(tmp_path / "adapter")
    bare = packed_model()
    bare.resize_token_embeddings(70)
    assert not torch.equal(logits(bare), expected)
    assert torch.equal(logits(PeftModel.from_pretrained(bare, tmp_path / "adapter")), expected)


def test_what_cannot_be_trained_whole_says_why() -> None:
    def refused(match: str, model: Any = None, **keys: Any) -> None:
        with pytest.raises(ValueError, match=match):
            get_peft_model(model or packed_model(), LowBitConfig(rank=4, **keys))

    refused(
        r"modules_to_save: model.layers.0.mlp.down_proj is packed \(W3.*target_modules",
        modules_to_save=["down_proj"],
    )
    refused("modules_to_save: model.layers.0 is packed", modules_to_save=["layers.0"])
    refused("the model has no module 'lm_haed'; did you mean 'lm_head'", modules_to_save=["lm_haed"])
    refused("no module 'embed'; did you mean", trainable_token_indices={"embed": [1]})
    refused(
        "tied, one matrix, and were given different tokens",
        packed_model(tied=True),
        trainable_token_indices={"embed_tokens": [1], "lm_head": [2]},
    )
    head = packed_model()
    head.lm_head = PackedLinear(
        CALIBRATORS["mse"].run(head.lm_head.weight.detach(), IntGrid(group_size=32), Stats())
    )  # pyright: ignore[reportAttributeAccessIssue]
    refused("modules_to_save: lm_head is packed", head, modules_to_save=["lm_head"])
    with pytest.raises(
        ValueError, match=r"modules_to_save: got 'lm_head'; allowed: a list; write \['lm_head'\]"
    ):
        LowBitConfig(modules_to_save="lm_head")  # pyright: ignore[reportArgumentType]


def test_a_saved_head_that_is_missing_is_not_made_up(tmp_path: Path) -> None:
    model = wrapped(False, modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    facts = json.loads((tmp_path / "adapter_config.json").read_text())
    assert facts["modules_to_save"] == ["lm_head"] and facts["trainable_token_indices"] is None
    state = load_file(tmp_path / "adapter_model.safetensors")
    del state["base_model.model.lm_head.weight"]
    save_file(state, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ValueError, KeyError), match="lm_head"):
        PeftModel.from_pretrained(packed_model(), tmp_path)


def test_the_integers_do_not_notice() -> None:
    model = wrapped(True, modules_to_save=["lm_head"])
    train(model)
    assert {
        name.replace(".base_layer", ""): layer.base.digest()
        for name, layer in packed_layers(model.base_model.model)
    } == {name: layer.base.digest() for name, layer in packed_layers(packed_model(INTEGER, tied=True))}
