"""What a script says in LoraConfig's names: the same, or an error that says why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.integrations.peft import LowBitConfig
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.yaml import RecipeError
from tests.integrations.peft_models import logits, packed_model, tokens
from tests.processes import ROOT


def test_a_loraconfig_s_keys_are_ours() -> None:
    theirs = LowBitConfig(
        r=8,
        lora_alpha=24,
        lora_dropout=0,
        use_rslora=False,
        use_dora=False,
        bias="none",
        init_lora_weights=True,
    )
    assert theirs.options == LowBitConfig(rank=8, alpha=24).options
    side = LowBitConfig(method="lora", r=8, lora_alpha=24, lora_dropout=0.1)
    assert side.options == LowBitConfig(method="lora", rank=8, alpha=24, dropout=0.1).options


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"use_rslora": True}, "alpha / sqrt"),
        ({"use_dora": True}, "dl_qat"),
        ({"init_lora_weights": "pissa"}, "Kaiming"),
        ({"r": 8, "rank": 8}, "r and rank are one key"),
    ],
)
def test_what_means_something_else_is_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LowBitConfig(**keys)


@pytest.mark.parametrize("method", ADAPTERS)
def test_dropout_is_where_there_is_a_side_path(method: str) -> None:
    if "dropout" in ADAPTERS[method].model_fields:
        assert LowBitConfig(method=method, lora_dropout=0.5).options["dropout"] == 0.5
    else:
        with pytest.raises(ValueError, match="inside the rounded weight"):
            LowBitConfig(method=method, lora_dropout=0.5)
        assert "dropout" not in LowBitConfig(method=method, lora_dropout=0.0).options


def test_dropout_leaves_out_inputs_of_the_product_while_it_trains() -> None:
    torch.manual_seed(0)
    model = get_peft_model(packed_model(), LowBitConfig(method="lora", rank=4, lora_dropout=0.5))
    assert torch.equal(logits(model), logits(packed_model()))  # B is zero
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter)
    still = logits(model)
    assert torch.equal(logits(model), still)

    def forward(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model.train()(input_ids=tokens()).logits.detach()

    assert torch.equal(forward(1), forward(1))
    assert not torch.allclose(forward(1), forward(2)) and not torch.allclose(forward(1), still)
    assert torch.equal(logits(model), still)
    layer = next(m for m in model.modules() if type(m).__name__ == "Lora")
    x, base = torch.randn(4000, layer.A.shape[1]), packed_model().model.layers[0].self_attn.q_proj.base
    layer.train()
    mean = torch.stack([layer(x[:1], base) for _ in range(600)]).mean(0)
    layer.eval()
    side = layer(x[:1], base) - base.linear(x[:1])
    assert (mean - layer(x[:1], base)).norm() < 0.3 * side.norm()  # what is kept is scaled up


def test_a_recipe_says_what_dropout_does_not_go_with() -> None:
    lora = "adapter={method: lora, rank: 4, dropout: 0.1}"
    quick = ROOT / "recipes" / "quickstart.yaml"
    load_recipe(quick, [lora], check=False)
    for override, words in (
        ("train.mlp_chunk=64", "mlp_chunk: null"),
        ("train.gradient={kind: zeroth_order}", "two forwards"),
    ):
        with pytest.raises(RecipeError, match=words):
            load_recipe(quick, [lora, override])
