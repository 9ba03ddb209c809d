"""Without our package: compressed-tensors gives equal logits, and what needs us stops and says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import adapter_state, attach
from lowbit_ft.export.card import CardFacts, model_card
from lowbit_ft.export.native import STOP
from lowbit_ft.export.reader import load_exported
from lowbit_ft.export.writer import write_model
from lowbit_ft.integrations.adapter_files import write_adapter
from lowbit_ft.integrations.transformers import PackedConfig, PackedQuantizer
from lowbit_ft.model.checkpoint import Checkpoint
from tests.integrations import peft_models
from tests.integrations.loading import COMPRESSED, NATIVE, in_a_new_process
from tests.packed_tools import IDS, int_grid, packed_model, random_weights, tiny_checkpoint
from tests.processes import environment

WITHOUT_US = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
out, ids = {}, torch.arange(3, 40)[None]
for name, folder, asymmetric in json.loads(sys.argv[1]):
    for dtype in ("float32", "bfloat16"):
        for dequantize in {asymmetric, True} if "mixed" not in name else {False}:
            options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
            options["dtype"] = getattr(torch, dtype)
            model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
            with torch.no_grad():
                out[f"{name} {dtype} {dequantize}"] = model(ids).logits.contiguous()
assert not any(name.startswith("lowbit") for name in sys.modules)
save_file(out, sys.argv[2])
"""


def test_compressed_tensors_loads_without_our_package_with_equal_logits(tmp_path: Path) -> None:
    """Every bit width, symmetric and asymmetric, fp32 and bf16, in both modes of transformers that can read
    it.
    """
    source = tiny_checkpoint(tmp_path / "dense")
    cases: dict[str, Any] = {
        f"W{bits} {'sym' if symmetric else 'asym'}": int_grid(bits=bits, symmetric=symmetric)
        for bits in (2, 3, 4, 6, 8)
        for symmetric in (True, False)
    }
    cases["row"] = int_grid(bits=3, group_size=-1)
    cases["mixed"] = {
        "down_proj": int_grid(bits=8, group_size=-1),
        "v_proj": int_grid(bits=2),
        "": int_grid(bits=3),
    }
    expected, folders = {}, []
    for name, grid in cases.items():
        asymmetric = not isinstance(grid, dict) and not grid.symmetric
        folders.append((name, str(tmp_path / name), asymmetric))
        for dtype in ("float32", "bfloat16"):
            checkpoint = Checkpoint.open(source, dtype=dtype)
            weights = random_weights(checkpoint.empty_model(), grid)
            if dtype == "float32":
                write_model(tmp_path / name, checkpoint, weights, COMPRESSED)
            with torch.no_grad():
                expected[f"{name} {dtype}"] = packed_model(checkpoint, weights)(IDS).logits
    in_a_new_process(WITHOUT_US, json.dumps(folders), tmp_path / "logits.safetensors")
    found = load_file(tmp_path / "logits.safetensors")
    assert {key.rpartition(" ")[0] for key in found} == set(expected) and len(found) == 2 * (
        5 + 5 * 2 + 2 + 1
    )
    different = [
        key for key, logits in found.items() if not torch.equal(logits, expected[key.rpartition(" ")[0]])
    ]
    assert different == []


STOPS = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""
ADAPTER = """
import sys
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM
model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    num_attention_heads=1))
said = []
for folder in sys.argv[1:]:
    try:
        PeftModel.from_pretrained(model, folder)
    except KeyError as error:
        said.append(repr(error))
sys.exit(" ".join(said))
"""


def fails(code: str, *folders: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, folders)], env=environment(), capture_output=True, text=True
    )
    assert done.returncode != 0, done.stdout
    return done.stderr


def first_lines(card: Path) -> str:
    """What a reader sees first: the front matter is the hub's."""
    _, _, rest = card.read_text(encoding="utf-8").removeprefix("---\n").partition("---\n")
    return "\n".join(rest.strip().splitlines()[:2])


def test_a_native_folder_stops_transformers(tmp_path: Path) -> None:
    """In a new process without us: not random weights and exit 0, but an error that says what to import. With
    us: read as ever, by our reader and by transformers, and the caller's config is left as it was."""
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path / "dense"))
    write_model(tmp_path / "m", checkpoint, random_weights(checkpoint.empty_model(), int_grid()), NATIVE)
    said = fails(STOPS, tmp_path / "m")
    assert "import lowbit_ft before this folder is read (its reader, version 1)" in said
    assert "MISSING" not in said
    config = AutoConfig.from_pretrained(tmp_path / "m")
    kept = config.to_dict()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", config=config)
    assert config.to_dict() == kept and not hasattr(model.config, "transformers_weights")
    assert torch.equal(model(IDS).logits, load_exported(tmp_path / "m")(IDS).logits)


def test_the_reader_hook_of_older_transformers(tmp_path: Path) -> None:
    """5.5 to 5.17 show the config to update_tp_plan, 5.20 on to update_attn_implementation."""
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path / "dense"))
    write_model(tmp_path / "m", checkpoint, random_weights(checkpoint.empty_model(), int_grid()), NATIVE)
    config = AutoConfig.from_pretrained(tmp_path / "m")
    quantizer = PackedQuantizer(PackedConfig(**config.quantization_config))
    for hook in (quantizer.update_tp_plan, quantizer.update_attn_implementation):
        config.transformers_weights = STOP
        assert hook(config) is config and not hasattr(config, "transformers_weights")


def test_other_formats_need_no_import(tmp_path: Path) -> None:
    """A checkpoint's own `transformers_weights` names a file that is not in what we write."""
    source = tiny_checkpoint(tmp_path / "dense")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"transformers_weights": "model.safetensors"}))
    checkpoint = Checkpoint.open(source)
    write_model(tmp_path / "m", checkpoint, random_weights(checkpoint.empty_model(), int_grid()), COMPRESSED)
    assert "transformers_weights" not in json.loads((tmp_path / "m" / "config.json").read_text())


def test_cards_say_it_first(tmp_path: Path) -> None:
    """The adapter's card, whoever wrote it, and the folder's."""
    model = peft_models.trained()
    model.save_pretrained(tmp_path / "peft")
    model.save_pretrained(tmp_path / "peft")
    attached = peft_models.packed_model()
    attach(attached, ADAPTERS["lr_qat"](rank=4))
    write_adapter(tmp_path / "ours", adapter_state(attached), ADAPTERS["lr_qat"](rank=4), "0" * 64, "base")
    for folder in ("peft", "ours"):
        assert "`import lowbit_ft` first" in first_lines(tmp_path / folder / "README.md")
        assert (tmp_path / folder / "README.md").read_text().count("`import lowbit_ft` first") == 1
    # what PEFT has to say of each
    assert fails(ADAPTER, tmp_path / "peft", tmp_path / "ours").count("KeyError('LOWBIT')") == 2
    facts = CardFacts("name", "org/base", "lr_qat", True, int_grid(), "name: name")
    (tmp_path / "README.md").write_text(model_card(facts, "native", []))
    assert "`import lowbit_ft` first" in first_lines(tmp_path / "README.md")
    assert "import lowbit_ft" not in model_card(facts, "compressed-tensors", [])
