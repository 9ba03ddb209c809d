"""A teacher's words on the disk: what is read is what was written, and nothing else is believed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from lowbit_ft.files.atomic import write_bytes
from lowbit_ft.files.errors import FileError
from lowbit_ft.files.manifest import MANIFEST, file_entry, open_sealed, sealed
from lowbit_ft.signals import shards
from lowbit_ft.signals.store import LEAST, Store, bytes_per_position, condense, id_dtype

KEY = {"model": "here", "top_k": 3, "vocabulary": 11, "temperature": 1.0}
NUMBERS, ROWS = [0, 1, 4, 5, 9], [2, 3, 0, 1, 4]


def logits(rows: int, seed: int, vocabulary: int = 11) -> torch.Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def opened(folder: Path, numbers: list[int] = NUMBERS, **changes: Any) -> Store:
    return Store(folder, KEY | changes, numbers, 2)


def filled(folder: Path, only: list[int] | None = None) -> Store:
    """Windows of 2, 3, 0, 1 and 4 positions in shards of two windows."""
    here = opened(folder)
    for shard in here.missing() if only is None else only:
        rows = ROWS[2 * shard : 2 * shard + 2]
        here.write(shard, rows, *condense(logits(sum(rows), shard), 3))
    return opened(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_kept_is_softmax() -> None:
    """Against float64; of all tokens it is the whole distribution, and nothing is left."""
    for vocabulary, k, temperature in ((11, 3, 1.0), (700, 16, 1.0), (700, 16, 2.5), (11, 11, 1.0)):
        z = logits(40, 1, vocabulary)
        ids, logp, rest = condense(z, k, temperature)
        exact = (z.double() / temperature).log_softmax(-1)
        best = exact.topk(k).indices.sort(-1).values
        assert torch.equal(ids, best)
        assert (logp.double() - exact.gather(-1, best)).abs().max() <= exact.abs().max() / 2048
        left = 1 - exact.gather(-1, best).exp().sum(-1)
        if k < vocabulary:
            assert ((rest.double().exp() - left) / left).abs().max() < 0.01
        else:
            assert (rest == LEAST).all() and rest.double().exp().max() == 0


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    here = filled(tmp_path / "t")
    assert not here.missing() and here.shards == 3
    found = here.lookup([5, 0, 9, 4])
    whole = [condense(logits(n, shard), 3) for shard, n in enumerate((5, 1, 4))]
    wanted = [torch.cat([whole[1][i], whole[0][i][:2], whole[2][i]]) for i in range(3)]
    assert torch.equal(found.ids, wanted[0]) and found.ids.dtype == torch.int64
    # what float16 lost of the mass of 1 is divided out
    mass = wanted[1].double().exp().sum(-1) + wanted[2].double().exp()
    assert (mass - 1).abs().max() < 0.006
    assert (found.log_p - (wanted[1].double() - mass.log()[:, None])).abs().max() < 1e-6
    assert (found.log_p.double().exp().sum(-1) + found.rest.double().exp() - 1).abs().max() < 1e-6
    with pytest.raises(ValueError, match="window 2 is not in it; it has 5"):
        here.lookup([2])
    assert here.lookup([4]).ids.shape == (0, 3)


def test_large_vocabularies_have_wider_ids(tmp_path: Path) -> None:
    big = 70_001
    assert (id_dtype(1 << 16), id_dtype(big)) == (torch.uint16, torch.int32)
    assert (bytes_per_position(64, 1 << 16), bytes_per_position(64, big)) == (258, 386)
    for vocabulary in (1 << 16, big):
        folder, key = tmp_path / str(vocabulary), KEY | {"vocabulary": vocabulary}
        z = torch.zeros(1, vocabulary)
        z[0, [1, vocabulary - 2, vocabulary - 1]] = 20.0
        Store(folder, key, [7], 1).write(0, [1], *condense(z, 3))
        assert Store(folder, key, [7], 1).lookup([7]).ids.tolist() == [[1, vocabulary - 2, vocabulary - 1]]


def test_a_kill_leaves_whole_shards_and_the_next_writer_goes_on(tmp_path: Path, monkeypatch: Any) -> None:
    """Killed in the write of every shard, before and after its file is there: the same bytes at the end."""
    whole = contents(filled(tmp_path / "whole").folder)
    for at in range(1, 8):  # manifest, then shard and manifest three times
        folder, left = tmp_path / f"killed-{at}", at

        def dies(path: Path, data: bytes) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise KeyboardInterrupt
            write_bytes(path, data)

        monkeypatch.setattr(shards, "write_bytes", dies)
        with pytest.raises(KeyboardInterrupt):
            filled(folder)
        monkeypatch.undo()
        again = opened(folder)
        assert len(again.missing()) == 3 - max(0, (at - 2) // 2)
        assert contents(filled(folder).folder) == whole
    assert set(whole) == {MANIFEST, *(f"windows-0000{i}.safetensors" for i in range(3))}


def test_another_key_is_refused_and_named(tmp_path: Path) -> None:
    folder = filled(tmp_path / "t").folder
    with pytest.raises(
        shards.OtherKey, match=r"top_k 3, and this run has 4\. Give this run another train.tea"
    ):
        opened(folder, top_k=4)
    with pytest.raises(shards.OtherKey, match='model "here", and this run has "there"'):
        opened(folder, model="there")
    assert opened(folder).missing() == []


@pytest.mark.parametrize("what", ["tampered", "truncated", "other shard", "link"])
def test_a_changed_file_is_refused_by_name(tmp_path: Path, what: str) -> None:
    folder = filled(tmp_path / "t").folder
    file = folder / "windows-00001.safetensors"
    data = file.read_bytes()
    if what == "tampered":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif what == "truncated":
        file.write_bytes(data[:-2])
    elif what == "other shard":
        shutil.copy(folder / "windows-00000.safetensors", file)
    else:
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileError, match="windows-00001.safetensors: its content is not the one"):
        opened(folder)
    file.unlink()  # as the message says
    assert opened(folder).missing() == [1]
    filled(folder)
    assert file.read_bytes() == data


def test_a_file_that_changes_under_a_run_is_refused(tmp_path: Path) -> None:
    here = filled(tmp_path / "t")
    here.lookup([0])
    file = here.folder / "windows-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(
        FileError, match="windows-00000.safetensors: was replaced or written to .* Remove that"
    ):
        here.lookup([0])


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no teacher's words"):
        opened(tmp_path)
    other = tmp_path / "model"
    other.mkdir()
    (other / MANIFEST).write_bytes(sealed({"format": "native", "files": {}}))
    with pytest.raises(ValueError, match="is of 'native', not of"):
        opened(other)
    here = filled(tmp_path / "t", only=[0])
    file = here.folder / "windows-00001.safetensors"
    save_file({"mine": torch.zeros(1)}, file)
    with pytest.raises(FileError, match="windows-00001.safetensors: was not written for this store"):
        filled(here.folder)
    assert set(load_file(file)) == {"mine"}


def test_a_damaged_manifest_is_refused(tmp_path: Path) -> None:
    manifest = filled(tmp_path / "t").folder / MANIFEST
    whole = manifest.read_bytes()
    manifest.write_bytes(whole[:100])
    with pytest.raises(ValueError, match="cut or damaged; move the folder away and run the line again"):
        filled(tmp_path / "t")
    manifest.write_bytes(whole.replace(b'"top_k": 3', b'"top_k": 4'))
    with pytest.raises(ValueError, match="its own hash does not agree"):
        opened(tmp_path / "t", top_k=4)


def _bad(name: str, value: Any) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = value(tensors[name])

    return change


def _set(index: Any, value: float) -> Any:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        out = tensor.to(torch.int32) if tensor.dtype is torch.uint16 else tensor.clone()
        out[index] = value
        return out.to(tensor.dtype)

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_bad("ids", _set((1, 2), 11)), "beyond the vocabulary of 11"),
        (_bad("ids", lambda t: t[:, [2, 1, 0]].contiguous()), "not ascending"),
        (_bad("ids", lambda t: t.to(torch.int32)), "it should hold"),
        (_bad("ids", lambda t: t[:, :2].contiguous()), "it should hold"),
        (_bad("log_p", _set((0, 0), float("nan"))), "NaN or infinite"),
        (_bad("log_p", _set((0, 0), 0.0)), "do not add up"),
        (_bad("rest", _set(0, float("-inf"))), "NaN or infinite"),
        (_bad("rest", _set(0, -0.1)), "do not add up"),
        (_bad("log_p", _set(0, LEAST)), "do not add up"),
        (_bad("rows", _set(0, 1)), "of its windows do not add up"),
        (_bad("rows", _set(slice(None), -1)), "of its windows do not add up"),
        (lambda tensors: tensors.pop("rest"), "it should hold"),
        (lambda tensors: tensors.update(more=torch.zeros(2)), "it should hold"),
    ],
)
def test_what_stands_in_a_shard_is_looked_at(tmp_path: Path, change: Any, match: str) -> None:
    """Files whose hashes agree, from a writer that is not ours."""
    folder = filled(tmp_path / "t").folder
    file = folder / "windows-00000.safetensors"
    tensors = load_file(file)
    change(tensors)
    file.write_bytes(save(tensors))
    facts = open_sealed(folder / MANIFEST)
    facts["files"][file.name] = file_entry(file)
    (folder / MANIFEST).write_bytes(sealed(facts))
    here = opened(folder)
    with pytest.raises(FileError, match=f"windows-00000.safetensors: no shard of .*{match}"):
        here.lookup([0, 1])
    here.lookup([9])
