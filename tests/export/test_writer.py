"""Formats: pack and unpack are inverse, what cannot be held is refused with a way out, and the writer is
careful.
"""

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
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lowbit_ft.export import EXPORTERS, LayerSpec, Weights, folder, reader
from lowbit_ft.export.native import layers_from_config
from lowbit_ft.export.reader import load_exported, read_weights
from lowbit_ft.export.verify import verify
from lowbit_ft.export.writer import check_files, read_manifest, replace_file, write_model
from lowbit_ft.grid import BinaryGrid, IntGrid
from lowbit_ft.grid.bitstream import pack_stream, unpack_stream
from lowbit_ft.model.hub import tensor_entries
from lowbit_ft.model.load import Checkpoint
from tests.packed_tools import (
    IDS,
    SIZE,
    int_grid,
    packed_model,
    random_weight,
    random_weights,
    tiny_checkpoint,
)

NATIVE, COMPRESSED = EXPORTERS["native"], EXPORTERS["compressed-tensors"]
BOTH = {"native": NATIVE, "compressed-tensors": COMPRESSED}  # the others: test_formats.py
INT_GRIDS = st.builds(
    IntGrid,
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([32, 64, 128, 256, -1]),
    symmetric=st.booleans(),
    residual_bits=st.sampled_from([0, 1, 2, 4]),
    scale_dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
)
BINARY_GRIDS = st.builds(
    BinaryGrid, bits=st.sampled_from([1, 2, 3, 4]), group_size=st.sampled_from([32, 64, 128, 256, -1])
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint(tmp_path_factory.mktemp("source") / "tiny"), dtype="float32")


@pytest.fixture(scope="module")
def weights(source: Checkpoint) -> dict[str, Any]:
    return random_weights(source.empty_model(), int_grid(bits=3))


# ------------------------------------------------------------------------------------------ pack and unpack


@pytest.mark.parametrize("name", list(EXPORTERS))
@settings(max_examples=60)
@given(grid=INT_GRIDS | BINARY_GRIDS, n=st.integers(1, 70), k=st.integers(1, 600), offset=st.booleans())
def test_unpack_is_the_inverse_of_pack(name: str, grid: Any, n: int, k: int, offset: bool) -> None:
    exporter, offset = EXPORTERS[name], offset and isinstance(grid, IntGrid)
    n = n * 32 if exporter.name.startswith(("gptq", "awq")) else n  # whole words of codes along N
    problems = exporter.reject_model({"a.0.b": LayerSpec((n, k), grid, offset)})
    if problems:
        assert all("native" in problem for problem in problems)  # says the way out
        assert exporter is not NATIVE
        return
    if exporter is not NATIVE:
        grid = IntGrid(**({k: v for k, v in grid.to_json().items() if k != "grid"} | {"residual_bits": 0}))
    weight = random_weight((n, k), grid, offset=offset)
    layer = LayerSpec.of(weight)
    tensors = exporter.pack(weight)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == exporter.specs(layer)
    assert exporter.unpack(tensors, layer).digest() == weight.digest()
    if exporter.missing(exporter.reads_with):
        return
    read = exporter.read_back(tensors, layer)  # the library's own code finds the same
    assert torch.equal(read.codes, weight.unpack_codes()) and torch.equal(
        read.scale.float(), weight.scale.float()
    )
    for key in ("zero", "offset"):
        ours, theirs = getattr(weight, key, None), getattr(read, key)
        assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs))


@settings(max_examples=60)
@given(bits=st.integers(1, 8), rows=st.integers(1, 9), columns=st.integers(1, 200), seed=st.integers(0, 99))
def test_the_bit_stream_is_the_librarys(bits: int, rows: int, columns: int, seed: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=g).to(torch.uint8)
    signed = (codes.int() - (1 << (bits - 1))).to(torch.int8)
    assert torch.equal(pack_stream(codes, bits), pack_to_int32(signed, bits))
    assert torch.equal(
        pack_stream(codes, bits).t(), pack_to_int32(signed.t().contiguous(), bits, packed_dim=0)
    )
    assert torch.equal(unpack_stream(pack_stream(codes, bits), bits, columns), codes)


