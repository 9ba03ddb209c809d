"""Loading: what it reads equals transformers' from_pretrained, in little memory; what it refuses, it
names.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowbit_ft.files.tensorfile import CheckpointError, read_header
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.hub import contained_file, locate
from lowbit_ft.model.load import load_model, load_tokenizer, materialize

TINY = Path(__file__).parents[2] / "recipes" / "assets" / "tiny-llama"
SIZE: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GQA = SIZE | {"num_key_value_heads": 2}
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**GQA),
    "llama3-rope": lambda: transformers.LlamaConfig(**GQA, rope_parameters=LLAMA3_ROPE),
    "qwen2-tied": lambda: transformers.Qwen2Config(**GQA, tie_word_embeddings=True),
    "gemma": lambda: transformers.GemmaConfig(**GQA, head_dim=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(**GQA, head_dim=8),
    "opt": lambda: transformers.OPTConfig(**SIZE, ffn_dim=48, word_embed_proj_dim=32),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "mixtral-fused-experts": lambda: transformers.MixtralConfig(**GQA, num_local_experts=4),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **GQA, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, head_dim=8
    ),
}


def random_checkpoint(folder: Path, config: Any, shard: str = "5GB", base_only: bool = False) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    (model.base_model if base_only else model).save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return random_checkpoint(tmp_path / "llama", MODELS["llama"]())


def edit(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


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


# ---------------------------------------------------------------- bad checkpoints, each named


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
    "config not json": (lambda f: (f / "config.json").write_text("{"), r"config\.json: cannot be used"),
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


def test_tied_by_config_but_stored_different(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "m", MODELS["qwen2-tied"]())
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert load_model(Checkpoint.open(folder)).lm_head.weight.shape == (99, 32)  # the same values: fine
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(CheckpointError, match='"tie_word_embeddings": false'):
        load_model(Checkpoint.open(folder))


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


# ---------------------------------------------------------------- where checkpoints come from


def test_hub_snapshot_links_work_and_others_do_not(llama: Path, tmp_path: Path) -> None:
    """The layout of the hub cache: snapshots/<commit>/x.safetensors -> ../../blobs/<hash>."""
    repo = tmp_path / "models--owner--name"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    shutil.move(llama / "model.safetensors", repo / "blobs" / "abc")
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/abc"))
    shutil.copy(llama / "config.json", snapshot)
    load_model(Checkpoint.open(snapshot))
    other = tmp_path / "models--owner--other" / "blobs"
    other.mkdir(parents=True)
    shutil.copy(repo / "blobs" / "abc", other / "def")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(other / "def")
    with pytest.raises(CheckpointError, match="leaves the folder"):
        Checkpoint.open(snapshot)


def test_hub_id_downloads_only_what_the_index_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commit = "1" * 40
    snapshot = tmp_path / "models--owner--name" / "snapshots" / commit
    random_checkpoint(snapshot, MODELS["llama"](), shard="20KB")
    asked: list[tuple[str | None, list[str]]] = []

    def fake(
        repo: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        assert repo == "owner/name" and ignore_patterns == ["*/*"]
        asked.append((revision, allow_patterns))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    checkpoint = Checkpoint.open("owner/name", revision="main")
    assert checkpoint.revision == commit and checkpoint.source == "owner/name"
    assert [revision for revision, _ in asked] == ["main", commit]
    assert not any("safetensors" in pattern for pattern in asked[0][1])
    assert {p for p in asked[1][1] if p.endswith(".safetensors")} == {
        p.name for p in snapshot.glob("*.safetensors")
    }


@pytest.mark.parametrize(
    ("source", "revision", "message"),
    [
        ("no/such/folder", None, "no such folder"),
        ("./missing", None, "no such folder"),
        (str(TINY), "main", "a local folder has no revision"),
        (str(TINY / "config.json"), None, "a file; give the folder"),
    ],
)
def test_source_that_is_not_there(source: str, revision: str | None, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(source, revision)


def test_hub_failure_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise OSError("offline\nand a long explanation")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"^owner/name: no such folder.*OSError: offline\)$"):
        locate("owner/name", None)


@given(name=st.text(max_size=30))
@settings(max_examples=150, deadline=None)
def test_fuzz_shard_names_never_leave_the_folder(name: str) -> None:
    try:
        path = contained_file(TINY, name + ".safetensors")
    except CheckpointError:
        return
    assert path.resolve().parent == TINY.resolve()


@given(data=st.binary(max_size=200), json_like=st.booleans())
@settings(max_examples=200, deadline=None)
def test_fuzz_header_is_read_or_refused(data: bytes, json_like: bool, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(len(data).to_bytes(8, "little") + data if json_like else data)
    try:
        assert isinstance(read_header(path), dict)
    except CheckpointError as error:
        assert str(path) in str(error)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (ENTRY | {"dtype": "F4"}, "dtype 'F4'"),
        (ENTRY | {"shape": [-2]}, "integers >= 0"),
        (ENTRY | {"shape": [3]}, "cannot lie in bytes 0:8"),
        (ENTRY | {"data_offsets": [4, 12]}, "cannot lie in bytes 4:12"),
        (ENTRY | {"data_offsets": [0]}, "damaged header entry"),
        ({"dtype": "F32"}, "damaged header entry"),
        ("x", "damaged header entry"),
    ],
)
def test_damaged_header(entry: Any, message: str, tmp_path: Path) -> None:
    header = json.dumps({"w": entry}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read_header(path)
    good = json.dumps({"w": ENTRY, "__metadata__": {"format": "pt"}}).encode()
    path.write_bytes(len(good).to_bytes(8, "little") + good + bytes(8))
    assert read_header(path) == {"w": ENTRY}
