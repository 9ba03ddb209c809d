"""Loading: what it reads equals transformers' from_pretrained, in little memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowbit_ft.files.tensorfile import CheckpointError
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.load import load_model, load_tokenizer, materialize
from tests.checkpoint_tools import GQA, MODELS, TINY, edit, random_checkpoint


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", list(MODELS))
def test_logits_equal_from_pretrained(name: str, dtype: str, tmp_path: Path) -> None:
    config = MODELS[name]()
    tied = bool(getattr(config, "tie_word_embeddings", False))
    ids = torch.randint(3, 99, (2, 17), generator=torch.Generator().manual_seed(0))
    for base_only in (False, True) if tied else (False,):  # without the prefix: OPT's "decoder." keys
        folder = random_checkpoint(tmp_path / str(base_only), config, base_only=base_only)
        ours = load_model(Checkpoint.open(folder, dtype=dtype))
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
        assert (ours.get_output_embeddings().weight is ours.get_input_embeddings().weight) == tied
        for (key, buffer), (other, expected) in zip(
            ours.named_buffers(), theirs.named_buffers(), strict=True
        ):
            assert key == other and buffer.dtype == expected.dtype and torch.equal(buffer, expected)
        assert {k: p.dtype for k, p in ours.named_parameters()} == {
            k: p.dtype for k, p in theirs.named_parameters()
        }


def test_the_shipped_model_loads_with_its_tokenizer() -> None:
    checkpoint = Checkpoint.open(TINY)
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    reference = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16).eval()
    ids = tokenizer("def add(a, b):\n    return a + b\n", return_tensors="pt").input_ids
    assert torch.equal(model(ids).logits, reference(ids).logits)
    assert model.generation_config == reference.generation_config
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config._attn_implementation == "sdpa" and not model.training


def test_one_module_at_a_time_keeps_the_tie(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(random_checkpoint(tmp_path / "m", MODELS["qwen2-tied"]()), dtype="float32")
    model = checkpoint.empty_model("eager")
    assert all(p.is_meta for p in model.parameters())
    assert model.config._attn_implementation == "eager"
    materialize(model.model.layers[0], checkpoint, "model.layers.0")
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    materialize(model.lm_head, checkpoint, "lm_head")
    assert not model.model.embed_tokens.weight.is_meta  # the same object
    materialize(model, checkpoint)
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_shards_read_tensor_by_tensor(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "m", MODELS["llama"](), shard="20KB")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    checkpoint = Checkpoint.open(folder)
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert checkpoint.names() == sorted(stored)
    assert checkpoint.nbytes == sum(t.nbytes for t in stored.values())
    for name, tensor in stored.items():
        assert checkpoint.shape(name) == tensor.shape
        assert torch.equal(checkpoint.read(name), tensor)
        assert torch.equal(checkpoint.read(name, dtype=torch.bfloat16), tensor.bfloat16())
    with pytest.raises(CheckpointError, match="has no tensor 'lm_head.weigth'; nearest: lm_head.weight"):
        checkpoint.read("lm_head.weigth")


def test_reading_crosses_the_staging_buffer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Path
) -> None:
    monkeypatch.setattr("lowbit_ft.files.tensorfile.STAGE", 64)
    checkpoint = Checkpoint.open(llama)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(checkpoint.read(name), load_file(llama / "model.safetensors")[name])
    edit(llama, lambda t: t[name].view(-1).__setitem__(1000, float("inf")))
    with pytest.raises(CheckpointError, match="first at flat index 1000"):
        Checkpoint.open(llama).read(name)


def test_peak_memory_is_one_tensor(tmp_path: Path) -> None:
    """Reading 120 MB in 8 MB tensors must not cost more than a few of them (the rest is the allocator's
    slack).
    """
    folder = tmp_path / "big"
    transformers.LlamaConfig(**GQA).save_pretrained(folder)
    save_file(
        {f"w{i}": torch.ones(1024, 4096, dtype=torch.bfloat16) for i in range(15)},
        folder / "model.safetensors",
    )
    code = (
        "import sys, resource\n"
        "from lowbit_ft.model.checkpoint import Checkpoint\n"
        "import torch\n"
        "checkpoint = Checkpoint.open(sys.argv[1], dtype='float32')\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "torch.ones(1 << 20).sum()\n"
        "before = peak()\n"
        "for name in checkpoint.names():\n"
        "    tensor = None\n"
        "    tensor = checkpoint.read(name)\n"
        "print(checkpoint.nbytes // 1024, peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
    )
    total, grown = map(int, done.stdout.split())
    assert total > 120_000 and grown < 45_000  # KiB


def test_tied_by_config_but_stored_different(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "m", MODELS["qwen2-tied"]())
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert load_model(Checkpoint.open(folder)).lm_head.weight.shape == (99, 32)  # the same values: fine
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(CheckpointError, match='"tie_word_embeddings": false'):
        load_model(Checkpoint.open(folder))
