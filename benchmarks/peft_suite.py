"""PEFT's own suite for decoders on our method: every test that PEFT runs over all its methods.

    python -m benchmarks.peft_suite --fetch    # the tests of the PEFT that is installed, from PyPI
    python -m benchmarks.peft_suite            # every test x model x method: two minutes
    python -m benchmarks.peft_suite --methods lr_qat --tests test_merge_layers

Their code is not in this repository: --fetch puts it into a cache folder. TestDecoderModels, and what its
base class has besides, runs LowBitConfig on packed models that plain from_pretrained reads from folders. What
they call init_weights=False (an adapter that changes something) is an adapter moved at random here.
tests/integrations/test_peft_suite.py is the short form.

A line per test: passed, failed, or not applicable with the reason. Not applicable are tests that they skip
for methods they do not know by name (the reason is theirs), those of one method of theirs, those in NOT_OURS
and INEXACT, and those in REFUSED, where it is checked what we say instead.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import re
import subprocess
import sys
import tarfile
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.integrations.transformers import mark_packed
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.sections.quant import QuantSection
from tests.architectures import CONFIGS, checkpoint_of

PACKAGE = "peft_suite_of_peft"
# A layer per matrix, biases everywhere, Conv1D. Theirs skips models by their names, so these have other ones.
MODELS = {"rotary": "llama", "biased": "opt", "conv1d": "gpt2"}
GRID: dict[str, Any] = {"bits": 4, "group_size": 32, "residual_bits": 4}
# Tests that cannot hold for weights that are rounded, or that our rules forbid: why.
NOT_OURS = {
    "test_add_adapter_no_autocast_adapter_dtype": "masters of adapters are float32, whatever is asked for: "
    "a step of a low-bit weight is lost in 16 bits",
}
# Tests that run into a refusal of ours: what it says. Another error, or none, is a failure.
REFUSED = {
    "test_save_pretrained_pickle": "no pickle",
    "test_save_pretrained_selected_adapters_pickle": "no pickle",
    "test_merge_layers_multi": "one adapter can be active at a time",
}
# Tests that compare a merged model with the unmerged one: not for a method whose merge rounds again.
INEXACT = {"test_merge_layers", "test_merge_layers_nan", "_test_safe_merge"}
UNTIED = {
    "_test_safe_merge"
}  # it gives a state dict to safetensors' save_file, which takes no shared tensors
MERGE_ROUNDS = "the merge of this method rounds again, and warns"


@dataclass(frozen=True)
class Result:
    test: str
    model: str
    method: str
    outcome: str  # passed | failed | not applicable
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.outcome:14} {self.test:44} {self.model:8} {self.method:12} {self.reason}".rstrip()


def suite_folder() -> Path:
    """Where the tests of the PEFT that is installed lie, fetched or not."""
    return Path(f"~/.cache/lowbit_ft/peft-{version('peft')}/tests").expanduser()


def fetch(folder: Path) -> None:
    """The files of tests/ in the source distribution on PyPI."""
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
        subprocess.run([*command, f"peft=={version('peft')}", "--dest", place], check=True)
        (archive,) = Path(place).glob("peft-*.tar.gz")
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                name = Path(member.name)
                if (
                    member.isfile()
                    and len(name.parts) == 3
                    and name.parts[1] == "tests"
                    and name.suffix == ".py"
                ):
                    content = tar.extractfile(member)
                    assert content is not None
                    (folder / name.name).write_bytes(content.read())


def theirs(folder: Path) -> ModuleType:
    """Their module of decoder tests, as a package of its own."""
    if PACKAGE not in sys.modules:
        package = sys.modules[PACKAGE] = ModuleType(PACKAGE)
        package.__path__ = [str(folder)]
        if find_spec("diffusers") is None:  # asked only whether a model is one of its pipelines
            stand_in: Any = ModuleType("diffusers")
            stand_in.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
            sys.modules["diffusers"] = stand_in
    try:
        return importlib.import_module(f"{PACKAGE}.test_decoder_models")
    finally:
        if getattr(sys.modules.get("diffusers"), "__spec__", None) is None:
            sys.modules.pop("diffusers", None)


def packed(kind: str, method: str, folder: Path, tied: bool = True) -> Path:
    """A folder that from_pretrained reads: a random model of that kind on a grid of the method, its head as
    its config has it or (tied: False) a matrix of its own."""
    grid = "binary" if ADAPTERS[method].grid_name == "binary" else "integer"
    name = kind if tied else f"{kind}-untied"
    place = folder / f"{name}-{grid}"
    if not place.exists():
        config = CONFIGS[MODELS[kind]]()
        config.tie_word_embeddings = config.tie_word_embeddings and tied
        checkpoint = checkpoint_of(config, folder / f"{name}-dense")
        keys = dict(GRID) if grid == "integer" else {"grid": "binary", "bits": 3, "group_size": 32}
        keys["calibrate"] = "absmax" if grid == "integer" else "greedy"
        model, _ = quantize(checkpoint, QuantSection(**keys), dtype=torch.float32)
        mark_packed(model)
        model.save_pretrained(place)
    return place


def tests_of(suite: ModuleType) -> dict[str, list[dict[str, Any]]]:
    """Test -> the further arguments it runs with; those of one method of theirs have none."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, function in inspect.getmembers(suite.TestDecoderModels, inspect.isfunction):
        if not name.startswith("test_"):
            continue
        marks = {mark.args[0]: mark.args[1] for mark in getattr(function, "pytestmark", [])}
        found[name] = []
        if "model_id" not in marks or marks.get("config_cls,config_kwargs") is not suite.ALL_CONFIGS:
            continue
        others = [
            [{key: value} for value in values]
            for key, values in marks.items()
            if key not in ("model_id", "config_cls,config_kwargs")
        ]
        found[name] = [{k: v for one in chosen for k, v in one.items()} for chosen in product(*others)]
    source = inspect.getsource(suite.TestDecoderModels)
    for name, function in inspect.getmembers(suite.PeftCommonTester, inspect.isfunction):
        takes = list(inspect.signature(function).parameters)[1:]
        if name.startswith("_test_") and takes == ["model_id", "config_cls", "config_kwargs"]:
            if f"self.{name}(" not in source:
                found[name] = [{}]
    return found


