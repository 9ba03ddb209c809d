"""PEFT: the calls users know, on packed integers. Trained, saved, switched, merged: the same bit for bit."""

from __future__ import annotations

import copy
import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import adapter_state, attach, base_digest, load_adapter_state
from lowbit_ft.grid import BinaryGrid, Grid, IntGrid
from lowbit_ft.grid.calibrate import CALIBRATORS, Stats
from lowbit_ft.integrations.peft import LowBitConfig, LowBitLinear, read_adapter, write_adapter
from lowbit_ft.model.linear import PackedLinear

INTEGER = IntGrid(bits=3, group_size=32)
BINARY = BinaryGrid(bits=3, group_size=32)
LAYERS = 14
QUICK: dict[str, dict[str, Any]] = {
    name: {"rank": 4} if "rank" in c.model_fields else {} for name, c in ADAPTERS.items()
}


def packed_model(grid: Grid = INTEGER, seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A fresh copy of a random Llama whose 14 decoder linears are packed; one seed, one set of integers."""
    return copy.deepcopy(_packed_once(grid, seed)).to(dtype)


@functools.cache
def _packed_once(grid: Grid, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_bias=True,
    )
    model = LlamaForCausalLM(config).eval()
    calibrate = CALIBRATORS["greedy" if isinstance(grid, BinaryGrid) else "mse"]
    for layer in model.model.layers:
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                base = calibrate.run(module.weight.detach(), grid, Stats())
                bias = None if module.bias is None else torch.randn_like(module.bias) / 10
                parent, _, child = name.rpartition(".")
                setattr(layer.get_submodule(parent), child, PackedLinear(base, bias))
    return model


def tokens(rows: int = 2, seed: int = 5) -> Tensor:
    return torch.randint(0, 64, (rows, 12), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=tokens()).logits


def train(model: nn.Module, steps: int = 3, seed: int = 5, lr: float = 0.02) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses, ids = [], tokens(seed=seed)
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def grid_of(method: str) -> Grid:
    return BINARY if ADAPTERS[method].grid_name == "binary" else INTEGER


def trained(method: str = "lr_qat", name: str = "default", seed: int = 5, **keys: Any) -> Any:
    torch.manual_seed(7)
    model = get_peft_model(
        packed_model(grid_of(method)), LowBitConfig(method=method, **(QUICK[method] | keys)), name
    )
    train(model, seed=seed)
    return model


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


@pytest.mark.parametrize("method", [m for m in ADAPTERS if ADAPTERS[m].exact_merge])
def test_the_folder_of_a_run_is_a_peft_adapter(method: str, tmp_path: Path) -> None:
    keys = (
        QUICK[method]
        | ({"warmup_steps": 2} if method == "l4q" else {})
        | ({"init": "svd"} if method == "dl_qat" else {})
    )
    config, model = ADAPTERS[method](**keys), packed_model(grid_of(method))
    model.config.save_pretrained(tmp_path / "base")  # PEFT compares vocabulary sizes when it saves
    attach(model, config)
    for _ in range(2):  # the second time over a full folder
        train(model)
        for _, layer in ((n, m) for n, m in model.named_modules() if isinstance(m, PackedLinear)):
            assert layer.adapter is not None
            layer.adapter.begin_step(2, layer.base)
        folder = write_adapter(
            tmp_path / "run" / "adapter", adapter_state(model), config, base_digest(model), tmp_path / "base"
        )
    assert sorted(p.name for p in (tmp_path / "run").rglob("*")) == [
        "adapter",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    expected, state = logits(model), adapter_state(model)

    again, tensors, digest = read_adapter(folder)
    assert again == config and digest == base_digest(model)
    assert tensors.keys() == state.keys() and all(torch.equal(tensors[k], state[k]) for k in state)
    fresh = packed_model(grid_of(method))
    attach(fresh, again.model_copy(update={k: 0 for k in ["warmup_steps"] if k in keys}))
    load_adapter_state(fresh, tensors)
    assert torch.equal(logits(fresh), expected)

    for low_cpu_mem_usage in (False, True):
        model = PeftModel.from_pretrained(
            packed_model(grid_of(method)), folder, low_cpu_mem_usage=low_cpu_mem_usage
        )
        assert torch.equal(logits(model), expected)
        assert not any(p.requires_grad for p in model.parameters())
    model = PeftModel.from_pretrained(packed_model(grid_of(method)), folder, is_trainable=True)
    losses = train(model, steps=5, lr=0.002)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "peft")
    assert load_file(tmp_path / "peft" / "adapter_model.safetensors").keys() == state.keys()
    assert read_adapter(tmp_path / "peft")[0] == config


def test_auto_peft_finds_base_and_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base comes from whoever reads packed folders; here a stand-in that checks which was asked for."""
    model, config = packed_model(), ADAPTERS["lr_qat"](rank=4)  # pyright: ignore[reportCallIssue]
    attach(model, config)
    train(model)
    write_adapter(tmp_path / "adapter", adapter_state(model), config, base_digest(model), tmp_path / "base")

    class Reader:
        @staticmethod
        def from_pretrained(path: str, **kwargs: Any) -> nn.Module:
            assert path == str(tmp_path / "base")
            return packed_model()

    monkeypatch.setattr(AutoPeftModelForCausalLM, "_target_class", Reader)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    loaded = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded), logits(model))


