"""config.json and its neighbours, written by strangers: one answer that names the file, no kernel, no code,
no model that is built of a number nobody has.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from lowbit_ft.export import EXPORTERS
from lowbit_ft.export.reader import load_exported
from lowbit_ft.export.writer import write_model
from lowbit_ft.files.tensorfile import CheckpointError
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.config import check_counts, load_config, read_config, stop_ids, stored_dtype
from lowbit_ft.model.load import load_model, load_tokenizer
from tests.checkpoint_tools import TINY


def change(folder: Path, name: str = "config.json", **values: Any) -> None:
    path = folder / name
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | values))


BAD_VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown activation": ({"hidden_act": "x"}, "KeyError|hidden_act"),
    "an unknown rope": ({"rope_parameters": {"rope_type": "zzz"}}, "zzz|rope"),
    "a float for a width": ({"hidden_size": 1e9}, "hidden_size: got 1000000000.0; allowed: at most"),
    "no such vocabulary": ({"vocab_size": 10**12}, "vocab_size: got 1000000000000; allowed: at most"),
    "no such head": ({"head_dim": 10**11}, "head_dim: got 100000000000; allowed: at most"),
    "ten million layers": (
        {"num_hidden_layers": 10**7},
        r"num_hidden_layers: got 10000000; allowed:",
    ),
    "a hundred layers": (
        {"num_hidden_layers": 100},
        r"num_hidden_layers: got 100; .*the files have 21",
    ),
    "no heads": ({"num_attention_heads": 0}, "ZeroDivisionError|num_attention_heads"),
    "an unknown kind": ({"model_type": "nothing"}, "nothing"),
    "a kind that is no text": ({"model_type": [1]}, "model_type: got a JSON list; allowed: text"),
    "a window that is text": ({"sliding_window": "zzz"}, "sliding_window: got 'zzz'; allowed: an integer"),
    "not a number": ({"num_hidden_layers": float("nan")}, "num_hidden_layers: got nan"),
}


@pytest.mark.parametrize("case", list(BAD_VALUES))
def test_a_value_no_model_has_is_answered(case: str, llama: Path) -> None:
    values, message = BAD_VALUES[case]
    change(llama, **values)
    with pytest.raises(CheckpointError, match=rf"(?s)config\.json: .*({message})"):
        Checkpoint.open(llama).empty_model()


def test_without_weights_counts_are_bounded_too(llama: Path) -> None:
    """As `plan --config` asks: there are no tensors to compare with."""
    with pytest.raises(ValueError, match="num_hidden_layers: got 2000; allowed: at most 1024"):
        check_counts(llama / "config.json", {"num_hidden_layers": 2000})
    with pytest.raises(ValueError, match="text_config.n_routed_experts: got 100000; allowed: at most 1024"):
        check_counts(llama / "config.json", {"text_config": {"n_routed_experts": 100_000}})
    check_counts(llama / "config.json", {"num_hidden_layers": 126, "vocab_size": 256_000, "n_experts": 384})


def test_attention_kernels_and_code_of_a_config_are_dropped(llama: Path, tmp_path: Path) -> None:
    change(
        llama,
        _attn_implementation="org/kernel",
        attn_implementation="org/kernel",
        transformers_weights="../other.safetensors",
        auto_map={"AutoConfig": "code.Config"},
        extra={"_attn_implementation": "org/kernel", "list": [{"auto_map": "org/kernel"}]},
    )
    assert "org/kernel" not in json.dumps(read_config(llama))
    checkpoint = Checkpoint.open(llama, dtype="float32")
    assert checkpoint.empty_model("eager").config._attn_implementation == "eager"
    assert load_model(checkpoint).config._attn_implementation == "sdpa"
    assert load_exported(llama, attention="sdpa").config._attn_implementation == "sdpa"

    from tests.packed_tools import int_grid, random_weights

    weights = random_weights(checkpoint.empty_model(), int_grid())
    write_model(tmp_path / "base", checkpoint, weights, EXPORTERS["native"])
    written = (tmp_path / "base" / "config.json").read_text()
    assert "org/kernel" not in written and "auto_map" not in written and "other.safetensors" not in written


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "got a JSON list; allowed: an object"),
        ({"eos_token_id": [1, "x"]}, "eos_token_id"),
        ({"eos_token_id": {"a": 1}}, "eos_token_id"),
    ],
)
def test_a_bad_generation_config_is_answered(content: Any, message: str, llama: Path) -> None:
    (llama / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"(?s)generation_config\.json: .*({message})"):
        load_model(Checkpoint.open(llama))


def test_stop_tokens_are_read(llama: Path) -> None:
    path = llama / "generation_config.json"
    for value, ids in ((3, [3]), ([5, 3], [5, 3]), (None, [])):
        path.write_text(json.dumps({"eos_token_id": value}))
        assert stop_ids(path) == ids
    assert stop_ids(llama / "nothing.json") is None
    assert EXPORTERS["native"].stops(llama) == [2]  # of config.json
    path.write_text(json.dumps({"eos_token_id": [5, 3, 5]}))
    assert EXPORTERS["native"].stops(llama) == [3, 5]


@pytest.mark.parametrize("length", ["x", [], -1])
def test_a_tokenizer_without_a_length_is_answered(length: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(TINY, tmp_path / "m")
    assert load_tokenizer(Checkpoint.open(folder))("a")["input_ids"]
    change(folder, "tokenizer_config.json", model_max_length=length)
    with pytest.raises(CheckpointError, match="its tokenizer cannot be loaded"):
        load_tokenizer(Checkpoint.open(folder))


def test_a_dtype_is_a_dtype(llama: Path) -> None:
    for name in ("load", "int8", 5, "nothing"):
        with pytest.raises(ValueError, match=r"config\.json: dtype: got"):
            stored_dtype(llama / "config.json", {"dtype": name})
    assert str(stored_dtype(llama, {"torch_dtype": "bfloat16"})) == "torch.bfloat16"


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"]
)
def test_a_pipe_in_a_checkpoint_is_refused(name: str, llama: Path) -> None:
    (llama / name).unlink(missing_ok=True)
    os.mkfifo(llama / name)
    began = time.monotonic()
    for door in (lambda: Checkpoint.open(llama), lambda: load_exported(llama)):
        with pytest.raises(ValueError, match=rf"{name}: (not readable JSON|got a pipe|.*got a pipe)"):
            door()
    assert time.monotonic() - began < 60


def test_a_good_config_is_taken(llama: Path) -> None:
    config = load_config(llama)
    assert config.num_hidden_layers == 2 and config._name_or_path == str(llama)
