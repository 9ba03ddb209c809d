"""outside: a packed model that no run of ours trained, in the format of a server.

    a folder that merge_and_unload().save_pretrained() wrote, or `lowbit-ft quantize MODEL`
    an adapter folder of PEFT, over the packed base it was trained on

It is written, read back through the format's own reader and compared before it counts as a model, as the
export of a run is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..adapters.attach import (
    adapted_layers,
    adapted_names,
    attach,
    base_digest,
    load_adapter_state,
    train_head,
    whole_names,
    whole_parameters,
)
from ..adapters.folder import CONFIG_FILE
from ..export import EXPORTERS, Exporter, Weights
from ..export.card import CardFacts, model_card, serve_line
from ..export.chat import TEXT
from ..export.folder import check_target
from ..export.native_folder import NativeFolder, is_native
from ..export.reader import load_exported
from ..export.verify import verify
from ..export.writer import write_model
from ..files.jsonfile import read_json
from ..integrations.adapter_files import read_adapter, refuse_other_base
from ..kv_cache import place_kv_cache
from ..merge import merged_weight, merged_weights
from ..model.chat_template import defaults
from ..model.config import GENERATION
from ..model.linear import deployed
from ..model.purpose import AUTO
from ..model.shipped import Trained, as_shipped, trained_tensors
from ..names import matches
from .export import set_aside

FORMAT = "compressed-tensors"


@dataclass(frozen=True)
class _Model:
    """What is written. load: the packed model with its adapter, for the comparison; method: None where the
    folder does not say by which it was trained."""

    checkpoint: NativeFolder
    weights: Weights
    load: Callable[[], Any]
    method: str | None = None
    exact: bool = True
    dense: Mapping[str, Trained] = field(default_factory=dict)  # what was trained beside the packed layers


def export_outside(
    folder: Path,
    format: str | None = None,
    output: Path | None = None,
    base: Path | None = None,
    say: Callable[[str], object] = print,
) -> Path:
    """Write the folder's model in a format, verify it, and return where: `output`, or a folder beside it
    named after the format. base: the packed base of an adapter folder, where its config does not name one.
    ValueError when it is neither kind of folder, or the format cannot hold it."""
    name = format or FORMAT
    exporter = _exporter(name)
    target = output or folder.resolve().with_name(f"{folder.resolve().name}-{name}")
    check_target(target)
    adapter = (folder / CONFIG_FILE).is_file()
    if base is not None and not adapter:
        raise ValueError(f"--base: got {base}, but {folder} is no adapter folder (no {CONFIG_FILE} in it)")
    model = _with_adapter(folder, base) if adapter else _as_it_is(folder)
    if name == "native" and not adapter:
        raise ValueError(f"{folder}: is in the native format already; use it as it is")
    checkpoint = model.checkpoint
    _refuse_inside(target, folder, checkpoint.folder)
    facts = CardFacts(
        folder.resolve().name,
        checkpoint.base,
        model.method,
        model.exact,
        next(iter(model.weights.specs.values())).grid,
        None,
        checkpoint.kv_cache,
        _told(checkpoint.folder / TEXT),
        dense=tuple(dict.fromkeys(tensor.rpartition(".")[0] for tensor in model.dense)),
        generation=(checkpoint.folder / GENERATION).is_file(),
    )
    if (purpose := checkpoint.purpose) is not None:
        facts = replace(facts, pipeline=AUTO[purpose.auto], auto=purpose.auto)
    card = {"README.md": model_card(facts, name, [])}
    shipped = as_shipped(checkpoint, model.dense)
    write_model(target, shipped, model.weights, exporter, kv_cache=checkpoint.kv_cache, extra_files=card)
    _compare(target, model, exporter, say)
    say(f"{name}: {target}")
    say(serve_line(facts, name, target))
    return target


def _told(file: Path) -> dict[str, Any]:
    """The defaults of the folder's chat template."""
    return defaults(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _refuse_inside(target: Path, *sources: Path) -> None:
    """ValueError for a place that is one of the folders that are read, or in one, or around one: what is
    written takes the place of what was there."""
    place = target.resolve()
    for source in sources:
        read = source.resolve()
        if place.is_relative_to(read) or read.is_relative_to(place):
            raise ValueError(
                f"--output: got {target}, and the model is read from {source}, which has to stay as it is; "
                "nothing was written: choose a folder outside of it"
            )


def _compare(target: Path, model: _Model, exporter: Exporter, say: Callable[[str], object]) -> None:
    """Read what was written through its own reader; what differs is set aside, and is an error."""

    def packed() -> Any:
        loaded = model.load()
        if not exporter.carries_kv_cache:
            place_kv_cache(loaded, None)  # nor has the model that is read from the folder
        return loaded

    try:
        source = model.checkpoint.folder
        say(str(verify(target, model.weights, model=packed, source=source, dense=model.dense)))
    except BaseException as error:
        refused = set_aside(target)
        if isinstance(error, ValueError):
            raise ValueError(
                f"{error}\n{target} was not verified and is no model to serve; what was written is in "
                f"{refused}"
            ) from error
        raise


def _exporter(name: str) -> Exporter:
    if name not in EXPORTERS:
        raise ValueError(f"format: got {name!r}; allowed are {', '.join(EXPORTERS)}")
    exporter = EXPORTERS[name]
    for modules in (exporter.writes_with, exporter.reads_with):
        if reason := exporter.missing(modules):
            raise ValueError(f"format: {name} is verified through its reader, and {reason}")
    return exporter


def _as_it_is(folder: Path) -> _Model:
    checkpoint = NativeFolder(folder)
    return _Model(checkpoint, checkpoint.weights, lambda: load_exported(folder, dtype=checkpoint.dtype))


def _with_adapter(folder: Path, base: Path | None) -> _Model:
    """An adapter folder over its base: the weights are its merge, layer by layer."""
    config, state, digest = read_adapter(folder)
    whole = whole_names(state)
    saved = config.modules_to_save or []
    if others := [n for n in whole if not any(matches(p, n) or n.startswith(f"{p}.") for p in saved)]:
        raise ValueError(
            f"{folder}: holds dense tensors that modules_to_save does not name ({others[0]}: of a vocabulary "
            "that was resized), which are no part of the packed base: "
            "PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(DIR), then export DIR"
        )
    path = base or _named_base(folder)
    checkpoint = NativeFolder(path)

    def load() -> Any:
        model = load_exported(path, dtype=checkpoint.dtype)
        refuse_other_base(base_digest(model), digest, str(folder))
        start = {"init": "zero"} if "init" in type(config).model_fields else {}
        of_task = checkpoint.purpose is not None
        names = {"targets": adapted_names(state), "modules_to_save": None if of_task else whole}
        attach(model, config.model_copy(update={**names, **start}))
        if of_task:
            train_head(model, whole_parameters(state))
        load_adapter_state(model, state)
        return model.eval()

    def shipped() -> Any:
        """What is read back is the merge, which a product that is not on the grid (lora) is not."""
        model = load()
        for name, layer in [] if config.exact_merge else list(adapted_layers(model)):
            model.set_submodule(name, deployed(layer, merged_weight(layer)))
        return model

    trained = load()
    dense = trained_tensors(trained)
    return _Model(checkpoint, merged_weights(trained), shipped, config.method, config.exact_merge, dense)


def _named_base(folder: Path) -> Path:
    """The packed base that the adapter's config names. ValueError where that is no packed folder here."""
    facts = read_json(folder / CONFIG_FILE, dict[str, Any])
    named = facts.get("base_model_name_or_path")
    for path in (Path(str(named)), folder / str(named)) if named else ():
        if path.is_dir() and is_native(path):
            return path
    raise ValueError(
        f"{folder / CONFIG_FILE}: its base is {named!r}, which is no packed folder here; name it with --base "
        "DIR. A base that was packed while it was loaded is on no disk: save merge_and_unload() and export "
        "that, or pack it by the same keys (lowbit-ft quantize MODEL) and give that folder"
    )
