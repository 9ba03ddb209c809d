"""The adapter folder: what its files say is believed only while they are what was written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import adapter_state, attach, base_digest
from lowbit_ft.files.manifest import MANIFEST, sealed
from lowbit_ft.integrations.adapter_files import check_adapter, read_adapter, write_adapter
from lowbit_ft.integrations.peft import LowBitConfig
from tests.integrations.peft_models import packed_model

FILES = ("adapter_config.json", "adapter_model.safetensors", MANIFEST)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, config = packed_model(), ADAPTERS["scale"](method="scale")
    attach(model, config)
    place = tmp_path_factory.mktemp("written") / "adapter"
    return write_adapter(place, adapter_state(model), config, base_digest(model), "base")


def refused(folder: Path, name: str, content: bytes) -> None:
    """With this content of one file nobody reads the folder; then it is as it was."""
    original = (folder / name).read_bytes()
    assert content != original
    (folder / name).write_bytes(content)
    try:
        with pytest.raises(ValueError, match="lowbit_ft.json|its content is not the one that was written"):
            read_adapter(folder)
    finally:
        (folder / name).write_bytes(original)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_refused(folder: Path, name: str) -> None:
    original = (folder / name).read_bytes()
    # Every byte of what is parsed; of the tensors' values, which are all alike, some.
    places = [*range(min(len(original), 2000)), *range(2000, len(original), 199), len(original) - 1]
    for place in places:
        damaged = bytearray(original)
        damaged[place] ^= 1 << place % 8
        refused(folder, name, bytes(damaged))
    read_adapter(folder)


@settings(max_examples=60)
@given(data=st.data())
def test_cut_grown_or_rewritten_is_refused(folder: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(FILES))
    original = (folder / name).read_bytes()
    first = data.draw(st.integers(0, len(original) - 1))
    last = data.draw(st.integers(first, len(original)))
    content = original[:first] + data.draw(st.binary(max_size=9)) + original[last:]
    if content != original:
        refused(folder, name, content)


def test_every_reader_looks_and_what_peft_wrote_needs_no_manifest(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    text = (copy / "adapter_config.json").read_text()
    (copy / "adapter_config.json").write_text(text.replace('"scale"', '"l4q"'))
    for read in (read_adapter, check_adapter, LowBitConfig.from_pretrained):
        with pytest.raises(ValueError, match=r"copy: adapter_config\.json: its content is not the one"):
            read(str(copy))
    (copy / "adapter_config.json").write_text(text)
    (copy / MANIFEST).write_bytes(sealed({"writer": "lowbit_ft", "files": {}}))  # vouches for nothing
    with pytest.raises(ValueError, match="not a manifest of an adapter"):
        read_adapter(copy)
    (copy / MANIFEST).unlink()
    assert read_adapter(copy)[0] == read_adapter(folder)[0]