def test_transformers_own_adapter_calls(tmp_path: Path) -> None:
    source = trained()
    expected = logits(source)
    source.save_pretrained(tmp_path)
    model = packed_model()
    model.load_adapter(str(tmp_path))
    assert torch.equal(logits(model), expected)
    model.add_adapter(LowBitConfig(method="dl_qat", rank=2), adapter_name="second")
    losses = train(model)
    assert losses[-1] < losses[0] and model.active_adapters() == ["second"]
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)
    model.disable_adapters()
    assert torch.equal(logits(model), logits(packed_model()))
    model.enable_adapters()
    with pytest.raises(ValueError, match="one adapter can be active"):
        model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="base is"):
        packed_model(seed=1).load_adapter(str(tmp_path))


def test_a_bf16_model_loads_fp32_masters_through_transformers(tmp_path: Path) -> None:
    source = get_peft_model(packed_model(dtype=torch.bfloat16), LowBitConfig(rank=4))
    train(source)
    source.save_pretrained(tmp_path)
    model = packed_model(dtype=torch.bfloat16)
    model.load_adapter(str(tmp_path))
    assert {p.dtype for n, p in model.named_parameters() if "lowbit_adapters" in n} == {torch.float32}
    assert torch.equal(logits(model), logits(source))


def test_another_base_is_refused(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"trained on the packed base \w{12}\.\.\., this model's base is \w{12}"
    ):
        PeftModel.from_pretrained(packed_model(seed=1), tmp_path)
    model = get_peft_model(packed_model(seed=1), LowBitConfig(rank=4))
    with pytest.raises(ValueError, match="Load the base named in adapter_config.json"):
        model.load_adapter(tmp_path, "other")
    assert list(model.peft_config) == ["default"]
    logits(model)
    one_bit = packed_model()
    one_bit.model.layers[1].mlp.down_proj.codes[0, 0] ^= 1
    with pytest.raises(ValueError, match="their integers differ"):
        PeftModel.from_pretrained(one_bit, tmp_path)


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


@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
def test_a_part_of_an_adapter_is_refused(damage: str, tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    key = "base_model.model.model.layers.0.mlp.up_proj.lowbit_adapters.B"
    if damage == "missing":
        del state[key]
    else:
        state[key + ("x" if damage == "extra" else "")] = torch.zeros(3, 3)
    save_file(state, path)
    with pytest.raises(
        ValueError,
        match=r"(?s)does not fit its config.*layers\.0\.mlp\.up_proj\.lowbit_adapters\.default\.B|\.Bx",
    ):
        PeftModel.from_pretrained(packed_model(), tmp_path)


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    good = tmp_path / "good"
    trained().save_pretrained(good)
    config, tensors = "adapter_config.json", "adapter_model.safetensors"

    def broken(change: Callable[[Path], object]) -> Path:
        folder = tmp_path / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        change(folder)
        return folder

    def facts(**changes: Any) -> Callable[[Path], object]:
        return lambda f: (f / config).write_text(json.dumps(json.loads((f / config).read_text()) | changes))

    def poison(folder: Path) -> None:
        state = load_file(folder / tensors)
        state[sorted(state)[0]][0, 0] = float("nan")
        save_file(state, folder / tensors)

    cases: list[tuple[Callable[[Path], object], str]] = [
        (lambda f: (f / config).unlink(), "adapter_config.json: cannot be read"),
        (lambda f: (f / config).write_text("{"), "adapter_config.json: not JSON"),
        (facts(peft_type="LORA"), "got peft_type 'LORA'"),
        (facts(method="qlora"), "adapter.method: got 'qlora'"),
        (facts(options=[1]), r"options: got \[1\]"),
        (facts(base_digest=None), "no base_digest"),
        (lambda f: (f / tensors).unlink(), "adapter_model.safetensors: cannot be read"),
        (lambda f: (f / tensors).write_bytes((f / tensors).read_bytes()[:-8]), "truncated"),
        (lambda f: (f / tensors).rename(f / "adapter_model.bin"), "a pickle file"),
        (poison, "NaN or Inf in base_model.model.model.layers.0"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            read_adapter(broken(change))
    with pytest.raises(ValueError, match="a pickle file"):
        PeftModel.from_pretrained(
            packed_model(), broken(lambda f: (f / tensors).rename(f / "adapter_model.bin"))
        )
    with pytest.warns(UserWarning, match="'shiny'"):
        assert PeftConfig.from_pretrained(str(broken(facts(shiny=1)))).method == "lr_qat"


def test_a_failed_write_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = packed_model(), ADAPTERS["scale"]()
    attach(model, config)
    folder = write_adapter(tmp_path / "adapter", adapter_state(model), config, base_digest(model), "base")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    train(model)
    real = os.rename

    def fail_on_new(source: Path, target: Path) -> None:
        if ".partial" in str(source):
            raise OSError("disk full")
        real(source, target)

    monkeypatch.setattr(os, "rename", fail_on_new)
    with pytest.raises(OSError, match="disk full"):
        write_adapter(folder, adapter_state(model), config, base_digest(model), "base")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_generate_runs_with_an_adapter() -> None:
    model = trained(task_type="CAUSAL_LM")
    out = model.generate(input_ids=tokens(rows=1), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 16)
