"""The adapter folder, in PEFT's layout, written and read without importing PEFT (its import takes seconds).

    adapter_config.json          peft_type LOWBIT, method, options, base_model_name_or_path, base_digest
    adapter_model.safetensors    base_model.model.<layer>.lowbit_adapters.<tensor>, fp32 (numbers of rows and
                                 codes of ef_qat: integers), and base_model.model.<module>.<tensor> of
                                 modules_to_save, the head of a task among them
    README.md                    in its first lines, what a PEFT without us cannot say: import lowbit_ft
    lowbit_ft.json               size and sha256 of both, and its own (files/manifest.py; PEFT writes none)

base_digest is the sha256 of the packed base (attach.base_digest). An adapter says which way the integers of
*one* base move, so `PeftModel.from_pretrained` and whoever calls `read_adapter` refuse any other base.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from ..adapters import ADAPTERS, AdapterConfig
from ..adapters.attach import PEFT_PREFIX, adapted_names, whole_names
from ..adapters.base import LowRankOptions
from ..adapters.folder import CONFIG_FILE, TENSOR_FILE, refuse_pickle
from ..adapters.patterns import PATTERNS
from ..files.atomic import leftover_of, staged_folder
from ..files.errors import writing
from ..files.jsonfile import read_json
from ..files.manifest import MANIFEST, changed_files, file_entry, open_sealed, sealed
from ..files.regular import read_card
from ..files.tensorfile import is_finite, load_tensors, save_tensors
from ..model.rows import PEFT_KEY
from ..names import did_you_mean, matches
from ..recipe.errors import to_problems
from ..recipe.values import for_method
from ..segments import Parts, layout, read_layout

PEFT_TYPE = "LOWBIT"
# Keys of a recipe that say where an adapter goes, what it started from, in which parts a matrix is and what
# trains beside it:
# target_modules, the tensors, `segments` and `modules_to_save` tell that here.
NOT_OPTIONS = ("targets", "init_from", "segments", "modules_to_save")
# Keys that many methods of PEFT share and ours has not, with the way out. None and "none" say what it does.
OF_OTHER_METHODS = {
    "bias": "biases stay as they are beside packed weights; leave it out",
    "layers_to_transform": "name the layers in target_modules, as a regex: r'.*layers\\.(0|1)\\..*'",
    "layers_pattern": "name the layers in target_modules, as a regex",
}

CARD_FILE = "README.md"
IMPORT_FIRST = (
    "> **`import lowbit_ft` first** (`pip install lowbit-ft`): it teaches PEFT this method. "
    f"Without it PEFT stops with\n> `KeyError: '{PEFT_TYPE}'`."
)
CARD = """---
library_name: peft
tags: [lowbit_ft, quantized, qat]
---
The adapter moves the integers of one packed base, which `adapter_config.json` names
(`base_model_name_or_path`, `base_digest`); any other base is refused.

```python
import lowbit_ft
from peft import PeftModel
from transformers import {auto}

model = PeftModel.from_pretrained({auto}.from_pretrained("BASE"), "PATH")
```
"""


@dataclass(frozen=True)
class Head:
    """What the model of an adapter is for: PEFT's word for it, the auto class that builds it, and the modules
    that are trained whole (their tensors are in the state)."""

    task_type: str | None = "CAUSAL_LM"
    auto: str = "AutoModelForCausalLM"
    modules: Sequence[str] = ()


LANGUAGE = Head()


def adapter_config(method: str, options: Mapping[str, Any], others: Sequence[str] = ()) -> AdapterConfig:
    """The config of `method` with its own keys in `options`. ValueError: one line per wrong key or value.
    others: keys that are allowed beside them where the user wrote these.
    """
    kind = ADAPTERS.get(method)
    if kind is None:
        raise ValueError(
            f"adapter.method: got {method!r}; allowed: {', '.join(ADAPTERS)}{did_you_mean(method, ADAPTERS)}"
        )
    allowed = [key for key in kind.model_fields if key not in ("method", *NOT_OPTIONS)]
    allowed += [key for key in others if key not in allowed]
    lines = [
        f"adapter.{key}: unknown key{did_you_mean(key, allowed)}; allowed: {', '.join(allowed)}"
        for key in options
        if key not in kind.model_fields
    ]
    given = for_method({**{k: v for k, v in options.items() if k in kind.model_fields}, "method": method})
    try:
        config = kind.model_validate(given)
    except ValidationError as error:
        lines += map(str, to_problems("adapter", kind, error.errors(), given))
    else:
        if not lines:
            return config
    raise ValueError("\n".join(lines))


def refuse_keys_of_others(keys: dict[str, Any]) -> None:
    """TypeError, by which PEFT's callers find out whether a method has a key, for one of OF_OTHER_METHODS;
    those that say what is done anyway are taken out of `keys`."""
    for key, way_out in OF_OTHER_METHODS.items():
        if keys.pop(key, None) not in (None, "none"):
            raise TypeError(f"LowBitConfig has no {key}: {way_out}")


def adapter_options(config: AdapterConfig) -> dict[str, Any]:
    """Every key of the method, defaults too: a later change of a default must not change a saved adapter.
    Patterns where there are some, as pairs in their order.
    """
    found = config.model_dump(mode="json", exclude={"method", *NOT_OPTIONS, *PATTERNS})
    patterns = {key: getattr(config, key, {}) for key in PATTERNS}
    return found | {key: [list(pair) for pair in value.items()] for key, value in patterns.items() if value}


def with_parts(config: AdapterConfig, plan: Mapping[str, Parts]) -> AdapterConfig:
    """The config with an A and a B for each part of these layers. ValueError where its method has none."""
    if not isinstance(config, LowRankOptions):
        raise ValueError(f"segments: {config.method} has no A and B of its own for each part; leave it out")
    return config.with_plan(plan)


def refuse_other_base(found: str, wanted: str, adapter: str) -> None:
    """ValueError when the base's digest is not the one the adapter was trained on."""
    if found != wanted:
        raise ValueError(
            f"{adapter}: trained on the packed base {wanted[:12]}..., this model's base is {found[:12]}...: "
            "their integers differ, and an adapter only means something on its own base. "
            "Load the base named in "
            f"{CONFIG_FILE} (base_model_name_or_path), or train the adapter again on this one"
        )


