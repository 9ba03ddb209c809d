"""Copies of a model: copy.deepcopy and pickle, of every kind of model that holds our layers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import attach
from lowbit_ft.integrations.peft import LowBitConfig
from lowbit_ft.integrations.transformers import mark_packed
from tests.integrations.loading import load
from tests.integrations.peft_models import QUICK, grid_of, logits, packed_model, tokens, train, trained


def attached(method: str) -> Any:
    model = packed_model(grid_of(method))
    attach(model, ADAPTERS[method](method=method, **QUICK[method]))
    train(model)
    return model


def through_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


COPIES: list[Callable[[Any], Any]] = [copy.deepcopy, through_pickle]


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("make", [trained, attached])
@pytest.mark.parametrize("method", ADAPTERS)
def test_a_copy_is_the_model_and_is_its_own(method: str, make: Any, copied: Callable[[Any], Any]) -> None:
    model = make(method)
    expected = logits(model)
    other = copied(model)
    assert torch.equal(logits(other), expected)
    train(other)
    assert not torch.equal(logits(other), expected)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("copied", COPIES)
def test_a_copied_peft_model_goes_on_as_one(copied: Callable[[Any], Any], tmp_path: Path) -> None:
    model = get_peft_model(packed_model(), LowBitConfig(rank=4, modules_to_save=["lm_head"]))
    train(model)
    other = copied(model)
    other.add_adapter("second", LowBitConfig(rank=2))
    assert sorted(model.peft_config) == ["default"]
    other.save_pretrained(tmp_path)
    model.merge_adapter()
    expected = logits(model)
    assert torch.equal(logits(copied(model)), expected)  # merged, and not
    assert torch.equal(logits(other.merge_and_unload()), expected)
    assert copied(LowBitConfig(rank=4)) == LowBitConfig(rank=4)


@pytest.mark.parametrize("copied", COPIES)
def test_a_loaded_model_that_has_decoded(copied: Callable[[Any], Any], tmp_path: Path) -> None:
    """With the quantizer of transformers in it, and the repacked weights of decoding."""
    model = packed_model()
    mark_packed(model)
    model.save_pretrained(tmp_path)
    model = load(tmp_path, torch.bfloat16)
    step = model(tokens(rows=1)[:, :1]).logits
    other = copied(model)
    assert torch.equal(other(tokens(rows=1)[:, :1]).logits, step)
    assert torch.equal(logits(other), logits(model))
    other.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again", torch.bfloat16)), logits(model))
