"""Find the files of a checkpoint: a local folder, or a hub id fetched at one commit; nothing outside it.

An index file (model.safetensors.index.json) names the shards, and it is data from a stranger: a name with a
separator or "..", an absolute path, or a link that leaves the folder would make us read (and publish, after
an export) any file of this machine. Each name is resolved and must stay in the folder; the hub cache's own
links, from a snapshot to the blobs of the same repository, are the one exception.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, StrictStr

from ..diffusion.names import WEIGHTS
from ..files.jsonfile import read_json
from ..files.regular import irregular
from ..files.tensorfile import DTYPES, CheckpointError, TensorEntry, parse_header
from ..names import python_line

SMALL_FILES = ["*.json", "*.jinja", "tokenizer*", "*.model", "*.tiktoken", "merges.txt", "vocab.txt"]
STEMS = ("model", WEIGHTS)  # of the files of tensors: transformers', diffusers'
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\- ]*\.safetensors")


class _Index(BaseModel):
    weight_map: dict[StrictStr, StrictStr]


def refuse_irregular(folder: Path) -> None:
    """CheckpointError naming the first pipe, device or socket of a folder: whoever opens it may wait for
    ever."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if (what := irregular(path)) is not None:
            raise CheckpointError(f"{path}: got {what}; a checkpoint has regular files; remove it")


def contained_file(folder: Path, name: Any) -> Path:
    """The path of file `name` of `folder`; refused unless it is a plain name and a file of that folder.

    A hub snapshot's links into the blobs folder of its own repository are allowed. Raises CheckpointError.
    """
    if not isinstance(name, str) or ".." in name or not _PLAIN_NAME.fullmatch(name):
        raise CheckpointError(
            f"{folder}: the index names the shard {name!r}, "
            "which is not a plain *.safetensors file name; refused"
        )
    folder = folder.resolve()
    path = folder / name
    if not path.exists():
        broken = " (a link that leads nowhere)" if path.is_symlink() else ""
        raise CheckpointError(f"{path}: missing{broken}. The download is incomplete: get it again.")
    allowed = [folder]
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        allowed.append(folder.parent.parent / "blobs")
    real = path.resolve()
    if not any(real.is_relative_to(root) for root in allowed):
        raise CheckpointError(
            f"{path}: a link that leaves the folder (to {real}); refused. Put the file itself there, or give "
            "the folder that has it."
        )
    return path


def shards_of(folder: Path, problems: list[str]) -> dict[str, list[str]]:
    """{shard file name: tensor names the index promises in it}."""
    stem = next((stem for stem in STEMS if any(folder.glob(f"{stem}.safetensors*"))), STEMS[0])
    index, single = folder / f"{stem}.safetensors.index.json", f"{stem}.safetensors"
    if (folder / single).is_symlink() or (folder / single).exists():
        return {single: []}
    if index.exists():
        try:
            weight_map = read_json(index, _Index).weight_map
        except ValueError as error:
            problems.append(f"{index}: not a weight index ({str(error).removeprefix(f'{index}: ')})")
            return {}
        shards: dict[str, list[str]] = {}
        for name, shard in weight_map.items():
            shards.setdefault(shard, []).append(name)
        return shards
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
    if pickles:
        convert = (
            "from transformers import AutoModelForCausalLM as M; "
            f"M.from_pretrained({str(folder)!r}).save_pretrained({f'{folder}-safetensors'!r})"
        )
        problems.append(
            f"{folder}: only pickle weights ({pickles[0]}). Reading a pickle can run code, so it is refused. "
            f"If you trust it, convert it once: {python_line(convert)} and copy the tokenizer files"
        )
    else:
        others = sorted(p.name for p in folder.glob("*.safetensors"))
        hint = f" (there is {', '.join(others[:3])}: an adapter, or a renamed file?)" if others else ""
        problems.append(f"{folder}: no model.safetensors and no model.safetensors.index.json{hint}")
    return {}


def tensor_entries(folder: Path) -> tuple[dict[str, TensorEntry], list[str]]:
    """(where every tensor of a model folder lies, what is wrong with its weight files), from the headers
    alone.
    """
    entries: dict[str, TensorEntry] = {}
    problems: list[str] = []
    for shard, expected in shards_of(folder, problems).items():
        try:
            path = contained_file(folder, shard)
            start, header = parse_header(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if missing := sorted(set(expected) - set(header)):
            problems.append(
                f"{path}: lacks {len(missing)} tensors that the index puts here, such as {missing[0]!r}"
            )
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            entries[name] = TensorEntry(path, dtype, shape, start + begin, end - begin)
    return entries, problems


def locate(source: str, revision: str | None) -> tuple[Path, str | None]:
    """(folder, commit): a local folder, or a hub id fetched into the hub cache."""
    local = Path(source).expanduser()
    if local.is_dir():
        if revision is not None:
            raise CheckpointError(f"{source}: a local folder has no revision; remove revision {revision!r}")
        refuse_irregular(local)
        return local.resolve(), None
    if local.exists():
        raise CheckpointError(f"{source}: a file; give the folder that has config.json and *.safetensors")
    folder = _fetch(source, revision, SMALL_FILES)
    indexed = [name for name in shards_of(folder, []) if isinstance(name, str)]
    # Only the shards of the index: some repositories hold a second copy of the weights.
    folder = _fetch(source, folder.name, SMALL_FILES + (indexed or [f"{stem}.safetensors" for stem in STEMS]))
    return folder.resolve(), folder.name


def locate_small(source: str, *, fetch: bool = True) -> Path | None:
    """The folder that has a model's configuration and tokenizer: a local one, or those files of a hub id;
    None for one that is not on this disk, where it is not to be fetched."""
    local = Path(source).expanduser()
    if local.is_dir():
        return local.resolve()
    if fetch:
        return _fetch(source, None, SMALL_FILES).resolve()
    from huggingface_hub import try_to_load_from_cache  # slow to import

    found = try_to_load_from_cache(source, "tokenizer_config.json")
    return Path(found).parent if isinstance(found, str) else None


def _fetch(source: str, revision: str | None, files: list[str]) -> Path:
    """The snapshot of a hub id with these files of it. CheckpointError where there is none."""
    if not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", source) or source.startswith("."):
        raise CheckpointError(f"{source}: no such folder (and not a hub id of the form owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(source, revision=revision, allow_patterns=files, ignore_patterns=["*/*"])
        )
    except Exception as error:  # OSError, ValueError or httpx errors: all for the user to solve
        detail = (str(error).strip().splitlines() or ["no detail"])[0]
        raise CheckpointError(
            f"{source}: no such folder, and as a hub id it could not be fetched "
            f"({type(error).__name__}: {detail})"
        ) from error
