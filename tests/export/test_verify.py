"""verify and check_files: what differs is named, and a damaged file is an error of ours, never a crash."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lowbit_ft.export import LayerSpec, reader
from lowbit_ft.export.answers import Answers, answer
from lowbit_ft.export.folder import check_files, read_manifest
from lowbit_ft.export.native import layers_from_config
from lowbit_ft.export.reader import read_weights
from lowbit_ft.export.verify import verify
from lowbit_ft.export.writer import write_model
from lowbit_ft.files.manifest import file_entry, sealed
from lowbit_ft.model.checkpoint import Checkpoint
from tests.export.common import BOTH, NATIVE
from tests.packed_tools import IDS, packed_model, random_weight


def test_answers_go_on_behind_a_tie_and_fail_on_a_difference() -> None:
    table = torch.tensor(
        [[0.0, 5.0, 1.0, 0.0], [0.0, 0.0, 5.0, 4.999], [0.0, 5.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]]
    )

    def logits(ids: torch.Tensor, table: torch.Tensor = table) -> torch.Tensor:
        return table[ids]

    said = answer(logits, torch.tensor([[0]]), stops=[3])
    assert said.ids[0, :5].tolist() == [0, 1, 2, 1, 2] and said.ids.shape[1] == 17
    assert answer(logits, torch.tensor([[0]]), stops=[2]).ids.tolist() == [[0, 1, 2]]
    same = Answers.compare(logits, [said], 1e-4)
    assert same.ok and same.same == same.tokens == 16 and "16 of 16" in str(same)
    tie = table.clone()
    tie[1, 3] = 5.0005
    near = Answers.compare(lambda ids: logits(ids, tie), [said], 1e-3)
    assert near.ok and near.same == 8 and "ties within the tolerance" in str(near)
    assert not Answers.compare(lambda ids: logits(ids, tie), [said], 1e-6).ok
    assert not Answers.compare(lambda ids: logits(ids) * float("nan"), [said], 1e-3).ok


def test_verify_names_the_layers_that_differ(
    source: Checkpoint, weights: dict[str, Any], tmp_path: Path
) -> None:
    model = packed_model(source, weights)
    for name, exporter in BOTH.items():
        target = tmp_path / name
        write_model(target, source, weights, exporter)
        report = verify(target, weights, model=model, input_ids=IDS)
        assert (
            report.ok
            and report.logit_difference == 0
            and "7 layers" in str(report)
            and "equal bit for bit" in str(report)
        )
        assert "not compared" in str(verify(target, weights))

        layer = "model.layers.0.mlp.down_proj"
        damaged = dict(weights)
        codes = weights[layer].codes.clone()
        codes[5, 3] ^= 1  # one bit of one code
        damaged[layer] = random_weight(weights[layer].shape, weights[layer].grid, seed=6).__class__(
            codes=codes, scale=weights[layer].scale, shape=weights[layer].shape, grid=weights[layer].grid
        )
        with pytest.raises(
            ValueError, match=rf"(?s)1 of 7 layers differ.*{layer}: 1 codes, 0 scales.*, 1 weights"
        ):
            verify(target, damaged)
        with pytest.raises(ValueError, match="logits: largest difference"):
            verify(target, weights, model=packed_model(source, damaged), input_ids=IDS)
        with pytest.raises(ValueError, match="other layers"):
            verify(target, {layer: weights[layer]})
        tensors = load_file(target / "model.safetensors")
        tensors[f"{layer}.{'codes' if exporter is NATIVE else 'weight_packed'}"].view(-1)[7] ^= 1
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="model.safetensors: its content"):
            verify(target, weights)
        entry = file_entry(target / "model.safetensors")  # as if it had been written so
        manifest = read_manifest(target)
        manifest["files"]["model.safetensors"] = entry
        (target / "lowbit_ft.json").write_bytes(sealed(manifest))
        with pytest.raises(ValueError, match=rf"{layer}: 1 codes"):
            verify(target, weights)


@settings(max_examples=150)
@given(data=st.data())
def test_a_damaged_file_is_an_error_of_ours_never_a_crash(native_folder: Path, data: st.DataObject) -> None:
    """Bytes changed, cut off or added anywhere: ValueError, or weights of the announced grids; and the hashes
    tell always.
    """
    name = data.draw(st.sampled_from(["model.safetensors", "config.json", "lowbit_ft.json"]))
    path = native_folder / name
    original, vouched = path.read_bytes(), (native_folder / "lowbit_ft.json").read_bytes()
    # Most of the damage in the header and in the JSON, where it can be misread; the tensors' bytes are all
    # alike.
    reach = data.draw(st.sampled_from([8, 5000, len(original)]))
    content = bytearray(original)
    kind = data.draw(st.sampled_from(["change", "cut", "grow", "text"]))
    if kind == "cut":
        del content[data.draw(st.integers(0, len(original) - 1)) :]
    elif kind == "grow":
        content += data.draw(st.binary(min_size=1, max_size=20))
    elif kind == "text":
        words = [
            b'"codes"',
            b"128",
            b"0",
            b"[",
            b'"layers"',
            b"2",
            b'"bits"',
            b"model",
            b"null",
            b"-1",
            b"1e400",
            b"I16",
        ]
        old, new = data.draw(st.sampled_from(words)), data.draw(st.sampled_from(words))
        content = bytearray(bytes(content).replace(old, new, data.draw(st.integers(1, 3))))
    else:
        for _ in range(data.draw(st.integers(1, 8))):
            content[data.draw(st.integers(0, min(reach, len(content)) - 1))] = data.draw(st.integers(0, 255))
    try:
        path.write_bytes(content)
        if bytes(content) != original:
            with pytest.raises(ValueError):
                check_files(native_folder)
            with pytest.raises(ValueError):
                read_weights(native_folder)
        (native_folder / "lowbit_ft.json").unlink()  # what nobody vouches for is data from a stranger
        try:
            stream = read_weights(native_folder)
            for layer, weight in stream.items():
                assert LayerSpec.of(weight) == stream.specs[layer]
        except ValueError as error:
            assert str(error)
    finally:
        (native_folder / "lowbit_ft.json").write_bytes(vouched)
        path.write_bytes(original)


def test_read_weights_names_the_layer_of_a_tensor_that_does_not_fit(
    native_folder: Path, tmp_path: Path
) -> None:
    layer = "model.layers.0.mlp.down_proj"

    def damaged(change: Any) -> Any:
        target = tmp_path / "m"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(native_folder, target)
        tensors = load_file(target / "model.safetensors")
        change(tensors)
        save_file(tensors, target / "model.safetensors")
        with pytest.raises(ValueError, match=r"model\.safetensors: its content is not the one"):
            read_weights(target)
        (target / "lowbit_ft.json").unlink()  # nobody vouches for it any more: data from a stranger
        return read_weights(target)

    with pytest.raises(ValueError, match=rf"layer {layer} \(W4 g64 asym\) has no tensor {layer}.zero"):
        damaged(lambda t: t.pop(f"{layer}.zero"))
    with pytest.raises(ValueError, match=rf"{layer}.scale is torch.float32"):
        damaged(lambda t: t.update({f"{layer}.scale": t[f"{layer}.scale"].float()}))
    with pytest.raises(ValueError, match=rf"{layer}.codes is torch.int16 \(127, 64\)"):
        damaged(lambda t: t.update({f"{layer}.codes": t[f"{layer}.codes"][:-1].clone()}))
    for name, match in (("zero", "zero is 99"), ("scale", "scale has NaN or Inf")):
        value = 99 if name == "zero" else float("nan")
        stream = damaged(lambda t, n=name, v=value: t[f"{layer}.{n}"].view(-1)[3:4].fill_(v))
        with pytest.raises(ValueError, match=rf"layer {layer}: {match}"):
            stream[layer]
        assert len(stream) == 7 and all(stream[other].nbytes for other in stream if other != layer)


BAD_CONFIGS: dict[str, Any] = {
    "needs an object": lambda c: [],
    "quant_method": lambda c: c | {"quant_method": "gptq"},
    "version": lambda c: c | {"version": 2},
    "needs a list": lambda c: c | {"grids": {}},
    "lists no layer": lambda c: c | {"grids": []},
    r"grids\[0\]: needs": lambda c: c | {"grids": [3]},
    "bits: got 5": lambda c: c | {"grids": [c["grids"][0] | {"bits": 5}]},
    "bits: got \\[\\]": lambda c: c | {"grids": [c["grids"][0] | {"bits": []}]},
    "unexpected keyword": lambda c: c | {"grids": [c["grids"][0] | {"surprise": 1}]},
    "allowed are integer, binary": lambda c: c | {"grids": [c["grids"][0] | {"grid": "ternary"}]},
    "offset: got 1": lambda c: c | {"grids": [c["grids"][0] | {"offset": 1}]},
    "listed twice": lambda c: c | {"grids": [c["grids"][0], c["grids"][0]]},
    "both positive": lambda c: c | {"grids": [c["grids"][0] | {"layers": {"x": [0, 4]}}]},
    "got shape": lambda c: c | {"grids": [c["grids"][0] | {"layers": {"x": [True, 4.0]}}]},
}


@pytest.mark.parametrize("message", list(BAD_CONFIGS))
def test_bad_configs_are_named(message: str, native_folder: Path) -> None:
    config = reader.read_config(native_folder)["quantization_config"]
    with pytest.raises(ValueError, match=message):
        layers_from_config(BAD_CONFIGS[message](config))
