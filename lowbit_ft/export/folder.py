"""A model folder of ours: a manifest that says what we wrote and what it must hash to.

lowbit_ft.json lists every file with its size and sha256 and, per layer, its name in the files and the sha256
of every tensor of the weight, and carries a hash of itself (files/manifest.py). It is why a folder can be
replaced safely: only one that is wholly ours is; and why what is read back is what was written: whatever
ships, measures or answers from a folder of ours compares it with its manifest first.
"""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.atomic import leftover_of, write_bytes
from ..files.manifest import MANIFEST, changed_files, file_entry, json_bytes, open_sealed, sealed
from ..grid import Weight

# Files of a checkpoint that belong to the model and are not weights. By name, not "*.json": a folder may hold
# optimizer states, trainer logs and adapters, which are not this model.
COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "*.model",
    "*.tiktoken",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a folder that `write_model` wrote. ValueError when there is none or it is damaged."""
    path = Path(folder) / MANIFEST
    manifest = open_sealed(path)
    whole = manifest.get("writer") == "lowbit_ft"
    if not whole or not all(isinstance(manifest.get(key), dict) for key in ("files", "layers")):
        raise ValueError(f"{path}: not a manifest of a model of lowbit_ft")
    if not all(
        isinstance(entry, dict) for entry in (*manifest["files"].values(), *manifest["layers"].values())
    ):
        raise ValueError(f"{path}: not a manifest of a model of lowbit_ft")
    return manifest


def check_files(folder: str | Path) -> dict[str, Any]:
    """Read every file of the folder and compare it with the manifest, which is returned. ValueError naming
    what is missing or changed.
    """
    manifest = read_manifest(folder)
    if problems := changed_files(Path(folder), manifest["files"]):
        raise ValueError(
            f"{folder}: {'; '.join(problems)}. Whoever changed it, this is not what was written: move the "
            "folder away and run the line again (lowbit-ft run), or copy it again from where it is whole"
        )
    return manifest


def check_if_ours(folder: str | Path) -> None:
    """`check_files` of a folder with a manifest; other folders, such as a plain model, have nothing to be
    compared with.
    """
    if (Path(folder) / MANIFEST).exists():
        check_files(folder)


def replace_file(folder: str | Path, name: str, content: str | bytes) -> None:
    """Replace (or add) an extra file, such as README.md, in a folder of ours, and its entry in the manifest.

    Whenever the process dies, the folder is still wholly ours: the entry is empty, which matches any content,
    while the file changes. ValueError for a folder that is not ours or a file that `write_model` makes
    itself.
    """
    folder = Path(folder)
    manifest, (data,) = read_manifest(folder), check_extra({name: content}).values()
    if any(path.name == name for path in copied_files(folder)):
        raise ValueError(f"{folder / name}: a file of the model, not an extra one")
    for entry in ({}, None):
        if entry is None:
            write_bytes(folder / name, data)
            entry = file_entry(folder / name)
        manifest["files"][name] = entry
        write_bytes(folder / MANIFEST, sealed(manifest))


def replace_config(folder: str | Path, config: Mapping[str, Any]) -> None:
    """Replace config.json in a folder of ours, and its entry in the manifest; as `replace_file` whenever the
    process dies."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    for entry in ({}, None):
        if entry is None:
            write_bytes(folder / "config.json", json_bytes(config))
            entry = file_entry(folder / "config.json")
        manifest["files"]["config.json"] = entry
        write_bytes(folder / MANIFEST, sealed(manifest))


def layer_digests(weight: Weight) -> dict[str, str]:
    """sha256 of the bytes of every tensor of the weight, by name."""
    return {
        name: hashlib.sha256(tensor_bytes(tensor)).hexdigest() for name, tensor in weight.to_tensors().items()
    }


def tensor_bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]  (an array is a buffer)


def write_json(path: Path, data: Any) -> None:
    path.write_bytes(json_bytes(data))


def copied_files(folder: Path) -> list[Path]:
    """The files to copy. A link is followed only inside the folder, or from a hub snapshot to its own blobs:
    an export must not publish another file of this machine."""
    root, found = folder.resolve(), []
    allowed = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        allowed.append(root.parent.parent / "blobs")
    for path in sorted({path for pattern in COPIED for path in root.glob(pattern)}):
        real = path.resolve()
        if not any(real.is_relative_to(place) for place in allowed):
            raise ValueError(
                f"{path}: a link that leaves the folder (to {real}); refused. Put the file itself there."
            )
        if real.is_file():
            found.append(path)
    return found


def check_extra(files: Mapping[str, str | bytes]) -> dict[str, bytes]:
    reserved = {"config.json", MANIFEST, "model.safetensors.index.json"}
    for name in files:
        if (
            Path(name).name != name
            or name.startswith(".")
            or name in reserved
            or name.endswith((".safetensors", ".gguf", ".onnx", ".onnx_data"))
        ):
            raise ValueError(
                f"extra file {name!r}: needs a plain file name that the model folder does not use itself"
            )
    return {name: data.encode() if isinstance(data, str) else data for name, data in files.items()}


def check_space(folder: Path, needed: int) -> None:
    parent = next(p for p in folder.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ValueError(
            f"{folder}: needs {needed / 1e9:.2f} GB and {parent} has {free / 1e9:.2f} GB "
            "free; make room there"
        )


def check_target(folder: Path) -> None:
    """ValueError when something is there that this module did not write."""
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_symlink() or not folder.is_dir():
        raise ValueError(f"{folder}: exists and is not a folder; choose another place")
    if not any(folder.iterdir()):
        return
    try:
        files = read_manifest(folder)["files"]
    except ValueError as error:
        raise ValueError(
            f"{folder}: exists and was not written by lowbit_ft ({error}); nothing is overwritten"
        ) from None
    for path in folder.iterdir():
        if path.name == MANIFEST:
            continue
        if leftover_of(path.name) in (MANIFEST, *files):
            continue  # a process was killed in replace_file
        if path.name not in files:
            raise ValueError(
                f"{path}: was added to this folder after it was written; nothing is overwritten: move it "
                "or the folder"
            )
        entry = files[path.name]
        if not path.is_file() or entry and path.stat().st_size != entry.get("bytes"):
            raise ValueError(
                f"{path}: was changed after it was written; nothing is overwritten: move it or the folder"
            )
