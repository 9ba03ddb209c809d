"""The model section: what is refused, against the disk and this machine."""

import shutil

import pytest

from lowbit_ft.recipe.recipe import load_recipe
from tests.recipe.recipe_text import (
    GOOD,
    TINY,
    bad_recipes,
    refused,
    refused_with,
    write,
)

BAD = [
    # (what, changed text, overrides, place and words that must be in one line)
    (
        "unknown key near",
        ("dtype: float32", "dtpye: float32"),
        (),
        "r.yaml:4: model.dtpye: unknown key; did you mean 'dtype'?; allowed: path",
    ),
    (
        "literal",
        ("device: cpu", "device: gpu"),
        (),
        "r.yaml:5: model.device: got 'gpu'; allowed: auto, cpu, cuda; did you mean 'cpu'?",
    ),
    ("no such model", (str(TINY), str(TINY) + "x"), (), "r.yaml:3: model.path: got"),
    (
        "model is a file",
        (str(TINY), str(TINY / "config.json")),
        (),
        "a file; give the folder that holds config.json",
    ),
    (
        "revision of a folder",
        ("dtype: float32", "dtype: float32\n  revision: main"),
        (),
        "r.yaml:5: model.revision: got 'main'; a local folder has no revisions",
    ),
    ("fp16 on a CPU", ("dtype: float32", "dtype: float16"), (), "r.yaml:4: model.dtype: got fp16 on a CPU"),
    (
        "flash attention on a CPU",
        ("dtype: float32", "attention: flash_attention_2"),
        (),
        "r.yaml:4: model.attention: got 'flash_attention_2', but there is no GPU",
    ),
    (
        "flex attention on a CPU",
        ("dtype: float32", "attention: flex_attention"),
        (),
        "r.yaml:4: model.attention: got 'flex_attention', whose backward PyTorch has on GPUs "
        "only; allowed here: sdpa",
    ),
]


@bad_recipes(BAD)
def test_bad_recipe_is_refused_with_its_line(change, overrides, words):
    refused_with(change, overrides, words)


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json: missing"),
        (lambda f: (f / "config.json").write_text("{"), "not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "got a JSON list"),
        (lambda f: (f / "model.safetensors").write_bytes(b"PK" * 10), "not a safetensors file"),
        (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "only pickle weights"),
        (
            lambda f: (f / "config.json").write_text('{"quantization_config": {"quant_method": "hqq"}}'),
            "already quantized by 'hqq'; allowed: gptq",
        ),
    ],
)
def test_bad_checkpoints_are_told_with_the_recipe_line(tmp_path, break_it, words):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    break_it(folder)
    (problem,) = refused(GOOD.replace(str(TINY), str(folder)))
    assert problem.startswith("r.yaml:3: model.path: got ") and words in problem


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["model.dtype=bfloat16"],
            "model.dtype: got bf16, which Old GPU does not have; allowed: float16, float32",
        ),
        (["train.mixed_precision=bf16"], "train.mixed_precision: got bf16, which Old GPU does not have"),
        (["model.attention=flash_attention_2"], "the package flash-attn is not installed"),
        (
            ["train.optimizer=adamw8bit"],
            "got 'adamw8bit', from bitsandbytes, which is not installed; run pip install bitsandbytes",
        ),
    ],
)
def test_gpu_without_bf16(monkeypatch, overrides, words):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "Old GPU")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    text = GOOD.replace("device: cpu", "device: cuda")
    assert any(words in problem for problem in refused(text, tuple(overrides)))
    assert load_recipe(write(text), ["model.dtype=float16"]).model.dtype == "float16"


def test_cuda_where_there_is_none(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (problem,) = refused(GOOD.replace("device: cpu", "device: cuda"))
    assert problem.startswith("r.yaml:5: model.device: got 'cuda', but PyTorch sees no GPU here")
