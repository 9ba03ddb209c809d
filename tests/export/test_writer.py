"""The writer: a complete folder, everything dense bit for bit, nothing of others overwritten."""

from __future__ import annotations

import gc
import json
import os
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from lowbit_ft.export import LayerSpec, Weights, folder, reader
from lowbit_ft.export.folder import check_files, copied_files, read_manifest, replace_file
from lowbit_ft.export.reader import load_exported, read_weights
from lowbit_ft.export.verify import verify
from lowbit_ft.export.writer import write_model
from lowbit_ft.grid import BinaryGrid
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.hub import tensor_entries
from tests.export.common import BOTH, COMPRESSED, NATIVE
from tests.packed_tools import (
    IDS,
    SIZE,
    int_grid,
    packed_model,
    random_weight,
    random_weights,
    tiny_checkpoint,
)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "video_preprocessor_config.json"])
def test_files_of_a_processor_are_copied(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    assert [path.name for path in copied_files(tmp_path)] == [name]


def test_the_folder_is_complete_and_everything_dense_is_copied_bit_for_bit(
    source: Checkpoint, weights: dict[str, Any], tmp_path: Path
) -> None:
    source = Checkpoint.open(shutil.copytree(source.folder, tmp_path / "source"), dtype="float32")
    (source.folder / "tokenizer.json").write_text('{"a": 1}')
    (source.folder / "chat_template.jinja").write_text("{{ messages }}")
    (source.folder / "trainer_state.json").write_text("{}")  # not a part of the model
    dense = load_file(source.folder / "model.safetensors")
    for name, exporter in BOTH.items():
        target = tmp_path / name
        manifest = write_model(target, source, weights, exporter, extra_files={"README.md": "hello"})
        assert {p.name for p in target.iterdir()} == {
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "chat_template.jinja",
            "README.md",
            "model.safetensors",
            "lowbit_ft.json",
        }
        assert check_files(target) == manifest == read_manifest(target)
        assert set(manifest["layers"]) == set(weights) and manifest["format"] == name
        config = json.loads((target / "config.json").read_text())
        assert config["dtype"] == "float32"  # what it was trained in; stored in bfloat16
        assert config["quantization_config"]["quant_method"] == exporter.quant_method
        stored = load_file(target / "model.safetensors")
        for key, tensor in dense.items():
            layer = key.removesuffix(".weight")
            if layer in weights:
                assert key not in stored
                tensors = {k: stored[f"{layer}.{k}"] for k in exporter.specs(LayerSpec.of(weights[layer]))}
                assert (
                    exporter.unpack(tensors, LayerSpec.of(weights[layer])).digest() == weights[layer].digest()
                )
            else:
                assert stored[key].dtype == torch.bfloat16 and torch.equal(stored[key], tensor)
    ignore = json.loads((tmp_path / "compressed-tensors" / "config.json").read_text())["quantization_config"][
        "ignore"
    ]
    assert ignore == ["lm_head"]


def test_shards_are_aligned_and_read_by_the_safetensors_library(source: Checkpoint, tmp_path: Path) -> None:
    grids = {"o_proj": int_grid(symmetric=False, group_size=-1), "": int_grid(bits=8, residual_bits=4)}
    weights = random_weights(source.empty_model(), grids)
    write_model(tmp_path / "m", source, weights, NATIVE, max_shard_bytes=40_000)
    files = sorted((tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    found = {key: (path.name, tensor) for path in files for key, tensor in load_file(path).items()}
    assert {key: name for key, (name, _) in found.items()} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for _, t in found.values())
    for entry in tensor_entries(tmp_path / "m")[0].values():
        assert entry.start % entry.dtype.itemsize == 0
    for name, weight in read_weights(tmp_path / "m").items():
        assert weight.digest() == weights[name].digest()


def test_one_layer_at_a_time_is_in_memory(
    source: Checkpoint, weights: dict[str, Any], tmp_path: Path
) -> None:
    alive: list[weakref.ref[Any]] = []
    most = 0

    def make(name: str) -> Any:
        nonlocal most
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
        weight = random_weight(weights[name].shape, weights[name].grid)
        alive.append(weakref.ref(weight.scale))
        return weight

    write_model(
        tmp_path / "m", source, Weights({n: LayerSpec.of(w) for n, w in weights.items()}, make), NATIVE
    )
    assert (
        len(alive) == len(weights) == 7 and most <= 1
    )  # the one before may live until its name is bound anew


def test_nothing_of_others_is_overwritten_and_ours_is_replaced_whole(
    source: Checkpoint, weights: dict[str, Any], tmp_path: Path
) -> None:
    target = tmp_path / "m"

    def write(text: str = "a", given: Any = weights) -> Any:
        return write_model(target, source, given, NATIVE, extra_files={"README.md": text})

    target.mkdir()  # an empty folder is nobody's
    write()
    write("b")
    assert (target / "README.md").read_text() == "b" and check_files(target)
    replace_file(target, "README.md", "a longer text")
    assert (target / "README.md").read_text() == "a longer text" and check_files(target)
    for bad in ("config.json", "generation_config.json", "../x", "model.safetensors", "lowbit_ft.json"):
        with pytest.raises(ValueError, match="file"):
            replace_file(target, bad, "x")

    def broken(name: str) -> Any:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):  # a failure leaves the old folder and no leftovers
        write("c", Weights({n: LayerSpec.of(w) for n, w in weights.items()}, broken))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"] and check_files(target)

    (tmp_path / ".m.lowbit_ft-0123456789abcdef.partial").mkdir()  # of a killed process
    os.rename(target, tmp_path / ".m.lowbit_ft-0123456789abcdef.replaced")
    (tmp_path / ".m.partial").mkdir()  # somebody else's
    write("d")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".m.partial", "m"] and check_files(target)

    (target / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes\.txt: was added"):
        write()
    (target / "notes.txt").unlink()
    (target / "README.md").write_text("edited by hand")
    with pytest.raises(ValueError, match=r"README\.md: was changed"):
        write()
    with pytest.raises(ValueError, match=r"README\.md: its content"):
        check_files(target)
    (target / "lowbit_ft.json").write_text("[]")
    with pytest.raises(ValueError, match="not written by lowbit_ft"):
        write()
    shutil.rmtree(target)
    target.write_text("a file")
    with pytest.raises(ValueError, match="not a folder"):
        write()


def test_what_cannot_be_written_is_refused_before_anything_is(
    source: Checkpoint, weights: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, first = tmp_path / "m", next(iter(weights))

    def refused(match: str, given: Any = weights, exporter: Any = NATIVE, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            write_model(target, source, given, exporter, **options)
        assert list(tmp_path.iterdir()) == []

    refused("no packed layer", {})
    refused(
        r"has no sign planes, and the scales of 1 layers",
        {first: random_weight((128, 128), BinaryGrid())},
        COMPRESSED,
    )
    refused("no such layer", {"model.layers.9.q": weights[first]})
    refused(r"\[4, 128\]", {first: random_weight((4, 128), int_grid())})
    for name in ("../evil", "config.json", ".hidden", "x.safetensors", "generation_config.json"):
        refused("extra file", extra_files={name: ""})
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    refused("GB free")


def test_a_link_that_leaves_the_checkpoint_is_not_published(tmp_path: Path, weights: dict[str, Any]) -> None:
    path = tiny_checkpoint(tmp_path / "c")
    (tmp_path / "secret").write_text("key")
    (path / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="leaves the folder"):
        write_model(tmp_path / "m", Checkpoint.open(path), weights, NATIVE)
    (path / "tokenizer.json").unlink()
    (path / "LICENSE").write_text("free")
    (path / "NOTICE").symlink_to(path / "LICENSE")
    write_model(tmp_path / "m", Checkpoint.open(path), weights, NATIVE)
    assert (tmp_path / "m" / "NOTICE").read_text() == "free" and not (tmp_path / "m" / "NOTICE").is_symlink()


OPT: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=128,
    num_hidden_layers=1,
    num_attention_heads=4,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    ffn_dim=128,
    word_embed_proj_dim=128,
)
SHAPES: dict[str, Any] = {
    "tied": dict(tie_word_embeddings=True),
    "biases": dict(config=transformers.Qwen2Config(**SIZE)),
    "opt, names without the model's prefix": dict(config=transformers.OPTConfig(**OPT), base_only=True),
    "experts stay dense": dict(
        config=transformers.Qwen3MoeConfig(
            **SIZE, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2, head_dim=32
        )
    ),
}


@pytest.mark.parametrize("kind", list(SHAPES))
def test_architectures_load_exactly_from_both_formats(kind: str, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_checkpoint(tmp_path / "c", **SHAPES[kind]), dtype="float32")
    weights = random_weights(source.empty_model(), int_grid())
    expected = packed_model(source, weights)(IDS).logits
    for name, exporter in BOTH.items():
        if kind.startswith("experts") and not exporter.dense_experts:
            with pytest.raises(ValueError, match="does not read dense experts"):
                write_model(tmp_path / name, source, weights, exporter)
            continue
        write_model(tmp_path / name, source, weights, exporter)
        model = load_exported(tmp_path / name)
        assert torch.equal(model(IDS).logits, expected)
        assert verify(tmp_path / name, weights).ok
    if kind.startswith("experts"):
        skipped = reader.read_config(tmp_path / "native")["quantization_config"]["skipped"]
        assert r"re:model\.layers\.0\.mlp\.experts\..*" in skipped and "model.layers.0.mlp.gate" in skipped


def test_a_packed_head_is_untied_from_its_embedding(tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_checkpoint(tmp_path / "c", tie_word_embeddings=True), dtype="float32")
    weights = random_weights(source.empty_model(), int_grid())
    weights["lm_head"] = random_weight((64, 128), int_grid(bits=8))
    for name, exporter in BOTH.items():
        write_model(tmp_path / name, source, weights, exporter)
        model = load_exported(tmp_path / name)
        assert not model.config.tie_word_embeddings
        embedding = load_file(source.folder / "model.safetensors")["model.embed_tokens.weight"]
        assert torch.equal(model.get_input_embeddings().weight, embedding.float())
        model(IDS)  # compressed-tensors unpacks its layers at the first forward
        head = model.lm_head.weight
        assert torch.equal(head, weights["lm_head"].dequantize())
