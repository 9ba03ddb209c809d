"""RunDir: the folder of one run, what lies where in it, and the stage clock.

    recipe.yaml (resolved)   environment.json   metrics.jsonl   quant.json   trainable.json   moved.json
    model/ (tokenizer and config.json with model.add_tokens)
    base/  checkpoints/  adapter/  merged/  exported/   evaluation.json   tasks.json   samples.json
    boxes.json (what a detector found)
    synthesis/ (rows that the model wrote)  reconstruct/  reconstruct.json  teacher/  lora_start.json
           teacher.json (how near it is)   processes.json   stages.json   report.html
           zeros.json (pruned while it trained)   speech.json (spectrograms)
           made.json (which tensors this run wrote into which folder)
    started.json       the mark of a run folder, written first; the folder that relative paths are from
    .lowbit_ft.lock    held by the process that writes (files/lock.py)

One folder holds one run: starting another recipe in it is refused, starting the same one again continues it.
A folder with other things in it, without our mark, is left alone. One process at a time writes; reading is
always possible, and what is read is compared with its manifest, and with made.json: whole, and this run's.
Every file is written beside its name and renamed, by the main process only.
"""

import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from .files.atomic import visible_names, write_bytes, write_text
from .files.jsonfile import read_json
from .files.lock import FolderLock
from .files.manifest import MANIFEST, identity
from .files.marker import MARKER, WRITER, is_run
from .files.records import Made, StageTime, Started
from .model.config import read_config
from .recipe.recipe import Recipe, load_recipe
from .recipe.yaml import read_source
from .train.memory import peak_gb, reset_peak

# Keys that may differ between two starts of one run: they change where it lies and what is measured or kept,
# not what is trained. Another number of processes needs another split of the windows of a step; that their
# number stays, the checkpoint checks.
FREE = (
    "output",
    "eval",
    "export",
    "model.device",
    "train.trackers",
    "train.log_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.sharding",
    "train.micro_batch_size",
    "train.gradient_accumulation_steps",
    "train.keep_codes",
    "train.teacher_dir",
)


