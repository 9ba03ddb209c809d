"""Starting A and B from a PEFT LoRA: exact where the units are the same, measured where they are not, refused
where it does not fit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import attach
from lowbit_ft.adapters.lora_start import in_grid_steps, read_lora, start_from_lora
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.sections.quant import QuantSection
from tests.packed_tools import IDS, tiny_checkpoint


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("dense") / "llama")


def make_lora(dense: Path, folder: Path, **options: Any) -> Any:
    """A LoRA that PEFT itself made and saved, with B away from 0."""
    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]} | options
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32),
        LoraConfig(task_type="CAUSAL_LM", **options),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    model.save_pretrained(folder)
    return model


def packed(dense: Path, config: Any, **quant: Any) -> Any:
    model, _ = quantize(Checkpoint.open(dense, dtype="float32"), QuantSection(**({"group_size": 64} | quant)))
    attach(model, config)
    return model


def product(model: Any, name: str) -> torch.Tensor:
    adapter = model.get_submodule(name).adapter
    return adapter.config.gain * (adapter.B @ adapter.A)


@pytest.mark.parametrize("method", ["lora", "dl_qat", "l4q"])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 32}, "rank_pattern": {"down_proj": 2}}],
    ids=str,
)
def test_in_weight_units_the_product_is_peft_s(
    method: str, options: dict[str, Any], dense: Path, tmp_path: Path
) -> None:
    made = make_lora(dense, tmp_path / "lora", **options)
    config = ADAPTERS[method](method=method, rank=6, alpha=24)
    model = packed(dense, config)
    report = start_from_lora(model, config, read_lora(tmp_path / "lora"))
    assert len(report.rows) == 2 and len(report.fresh) == 5 and "exact" in str(report)
    for row in report.rows:
        theirs = made.base_model.model.get_submodule(row.layer)
        torch.testing.assert_close(
            product(model, row.layer), theirs.get_delta_weight("default"), rtol=1e-5, atol=1e-9
        )
        assert row.error < 1e-6
        adapter = model.get_submodule(row.layer).adapter
        assert (
            row.rank <= 4 and adapter.A[row.rank :].abs().min() > 0 and not adapter.B[:, row.rank :].any()
        )  # the rest can train
    assert not product(model, report.fresh[0]).any()


def test_lora_over_the_packed_base_is_the_lora(dense: Path, tmp_path: Path) -> None:
    """8 bit: the model with the LoRA beside the base says what PEFT's says."""
    made = make_lora(dense, tmp_path / "lora").eval()
    config = ADAPTERS["lora"](method="lora", rank=4)
    model = packed(dense, config, bits=8, residual_bits=0)
    with torch.no_grad():
        before = model(IDS).logits
        start_from_lora(model, config, read_lora(tmp_path / "lora"))
        theirs, ours = made(IDS).logits, model(IDS).logits
    assert (
        float((ours - theirs).norm() / theirs.norm()) < 0.02 < float((before - theirs).norm() / theirs.norm())
    )


def test_in_grid_steps_it_is_approximate_and_says_how_much(dense: Path, tmp_path: Path) -> None:
    make_lora(dense, tmp_path / "lora")
    lora = read_lora(tmp_path / "lora")
    errors = {}
    for rank in (4, 8, 16):
        config = ADAPTERS["lr_qat"](method="lr_qat", rank=rank)
        report = start_from_lora(packed(dense, config), config, lora)
        errors[rank] = max(row.error for row in report.rows)
        assert (
            ("approximate: relative error" in str(report))
            == ("dl_qat takes it over exactly" in str(report))
            == (rank < 16)
        )
        assert all(row.shown is not None and row.shown > 0.7 for row in report.rows)
    assert 0.3 > errors[4] > errors[8] > 1e-3
    assert errors[16] < 1e-6  # 4 groups of rank 4: a product per group
    # without a residual, updates below half a step show nothing yet
    config = ADAPTERS["lr_qat"](method="lr_qat", rank=16)
    make_lora(dense, tmp_path / "small", lora_alpha=0.5)
    small = read_lora(tmp_path / "small")
    for residual, low, high in ((4, 0.6, 1.4), (0, -0.01, 0.2)):
        report = start_from_lora(packed(dense, config, residual_bits=residual), config, small)
        assert all(row.shown is not None and low < row.shown < high for row in report.rows), report.rows


def test_a_scale_that_is_an_outer_product_is_exact() -> None:
    g = torch.Generator().manual_seed(0)
    u, v = torch.rand(40, 1, generator=g) + 0.1, torch.rand(1, 60, generator=g) + 0.1
    update = torch.randn(40, 3, generator=g) @ torch.randn(3, 60, generator=g)
    b, a = in_grid_steps(update, u * v, 3)
    torch.testing.assert_close(u * v * (b @ a), update, rtol=1e-4, atol=1e-5)


