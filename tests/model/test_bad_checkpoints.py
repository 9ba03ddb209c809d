"""Checkpoints that are refused: each problem named, all at once, and no code of theirs run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lowbit_ft.files.tensorfile import CheckpointError, read_header
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.load import load_model, load_tokenizer
from tests.checkpoint_tools import MODELS, edit, random_checkpoint


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def make_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index(folder: Path, shard: Any) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    names = list(read_header(folder / "a.safetensors"))
    weight_map = {name: "a.safetensors" for name in names} | {names[0]: shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def link_out(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)


def quantized(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "hqq"}}))


BAD: dict[str, tuple[Any, str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json: missing"),
    "config not json": (lambda f: (f / "config.json").write_text("{"), r"config\.json: not JSON"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"no model\.safetensors and no"),
    "pickle only": (make_pickle, r"only pickle weights \(pytorch_model\.bin\).*convert it once"),
    "truncated": (cut, r"model\.safetensors: truncated: expected \d+ bytes, has \d+"),
    "missing shard": (lambda f: index(f, "b.safetensors"), r"b\.safetensors: missing"),
    "shard traverses": (lambda f: index(f, "../x.safetensors"), r"'\.\./x\.safetensors'.*refused"),
    "shard absolute": (lambda f: index(f, "/etc/x.safetensors"), r"'/etc/x\.safetensors'.*refused"),
    "shard not text": (lambda f: index(f, ["a"]), r"index\.json: not a weight index"),
    "link leaves": (link_out, r"a link that leaves the folder \(to .*outside\.safetensors\); refused"),
    "already quantized": (quantized, "already quantized by 'hqq'; allowed: gptq, awq, compressed-tensors"),
    "not safetensors": (
        lambda f: (f / "model.safetensors").write_bytes(b"PK\x03\x04" * 9),
        r"model\.safetensors: not a safetensors file",
    ),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_checkpoint_is_refused_when_opened(case: str, llama: Path) -> None:
    damage, message = BAD[case]
    damage(llama)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(llama)


BAD_TENSORS: dict[str, tuple[Any, str]] = {
    "wrong shape": (
        lambda t: t.update({"model.norm.weight": torch.ones(31)}),
        r"model\.safetensors: tensor 'model\.norm\.weight' has shape \[31\].*\[32\]",
    ),
    "missing tensor": (
        lambda t: t.pop("model.layers.1.self_attn.q_proj.weight"),
        r"no tensor for the model's parameter 'model\.layers\.1\.self_attn\.q_proj\.weight'.*nearest",
    ),
    "nan": (
        lambda t: t["model.norm.weight"].__setitem__(3, float("nan")),
        r"model\.safetensors: tensor 'model\.norm\.weight' .* has NaN or Inf \(first at flat index 3\)",
    ),
    "inf": (
        lambda t: t["lm_head.weight"][0].__setitem__(0, float("-inf")),
        r"tensor 'lm_head\.weight' .* has NaN or Inf",
    ),
}


@pytest.mark.parametrize("case", list(BAD_TENSORS))
def test_bad_tensor_is_named(case: str, llama: Path) -> None:
    change, message = BAD_TENSORS[case]
    edit(llama, change)
    with pytest.raises(CheckpointError, match=message):
        load_model(Checkpoint.open(llama))


def test_values_beyond_float16_are_named(llama: Path) -> None:
    edit(llama, lambda t: t["model.norm.weight"].__setitem__(3, 1e6))
    load_model(Checkpoint.open(llama))
    with pytest.raises(CheckpointError, match="beyond float16"):
        load_model(Checkpoint.open(llama, dtype="float16"))


def test_all_problems_at_once(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "m", MODELS["llama"](), shard="20KB")
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:100])
    checkpoint = Checkpoint.open(folder, check=False)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.check()
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 and first.name in lines[0] and second.name in lines[1]


def test_attention_the_model_lacks_says_what_to_set(tmp_path: Path) -> None:
    config = transformers.BloomConfig(vocab_size=99, hidden_size=32, n_layer=1, n_head=4)
    checkpoint = Checkpoint.open(random_checkpoint(tmp_path / "m", config))
    with pytest.raises(CheckpointError, match="set model.attention: eager"):
        checkpoint.empty_model("sdpa")
    load_model(checkpoint, "eager")


def test_code_in_a_checkpoint_is_not_run(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (llama / "config.json").write_text(json.dumps(config))
    (llama / "own.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(CheckpointError, match="never run here"):
        Checkpoint.open(llama)


def test_tokenizer_missing(llama: Path) -> None:
    with pytest.raises(CheckpointError, match="its tokenizer cannot be loaded"):
        load_tokenizer(Checkpoint.open(llama))