class RunDir:
    """Paths and small files of a run. `main` is false on the other processes of a distributed run: they write
    nothing.
    """

    def __init__(self, path: Path, main: bool = True):
        self.path, self.main = Path(path), main
        self.lock: FolderLock | None = None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @classmethod
    def start(cls, recipe: Recipe, main: bool = True) -> "RunDir":
        """Make the folder, or continue the same recipe in it, and hold it until `close`. ValueError when it
        holds another run or something else, or another process writes to it.
        """
        run = cls(recipe.output, main)
        run.refuse_foreign()
        run.path.mkdir(parents=True, exist_ok=True)
        run.lock = FolderLock(run.path)
        try:
            run._begin(recipe)
        except BaseException:
            run.close()
            raise
        return run

    def _begin(self, recipe: Recipe) -> None:
        run = self
        # Before the first checkpoint there is nothing to protect: base/ knows by itself whether it is still
        # the right one.
        if (changed := run.changed(recipe)) and run.trained:
            raise ValueError(run.refused(changed))
        here = Path.cwd()
        from_here = os.path.relpath(here, run.path.resolve())
        run.write_json(MARKER, {"writer": WRITER, "folder": str(here), "from_here": from_here})
        run.write_text("recipe.yaml", recipe.to_yaml())

    def changed(self, recipe: Recipe) -> list[str]:
        """The keys in which the recipe differs from that of the run that is here, but for those of FREE;
        none where there is no run."""
        if not (self / "recipe.yaml").exists():
            return []
        before, now = _flat(read_source(self / "recipe.yaml").values), _flat(yaml.safe_load(recipe.to_yaml()))
        differ = [key for key in now | before if now.get(key) != before.get(key)]
        return sorted(k for k in differ if not f"{k}.".startswith(tuple(f"{free}." for free in FREE)))

    @property
    def trained(self) -> bool:
        """Something of the training is here."""
        return (self / "adapter").exists() or any((self / "checkpoints").glob("step-*"))

    def refused(self, changed: Sequence[str]) -> str:
        """Why a recipe that differs in these keys is not run here."""
        return (
            f"{self.path} holds a run with another recipe; these keys differ: {', '.join(changed)}. "
            "Give this run another `output`, or remove that folder"
        )

    def finished(self) -> list[str]:
        """The stages that are done, in the order in which they were."""
        return [row.stage for row in self.read_json("stages.json", list[StageTime], [])]

    def refuse_foreign(self) -> None:
        """ValueError when the folder has things in it that are not of a run: nothing there is overwritten."""
        if self.path.exists() and visible_names(self.path) and not is_run(self.path):
            raise ValueError(
                f"{self.path} is not empty and holds no run (no {MARKER} of lowbit_ft), and nothing of it is "
                "overwritten; give `output` a new folder"
            )

    def hold(self) -> None:
        """Lock a run that is there, to write to it. ValueError when it is no run, or another process writes
        to it.
        """
        if not is_run(self.path):
            raise ValueError(
                f"{self.path} is not the folder of a run (no {MARKER} of lowbit_ft in it); nothing is "
                "written there"
            )
        self.lock = FolderLock(self.path)

    def close(self) -> None:
        """Let the next process write."""
        if self.lock is not None:
            self.lock.release()
            self.lock = None

    def made(self, name: str) -> None:
        """Note that this run has just written the folder `name` of tensors."""
        if self.main:
            self.write_json(
                "made.json", {**self.read_json("made.json", Made, {}), name: identity(self / name)}
            )

    def refuse_other(self, name: str) -> None:
        """ValueError when the tensors in the folder `name` are not the ones that this run wrote there."""
        noted, folder = self.read_json("made.json", Made, {}).get(name), self / name
        if noted != identity(folder):
            raise ValueError(
                f"{folder}: its {MANIFEST} is of other tensors than this run wrote there (of another run, or "
                "a kill came in between); run the line again (lowbit-ft run), or put its own folder back"
            )

    def recipe(self) -> Recipe:
        """The recipe of this run, its paths as they were given. ValueError when the folder is no run."""
        return self._read(())

    def recipe_here(self) -> Recipe:
        """The recipe of this run with paths that the current folder can open, and this folder as its output.
        ValueError when the folder is no run.

        Relative paths are from the folder in which the run was started, wherever that is now: where it was,
        or where it lies from a run that was moved with it. What is in neither is looked for in the current
        folder.
        """
        recipe = self._read([Path() if _same(folder) else folder for folder in [*self.started(), Path()]])
        return recipe.model_copy(update={"output": self.path})

    def started(self) -> list[Path]:
        """Where the folder may be in which the run was started; none where that was not recorded."""
        noted = self.read_json(MARKER, Started | None, None)
        given = [noted.folder, self.path.resolve() / noted.from_here] if noted else []
        return [Path(os.path.normpath(folder)) for folder in given]

    def _read(self, folders: Sequence[Path]) -> Recipe:
        stored = self / "recipe.yaml"
        if not stored.is_file():
            raise ValueError(f"{self.path} is not the folder of a run (no recipe.yaml in it)")
        return load_recipe(stored, check=False, folders=folders)

    def write_text(self, name: str, text: str) -> None:
        if self.main:
            write_text(self / name, text)

    def write_file(self, name: str, data: bytes) -> None:
        """One that may lie in a folder of its own."""
        if self.main:
            (self / name).parent.mkdir(exist_ok=True)
            write_bytes(self / name, data)

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=1) + "\n")

    def read_json(self, name: str, shape: Any, default: Any) -> Any:
        """The file as `shape` (files/records.py), `default` where there is none. ValueError for another
        content."""
        path = self / name
        fix = "a file of this run was changed; put it back, or remove it"
        return read_json(path, shape, fix) if os.path.lexists(path) else default

    @contextmanager
    def stage(self, name: str, device: torch.device, resumable: bool = False) -> Iterator[None]:
        """Time and peak memory of a stage, into stages.json. A stage run again replaces its line; a resumable
        one, which goes on where it was, adds its time to it."""
        reset_peak(device)
        began = time.perf_counter()
        yield
        row = {"stage": name, "seconds": time.perf_counter() - began, "peak_memory_gb": peak_gb(device)}
        rows: list[StageTime] = self.read_json("stages.json", list[StageTime], [])
        before = next((r for r in rows if r.stage == name), None)
        if before is not None and resumable:
            row["seconds"] += before.seconds
            row["peak_memory_gb"] = max(row["peak_memory_gb"], before.peak_memory_gb)
        self.write_json("stages.json", [*(r.model_dump() for r in rows if r.stage != name), row])


def shipped(folder: Path) -> Path:
    """The model folder in a run: exported/, or merged/ where there is none, or where only merged/ says what
    keys and values are on; any other folder is returned as it is. ValueError when what is there is not what
    this run wrote.
    """
    if not (folder / "recipe.yaml").is_file():
        return folder
    caches = (folder / "merged").is_dir() and _says_kv_cache(folder / "merged")
    return _own(folder, "exported" if (folder / "exported").is_dir() and not caches else "merged")


def merged_of(folder: Path) -> Path:
    """merged/ of a run. ValueError when it is not what this run wrote."""
    return _own(folder, "merged")


def _own(folder: Path, name: str) -> Path:
    if is_run(folder) and (folder / name).is_dir():
        RunDir(folder).refuse_other(name)
    return folder / name


def _says_kv_cache(folder: Path) -> bool:
    entry = read_config(folder).get("quantization_config")
    return isinstance(entry, dict) and entry.get("kv_cache") is not None


def _same(folder: Path) -> bool:
    """Whether that is the current folder."""
    return folder.exists() and folder.samefile(Path())


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def environment() -> dict[str, Any]:
    """Versions and machine, for the report and for whoever wants to repeat the run."""
    names = (
        "lowbit_ft",
        "torch",
        "triton",
        "transformers",
        "peft",
        "accelerate",
        "bitsandbytes",
        "compressed-tensors",
        "datasets",
    )
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return {
        "python": platform.python_version(),
        **versions,
        "gpu": gpu,
        "cpu": platform.processor() or platform.machine(),
        "cpu_threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "commit": _commit(),
    }


def _commit() -> str:
    """The commit of a source checkout, or "installed package"."""
    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return "installed package"
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"
