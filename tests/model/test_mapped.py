"""The packed base on a CPU is pages of its files: nothing is copied, nothing written back, and damage is met
before it is mapped.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lowbit_ft import pipeline
from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import attach, base_digest, packed_layers
from lowbit_ft.adapters.lr_qat import LRQATConfig
from lowbit_ft.data.batches import Batches
from lowbit_ft.export import EXPORTERS
from lowbit_ft.export.reader import load_exported
from lowbit_ft.export.writer import write_model
from lowbit_ft.files.manifest import MANIFEST
from lowbit_ft.files.tensorfile import parse_header
from lowbit_ft.grid import Grid, IntGrid
from lowbit_ft.merge import base_weights, merged_weights
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.mapped import _give_back, is_mapped, mapped_ranges, to_device
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.sections.quant import QuantSection
from lowbit_ft.train.loop import train
from lowbit_ft.train.sharding import shard
from tests.forks import run_together
from tests.packed_tools import IDS, adapter_config, packed_model, random_weights, tiny_checkpoint
from tests.toy import examples, quiet, section

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
GRIDS: dict[str, Grid] = {
    "3 bit, zero points, residual": IntGrid(bits=3, group_size=64, symmetric=False),
    "2 bit, rows": IntGrid(bits=2, group_size=-1, residual_bits=2),
    "fp32 scales": IntGrid(bits=4, group_size=64, scale_dtype="float32"),
}
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/smaps").exists(), reason="needs Linux, whose /proc says what is mapped"
)


def base(folder: Path, grid: Grid = GRIDS["3 bit, zero points, residual"], **changes: Any) -> Path:
    """A packed folder of random integers; its checkpoint beside it."""
    checkpoint = Checkpoint.open(tiny_checkpoint(folder / "dense", num_hidden_layers=2, **changes))
    write_model(
        folder / "base", checkpoint, random_weights(checkpoint.empty_model(), grid), EXPORTERS["native"]
    )
    return folder / "base"


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": t
        for name, layer in packed_layers(model)
        for key, t in layer.base.to_tensors().items()
    }


def written_pages(folder: Path) -> int:
    """Bytes of the maps of this folder's files that are no longer the file's."""
    ranges = mapped_ranges(folder)
    assert ranges, "nothing is mapped"
    return sum(r.own for r in ranges)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_packed_tensors_are_views_of_the_files_with_the_values_of_the_unmapped_path(
    grid: Grid, tmp_path: Path
) -> None:
    folder = base(tmp_path, grid)
    checkpoint = Checkpoint.open(tmp_path / "dense")
    unmapped = packed_model(checkpoint, random_weights(checkpoint.empty_model(), grid))
    model = load_exported(folder)
    ranges = mapped_ranges(folder)
    for name, tensor in [*tensors(model).items(), ("embedding", model.model.embed_tokens.weight)]:
        assert is_mapped(tensor, ranges), f"{name} was copied"
        assert tensor.data_ptr() % tensor.element_size() == 0, f"{name} is not aligned"
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), (
            "saving one would save its neighbours"
        )
    assert not is_mapped(unmapped.model.embed_tokens.weight, ranges)
    assert base_digest(model) == base_digest(unmapped)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, unmapped(IDS).logits)
    assert written_pages(folder) == 0
    assert all(is_mapped(t, ranges) for t in tensors(model.to(torch.bfloat16).to("cpu")).values())


def test_offsets_are_aligned_in_every_file_we_write(tmp_path: Path) -> None:
    odd: dict[str, Any] = {
        "num_hidden_layers": 2,
        "vocab_size": 63,
        "hidden_size": 96,
        "intermediate_size": 160,
    }
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path / "dense", **odd))
    weights = random_weights(checkpoint.empty_model(), IntGrid(bits=3, group_size=32, symmetric=False))
    write_model(tmp_path / "base", checkpoint, weights, EXPORTERS["native"], max_shard_bytes=40_000)
    files = sorted((tmp_path / "base").glob("*.safetensors"))
    assert len(files) > 2
    for file in files:
        start, header = parse_header(file)
        for name, entry in header.items():
            size = {"U8": 1, "I16": 2, "BF16": 2}[entry["dtype"]]
            assert start % 8 == 0 and entry["data_offsets"][0] % size == 0, f"{file.name}: {name}"


@pytest.mark.parametrize("method", ADAPTERS)
def test_training_and_merging_write_to_no_page(method: str, tmp_path: Path) -> None:
    config = adapter_config(method, rank=2)
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path / "dense"))
    quant = (
        {"grid": "binary", "bits": 2} if config.grid_name == "binary" else {"bits": 4, "calibrate": "absmax"}
    )
    made, _ = quantize(checkpoint, QuantSection.model_validate(quant | {"group_size": 64}))
    write_model(tmp_path / "base", checkpoint, base_weights(made), EXPORTERS["native"])
    digest, states = base_digest(made), []
    ternary = {"optimizer": "t_signsgd", "learning_rate": 0.5} if config.ternary else {}
    for model in (made, load_exported(tmp_path / "base")):
        torch.manual_seed(3)
        attach(model, config)
        ranges = mapped_ranges(tmp_path / "base")
        assert not any(is_mapped(p, ranges) for p in model.parameters() if p.requires_grad), (
            "a master is a page of the file"
        )
        data = Batches(examples(9), 2, 0, 0)
        train(
            model,
            data,
            None,
            section(max_steps=3, gradient_accumulation_steps=1, **ternary),
            tmp_path / str(len(states)),
            console=quiet(),
        )
        states.append({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
        assert base_digest(model) == digest
        merged = {name: weight.digest() for name, weight in merged_weights(model).items()}
    assert states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][k], states[1][k]) for k in states[0]
    )
    assert merged and written_pages(tmp_path / "base") == 0


def test_who_writes_to_a_page_changes_neither_the_file_nor_anybody_else(tmp_path: Path) -> None:
    folder = base(tmp_path)
    before = (folder / "model.safetensors").read_bytes()
    one, other = load_exported(folder), load_exported(folder)
    codes = one.model.layers[0].mlp.up_proj.codes
    codes.fill_(7)
    assert bool((codes == 7).all()) and not torch.equal(codes, other.model.layers[0].mlp.up_proj.codes)
    assert written_pages(folder) > 0 and (folder / "model.safetensors").read_bytes() == before


def test_a_base_that_is_replaced_stays_what_it_was_for_who_has_it_mapped(tmp_path: Path) -> None:
    folder = base(tmp_path)
    model = load_exported(folder)
    digest = base_digest(model)
    checkpoint = Checkpoint.open(tmp_path / "dense")
    write_model(
        folder,
        checkpoint,
        random_weights(checkpoint.empty_model(), GRIDS["2 bit, rows"]),
        EXPORTERS["native"],
    )
    assert base_digest(load_exported(folder)) != digest == base_digest(model)
    for path in folder.iterdir():
        path.unlink()
    assert base_digest(model) == digest


@pytest.mark.parametrize("how", ["truncated", "longer", "header"])
def test_a_damaged_file_is_refused_before_it_is_mapped(how: str, tmp_path: Path) -> None:
    folder = base(tmp_path)
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(
        {"truncated": data[: len(data) // 2], "longer": data + b"\0" * 4096, "header": data[:30]}[how]
    )
    with pytest.raises(ValueError, match=r"model.safetensors: its content is not the one that was written"):
        load_exported(folder)
    (folder / MANIFEST).unlink()  # a folder that nothing vouches for has headers to be checked
    with pytest.raises(ValueError, match=r"model.safetensors: (truncated|too long)"):
        load_exported(folder)
    assert not mapped_ranges(folder)


def test_a_changed_byte_is_refused_by_the_hash_before_it_is_mapped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["quant.calibrate=absmax", "eval.generate=[]", f"output={tmp_path / 'run'}"]
    made = load_recipe(ROOT / "recipes" / "quickstart.yaml", options, check=False)
    pipeline.quantize(made)
    path = tmp_path / "run" / "base" / "model.safetensors"
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    pipeline.quantize(made)
    said = capsys.readouterr().out
    assert re.search(
        r"model.safetensors: its content is not the one that was written .*\nbase: packing it again", said
    )
    assert path.read_bytes() == whole


def test_pages_that_were_given_back_are_read_again(tmp_path: Path) -> None:
    folder = base(tmp_path, vocab_size=4096, hidden_size=256)
    model = load_exported(folder)
    weight = model.model.embed_tokens.weight.detach()
    expected = weight.float().sum()

    def resident() -> int:
        return sum(r.resident for r in mapped_ranges(folder))

    held = resident()
    _give_back(weight)
    assert resident() <= held - weight.numel() * 2 + 2 * os.sysconf("SC_PAGE_SIZE") * 20
    assert torch.equal(weight.float().sum(), expected)


def test_moving_to_a_device_moves_every_tensor(tmp_path: Path) -> None:
    folder = base(tmp_path)
    model = load_exported(folder, device="meta")
    assert all(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert {n: (t.shape, t.dtype) for n, t in tensors(model).items()} == {
        n: (t.shape, t.dtype) for n, t in tensors(load_exported(folder)).items()
    }
    assert to_device(model, "meta", folder) is model


def test_compiled_layers_and_saved_models_see_the_same_integers(tmp_path: Path) -> None:
    folder = base(tmp_path)
    model = load_exported(folder)
    layer = model.model.layers[1].mlp.down_proj
    x = torch.randn(20, layer.in_features, dtype=torch.bfloat16)  # more rows than the int4 kernel decodes
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, backend="aot_eager")(x), layer(x))
    model.save_pretrained(tmp_path / "again")
    assert base_digest(load_exported(tmp_path / "again")) == base_digest(model)
    assert written_pages(folder) == 0


def together(folder: Path, out: Path) -> None:
    """What each of two processes does: train the mapped base side by side, then share one."""
    from lowbit_ft.train.processes import join, rank

    join(CPU)
    report: dict[str, Any] = {}
    for sharing in ("none", "fsdp"):
        model = load_exported(folder)
        torch.manual_seed(3)
        attach(model, LRQATConfig.model_validate({"rank": 2}))
        if sharing == "fsdp":
            shard(model, CPU)
        data = Batches(examples(8), 1, 0, 0, rank(), 2)
        setting = section(max_steps=2, gradient_accumulation_steps=1, sharding=sharing)
        result = train(model, data, None, setting, out / sharing, console=quiet())
        maps = mapped_ranges(folder)
        report[sharing] = {"own": sum(r.own for r in maps), "maps": len(maps), "loss": result.final_loss}
        del model
    (out / f"rank{rank()}.json").write_text(json.dumps(report))


def test_two_processes_write_to_no_page(tmp_path: Path) -> None:
    folder = base(tmp_path)
    done = run_together(__file__, folder, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found["none"]["maps"] > 0 and found["none"]["own"] == 0 and found["fsdp"]["own"] == 0
        assert found["none"]["loss"] == found["fsdp"]["loss"]


if __name__ == "__main__":
    transformers.logging.disable_progress_bar()
    together(Path(sys.argv[1]), Path(sys.argv[2]))
