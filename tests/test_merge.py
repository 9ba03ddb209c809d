"""Merging: what was trained is what is written, for every method; and what differs later is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import attach, base_digest, packed_layers
from lowbit_ft.evaluate.generate import encode_prompt, generate
from lowbit_ft.export import EXPORTERS, LayerSpec
from lowbit_ft.export.folder import check_files, layer_digests, read_manifest
from lowbit_ft.export.reader import load_exported, read_weights
from lowbit_ft.export.verify import verify
from lowbit_ft.export.writer import write_model
from lowbit_ft.files.manifest import sealed
from lowbit_ft.grid import BinaryGrid, PackedWeight
from lowbit_ft.merge import base_weights, merge, merged_weights, moved, verify_merge
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.config import read_config
from lowbit_ft.model.tokenizer import read_tokenizer
from tests.packed_tools import IDS, int_grid, packed_model, random_weights, tiny_checkpoint

TINY = Path(__file__).parents[1] / "recipes" / "assets" / "tiny-llama"
LAYER = "model.layers.0.mlp.up_proj"

# Every method on a grid it takes, and L4Q with each offset it can ship.
CASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "lr_qat": ("lr_qat", {}, int_grid(bits=3, residual_bits=4)),
    "lr_qat asym": ("lr_qat", {}, int_grid(bits=4, residual_bits=4, symmetric=False)),
    "dl_qat": ("dl_qat", {}, int_grid(bits=2, residual_bits=2)),
    "l4q": ("l4q", {}, int_grid(bits=4, residual_bits=4)),
    "l4q integer": ("l4q", {"offset": "integer"}, int_grid(bits=4, residual_bits=4)),
    "l4q float": ("l4q", {"offset": "float"}, int_grid(bits=4, residual_bits=4)),
    "lota": ("lota", {"rank": 4}, int_grid(bits=4)),
    "lota float": ("lota", {"rank": 4, "offset": "float"}, int_grid(bits=2, symmetric=False)),
    "scale": ("scale", {}, int_grid(bits=8)),
    "full_qat": ("full_qat", {}, int_grid(bits=2, residual_bits=4)),
    "ef_qat": ("ef_qat", {"scope": "network"}, int_grid(bits=4, residual_bits=4, symmetric=False)),
    "alpha_tuning": ("alpha_tuning", {}, BinaryGrid(bits=3, group_size=64)),
    "lora": ("lora", {}, int_grid(bits=4)),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint(tmp_path_factory.mktemp("source") / "tiny"), dtype="float32")


def trained(source: Checkpoint, case: str) -> Any:
    """A model whose adapters have moved far enough that codes and scales change."""
    method, options, grid = CASES[case]
    model = packed_model(source, random_weights(source.empty_model(), grid))
    attach(model, ADAPTERS[method](method=method, **options))
    shake(model, ternary=method == "lota")
    return model.eval()


def shake(model: nn.Module, ternary: bool = False) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and ternary:
                parameter.copy_(torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1)
            elif parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def test_every_method_has_a_case() -> None:
    assert {method for method, _, _ in CASES.values()} == set(ADAPTERS)


@pytest.mark.filterwarnings("ignore:lora. the merge rounds again")
@pytest.mark.parametrize("case", list(CASES))
def test_what_was_trained_is_what_is_written_and_loads(case: str, source: Checkpoint, tmp_path: Path) -> None:
    model = trained(source, case)
    exact = ADAPTERS[CASES[case][0]].exact_merge
    manifest = merge(model, source, tmp_path / "merged", readme="# hello")
    assert (tmp_path / "merged" / "README.md").read_text() == "# hello"
    merged, written = merged_weights(model), read_weights(tmp_path / "merged")
    for name, weight in merged.items():
        assert getattr(weight, "residual", None) is None
        assert manifest["layers"][name]["sha256"] == layer_digests(weight)
        assert written[name].digest() == weight.digest()
    assert case != "l4q float" or all(
        w.offset is not None for w in written.values() if isinstance(w, PackedWeight)
    )
    assert case != "l4q integer" or all(
        w.zero is not None for w in written.values() if isinstance(w, PackedWeight)
    )
    report = verify_merge(model, tmp_path / "merged")
    assert report.exact and "all" in str(report)
    again = load_exported(tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits) == exact
    assert verify(tmp_path / "merged", merged, model=model if exact else again, input_ids=IDS).ok
    # and on to the format of a server, where it can hold the grid
    exporter = EXPORTERS["compressed-tensors"]
    if not exporter.reject_model(written.specs):
        write_model(tmp_path / "served", source, written, exporter)
        assert verify(tmp_path / "served", merged, model=again, input_ids=IDS).ok
    else:
        assert case in ("l4q float", "lota float", "alpha_tuning")


def test_what_training_moved(source: Checkpoint) -> None:
    model = trained(source, "lr_qat")
    shares = moved(model)
    change = shares.pop("scale_change")
    assert set(shares) == set(merged_weights(model)) and change > 0.01
    weight, base = merged_weights(model)[LAYER], base_weights(model)[LAYER]
    different = (weight.unpack_codes() != base.unpack_codes()).float().mean()
    assert 0 < shares[LAYER] == pytest.approx(float(different))
    only_scales = moved(trained(source, "alpha_tuning"))
    assert only_scales.pop("scale_change") > 0.01 and set(only_scales.values()) == {0.0}


def test_a_later_merge_counts_what_differs(source: Checkpoint, tmp_path: Path) -> None:
    model = trained(source, "lr_qat")
    merge(model, source, tmp_path / "m")
    before = merged_weights(model)[LAYER]
    adapter: Any = model.get_submodule(LAYER).adapter
    with torch.no_grad():
        adapter.B[3] += 0.5  # one row of the weight
        adapter.log_scale[0, 7] += 0.5
    after = merged_weights(model)[LAYER]
    codes = int((before.unpack_codes() != after.unpack_codes()).sum())
    report = verify_merge(model, tmp_path / "m")
    assert codes > 0 and not report.exact
    assert [(r.layer, r.different_codes, r.different_scales) for r in report.different] == [(LAYER, codes, 1)]
    assert f"{codes:,} of" in str(report) and f"{LAYER}: {codes:,} codes, 1 scales" in str(report)
    other = packed_model(source, random_weights(source.empty_model(), int_grid(bits=8)))
    with pytest.raises(
        ValueError, match=r"another model: 7 layers differ.*W3 g64 sym there, W8 g64 sym here"
    ):
        verify_merge(other, tmp_path / "m")


def test_base_keeps_the_residual_and_gives_the_same_adapted_model(source: Checkpoint, tmp_path: Path) -> None:
    model = trained(source, "lr_qat")
    write_model(tmp_path / "base", source, base_weights(model), EXPORTERS["native"])
    check_files(tmp_path / "base")
    again = load_exported(tmp_path / "base")
    assert base_digest(again) == base_digest(model)
    attach(again, ADAPTERS["lr_qat"](method="lr_qat"))
    state = {n: p for n, p in model.named_parameters() if p.requires_grad}
    again.load_state_dict(state, strict=False)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert {n: LayerSpec.of(layer.base) for n, layer in packed_layers(again)} == base_weights(model).specs


def test_manifests_and_configs_that_are_not_there_or_not_ours(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a folder that lowbit_ft wrote"):
        read_manifest(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json: missing"):
        read_config(tmp_path)
    for text in (
        "{",
        "[]",
        "3",
        '{"writer": "x"}',
        '{"writer": "lowbit_ft", "files": {}, "layers": {}}',
        sealed({"writer": "x"}).decode(),
        sealed({"writer": "lowbit_ft", "files": {"a": 1}, "layers": {}}).decode(),
    ):
        (tmp_path / "lowbit_ft.json").write_text(text)
        with pytest.raises(ValueError, match=r"lowbit_ft\.json"):
            read_manifest(tmp_path)
        (tmp_path / "config.json").write_text(text)
        if text in ("{", "[]", "3"):
            with pytest.raises(ValueError, match=r"config\.json"):
                read_config(tmp_path)
    (tmp_path / "lowbit_ft.json").write_bytes(
        sealed({"writer": "lowbit_ft", "files": {"../x": {"bytes": 1}}, "layers": {}})
    )
    with pytest.raises(ValueError, match="missing"):
        check_files(tmp_path)


# ------------------------------------------------------------------------------------------ generate


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """The shipped tiny Llama at 4 bit, as a native folder; its model and tokenizer."""
    checkpoint = Checkpoint.open(TINY, dtype="float32")
    model = packed_model(checkpoint, random_weights(checkpoint.empty_model(), int_grid(bits=4)))
    folder = tmp_path_factory.mktemp("generate") / "m"
    merge(model, checkpoint, folder)
    return folder, model, transformers.AutoTokenizer.from_pretrained(TINY)


def test_generate_is_greedy_and_the_same_from_a_folder_and_a_model(answered: tuple[Path, Any, Any]) -> None:
    folder, model, tokenizer = answered
    prompts = ["def add(a, b):", "Write a docstring."]
    model.train()
    texts = generate(model, prompts, max_new_tokens=6, tokenizer=tokenizer)
    assert model.training and len(texts) == 2
    read = load_exported(folder)
    assert generate(read, prompts, max_new_tokens=6, tokenizer=read_tokenizer(folder)) == texts
    for prompt, text in zip(prompts, texts, strict=True):
        ids = encode_prompt(tokenizer, prompt, chat=True)
        wanted = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True
        )
        assert ids[0].tolist() == list(wanted["input_ids"] if hasattr(wanted, "keys") else wanted)
        best = ids
        with torch.no_grad():
            for _ in range(6):  # plain argmax decoding
                best = torch.cat([best, model.eval()(best).logits[:, -1:].argmax(-1)], dim=1)
        assert tokenizer.decode(best[0, ids.shape[1] :], skip_special_tokens=True).startswith(text)
    plain = generate(model, prompts[:1], max_new_tokens=6, tokenizer=tokenizer, chat=False)
    assert (
        encode_prompt(tokenizer, prompts[0], chat=False).shape[1]
        < encode_prompt(tokenizer, prompts[0], chat=True).shape[1]
    )
    assert plain != texts[:1]


def test_generate_samples_from_its_seed_and_leaves_the_random_state(answered: tuple[Path, Any, Any]) -> None:
    _, model, tokenizer = answered
    state = torch.get_rng_state()
    texts = [
        generate(model, ["x"], max_new_tokens=8, tokenizer=tokenizer, sample=True, seed=s)[0]
        for s in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2] and torch.equal(torch.get_rng_state(), state)


def test_generate_refuses(answered: tuple[Path, Any, Any], tmp_path: Path) -> None:
    folder, model, tokenizer = answered
    for match, call in {
        "one string": lambda: generate(model, "hello", tokenizer=tokenizer),
        "max_new_tokens: got 0": lambda: generate(model, ["x"], max_new_tokens=0, tokenizer=tokenizer),
        "temperature: got 0": lambda: generate(model, ["x"], tokenizer=tokenizer, sample=True, temperature=0),
        "without one": lambda: generate(model, ["x"]),
        "gives no token": lambda: generate(model, [""], tokenizer=tokenizer, chat=False),
        "tokenizer cannot be loaded": lambda: read_tokenizer(tmp_path),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
    bare = transformers.AutoTokenizer.from_pretrained(TINY)
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        generate(model, ["x"], tokenizer=bare, chat=True)
    templated = read_tokenizer(folder)
    assert generate(model, ["x"], max_new_tokens=2, tokenizer=bare) == generate(
        model, ["x"], max_new_tokens=2, tokenizer=templated, chat=False
    )
