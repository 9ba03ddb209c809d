"""What cannot work with PEFT says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import adapter_state, attach
from lowbit_ft.grid import IntGrid
from lowbit_ft.integrations.adapter_files import write_adapter
from lowbit_ft.integrations.peft import LowBitConfig
from lowbit_ft.integrations.peft_layer import LowBitLinear
from tests.integrations.peft_models import BINARY, logits, packed_model, tokens, train, trained


def test_safe_merge_finds_a_diverged_scale() -> None:
    model = trained()
    next(m for m in model.modules() if isinstance(m, LowBitLinear)).lowbit_adapters[
        "default"
    ].log_scale.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or Inf"):
        model.merge_adapter(safe_merge=True)


def test_several_at_once_are_refused() -> None:
    model = trained()
    model.add_adapter("second", LowBitConfig(rank=2))
    several = ["default", "second"]
    for call in (
        lambda: model.base_model.set_adapter(several),
        lambda: model.merge_adapter(several),
        lambda: model.merge_and_unload(adapter_names=several),
    ):
        with pytest.raises(ValueError, match=r"round\(a \+ b\) is not round\(a\) \+ round\(b\)"):
            call()
    with pytest.raises(ValueError, match="one batch per adapter"):
        model(input_ids=tokens(), adapter_names=several)
    with pytest.raises(ValueError, match="Adapter.* exist"):
        model.delete_adapter("third")


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: LowBitConfig(method="lrqat"),
            r"adapter.method: got 'lrqat'; allowed: lr_qat.*did you mean 'lr_qat'",
        ),
        (lambda: LowBitConfig(method="lr_qat", rnak=4), r"adapter.rnak: unknown key; did you mean 'rank'\?"),
        (lambda: LowBitConfig(method="scale", options={"rank": 4}), r"adapter.rank: unknown key"),
        (
            lambda: LowBitConfig(method="lr_qat", rank=0, clip="no"),
            r"(?s)adapter.rank: got 0; allowed.*adapter.clip: got 'no'",
        ),
        (lambda: LowBitConfig(rank=4, options={"rank": 8}), "rank given both in options and as a keyword"),
        (lambda: LowBitConfig(rank=4, task_type="CASUAL_LM"), "Invalid task type"),
        (
            lambda: get_peft_model(
                LlamaForCausalLM(
                    LlamaConfig(
                        vocab_size=8,
                        hidden_size=8,
                        intermediate_size=8,
                        num_hidden_layers=1,
                        num_attention_heads=1,
                    )
                ),
                LowBitConfig(rank=4),
            ),
            "quantize it first",
        ),
        (
            lambda: get_peft_model(packed_model(BINARY), LowBitConfig(rank=4)),
            r"(?s)lr_qat cannot train these layers:\n  model.layers.0.self_attn.q_proj: "
            r".*integer.*layers.1.mlp.down_proj: ",
        ),
        (
            lambda: get_peft_model(
                packed_model(IntGrid(group_size=32, residual_bits=0)), LowBitConfig("l4q", rank=4)
            ),
            "residual_bits",
        ),
        (
            lambda: get_peft_model(
                packed_model(IntGrid(group_size=32, residual_bits=0)), LowBitConfig(rank=4, init="loftq")
            ),
            "reads the dense weights",
        ),
        (lambda: get_peft_model(packed_model(), LowBitConfig(rank=4), "mlp"), "adapter name 'mlp'"),
        (lambda: get_peft_model(packed_model(), LowBitConfig(rank=4), "A"), "adapter name 'A'"),
        (lambda: get_peft_model(packed_model(), LowBitConfig(rank=4), "a.b"), r"adapter name 'a\.b'"),
        (lambda: get_peft_model(packed_model(), LowBitConfig(rank=4), "values"), "adapter name 'values'"),
        (
            lambda: write_adapter("never", adapter_state(packed_model()), ADAPTERS["scale"](), "", "base"),
            "attach one first",
        ),
    ],
)
def test_what_cannot_work_says_why(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_an_attached_model_is_not_wrapped() -> None:
    model = packed_model()
    attach(model, ADAPTERS["scale"]())
    with pytest.raises(ValueError, match="adapters from attach"):
        get_peft_model(model, LowBitConfig(method="scale"))


def test_a_warm_up_needs_its_steps() -> None:
    model = get_peft_model(packed_model(), LowBitConfig(method="l4q", rank=4, warmup_steps=2))
    model.begin_step(0)
    train(model)
    with pytest.raises(ValueError, match="still in its warm-up"):
        model.merge_adapter()
    model.begin_step(2)
    expected = logits(model)
    assert torch.equal(logits(model.merge_and_unload()), expected)


@pytest.mark.parametrize(
    "key, meant",
    [("rnak", "rank"), ("target_module", "target_modules")],
)
def test_other_words_and_what_may_be_written(key: str, meant: str) -> None:
    """What is refused is not listed as allowed, and what is taken is. LoRA's names: test_lora_names.py."""
    with pytest.raises(ValueError, match=f"adapter.{key}: unknown key; did you mean '{meant}'") as said:
        LowBitConfig(method="lr_qat", **{key: 8})
    allowed = str(said.value).partition("allowed: ")[2].split(", ")
    assert not {"targets", "init_from"} & set(allowed)
    taken = {"rank": 8, "alpha": 8, "target_modules": ["q_proj"], "modules_to_save": ["x"]}
    assert taken.keys() <= set(allowed) and LowBitConfig(**taken).adapter.rank == 8  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    for name in ("targets", "init_from"):
        with pytest.raises(ValueError, match=f"{name} is a key of recipes"):
            LowBitConfig(**{name: ["q_proj"]})  # pyright: ignore[reportArgumentType]