def write_adapter(
    folder: str | Path,
    state: Mapping[str, Tensor],
    config: AdapterConfig,
    base_digest: str,
    base_path: str | Path,
    head: Head = LANGUAGE,
) -> Path:
    """Write the adapters of an attach()-ed model; `PeftModel.from_pretrained(base, folder)` reads them.

    state: attach.adapter_state(model), its tensors whole; base_digest: attach.base_digest(model); base_path:
    where the packed base is, for AutoPeft; head: what the model is for. A folder that is there is replaced as
    a whole: a reader never sees new tensors beside an old config. ValueError when something is there that
    this function did not write. Returns the folder.
    """
    folder = Path(folder)
    refuse_foreign(folder)
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        t = (tensor.float() if tensor.is_floating_point() else tensor).detach().cpu().contiguous()
        shared = any(t.data_ptr() == other.data_ptr() for other in tensors.values() if t.numel())
        tensors[name] = t.clone() if shared else t  # a tied pair: a file has each by itself
    if not tensors:
        raise ValueError("write_adapter: the model has no adapters; attach one first")
    facts = {
        "peft_type": PEFT_TYPE,
        "task_type": head.task_type,
        "method": config.method,
        "options": adapter_options(config),
        "base_model_name_or_path": str(base_path),
        "base_digest": base_digest,
        "target_modules": None
        if config.targets is None
        else adapted_names(state),  # None: every packed layer
        "exclude_modules": None,
        "inference_mode": True,
        "revision": None,
    }
    if plan := getattr(config, "plan", {}):
        names = set(adapted_names(state))
        facts["segments"] = layout({name: parts for name, parts in plan.items() if name in names})
    of_head = tuple(f"{module}." for module in head.modules)  # PEFT takes it whole
    saved = [name for name in whole_names(state) if not f"{name}.".startswith(of_head)]
    if saved := [*head.modules, *saved]:
        facts["modules_to_save"] = saved
    if config.token_rows:
        there = {key.removesuffix(f".{PEFT_KEY}").removeprefix(PEFT_PREFIX) for key in state}
        rows = {name: list(ids) for name, ids in config.token_rows.items() if name in there}
        facts["trainable_token_indices"] = rows
    with writing(folder), staged_folder(folder) as stage:
        save_tensors(stage / TENSOR_FILE, tensors, {"format": "pt"})
        (stage / CONFIG_FILE).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        say_on_card(stage, head.auto)  # not in the manifest: a card may be edited
        files = {name: file_entry(stage / name) for name in (CONFIG_FILE, TENSOR_FILE)}
        (stage / MANIFEST).write_bytes(sealed({"writer": "lowbit_ft", "version": 1, "files": files}))
    return folder


def say_on_card(folder: Path, auto: str = LANGUAGE.auto) -> None:
    """Put IMPORT_FIRST into the first lines of the folder's README.md, below the hub's front matter; make the
    card when there is none. A card that has it stays as it is.
    """
    path = folder / CARD_FILE
    text = read_card(path) if path.exists() else CARD.replace("{auto}", auto)
    if IMPORT_FIRST in text:
        return
    front, end, rest = ("", "", text)
    if text.startswith("---\n"):
        front, end, rest = text[4:].partition("\n---\n")
        front = "---\n" + front
    stage = path.with_name(f".{CARD_FILE}.new")
    stage.write_text(f"{front}{end}\n{IMPORT_FIRST}\n\n{rest.lstrip()}", encoding="utf-8")
    stage.replace(path)


