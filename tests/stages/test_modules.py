"""adapter.modules_to_save: dense modules that train whole, beside the integers, and what of them ships."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lowbit_ft.adapters import LRQATConfig
from lowbit_ft.adapters.attach import (
    adapter_state,
    adapters_off,
    attach,
    base_digest,
    load_adapter_state,
    packed_layers,
)
from lowbit_ft.export import EXPORTERS
from lowbit_ft.export.reader import load_exported, read_trained, read_weights
from lowbit_ft.export.stored import tensor_files
from lowbit_ft.export.verify import verify
from lowbit_ft.export.writer import write_model
from lowbit_ft.integrations.adapter_files import read_adapter, write_adapter
from lowbit_ft.merge import merge
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.shipped import as_shipped
from lowbit_ft.model.unrounded import unrounded
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.check import notes
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.sections.quant import QuantSection
from lowbit_ft.recipe.sections.train import TrainSection
from lowbit_ft.recipe.yaml import RecipeError
from lowbit_ft.train.optim import build_optimizer, set_learning_rates
from tests.export.common import ASSET, checkpoint

pytestmark = pytest.mark.usefixtures("in_the_repository")
SIZE: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1
)
SIZE |= dict(num_hidden_layers=2, vocab_size=4096, max_position_embeddings=64)
IDS = torch.arange(3, 40)[None]
NAMED = ["lm_head", "embed_tokens", "norm", "*.0.input_layernorm"]


@dataclass
class Line:
    """A model that trained, and the folders it was written to."""

    root: Path
    source: Checkpoint
    model: Any
    base: Tensor  # logits before training

    def logits(self) -> Tensor:
        with torch.no_grad():
            return self.model(IDS).logits

    def shipped(self) -> dict[str, Tensor]:
        """Every parameter that was named, as the training forward reads it."""
        names = ["lm_head", "model.embed_tokens", "model.norm", "model.layers.0.input_layernorm"]
        return {f"{name}.weight": self.model.get_submodule(name).weight.detach() for name in names}


def trained(root: Path, tied: bool, modules: list[str]) -> Line:
    """quantize, attach, three steps of the recipe's optimizer, merge, and two exports of merged/."""
    config = transformers.LlamaConfig(**SIZE, tie_word_embeddings=tied)
    source = checkpoint(root / "model", config, "bfloat16")
    model, _ = quantize(source, QuantSection(group_size=32, calibrate="absmax"), dtype=torch.bfloat16)
    write_model(root / "base", source, {n: m.base for n, m in packed_layers(model)}, EXPORTERS["native"])
    with torch.no_grad():
        base = model(IDS).logits
    attach(model, LRQATConfig(rank=4, modules_to_save=modules))  # pyright: ignore[reportCallIssue]
    section = TrainSection(max_steps=3, learning_rate=0.1, modules_learning_rate=0.02)
    optimizer = build_optimizer([(n, p) for n, p in model.named_parameters() if p.requires_grad], section)
    assert set_learning_rates(optimizer, 1.0) == {"lr": 0.1, "scale_lr": 0.1, "modules_lr": 0.02}
    assert {g["name"]: g["weight_decay"] for g in optimizer.param_groups}["modules"] == 0
    for _ in range(3):
        logits = model(IDS).logits[0, :-1].float()
        torch.nn.functional.cross_entropy(logits, IDS[0, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    line = Line(root, source, model, base)
    merge(model, source, root / "merged")
    shipped, weights = as_shipped(source, read_trained(root / "merged")), read_weights(root / "merged")
    for name in ("compressed-tensors", "gguf"):
        write_model(root / name, shipped, weights, EXPORTERS[name])
    return line


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    return trained(tmp_path_factory.mktemp("untied"), False, NAMED)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Line:
    return trained(tmp_path_factory.mktemp("tied"), True, ["lm_head"])


def gguf_tensors(folder: Path) -> dict[str, Tensor]:
    tensors = gguf.GGUFReader(folder / "model.gguf").tensors
    return {t.name: torch.from_numpy(t.data.copy()) for t in tensors}


def test_what_trained_is_what_every_folder_holds(line: Line) -> None:
    """Bytes of the tensors, and the logits of who loads them: transformers' own reader in two of three."""
    masters = {n: p for n, p in line.model.named_parameters() if "trained_whole" in n}
    assert len(masters) == 4 and all(p.dtype == torch.float32 for p in masters.values())
    before = load_file(line.source.folder / "model.safetensors")
    for folder in ("merged", "compressed-tensors"):
        files = load_file(line.root / folder / "model.safetensors")
        for name, tensor in line.shipped().items():
            master = masters[name.replace(".weight", ".trained_whole.weight")]
            assert torch.equal(files[name], tensor) and torch.equal(tensor, master.bfloat16())
            assert not torch.equal(tensor, before[name]) and not torch.equal(master, tensor.float())
        same = "model.layers.1.input_layernorm.weight"  # which was not named
        assert torch.equal(files[same], before[same])
        assert torch.equal(load_exported(line.root / folder)(IDS).logits, line.logits())
    stored = gguf_tensors(line.root / "gguf")
    for ours, theirs in (("lm_head", "output"), ("model.embed_tokens", "token_embd")):
        tensor = line.shipped()[f"{ours}.weight"]
        assert torch.equal(stored[f"{theirs}.weight"].view(torch.bfloat16).view_as(tensor), tensor)
    norm = line.shipped()["model.norm.weight"]
    assert torch.equal(stored["output_norm.weight"], norm.float())
    merged, dense = read_weights(line.root / "merged"), read_trained(line.root / "merged")
    report = verify(line.root / "compressed-tensors", merged, dense=dense)
    assert report.dense == 4 and "4 dense tensors that were trained" in str(report)


def test_every_other_format_holds_them_too(line: Line, tmp_path: Path) -> None:
    merged, dense = read_weights(line.root / "merged"), read_trained(line.root / "merged")
    others = [e for n, e in EXPORTERS.items() if n not in ("native", "compressed-tensors", "gguf")]
    others = [e for e in others if not e.needs_activations and not e.missing(e.writes_with)]
    assert len(others) >= 4
    for exporter in others:
        manifest = write_model(tmp_path / exporter.name, as_shipped(line.source, dense), merged, exporter)
        (file,) = tensor_files(tmp_path / exporter.name)
        files = load_file(file)
        for name, tensor in line.shipped().items():
            found = files[manifest["trained"][name]["stored_as"]]
            assert found.dtype == (torch.float32 if exporter.container == "onnx" else tensor.dtype)
            assert torch.equal(found.to(tensor.dtype), tensor), (exporter.name, name)


def test_verify_names_a_trained_tensor_that_is_another(line: Line, tmp_path: Path) -> None:
    write_model(
        tmp_path / "ct", line.source, read_weights(line.root / "merged"), EXPORTERS["compressed-tensors"]
    )
    with pytest.raises(ValueError, match=r"4 of 18 layers differ(?s:.*)lm_head.weight: 0 codes, 0 scales"):
        verify(tmp_path / "ct", read_weights(line.root / "merged"), dense=read_trained(line.root / "merged"))


def test_the_base_alone_is_what_it_was(line: Line) -> None:
    with torch.no_grad(), adapters_off(line.model):
        assert torch.equal(line.model(IDS).logits, line.base)
    with torch.no_grad(), unrounded(line.model):
        teacher = line.model(IDS).logits
    fresh, _ = quantize(line.source, QuantSection(group_size=32, calibrate="absmax"), dtype=torch.bfloat16)
    with torch.no_grad(), unrounded(fresh):
        assert torch.equal(fresh(IDS).logits, teacher)
    assert not torch.equal(line.logits(), line.base)


@pytest.mark.parametrize("which", ["line", "tied"])
def test_the_adapter_folder_is_pefts(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Our file, read by us and by PEFT over the packed base."""
    line: Line = request.getfixturevalue(which)
    base, folder = line.root / "base", tmp_path / "adapter"
    config = LRQATConfig(rank=4, modules_to_save=NAMED)  # pyright: ignore[reportCallIssue]
    write_adapter(folder, adapter_state(line.model), config, base_digest(line.model), base)
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), folder
    )
    assert torch.equal(theirs.eval()(IDS).logits, line.logits())
    theirs.save_pretrained(str(tmp_path / "again"))
    assert (
        load_file(folder / "adapter_model.safetensors").keys()
        <= load_file(tmp_path / "again" / "adapter_model.safetensors").keys()
    )

    config, state, _ = read_adapter(folder)
    model = load_exported(base, dtype=torch.bfloat16)
    attach(model, config)
    load_adapter_state(model, state)
    assert torch.equal(model.eval()(IDS).logits, line.logits())


def test_a_tied_head_is_one_tensor(tied: Line) -> None:
    head, embedding = tied.model.lm_head, tied.model.model.embed_tokens
    assert head.trained_whole.weight is embedding.trained_whole.weight
    for folder in ("merged", "compressed-tensors"):
        files = load_file(tied.root / folder / "model.safetensors")
        assert "lm_head.weight" not in files
        assert torch.equal(files["model.embed_tokens.weight"], head.weight)
        loaded = load_exported(tied.root / folder)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert torch.equal(loaded(IDS).logits, tied.logits())
    stored = gguf_tensors(tied.root / "gguf")
    assert "output.weight" not in stored
    assert torch.equal(stored["token_embd.weight"].view(torch.bfloat16).view_as(head.weight), head.weight)


def test_what_is_refused_is_refused_at_once(line: Line, tmp_path: Path) -> None:
    keys = [
        f"model.path={line.source.folder}",
        f"output={tmp_path}",
        "eval.window=64",
        "data.sequence_len=64",
    ]
    keys += ["quant.group_size=32"]

    def lines_of(*overrides: str) -> str:
        with pytest.raises(RecipeError) as error:
            load_recipe("recipes/quickstart.yaml", [*keys, *overrides])
        return str(error.value)

    said = lines_of(
        "adapter.modules_to_save=[lm_heed, q_proj, embed_tokens, lm_head]",
        "quant.lm_head=8",
        "train.gradient.kind=zeroth_order",
        "train.sharding=fsdp",
    )
    for words in (
        "modules_to_save.0: got 'lm_heed', which is no dense module; did you mean 'lm_head'?",
        "modules_to_save.1: got 'q_proj', and model.layers.0.self_attn.q_proj is packed",
        "modules_to_save.3: got 'lm_head', and lm_head is packed: its integers train through an adapter",
        "quant.lm_head: null",
        "got 'zeroth_order', which knows the step of a grid",
        "got 'fsdp' with adapter.modules_to_save",
    ):
        assert words in said, said
    assert "modules_to_save.2" not in said
    assert "are tied" not in " ".join(
        notes(load_recipe("recipes/quickstart.yaml", [*keys, "adapter.modules_to_save=[lm_head]"]))
    )
    tied = shutil.copytree(ASSET, tmp_path / "tied")
    recipe = load_recipe(
        "recipes/quickstart.yaml",
        [f"model.path={tied}", "adapter.modules_to_save=[lm_head]", f"output={tmp_path / 'out'}"],
    )
    assert "model.embed_tokens and lm_head are tied: one tensor is trained" in " ".join(notes(recipe))
    with pytest.raises(ValueError, match="modules_to_save: got 'nrm', which is no dense module"):
        attach(load_exported(line.root / "base"), LRQATConfig(modules_to_save=["nrm"]))  # pyright: ignore[reportCallIssue]