def edit(folder: Path, **facts: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type: got 'IA3'; allowed: 'LORA'"),
        ({"use_dora": True}, "use_dora: got True; allowed: False"),
        ({"bias": "all"}, "bias: got 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: got"),
        ({"lora_alpha": 0}, "lora_alpha: got 0"),
        ({"alpha_pattern": {"(": 1}}, "no regular expression"),
    ],
)
def test_what_is_no_plain_lora_is_refused(
    facts: dict[str, Any], message: str, dense: Path, tmp_path: Path
) -> None:
    make_lora(dense, tmp_path / "lora")
    edit(tmp_path / "lora", **facts)
    with pytest.raises(ValueError, match=message):
        read_lora(tmp_path / "lora")


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_a_lora_over_a_base_that_its_start_changed_is_refused(init: str, dense: Path, tmp_path: Path) -> None:
    """PEFT itself moves the base at such a start, and its own conversion makes a plain LoRA of it."""
    before = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    torch.manual_seed(0)
    made = get_peft_model(
        AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32),
        LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=init),
    )
    name = "model.layers.0.self_attn.q_proj"
    moved = made.base_model.model.get_submodule(name).base_layer.weight - before.get_submodule(name).weight
    assert moved.abs().max() > 1e-3
    made.peft_config["default"].init_lora_weights = True
    made.save_pretrained(tmp_path / "initial")
    made.peft_config["default"].init_lora_weights = init
    made.save_pretrained(tmp_path / "lora")
    with pytest.raises(
        ValueError,
        match=rf"adapter_config.json: init_lora_weights: got '{init}'; "
        rf"allowed.*path_initial_model_for_weight_conversion",
    ):
        read_lora(tmp_path / "lora")
    made.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    assert read_lora(tmp_path / "plain").rank == 8


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_starts_that_leave_the_base_alone_are_read(init: Any, dense: Path, tmp_path: Path) -> None:
    make_lora(dense, tmp_path / "lora")
    edit(tmp_path / "lora", init_lora_weights=init)
    assert read_lora(tmp_path / "lora").rank == 4


@pytest.mark.parametrize("init", ["corda", "loftq", "lora_ga", "next_year_s", ["pissa"]])
def test_other_starts_are_refused_by_name(init: Any, dense: Path, tmp_path: Path) -> None:
    make_lora(dense, tmp_path / "lora")
    edit(tmp_path / "lora", init_lora_weights=init)
    with pytest.raises(ValueError, match="other starts change the base"):
        read_lora(tmp_path / "lora")


def test_damaged_foreign_and_pickled_folders(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter_config.json: missing; give a folder of .*save_pretrained"):
        read_lora(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="got a JSON list; allowed: an object"):
        read_lora(tmp_path)
    folder = tmp_path / "lora"
    make_lora(dense, folder)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"base_model.model.lm_head.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match="got the tensor 'base_model.model.lm_head.weight'"):
        read_lora(folder)
    name = next(key for key in tensors if "lora_B" in key)
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    with pytest.raises(ValueError, match=r"needs lora_A \[r, in\] and lora_B \[out, r\]"):
        read_lora(folder)
    save_file(tensors | {name: tensors[name] * float("nan")}, path)
    config = ADAPTERS["dl_qat"](method="dl_qat", rank=4)
    with pytest.raises(ValueError, match="NaN or Inf in the LoRA of"):
        start_from_lora(packed(dense, config), config, read_lora(folder))
    path.rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="a pickle file, which is never read here"):
        read_lora(folder)


def test_ranks_layers_and_shapes_that_do_not_fit(dense: Path, tmp_path: Path) -> None:
    make_lora(dense, tmp_path / "lora")
    lora = read_lora(tmp_path / "lora")
    small = ADAPTERS["dl_qat"](method="dl_qat", rank=2, targets=["q_proj"])
    with pytest.raises(
        ValueError, match="the LoRA has rank 4, adapter.rank is 2; set adapter.rank: 4"
    ) as error:
        start_from_lora(packed(dense, small), small, lora)
    assert "1 layers that get no adapter here, such as model.layers.0.mlp.down_proj" in str(error.value)
    narrow = ADAPTERS["dl_qat"].model_validate({"rank": 4, "rank_pattern": {"down_proj": 3}})
    with pytest.raises(
        ValueError, match="has rank 4 in .*down_proj, adapter.rank_pattern gives it 3; let its"
    ):
        start_from_lora(packed(dense, narrow), narrow, lora)
    wider = tiny_checkpoint(tmp_path / "wider", intermediate_size=192)
    config = ADAPTERS["dl_qat"](method="dl_qat", rank=4)
    with pytest.raises(ValueError, match=r"down_proj is \[128, 192\] here, \[128, 256\] in the LoRA"):
        start_from_lora(packed(wider, config), config, lora)