@contextlib.contextmanager
def moving(suite: Any, always: bool) -> Iterator[None]:
    """Where a test asks for adapters that change something, ours are moved at random when they are made."""
    from lowbit_ft.integrations.peft_layer import LowBitLinear  # PEFT's import takes seconds

    plain, asks, moved = LowBitLinear.update_layer, suite.set_init_weights_false, [always]

    def update_layer(self: Any, adapter_name: str, config: Any) -> None:
        plain(self, adapter_name, config)
        if moved[0]:
            for parameter in self.lowbit_adapters[adapter_name].parameters():
                if parameter.is_floating_point() and not parameter.is_meta:
                    parameter.data.add_(0.5 * torch.randn_like(parameter))

    def set_init_weights_false(config_cls: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        moved[0] = True
        return dict(kwargs)

    LowBitLinear.update_layer, suite.set_init_weights_false = update_layer, set_init_weights_false
    try:
        yield
    finally:
        LowBitLinear.update_layer, suite.set_init_weights_false = plain, asks


def run_one(suite: ModuleType, test: str, model: Path, method: str, more: dict[str, Any]) -> tuple[str, str]:
    """(outcome, reason) of one test of theirs."""
    from lowbit_ft.integrations.peft import LowBitConfig  # PEFT's import takes seconds

    kwargs: dict[str, Any] = {"task_type": "CAUSAL_LM", "method": method}
    if "rank" in ADAPTERS[method].model_fields:
        kwargs["rank"] = 4
    case = suite.TestDecoderModels()
    torch.manual_seed(0)
    try:
        with moving(suite, always=test.startswith("_")), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            getattr(case, test)(model_id=str(model), config_cls=LowBitConfig, config_kwargs=kwargs, **more)
    except pytest.skip.Exception as skipped:
        return "not applicable", f"PEFT: {skipped.msg}"
    except (Exception, pytest.fail.Exception) as error:
        said = f"{type(error).__name__}: {error}"
        if test in REFUSED and isinstance(error, ValueError) and re.search(REFUSED[test], said):
            return "not applicable", f"refused: {str(error).splitlines()[0]}"
        where = traceback.extract_tb(error.__traceback__)[-1]
        return "failed", f"{said.strip().splitlines()[0][:200]} ({Path(where.filename).name}:{where.lineno})"
    if test in REFUSED:
        return "failed", f"was to be refused ({REFUSED[test]})"
    return "passed", ""


def run(
    suite: ModuleType, tests: list[str], models: list[str], methods: list[str], folder: Path
) -> Iterator[Result]:
    """Every test of theirs; folder: where the packed models are kept."""
    listed = tests_of(suite)
    for test in tests:
        if not listed[test]:
            yield Result(test, "-", "-", "not applicable", "a test of one method of PEFT's own")
            continue
        if test in NOT_OURS:
            yield Result(test, "-", "-", "not applicable", NOT_OURS[test])
            continue
        for model, method, more in product(models, methods, listed[test]):
            name = test + (f"[{'-'.join(map(str, more.values()))}]" if more else "")
            if test in INEXACT and not ADAPTERS[method].exact_merge:
                yield Result(name, model, method, "not applicable", MERGE_ROUNDS)
                continue
            place = packed(model, method, folder, tied=test not in UNTIED)
            yield Result(name, model, method, *run_one(suite, test, place, method, more))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--fetch", action="store_true", help="put their tests into the cache folder, and stop")
    p.add_argument("--tests", nargs="+", help="names of theirs; all by default")
    p.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    p.add_argument("--methods", nargs="+", default=list(ADAPTERS), choices=list(ADAPTERS))
    o = p.parse_args()
    if o.fetch:
        return fetch(suite_folder())
    if not suite_folder().is_dir():
        raise SystemExit(f"{suite_folder()}: not there; run python -m benchmarks.peft_suite --fetch")
    suite = theirs(suite_folder())
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for result in run(suite, o.tests or list(tests_of(suite)), o.models, o.methods, Path(folder)):
            counts[result.outcome] += 1
            print(result, flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    if counts["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
