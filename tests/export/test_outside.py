"""Out of any trainer: what merge_and_unload().save_pretrained() wrote, an adapter over its base, and what
`quantize MODEL` wrote, in every format.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from lowbit_ft import LowBitConfig, LowBitQuantConfig, pipeline
from lowbit_ft.adapters.attach import packed_layers
from lowbit_ft.cli.quantize import quantize_model
from lowbit_ft.export import EXPORTERS
from lowbit_ft.export.folder import check_files
from lowbit_ft.export.native_folder import NativeFolder
from lowbit_ft.export.reader import read_weights
from lowbit_ft.export.writer import write_model
from tests.architectures import CONFIGS, checkpoint_of
from tests.packed_tools import IDS
from tests.processes import ROOT

TINY = ROOT / "recipes" / "assets" / "tiny-llama"
READABLE = [
    name
    for name, exporter in EXPORTERS.items()
    if not exporter.missing(exporter.writes_with)
    and not exporter.missing(exporter.reads_with)
    and not exporter.needs_activations
    and name not in ("native", "compressed-tensors", "onnx")  # own tests: below; tests/tasks/test_line.py
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """base/ by `quantize MODEL`, adapter/ and merged/ by PEFT."""
    root = tmp_path_factory.mktemp("outside")
    options: dict[str, Any] = {"bits": 4, "group_size": 32, "calibrate": "absmax"}
    overrides = ["model.dtype=float32", "quant.targets=['*.0.*']"]
    quantize_model(str(TINY), overrides, options, output=root / "base")
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32),
        LowBitConfig(rank=4, task_type="CAUSAL_LM", target_modules=r".*\.0\..*(q_proj|down_proj)"),
    )
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter, std=2.0)
    model.save_pretrained(root / "adapter")
    merged = model.merge_and_unload()
    merged.save_pretrained(root / "merged")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TINY / file, root / "merged" / file)
    return {name: root / name for name in ("base", "adapter", "merged")}


@pytest.mark.parametrize("format", READABLE)
def test_a_saved_merge_in_every_format(format: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = pipeline.export(folders["merged"], format, tmp_path / "out")
    manifest = check_files(folder)  # verified by the format's own reader on the way
    assert manifest["format"] == format and set(manifest["layers"]) == set(read_weights(folders["merged"]))
    card = (folder / "README.md").read_text("utf-8")
    assert "packed with lowbit_ft" in card and "## Recipe" not in card


def test_an_adapter_over_its_base_is_its_merge(folders: dict[str, Path], tmp_path: Path) -> None:
    one = pipeline.export(folders["adapter"], "native", tmp_path / "native", folders["base"])
    digests = {name: weight.digest() for name, weight in read_weights(folders["merged"]).items()}
    assert {name: weight.digest() for name, weight in read_weights(one).items()} == digests
    assert "method `lr_qat`" in (one / "README.md").read_text("utf-8")
    start = {name: weight.digest() for name, weight in NativeFolder(folders["base"]).weights.items()}
    assert start.keys() == digests.keys() and start != digests

    moved = shutil.copytree(folders["adapter"], tmp_path / "moved" / "adapter")
    text = (moved / "adapter_config.json").read_text("utf-8")
    (moved / "adapter_config.json").write_text(text.replace(str(folders["base"]), "org/dense-model"), "utf-8")
    with pytest.raises(ValueError, match="'org/dense-model'.*--base DIR"):
        pipeline.export(moved, "compressed-tensors")
    with pytest.raises(ValueError, match="trained on the packed base"):
        pipeline.export(moved, "native", tmp_path / "wrong", folders["merged"])


def test_a_packed_base_ships_without_its_residual(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(folders["base"], tmp_path / "model")
    folder = pipeline.export(copy)  # beside it, in the format of the recipes
    assert folder.name == "model-compressed-tensors" and check_files(folder)["layers"]
    assert str(TINY) not in (folder / "README.md").read_text("utf-8")


@pytest.mark.parametrize("name", ["qwen2", "phi3", "gemma2"])
def test_biases_fused_matrices_and_ties_go_along(name: str, tmp_path: Path) -> None:
    path = checkpoint_of(CONFIGS[name](), tmp_path / "dense").folder
    config = LowBitQuantConfig(group_size=32, residual_bits=0, calibrate="absmax")
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, **options).eval()
    model.save_pretrained(tmp_path / "packed")
    checkpoint = NativeFolder(tmp_path / "packed")
    write_model(tmp_path / "again", checkpoint, checkpoint.weights, EXPORTERS["native"])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", **options).eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    folder = pipeline.export(tmp_path / "packed", "compressed-tensors")
    assert AutoModelForCausalLM.from_pretrained(folder, **options)(IDS).logits.isfinite().all()


def test_parts_of_fused_matrices_go_along_in_the_native_format(tmp_path: Path) -> None:
    path = checkpoint_of(CONFIGS["gpt_neox"](), tmp_path / "dense").folder
    overrides = [{"match": "*.query_key_value.v", "bits": 8}]
    keys = {"group_size": 32, "calibrate": "absmax", "overrides": overrides}
    base = quantize_model(str(path), ["model.dtype=float32"], keys, output=tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    get_peft_model(model, LowBitConfig(rank=4, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    pipeline.export(tmp_path / "adapter", "native", tmp_path / "native", base)  # compared on the way
    assert read_weights(tmp_path / "native").specs == NativeFolder(base).weights.specs
    with pytest.raises(ValueError, match="has one tensor and one grid for query_key_value"):
        pipeline.export(base)


def test_what_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    for arguments, words in (
        ((TINY,), "not packed by lowbit_ft"),
        ((folders["merged"], "gguff"), "format: got 'gguff'"),
        ((folders["merged"], "native"), "native format already"),
        ((folders["merged"], "gguf", None, folders["base"]), "no adapter folder"),
        ((folders["merged"], "gguf", ROOT / "docs"), "was not written by lowbit_ft"),
    ):
        with pytest.raises(ValueError, match=words):
            pipeline.export(*arguments)
    damaged = shutil.copytree(folders["base"], tmp_path / "damaged")
    with (damaged / "config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(ValueError, match="config.json"):
        pipeline.export(damaged)


def test_nothing_is_written_over_what_is_read(folders: dict[str, Path], tmp_path: Path) -> None:
    base = shutil.copytree(folders["base"], tmp_path / "base")
    before = check_files(base)
    for source, output, given in (
        (base, base, None),
        (base, base / "inside", None),
        (folders["adapter"], base, base),
    ):
        with pytest.raises(ValueError, match="has to stay as it is; nothing was written"):
            pipeline.export(source, "compressed-tensors", output, given)
        assert check_files(base) == before and sorted(p.name for p in tmp_path.iterdir()) == ["base"]


@pytest.mark.filterwarnings("ignore:lora. the merge rounds again")
def test_a_lora_ships_its_merge(folders: dict[str, Path], tmp_path: Path) -> None:
    """Its merge rounds, so what is read back is compared with the merge and not with the product."""
    config = LowBitConfig(method="lora", rank=4, task_type="CAUSAL_LM", target_modules=r".*\.0\..*q_proj")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.float32), config)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(tmp_path / "adapter")
    merged = digests_of(model.merge_and_unload())
    folder = pipeline.export(tmp_path / "adapter", "native", tmp_path / "out", folders["base"])
    assert {name: weight.digest() for name, weight in read_weights(folder).items()} == merged
    assert pipeline.export(tmp_path / "adapter", None, tmp_path / "ct", folders["base"]).is_dir()


def digests_of(model: Any) -> dict[str, str]:
    return {name: layer.base.digest() for name, layer in packed_layers(model)}