def check_adapter(folder: str | Path) -> None:
    """Compare an adapter folder with its manifest. ValueError naming what is missing or changed; a folder
    that PEFT wrote has no manifest and nothing to be compared with.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        return
    entries = open_sealed(folder / MANIFEST).get("files")
    if not isinstance(entries, dict) or not {CONFIG_FILE, TENSOR_FILE} <= entries.keys():
        raise ValueError(f"{folder / MANIFEST}: not a manifest of an adapter of lowbit_ft")
    if problems := changed_files(folder, entries):
        raise ValueError(
            f"{folder}: {'; '.join(problems)}. Whoever changed it, this is not what was trained: run the "
            "line again (lowbit-ft run), or copy the folder again"
        )


def refuse_foreign(folder: Path) -> None:
    """ValueError when a folder is there that is not empty and has other files than those of an adapter that
    we wrote.
    """
    if not folder.is_dir() or folder.is_symlink():
        return  # nothing, a link (which is replaced itself), or a file, which is refused later
    ours = {CONFIG_FILE, TENSOR_FILE, MANIFEST, CARD_FILE}
    names = {path.name for path in folder.iterdir() if leftover_of(path.name) not in ours}
    if names - ours or (names and MANIFEST not in names):
        raise ValueError(
            f"{folder}: exists and holds what lowbit_ft did not write ({', '.join(sorted(names)[:5])}); "
            "nothing is overwritten: move it, or choose another folder"
        )


def read_adapter(folder: str | Path) -> tuple[AdapterConfig, dict[str, Tensor], str]:
    """(config, tensors by PEFT key, base_digest) of a folder that write_adapter or PEFT wrote.

    The tensors are for attach.load_adapter_state. ValueError naming the file when one is missing, damaged,
    not what the manifest says, of another PEFT method, or holds NaN or Inf.
    """
    folder = Path(folder)
    check_adapter(folder)
    facts = _read_config(folder / CONFIG_FILE)
    try:
        config = adapter_config(str(facts.get("method")), facts.get("options") or {})
        if (entries := facts.get("segments")) is not None:
            config = with_parts(config, read_layout(entries))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}") from None
    if isinstance(modules := facts.get("target_modules"), list):
        config = config.model_copy(update={"targets": [str(name) for name in modules]})
    if isinstance(saved := facts.get("modules_to_save"), list):
        config = config.model_copy(update={"modules_to_save": [str(name) for name in saved]})
    digest = facts.get("base_digest")
    if not isinstance(digest, str):
        raise ValueError(
            f"{folder / CONFIG_FILE}: no base_digest; it cannot be checked which base this adapter belongs to"
        )
    refuse_pickle(folder)
    tensors = folder / TENSOR_FILE
    state = load_tensors(tensors)
    broken = [name for name, tensor in state.items() if not is_finite(tensor)]
    if broken:
        raise ValueError(f"{tensors}: NaN or Inf in {', '.join(broken[:5])}; this adapter cannot be used")
    if isinstance(rows := facts.get("trainable_token_indices"), dict):
        config = config.with_token_rows(_token_rows(rows, state, folder / CONFIG_FILE))
    return config, state, digest


def _token_rows(
    rows: Mapping[str, Any], state: Mapping[str, Tensor], path: Path
) -> dict[str, tuple[int, ...]]:
    """The tokens by the full names of the modules whose rows are in the file. ValueError for no ids."""
    found: dict[str, tuple[int, ...]] = {}
    for wanted, ids in rows.items():
        if not isinstance(ids, list) or not all(isinstance(i, int) and i >= 0 for i in ids):
            raise ValueError(f"{path}: trainable_token_indices: got {ids!r}; allowed: a list of token ids")
        for key in state:
            name = key.removeprefix(PEFT_PREFIX).removesuffix(f".{PEFT_KEY}")
            if key.endswith(f".{PEFT_KEY}") and matches(wanted, name):
                found[name] = tuple(ids)
    return found


def _read_config(path: Path) -> dict[str, Any]:
    facts = read_json(path, dict[str, Any], f"an adapter folder has {CONFIG_FILE} and {TENSOR_FILE}")
    found = facts.get("peft_type")
    if found != PEFT_TYPE:
        raise ValueError(f"{path}: got peft_type {found!r}; a lowbit adapter has {PEFT_TYPE!r}")
    if not isinstance(facts.get("options") or {}, dict):
        raise ValueError(f"{path}: options: got {facts['options']!r}; allowed: the method's keys and values")
    return facts