def test_compressed_tensors_refuses_what_it_cannot_hold() -> None:
    assert all(
        COMPRESSED.reject(int_grid(bits=b, symmetric=s)) is None for b in (2, 3, 4, 8) for s in (True, False)
    )
    assert "sign planes" in str(COMPRESSED.reject(BinaryGrid()))
    assert "float offset" in str(COMPRESSED.reject(int_grid(), offset=True))
    half = int_grid(
        scale_dtype="float16"
    )  # of a GPTQ base: exact in the file, and in a model that is as wide
    assert "float16 scales do not survive bfloat16" in str(COMPRESSED.reject_dtype(half, "bfloat16"))
    assert (
        COMPRESSED.reject(half)
        is COMPRESSED.reject_dtype(half, "float16")
        is COMPRESSED.reject_dtype(half, "float32")
        is None
    )
    assert "does not divide 100" in str(COMPRESSED.reject_width(int_grid(), 100))
    assert COMPRESSED.reject_width(int_grid(group_size=-1), 100) is None
    two = {"a": int_grid(symmetric=False), "b": int_grid(bits=8, symmetric=False)}
    problems = COMPRESSED.reject_model({name: LayerSpec((4, 64), grid) for name, grid in two.items()})
    assert len(problems) == 1 and "2 different grids" in problems[0]
    assert NATIVE.reject_model({name: LayerSpec((4, 100), grid, True) for name, grid in two.items()}) == []


def test_unpack_refuses_tensors_that_do_not_fit() -> None:
    for exporter in BOTH.values():
        weight = random_weight((6, 128), int_grid(symmetric=False))
        layer, tensors = LayerSpec.of(weight), exporter.pack(weight)
        for name in tensors:
            with pytest.raises(ValueError, match=f"missing {name}"):
                exporter.unpack({k: v for k, v in tensors.items() if k != name}, layer)
            with pytest.raises(ValueError, match=name):
                exporter.unpack(tensors | {name: torch.cat([tensors[name], tensors[name]])}, layer)
            with pytest.raises(ValueError, match=name):
                exporter.unpack(tensors | {name: tensors[name].to(torch.float64)}, layer)
        scale = "scale" if exporter is NATIVE else "weight_scale"
        with pytest.raises(ValueError, match="NaN" if exporter is NATIVE else "not bfloat16"):
            exporter.unpack(tensors | {scale: torch.full_like(tensors[scale], float("nan"))}, layer)
    with pytest.raises(ValueError, match="zero is 255"):
        tensors = NATIVE.pack(weight)
        NATIVE.unpack(tensors | {"zero": torch.full_like(tensors["zero"], 255)}, layer)
    with pytest.raises(ValueError, match="not bfloat16"):
        tensors = COMPRESSED.pack(weight)
        COMPRESSED.unpack(tensors | {"weight_scale": tensors["weight_scale"] * 1.0001}, layer)
    with pytest.raises(ValueError, match="weight_shape"):
        COMPRESSED.unpack(tensors | {"weight_shape": torch.tensor([128, 6])}, layer)


@settings(max_examples=40)
@given(grids=st.lists(INT_GRIDS | BINARY_GRIDS, min_size=1, max_size=4), offset=st.booleans())
def test_the_native_config_names_every_layer_and_grid(grids: list[Any], offset: bool) -> None:
    layers = {
        f"m.{i}.proj": LayerSpec((8 + i, 40), grid, offset and isinstance(grid, IntGrid))
        for i, grid in enumerate([*grids, grids[0]])
    }
    config = json.loads(json.dumps(NATIVE.model_config(layers, ["lm_head"])))
    assert layers_from_config(config) == layers


# ------------------------------------------------------------------------------------------ the writer


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

    (tmp_path / ".m.partial").mkdir()  # of a killed process
    os.rename(target, tmp_path / ".m.replaced")
    write("d")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"] and check_files(target)

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


# ------------------------------------------------------------------------------------------ verify and damage


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
        entry = folder.file_entry(target / "model.safetensors")  # as if it had been written so
        manifest = read_manifest(target)
        manifest["files"]["model.safetensors"] = entry
        (target / "lowbit_ft.json").write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=rf"{layer}: 1 codes"):
            verify(target, weights)


@pytest.fixture(scope="module")
def native_folder(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("fuzz") / "m"
    grids = {
        "o_proj": BinaryGrid(bits=2),
        "down_proj": int_grid(symmetric=False, residual_bits=2),
        "": int_grid(bits=2),
    }
    write_model(target, source, random_weights(source.empty_model(), grids), NATIVE)
    return target


@settings(max_examples=150)
@given(data=st.data())
def test_a_damaged_file_is_an_error_of_ours_never_a_crash(native_folder: Path, data: st.DataObject) -> None:
    """Bytes changed, cut off or added anywhere: ValueError, or weights of the announced grids; and the hashes
    tell always.
    """
    name = data.draw(st.sampled_from(["model.safetensors", "config.json", "lowbit_ft.json"]))
    path = native_folder / name
    original = path.read_bytes()
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
        if bytes(content) != original and name != "lowbit_ft.json":  # the manifest vouches for the rest
            with pytest.raises(ValueError):
                check_files(native_folder)
        try:
            stream = read_weights(native_folder)
            for layer, weight in stream.items():
                assert LayerSpec.of(weight) == stream.specs[layer]
        except ValueError as error:
            assert str(error)
    finally:
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
