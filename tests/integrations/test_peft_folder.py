"""The folder of a PEFT adapter: the one a run writes is the one PEFT reads, for its own base only."""

from __future__ import annotations

import errno
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
from torch import nn

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import adapter_state, attach, base_digest, load_adapter_state
from lowbit_ft.files.errors import FileError
from lowbit_ft.integrations.adapter_files import read_adapter, write_adapter
from lowbit_ft.integrations.peft import LowBitConfig
from lowbit_ft.model.linear import PackedLinear
from tests.integrations.peft_models import QUICK, grid_of, logits, packed_model, train, trained


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
        "README.md",
        "adapter",
        "adapter_config.json",
        "adapter_model.safetensors",
        "lowbit_ft.json",
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
        match=r"(?s)does not fit its config.*layers\.0\.mlp\.up_proj\.lowbit_adapters\.(default\.B|Bx)",
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
        (lambda f: (f / config).unlink(), "adapter_config.json: missing"),
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
            raise OSError(errno.ENOSPC, "disk full")
        real(source, target)

    monkeypatch.setattr(os, "rename", fail_on_new)
    with pytest.raises(FileError, match=r"adapter: could not be written \(disk full\)"):
        write_adapter(folder, adapter_state(model), config, base_digest(model), "base")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
