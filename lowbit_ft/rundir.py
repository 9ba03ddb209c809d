"""RunDir: the folder of one run, what lies where in it, and the stage clock.

    recipe.yaml (resolved)   environment.json   metrics.jsonl   quant.json   trainable.json   moved.json
    base/  checkpoints/  adapter/  merged/  exported/   evaluation.json   tasks.json   samples.json
           stages.json   report.html   started.json (the folder that relative paths of recipe.yaml are from)

One folder holds one run: starting another recipe in it is refused, starting the same one again continues it.
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

from .files.atomic import visible_names, write_text
from .recipe.recipe import Recipe, load_recipe
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
)


class RunDir:
    """Paths and small files of a run. `main` is false on the other processes of a distributed run: they write
    nothing.
    """

    def __init__(self, path: Path, main: bool = True):
        self.path, self.main = Path(path), main

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @classmethod
    def start(cls, recipe: Recipe, main: bool = True) -> "RunDir":
        """Make the folder, or continue the same recipe in it. ValueError when it holds another run."""
        run = cls(recipe.output, main)
        stored = run / "recipe.yaml"
        if stored.exists():
            before = yaml.safe_load(stored.read_text()) or {}
            now = yaml.safe_load(recipe.to_yaml())
            changed = [
                key for key in _flat(now) | _flat(before) if _flat(now).get(key) != _flat(before).get(key)
            ]
            changed = sorted(
                key for key in changed if not (f"{key}.").startswith(tuple(f"{free}." for free in FREE))
            )
            # Before the first checkpoint there is nothing to protect: base/ knows by itself whether it is
            # still the right one.
            trained = (run / "adapter").exists() or any((run / "checkpoints").glob("step-*"))
            if changed and trained:
                raise ValueError(
                    f"{run.path} holds a run with another recipe; these keys differ: {', '.join(changed)}. "
                    "Give this run another `output`, or remove that folder"
                )
        elif (
            run.path.exists() and visible_names(run.path) and not stored.exists()
        ):  # asked again: another process may make it
            raise ValueError(f"{run.path} is not empty and holds no run; give `output` a new folder")
        run.path.mkdir(parents=True, exist_ok=True)
        run.write_text("recipe.yaml", recipe.to_yaml())
        here = Path.cwd()
        run.write_json(
            "started.json", {"folder": str(here), "from_here": os.path.relpath(here, run.path.resolve())}
        )
        return run

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
        noted = self.read_json("started.json", {})
        given = [noted["folder"], self.path.resolve() / noted["from_here"]] if noted else []
        return [Path(os.path.normpath(folder)) for folder in given]

    def _read(self, folders: Sequence[Path]) -> Recipe:
        stored = self / "recipe.yaml"
        if not stored.is_file():
            raise ValueError(f"{self.path} is not the folder of a run (no recipe.yaml in it)")
        return load_recipe(stored, check=False, folders=folders)

    def write_text(self, name: str, text: str) -> None:
        if self.main:
            write_text(self / name, text)

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=1) + "\n")

    def read_json(self, name: str, default: Any = None) -> Any:
        path = self / name
        return json.loads(path.read_text()) if path.is_file() else default

    @contextmanager
    def stage(self, name: str, device: torch.device, resumable: bool = False) -> Iterator[None]:
        """Time and peak memory of a stage, into stages.json. A stage run again replaces its line; a resumable
        one, which goes on where it was, adds its time to it."""
        reset_peak(device)
        began = time.perf_counter()
        yield
        row = {"stage": name, "seconds": time.perf_counter() - began, "peak_memory_gb": peak_gb(device)}
        rows = self.read_json("stages.json", [])
        before = next((r for r in rows if r["stage"] == name), None)
        if before is not None and resumable:
            row["seconds"] += before["seconds"]
            row["peak_memory_gb"] = max(row["peak_memory_gb"], before["peak_memory_gb"])
        self.write_json("stages.json", [*(r for r in rows if r["stage"] != name), row])


def shipped(folder: Path) -> Path:
    """The model folder in a run (exported/, or merged/ where there is none); any other folder is returned as
    it is.
    """
    if not (folder / "recipe.yaml").is_file():
        return folder
    return folder / "exported" if (folder / "exported").is_dir() else folder / "merged"


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
