"""PEFT: the calls users know, on packed integers. Trained, saved, switched, merged: the same bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import base_digest
from lowbit_ft.integrations.peft import LowBitConfig
from lowbit_ft.integrations.peft_layer import LowBitLinear
from lowbit_ft.model.linear import PackedLinear
from tests.integrations.peft_models import (
    BINARY,
    LAYERS,
    QUICK,
    grid_of,
    logits,
    packed_model,
    tokens,
    train,
    trained,
)


def base_pointers(model: nn.Module) -> list[int]:
    return [
        t.data_ptr()
        for m in model.modules()
        if isinstance(m, PackedLinear)
        for t in m.base.to_tensors().values()
    ]


@pytest.mark.parametrize("method", ADAPTERS)
def test_train_save_load_merge_is_one_model(method: str, tmp_path: Path) -> None:
    model = get_peft_model(packed_model(grid_of(method)), LowBitConfig(method=method, **QUICK[method]))
    untrained = logits(model)
    losses = train(model)
    assert losses[-1] < losses[0]
    expected = logits(model)
    assert not torch.equal(expected, untrained)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(packed_model(grid_of(method))))
    model.save_pretrained(tmp_path)
    facts = json.loads((tmp_path / "adapter_config.json").read_text())
    assert facts["peft_type"] == "LOWBIT" and facts["method"] == method and facts["target_modules"] is None
    assert torch.equal(logits(PeftModel.from_pretrained(packed_model(grid_of(method)), tmp_path)), expected)

    if ADAPTERS[method].exact_merge:
        merged = model.merge_and_unload()
        assert torch.equal(logits(merged), expected)
    else:
        with pytest.warns(UserWarning, match="the merge rounds again"):
            merged = model.merge_and_unload()
    left = [m for m in merged.modules() if isinstance(m, PackedLinear)]
    assert len(left) == LAYERS and not any(isinstance(m, LowBitLinear) for m in merged.modules())
    assert all(m.adapter is None and "residual" not in m.base.to_tensors() for m in left)
    assert base_digest(merged) != base_digest(packed_model(grid_of(method)))


def test_three_tasks_on_one_base(tmp_path: Path) -> None:
    alone: dict[str, Tensor] = {}
    for seed, task in enumerate(["french", "code", "maths"]):
        alone[task] = logits(trained("alpha_tuning", task, seed))
        trained("alpha_tuning", seed=seed).save_pretrained(tmp_path / task)
    model = PeftModel.from_pretrained(packed_model(BINARY), tmp_path / "french", adapter_name="french")
    pointers = base_pointers(model)
    for task in ("code", "maths"):
        model.load_adapter(tmp_path / task, task)
    assert not torch.equal(alone["french"], alone["code"])
    for task in ("maths", "french", "code", "french"):
        model.set_adapter(task)
        assert torch.equal(logits(model), alone[task])
        assert torch.equal(
            logits(PeftModel.from_pretrained(packed_model(BINARY), tmp_path / task)), alone[task]
        )
    assert base_pointers(model) == pointers

    model.save_pretrained(tmp_path / "all", selected_adapters=["code"])
    again = PeftModel.from_pretrained(packed_model(BINARY), tmp_path / "all" / "code")
    assert torch.equal(logits(again), alone["code"])

    model.delete_adapter("french")
    assert sorted(model.peft_config) == ["code", "maths"]
    with pytest.raises(ValueError, match="french"):
        model.set_adapter("french")
    model.set_adapter("code")
    assert torch.equal(logits(model), alone["code"])
    unloaded = model.unload()
    assert torch.equal(logits(unloaded), logits(packed_model(BINARY)))
    assert base_digest(unloaded) == base_digest(packed_model(BINARY))


def test_only_the_active_adapter_trains() -> None:
    model = get_peft_model(packed_model(), LowBitConfig(method="lr_qat", rank=4, train_scale=False))
    model.add_adapter("second", LowBitConfig(method="l4q", options={"rank": 2}))

    def live() -> set[str]:
        return {name.split("lowbit_adapters.")[1] for name, p in model.named_parameters() if p.requires_grad}

    assert live() == {"default.A", "default.B"}
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.set_adapter("second")
    assert live() == {"second.A", "second.B", "second.log_scale"}
    train(model, steps=2)
    changed = {
        n.split("lowbit_adapters.")[-1] for n, p in model.named_parameters() if not torch.equal(p, before[n])
    }
    assert changed == {"second.A", "second.B", "second.log_scale"}
    model.set_adapter("default")
    with model.disable_adapter():
        assert live() == set()
    assert live() == {"default.A", "default.B"}  # train_scale: false survives switching off and on
    model.set_requires_grad("default")
    assert live() == {"default.A", "default.B"}


def test_parameter_count_includes_the_packed_weights(capsys: pytest.CaptureFixture[str]) -> None:
    base = packed_model()
    packed = sum(m.in_features * m.out_features for m in base.modules() if isinstance(m, PackedLinear))
    dense = sum(p.numel() for p in base.parameters())
    model = get_peft_model(base, LowBitConfig(method="lr_qat", rank=4))
    layers = [m for m in model.modules() if isinstance(m, LowBitLinear)]
    own = sum(4 * (m.in_features + m.out_features) + m.base_layer.base.scale.numel() for m in layers)
    assert len(layers) == LAYERS and model.get_nb_trainable_parameters() == (own, own + packed + dense)
    model.print_trainable_parameters()
    assert f"trainable params: {own:,d} || all params: {own + packed + dense:,d}" in capsys.readouterr().out


def test_masters_stay_fp32() -> None:
    model = get_peft_model(
        packed_model(dtype=torch.bfloat16), LowBitConfig(rank=4), autocast_adapter_dtype=False
    )

    def dtypes() -> set[torch.dtype]:
        return {p.dtype for n, p in model.named_parameters() if "lowbit_adapters" in n}

    assert dtypes() == {torch.float32}
    digest = [m.base.digest() for m in model.modules() if isinstance(m, PackedLinear)]
    model.merge_adapter()
    merged = logits(model)
    model.to(torch.float16).to(torch.bfloat16)
    assert dtypes() == {torch.float32} and torch.equal(logits(model), merged)
    assert [m.base.digest() for m in model.modules() if isinstance(m, PackedLinear)] == digest
    assert {m.bias.dtype for m in model.modules() if isinstance(m, PackedLinear) and m.bias is not None} == {
        torch.bfloat16
    }
    model.unmerge_adapter()
    assert logits(model).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        losses = train(model)
    assert losses[-1] < losses[0]


def test_merge_is_a_state_that_can_be_left() -> None:
    model = trained()
    model.add_adapter("second", LowBitConfig(rank=2))
    digest = [m.base.digest() for m in model.modules() if isinstance(m, PackedLinear)]
    expected, state = logits(model), {n: t.clone() for n, t in model.state_dict().items()}
    model.merge_adapter(safe_merge=True)
    assert model.get_model_status().merged_adapters == ["default"]
    assert torch.equal(logits(model), expected)
    assert state.keys() == model.state_dict().keys()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(packed_model()))
    assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match="'default' is merged; call unmerge_adapter"):
        model.merge_adapter(["second"])
    model.unmerge_adapter()
    assert model.get_model_status().merged_adapters == []
    assert torch.equal(logits(model), expected)
    assert [m.base.digest() for m in model.modules() if isinstance(m, PackedLinear)] == digest
    model.merge_adapter()
    assert torch.equal(logits(model.merge_and_unload()), expected)


def test_no_adapter_left_is_the_base() -> None:
    model = trained()
    model.delete_adapter("default")
    left = (
        model.base_model.model
    )  # PeftModel itself looks up the name that is gone, with every method of PEFT
    assert torch.equal(logits(left), logits(packed_model()))
    model.merge_adapter()
    assert torch.equal(logits(left), logits(packed_model()))
    model.add_adapter("second", LowBitConfig(rank=2))
    model.set_adapter("second")
    losses = train(model)
    assert losses[-1] < losses[0]


def test_targets_and_excludes(tmp_path: Path) -> None:
    config = LowBitConfig(
        rank=4, target_modules=["q_proj", "v_proj", "down_proj"], exclude_modules=["layers.1.mlp.down_proj"]
    )
    model = get_peft_model(packed_model(), config)
    wrapped = sorted(
        n.removeprefix("base_model.model.model.layers.")
        for n, m in model.named_modules()
        if isinstance(m, LowBitLinear)
    )
    assert wrapped == [
        "0.mlp.down_proj",
        "0.self_attn.q_proj",
        "0.self_attn.v_proj",
        "1.self_attn.q_proj",
        "1.self_attn.v_proj",
    ]
    model.add_adapter("mlp_only", LowBitConfig(rank=4, target_modules=r".*\.(up|gate)_proj"))
    train(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(packed_model(), tmp_path)), expected)
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged), expected)
    assert all("residual" not in m.base.to_tensors() for m in merged.modules() if isinstance(m, PackedLinear))

    everything = get_peft_model(
        packed_model(), LowBitConfig(rank=4, target_modules="all-linear", exclude_modules=["o_proj"])
    )
    assert sum(isinstance(m, LowBitLinear) for m in everything.modules()) == LAYERS - 2
    with pytest.raises(ValueError, match=r"lm_head: a Linear, not a packed linear layer"):
        get_peft_model(packed_model(), LowBitConfig(rank=4, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="not found in the base model"):
        get_peft_model(packed_model(), LowBitConfig(rank=4, target_modules=["qproj"]))


def test_generate_runs_with_an_adapter() -> None:
    model = trained(task_type="CAUSAL_LM")
    out = model.generate(input_ids=tokens(rows=1), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 16)
