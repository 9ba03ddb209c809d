"""From a path and a split to the local files that are read.

A folder or a glob pattern is divided into splits as the hub divides a repository of data files: by the
`configs` in the YAML header of its README.md where it has them; else by names such as
`data/train-00000-of-00001.parquet`, folders such as `test/`, and files such as `my-valid.jsonl`. The patterns
are those of `datasets`; without any such name all files are the split train. README.md and what `datasets`
writes beside its data is never a data file of a folder.

A file that is named itself is read whatever its name, as split train; another split must be what its name
says. In a folder of pictures whose columns a task names, text (.txt, .md) is no data and is said to be passed
over; with a metadata.csv, .jsonl or .parquet, as the imagefolder of `datasets` has it, that one has the rows.

What cannot be honoured (a split that is not there, a name without `configs`, a revision of a local
path) is an error, and a file with a known suffix that belongs to no split is said, not passed over.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ..files.regular import read_card
from .errors import DataError, first_line

TEXTS = (".txt", ".md")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def find_files(
    source: Any, suffixes: Collection[str], notes: list[str], instead: Collection[str] = ()
) -> list[Path] | None:
    """The local files that `source` (path, split, name, revision) means, sorted; None if its path can only be
    a hub id.

    `suffixes`: of the files a folder is searched for; `instead`: of those that are meant where it has none.
    `notes` gets a line where files belong to no split. Raises DataError when nothing is found, or when a key
    of `source` cannot be honoured.
    """
    path = source.path
    local = Path(path).expanduser()
    try:
        if local.is_dir():
            return _of_folder(source, local, suffixes, notes, instead)
        if local.exists():
            return _of_files(source, [local], local.parent, notes)
        if glob.has_magic(path):
            found = sorted(Path(f) for f in glob.glob(str(local), recursive=True) if Path(f).is_file())
            found = [file for file in found if file.name == local.name or file.name not in _beside_data()]
            if not found:
                raise DataError("no file matches this pattern", path)
            magic = next(i for i, part in enumerate(local.parts) if glob.has_magic(part))
            return _of_files(source, found, Path(*local.parts[:magic]), notes)
    except OSError as error:
        raise DataError(f"cannot be opened: {error.strerror or error}", path) from error
    except ValueError as error:  # a NUL in the path
        if isinstance(error, DataError):
            raise
        raise DataError(f"is no path: {error}", repr(path)) from error
    if local.suffix.lower() in suffixes or not _HUB_ID.fullmatch(path):
        raise DataError(
            "no such file, folder or hub data set; a relative path starts at the current folder", path
        )
    return None


def saved_dataset(path: str) -> bool:
    """Whether `path` is a folder that `save_to_disk` of `datasets` wrote."""
    try:
        folder = Path(path).expanduser()
        return (folder / "dataset_dict.json").is_file() or (
            (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
        )
    except (OSError, ValueError):
        return False  # no path at all: find_files says so


def refuse_remote_keys(source: Any, *names: str) -> None:
    """DataError where one of the keys `names`, which a local path does not have, is given."""
    for key in names:
        if (value := getattr(source, key, None)) is not None:
            raise DataError(
                f"a local path has no {key}, and the recipe asks for {key}: {value}; drop the key",
                source.path,
            )


def no_such_split(source: Any, split: str, known: Sequence[str]) -> DataError:
    """What is said where the split is not among the `known` ones."""
    sliced = "; a slice is not read here: use limit" if "[" in split or "+" in split else ""
    return DataError(
        f"there is no split {split!r}; the splits here: {', '.join(known) or 'none'}{sliced}", source.path
    )


def _beside_data() -> Collection[str]:
    from datasets.data_files import FILES_TO_IGNORE  # slow to import, and only folders and patterns need it

    return FILES_TO_IGNORE


def _of_folder(
    source: Any, folder: Path, suffixes: Collection[str], notes: list[str], instead: Collection[str]
) -> list[Path]:
    refuse_remote_keys(source, "revision")
    files = _with_suffix(folder, suffixes)
    pictures = _with_suffix(folder, instead)
    if pictures and getattr(source, "format", None) is None:
        texts = [name for name, file in files.items() if file.suffix.lower() in TEXTS]
        if texts:
            notes.append(f"{source.path}: not read, being text in a folder of pictures: {_few(texts)}")
        files = {name: file for name, file in files.items() if name not in texts}
        if files and all(is_metadata(file) for file in files.values()):
            _refuse_above_splits(source, list(files), list(pictures))
    files = files or pictures
    if not files:
        raise DataError(
            f"the folder holds no data file; known suffixes: {' '.join([*suffixes, *instead])} (README.md is "
            "none)",
            source.path,
        )
    declared = _declared(source, folder, list(files))
    if declared is None:
        refuse_remote_keys(source, "name")
    splits = _by_name(list(files)) if declared is None else declared
    split = getattr(source, "split", None) or "train"
    outside = sorted(set(files) - {name for names in splits.values() for name in names})
    if not splits.get(split):
        error = no_such_split(source, split, [f"{s} ({names[0]})" for s, names in splits.items() if names])
        rest = f"; in no split: {_few(outside)}" if outside else ""
        raise DataError(f"{error.problem}{rest}; set split, or name the files in path", source.path)
    if outside:
        notes.append(f"{source.path}: not read, being in no split by their names: {_few(outside)}")
    return [files[name] for name in sorted(splits[split])]


def is_metadata(file: Path) -> bool:
    """Whether a file is what the imagefolder of `datasets` takes for the rows of pictures."""
    return file.name in METADATA


def _refuse_above_splits(source: Any, metadata: list[str], pictures: list[str]) -> None:
    """DataError where pictures are of several splits by their names, and the file that names them is not."""
    splits = [split for split, names in _by_name(pictures).items() if names]
    if len(splits) > 1 and set(_by_name(metadata)) == {"train"}:
        raise DataError(
            f"{_few(metadata)} has the rows of pictures of several splits ({', '.join(splits)}); write one "
            "into the folder of each split",
            source.path,
        )


def _with_suffix(folder: Path, suffixes: Collection[str]) -> dict[str, Path]:
    """The files of a folder with one of these suffixes, by their names below it."""
    files = {}
    for file in sorted(folder.rglob("*")) if suffixes else ():
        name = file.relative_to(folder)
        hidden = any(part.startswith((".", "__")) for part in name.parts)
        if (
            file.suffix.lower() in suffixes
            and not hidden
            and name.name not in _beside_data()
            and file.is_file()
        ):
            files[name.as_posix()] = file
    return files


def _of_files(source: Any, found: list[Path], base: Path, notes: list[str]) -> list[Path]:
    """Files that were named, or matched by a pattern: all of them, unless their names tell of several
    splits."""
    refuse_remote_keys(source, "name", "revision")
    split = getattr(source, "split", None) or "train"
    if len(found) == 1 and split == "train":
        return found
    files = {file.relative_to(base).as_posix(): file for file in found}
    splits = _by_name(list(files))
    if len(splits) == 1 and split == "train":
        return found
    outside = sorted(set(files) - {name for names in splits.values() for name in names})
    if split not in splits:
        error = no_such_split(source, split, list(splits))
        raise DataError(
            f"{error.problem} (by the names of the files); drop split, or narrow the path", source.path
        )
    if outside:
        notes.append(f"{source.path}: not read, being in no split by their names: {_few(outside)}")
    return [files[name] for name in sorted(splits[split])]


def _by_name(names: Sequence[str]) -> dict[str, list[str]]:
    """Split -> names (relative, with /), by the patterns of `datasets`, the first kind of pattern that
    matches any."""
    from datasets import data_files  # as above

    shards = "[0-9]" * 5
    sharded = re.compile(rf"data/(\w+(?:\.\w+)*)-{shards}-of-{shards}[^/]*\.[^/]*")
    found: dict[str, list[str]] = {}
    for name in names:
        if match := sharded.fullmatch(name):
            found.setdefault(match[1], []).append(name)
    if found:
        return found
    for patterns in (
        data_files.DEFAULT_PATTERNS_SPLIT_IN_DIR_NAME,
        data_files.DEFAULT_PATTERNS_SPLIT_IN_FILENAME,
    ):
        for split, those in patterns.items():
            if matched := _matching(those, names):
                found[str(split)] = matched
        if found:
            return found
    return {"train": list(names)}


def _matching(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    from fsspec.utils import glob_translate  # comes with datasets

    compiled = [re.compile(glob_translate(pattern)) for pattern in patterns]
    return [name for name in names if any(regex.match(name) for regex in compiled)]


def _declared(source: Any, folder: Path, names: Sequence[str]) -> dict[str, list[str]] | None:
    """The splits that the README.md of a folder names in its YAML header; None where it names none."""
    readme = folder / "README.md"
    if not readme.is_file():
        return None
    from datasets.data_files import sanitize_patterns  # as above
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    try:
        card: Any = DatasetCard(read_card(readme), ignore_metadata_errors=True)
        configs = MetadataConfigs.from_dataset_card_data(card.data)
    except Exception as error:  # YAML, its checks and text encoding each have their own kind
        raise DataError(f"its YAML header cannot be read: {first_line(error)}", str(readme)) from error
    configs = {name: config for name, config in configs.items() if config.get("data_files")}
    if not configs:
        return None
    wanted = getattr(source, "name", None) or (
        next(iter(configs))
        if len(configs) == 1
        else next((n for n, c in configs.items() if c.get("default")), None)
    )
    if wanted is None and "default" in configs:
        wanted = "default"
    if wanted not in configs:
        raise DataError(f"name is {wanted!r}; README.md declares: {', '.join(configs)}", source.path)
    below = str(configs[wanted].get("data_dir") or "").strip("/")
    patterns = sanitize_patterns(configs[wanted]["data_files"])
    return {
        split: _matching([f"{below}/{p}" if below else str(p) for p in those], names)
        for split, those in patterns.items()
    }


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
