"""Cross checks of a recipe: what one section means for another, for the checkpoint on disk and for this
machine.

Everything here is found before anything is loaded: config.json, safetensors headers and file names are all
that is read. A check is a function over the sections it names in CHECKS and yields Problems; it runs when
those sections are valid in themselves, so one wrong key does not hide what is wrong elsewhere.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..adapters import ADAPTERS
from ..adapters.lora_start import lora_problems, read_lora
from ..export import EXPORTERS, LayerSpec
from ..export.compressed_tensors import fused_conflict
from ..export.planes import held
from ..grid import GRIDS, grid_of
from ..grid.calibrate import CALIBRATORS, calibrators_of
from ..names import did_you_mean, matches
from .layers import Layer, Shapes, has_chat_template, local_folder, read_shapes
from .machine import (
    HUB_ID,
    Problems,
    check_data,
    check_device,
    check_output,
    check_tasks,
    check_train,
    near_names,
    path_is,
)
from .yaml import KeyPath, Problem

GROUP_SIZES = (32, 64, 128, 256)


def check(values: dict[str, Any]) -> list[Problem]:
    """Run every check whose sections are in `values` ({section name: section}); returns the problems
    found.
    """
    sections = SimpleNamespace(**values)
    problems: list[Problem] = []
    for needs, run in CHECKS:
        if all(name in values for name in needs):
            problems += run(sections)
    return problems


# ---------------------------------------------------------------- grid, method, export


def _grids(r: Any) -> Iterator[tuple[KeyPath, Any]]:
    """(key path, grid) of the recipe's grid and of every override; those that cannot be are left to
    check_grid.
    """
    for path, bits, group_size in _bits(r.quant):
        try:
            yield path, grid_of(r.quant.grid, dict(r.quant) | {"bits": bits, "group_size": group_size})
        except ValueError:
            continue


def _bits(quant: Any) -> Iterator[tuple[KeyPath, int, int]]:
    yield ("quant",), quant.bits, quant.group_size
    for i, override in enumerate(quant.overrides):
        yield ("quant", "overrides", i), override.bits or quant.bits, override.group_size or quant.group_size


def check_grid(r: Any) -> Problems:
    """Bits and calibrator against the grid kind; patterns that cannot be read."""
    quant = r.quant
    grid_kind = GRIDS[quant.grid]
    for path, bits, group_size in _bits(quant):
        if bits not in grid_kind.widths:
            others = " or ".join(name for name, kind in GRIDS.items() if bits in kind.widths)
            yield Problem(
                (*path, "bits"),
                f"got {bits}; allowed on quant.grid {quant.grid}: {_list(grid_kind.widths)}; or "
                f"use quant.grid: {others}",
            )
            continue
        try:
            grid_of(quant.grid, dict(quant) | {"bits": bits, "group_size": group_size})
        except ValueError as error:
            yield Problem((*path, "group_size"), f"on quant.grid {quant.grid}: {error}")
    if refused := grid_kind.refuses(dict(quant)):
        yield Problem(("quant", refused[0]), refused[1])
    calibrator = CALIBRATORS.get(quant.calibrate)
    if quant.from_checkpoint:
        pass  # incoming.py has looked
    elif calibrator is None:
        fits = calibrators_of(grid_kind.kind)
        yield Problem(
            ("quant", "calibrate"),
            f"got {quant.calibrate!r}; allowed: {_list(fits)}{did_you_mean(quant.calibrate, fits)}",
        )
    else:
        for _, grid in _grids(r):
            reason = calibrator.reject(grid)
            if reason:
                yield Problem(("quant", "calibrate"), f"got {quant.calibrate!r}, which {reason}")
                break
    for key in ("targets", "exclude"):
        patterns = getattr(quant, key)
        for i, pattern in enumerate(patterns if isinstance(patterns, list) else []):
            if error := _pattern_error(pattern):
                yield Problem(
                    ("quant", key, i),
                    f"got {pattern!r}, not a name, glob or regex ({error}); escape it with \\",
                )


def check_method(r: Any) -> Problems:
    """The method against the grid of every layer."""
    config = r.adapter
    if config.grid_name != GRIDS[r.quant.grid].kind:
        message = (
            f"got {config.method!r}, which works on quant.grid: {config.grid_name}; the recipe has "
            f"{r.quant.grid}"
        )
        yield Problem(
            ("adapter", "method"),
            f"{message}; set quant.grid: {config.grid_name} or choose {_list(_methods_on(GRIDS[r.quant.grid].kind))}",
        )
        return
    for key, value in config:
        if isinstance(value, float) and not math.isfinite(value):
            yield Problem(("adapter", key), f"got {value}; allowed: a finite number")
    steps, limit = getattr(config, "warmup_steps", 0), r.train.max_steps if hasattr(r, "train") else None
    if limit is not None and steps >= limit:
        yield Problem(
            ("adapter", "warmup_steps"),
            f"got {steps}, but train.max_steps is {limit}: the grid would never be trained; lower it",
        )
    told = set()
    for path, grid in _grids(r):
        reason = _no_residual(r, config, grid) if r.quant.from_checkpoint else config.reject(grid)
        if reason and reason not in told:
            told.add(reason)
            where = "" if path == ("quant",) else f" (for {_path(path)})"
            yield Problem(("adapter", "method"), f"got {config.method!r}{where}: {reason}")
    yield from _gradient_cost(r, config)


def _gradient_cost(r: Any, config: Any) -> Problems:
    """Cheaper gradients that would cost more than the exact ones."""
    if getattr(config, "low_rank_gradient", "exact") == "exact":
        return
    for path, grid in _grids(r):
        if (cost := config.gradient_cost(grid)) >= 1:
            where = "" if path == ("quant",) else f" (for {_path(path)})"
            yield Problem(
                ("adapter", "low_rank_gradient"),
                f"got {config.low_rank_gradient!r}{where}, which with rank {config.rank}, group size "
                f"{grid.group_size} and scale_grad_tokens "
                f"{config.scale_grad_tokens:g} costs {cost:.2f} products of a layer's size where exact "
                "costs 1 (2 rank / group_size, and the "
                "share of the tokens that scales learn from); set scale_grad_tokens: 0.25 or less, a "
                "smaller rank, or low_rank_gradient: exact",
            )
            return


def _no_residual(r: Any, config: Any, grid: Any) -> str | None:
    """Why a method cannot train on a base that came quantized: there is no residual, and no dense weight to
    make one from.
    """
    start = getattr(config, "init", "zero")
    plain = config.model_copy(update={"init": "zero"}) if start != "zero" else config
    if plain.reject(grid):
        fit = [
            name
            for name, kind in ADAPTERS.items()
            if kind.grid_name == grid.kind and not kind(method=name).reject(grid)
        ]
        why = (
            f"{config.method} needs the fraction that rounding threw away, which "
            f"{r.model.path if hasattr(r, 'model') else 'a quantized checkpoint'} does not have"
        )
    elif start != "zero":
        return (
            f"adapter.init: {start} reads the rounding error, which a quantized checkpoint does not "
            "have; set adapter.init: zero"
        )
    else:
        return None
    return f"{why}; use {_list(fit)}, or give the full-precision checkpoint as model.path"


def check_adapter_layers(r: Any) -> Problems:
    """adapter.targets against the layers that are packed, and the LoRA of adapter.init_from against them."""
    shapes = _shapes(r.model)
    config = r.adapter
    layers = (
        {} if shapes is None else {x.name: x for x in shapes.linears if r.quant.skip_reason(x.name) is None}
    )
    for i, pattern in enumerate(config.targets or []):
        if layers and not any(matches(pattern, name) for name in layers):
            yield Problem(
                ("adapter", "targets", i),
                f"got {pattern!r}, which matches no packed layer{_nearest_layers(pattern, list(layers))}",
            )
    source = getattr(config, "init_from", None)
    if source is None:
        return
    here = ("adapter", "init_from")
    if getattr(config, "init", "zero") != "zero":
        yield Problem(
            ("adapter", "init"),
            f"got {config.init!r} beside init_from; A and B have one start: remove one of the two",
        )
    try:
        lora = read_lora(source)
    except (OSError, ValueError) as error:
        yield Problem(here, f"got {source!r}: {error}")
        return
    # A file may name its layers without the model's prefix; then the check waits for the model
    # (adapters/lora_start.py).
    named = any(name in layers for name in lora.pairs)
    adapted = {name: (x.out_features, x.in_features) for name, x in layers.items() if config.trains(name)}
    for problem in lora_problems(
        lora, config, adapted if named else {n: (b.shape[0], a.shape[1]) for n, (a, b) in lora.pairs.items()}
    ):
        yield Problem(here, f"got {source!r}: {problem}")


def check_export(r: Any) -> Problems:
    """The export format against the grid of every layer, so that training never ends in a model that cannot
    be written.
    """
    name = r.export.format
    told = set()
    yield from _check_reader(r, EXPORTERS[name])
    config = getattr(r, "adapter", None)
    first = next((grid for _, grid in _grids(r)), None)
    if (
        config is not None
        and first is not None
        and config.ships_offset
        and EXPORTERS[name].reject(first, offset=True) != EXPORTERS[name].reject(first)
    ):
        message = (
            f"got {name!r}, which holds no float offset per group; {config.method} with this "
            "adapter.offset ships one"
        )
        yield Problem(("export", "format"), f"{message}; set adapter.offset: auto, or export.format: native")
    for path, grid in _grids(r):
        if config is not None and config.grid_name == grid.kind:
            grid = config.shipped(grid)
        grid = held(EXPORTERS[name], grid)
        reason = EXPORTERS[name].reject(grid)
        if reason is None and hasattr(r, "model"):
            reason = EXPORTERS[name].reject_dtype(grid, r.model.dtype)
        if reason and reason not in told:
            told.add(reason)
            where = "" if path == ("quant",) else f" (for {_path(path)})"
            yield Problem(("export", "format"), f"got {name!r}{where}: {reason}")
    shapes = _shapes(r.model) if not told and hasattr(r, "model") else None
    if shapes is None:
        return
    yield from _check_kinds(r, shapes)
    specs, widths = {}, {}
    embedding = shapes.token_embedding
    for layer in _packed(r.quant, shapes):
        try:
            grid = r.quant.grid_for(layer.name)
        except ValueError:
            return  # bits the grid does not have: check_grid told
        if layer == embedding:
            if EXPORTERS[name].reject_matrix(replace(layer.matrix, embedding=True), grid, layer.parts):
                continue  # _check_kinds told
        elif config is not None and config.grid_name == grid.kind and config.trains(layer.name):
            grid = config.shipped(grid)
        grid = held(EXPORTERS[name], grid)
        specs[layer.name] = LayerSpec((layer.out_features, layer.in_features), grid)
        if reason := EXPORTERS[name].reject_width(grid, layer.in_features):
            widths.setdefault((reason, _divides(grid.group_size, layer)), []).append(layer.name)
    for (reason, divides), names in widths.items():
        if divides:  # else _check_groups tells which sizes do
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            yield Problem(("export", "format"), f"got {name!r}, which cannot hold {names[0]}{more}: {reason}")
    # What is left is about layers together (mixed grids).
    alone = {f"{layer}: {reason}" for (reason, _), names in widths.items() for layer in names}
    head = f"{shapes.head.name}: " if r.quant.lm_head is not None and shapes.head is not None else None
    for reason in (
        [reason for reason in EXPORTERS[name].reject_model(specs) if reason not in alone] if specs else []
    ):
        if head is not None and reason.startswith(head):
            yield Problem(
                ("quant", "lm_head"), f"got {r.quant.lm_head}, and export.format is {name}: {reason}"
            )
        else:
            where = ("quant", "overrides") if r.quant.overrides else ("export", "format")
            yield Problem(where, f"export.format {name} cannot hold these layers together: {reason}")


def _packed(quant: Any, shapes: Shapes) -> list[Layer]:
    """Every matrix that will be packed: linears, then a head that is tied (no tensor of its own), then the
    embedding.
    """
    layers = [layer for layer in shapes.linears if quant.skip_reason(layer.name) is None]
    if quant.lm_head is not None and (head := shapes.head) is not None and head not in layers:
        layers.append(head)
    if quant.embeddings is not None and (embedding := shapes.token_embedding) is not None:
        layers.append(embedding)
    return layers


def _divides(group_size: int, layer: Layer) -> bool:
    return group_size == -1 or layer.in_features % group_size == 0


def _check_reader(r: Any, exporter: Any) -> Problems:
    """The packages a format needs, and what the model itself must be for it."""
    if reason := exporter.missing(exporter.writes_with):
        yield Problem(("export", "format"), f"got {exporter.name!r}, which {reason}")
        return
    if r.export.verify and (reason := exporter.missing(exporter.reads_with)):
        yield Problem(
            ("export", "verify"),
            f"got true, and reading {exporter.name} {reason}; or set export.verify: false and check the "
            "folder elsewhere",
        )
    folder = local_folder(r.model.path, r.model.revision) if hasattr(r, "model") else None
    if folder is None:
        return
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        ).to_dict()
    except Exception:  # check_model tells what is wrong with it; transformers raises anything here
        return
    whole = path_is(
        Path(r.model.path).expanduser(), "dir"
    )  # of a hub id, only part of the files may have been fetched
    for reason in exporter.reject_checkpoint(config, folder if whole else None):
        yield Problem(("export", "format"), f"got {exporter.name!r}: {reason}")


def _check_kinds(r: Any, shapes: Shapes) -> Problems:
    """Layers that are no plain linears (experts, Conv1D, an embedding) against the format."""
    exporter, reasons, specs = EXPORTERS[r.export.format], {}, {}
    embedding = shapes.token_embedding
    layers = [(x, replace(x.matrix, embedding=x == embedding)) for x in _packed(r.quant, shapes)]
    for layer, matrix in layers:
        try:
            grid = r.quant.grid_for(layer.name)
        except ValueError:
            continue  # bits the grid does not have: check_grid told
        if layer.tensors:  # else a tied head, which gets tensors of its own
            reasons.setdefault(exporter.reject_matrix(matrix, grid, layer.parts), layer.name)
        specs[layer.name] = LayerSpec(matrix.shape, grid)
    if any(matrix.expert is not None for _, matrix in layers):
        reasons.setdefault(exporter.reject_experts(specs), "all layers")
    for reason, name in reasons.items():
        if reason is not None:
            yield Problem(
                ("export", "format"), f"got {r.export.format!r} (for {name} and its like): {reason}"
            )


def check_tasks_reader(r: Any) -> Problems:
    """lm-eval measures models of transformers; some formats are read by another library."""
    name = r.export.format
    if r.eval.tasks and not EXPORTERS[name].measurable:
        yield Problem(
            ("eval", "tasks"),
            f"lm-eval cannot measure an export.format {name}; set export.format: native, which measures "
            "merged/, the equal model, "
            f"and write {name} afterwards with `lowbit-ft export RUN --format {name}`; or remove the tasks",
        )


# ---------------------------------------------------------------- model and layers


def _shapes(model: Any) -> Shapes | None:
    """The headers of the model when it is on this disk and readable."""
    folder = local_folder(model.path, model.revision)
    if folder is None:
        return None
    try:
        return read_shapes(folder)
    except (OSError, ValueError):
        # a local folder: check_model tells; a hub id half downloaded: model/load.py fetches the rest
        return None


def check_model(r: Any) -> Problems:
    """That a path which is meant as a folder is a checkpoint that can be read (a quantized one: in a format
    of incoming/).
    """
    path = r.model.path
    here = ("model", "path")
    folder = Path(path).expanduser()
    if not path_is(folder, "dir"):
        if path_is(folder, "file"):
            yield Problem(here, f"got {path!r}, a file; give the folder that holds config.json")
        elif not HUB_ID.fullmatch(path) or path_is(folder.parent, "dir") and len(folder.parts) > 1:
            yield Problem(
                here,
                f"got {path!r}; there is no such folder{near_names(folder)}; give a checkpoint folder or a "
                "hub id owner/name",
            )
        return
    if r.model.revision is not None:
        yield Problem(
            ("model", "revision"), f"got {r.model.revision!r}; a local folder has no revisions; remove it"
        )
    try:
        incoming = read_shapes(folder).incoming
        if incoming is not None:
            incoming.refuse_order()
    except (OSError, ValueError) as error:
        yield Problem(here, f"got {path!r}: {error}")


def check_layers(r: Any) -> Problems:
    """Targets, exclusions and overrides that match nothing; group sizes that do not fit a layer."""
    shapes = _shapes(r.model)
    if shapes is None or not shapes.linears:
        return
    quant, names = r.quant, [layer.name for layer in shapes.linears]
    for key, layer in (("lm_head", shapes.head), ("embeddings", shapes.token_embedding)):
        if getattr(quant, key) is not None and layer is None:
            yield Problem(
                ("quant", key),
                f"got {getattr(quant, key)}, but this model's files have no such tensor; set it to null",
            )
    # tied to the embedding it has no weight of its own in the file, but it is a layer all the same
    head = "lm_head"
    for key in ("targets", "exclude"):
        patterns = getattr(quant, key)
        for i, pattern in enumerate(patterns if isinstance(patterns, list) else []):
            if not any(matches(pattern, name) for name in [*names, head]) and not _pattern_error(pattern):
                near = _nearest_layers(pattern, [*names, head])
                yield Problem(("quant", key, i), f"got {pattern!r}, which matches no linear layer{near}")
    targets = [layer for layer in shapes.linears if quant.skip_reason(layer.name) is None]
    if not targets:
        yield Problem(
            ("quant", "targets"),
            f"got {quant.targets!r} less exclude: no layer is left; the model has {_kinds_of(names)}",
        )
    for i, override in enumerate(quant.overrides):
        if not any(matches(override.match, layer.name) for layer in targets):
            message = (
                f"got {override.match!r}, which matches no quantized "
                f"layer{_nearest_layers(override.match, names)}"
            )
            yield Problem(("quant", "overrides", i, "match"), message)
    if hasattr(r, "export"):
        yield from _check_groups(r, _packed(quant, shapes))


def _check_groups(r: Any, targets: list[Layer]) -> Problems:
    exporter = EXPORTERS[r.export.format]
    misfits: dict[tuple[int, int], list[str]] = {}
    for layer in targets:
        try:
            grid = r.quant.grid_for(layer.name)
        except ValueError:
            continue  # bits the grid does not have: check_grid told
        size = grid.group_size
        if not _divides(size, layer) and exporter.reject_width(grid, layer.in_features):
            misfits.setdefault((size, layer.in_features), []).append(layer.name)
    widths = {layer.in_features for layer in targets}
    for (size, width), names in misfits.items():
        fits = [str(g) for g in GROUP_SIZES if all(w % g == 0 for w in widths)] + ["-1"]
        alone = [str(g) for g in GROUP_SIZES if width % g == 0] + ["-1"]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield Problem(
            ("quant", "group_size"),
            f"got {size}, which does not divide the {width} inputs of {names[0]}{more}; allowed for all "
            f"layers: {', '.join(fits)}; "
            f"or an override for these layers ({', '.join(alone)}), or export.format: native (its last "
            "group may be shorter)",
        )


def check_lengths(r: Any) -> Problems:
    """Window lengths against the positions the model has."""
    shapes = _shapes(r.model)
    limit = shapes.number("max_position_embeddings", "n_positions") if shapes else None
    if limit is None:
        return
    windows = [(("data", "sequence_len"), r.data.sequence_len)]
    if hasattr(r, "eval"):
        windows.append((("eval", "window"), r.eval.window))
    for path, length in windows:
        if length > limit:
            yield Problem(
                path,
                f"got {length}; allowed: at most the {limit} positions of the model; set it to {limit} or "
                "less, or extend them in the model's "
                "config.json (rope_parameters, then max_position_embeddings)",
            )


def check_offload(r: Any) -> Problems:
    """Room on the disk for the inputs of all layers, which train.offload: disk writes at every step."""
    shapes = _shapes(r.model) if r.train.offload == "disk" else None
    if shapes is None:
        return
    layers, width = (
        shapes.number("num_hidden_layers", "n_layer") or 0,
        shapes.number("hidden_size", "n_embd") or 0,
    )
    tokens, size = r.train.micro_batch_size * r.data.sequence_len, {"float32": 4}.get(r.model.dtype, 2)
    needed = layers * tokens * width * size
    folder = next((p for p in (r.output, *r.output.absolute().parents) if path_is(p, "dir")), None)
    free = shutil.disk_usage(folder).free if folder is not None else needed
    if free < needed:
        yield Problem(
            ("train", "offload"),
            f"got 'disk', which needs {needed / 1e9:.3g} GB ({layers} layers x {tokens} tokens x {width} x "
            f"{size} bytes), and "
            f"{str(folder)!r} has {free / 1e9:.3g} GB free; choose another `output`, or "
            "set train.offload: cpu",
        )


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


def check_chat(r: Any) -> Problems:
    """format: chat needs the template of the model's tokenizer."""
    folder = Path(r.model.path).expanduser()
    if not path_is(folder, "dir") or has_chat_template(folder):
        return  # a hub id: data/examples.py looks, once the tokenizer is there
    if not any(path_is(folder / name, "file") for name in TOKENIZER_FILES):
        yield Problem(
            ("model", "path"),
            f"got {r.model.path!r}, which has no tokenizer ({', '.join(TOKENIZER_FILES)}); copy it there",
        )
        return
    for key, source in (("train", r.data.train), ("valid", r.data.valid)):
        if source is not None and source.format == "chat":
            message = (
                f"got 'chat', but {r.model.path} has no chat template; allowed: completion, alpaca, text"
            )
            yield Problem(("data", key, "format"), f"{message}; or put a chat_template.jinja into its folder")


def notes(recipe: Any) -> list[str]:
    """What is not wrong but worth knowing before a run: an existing run that will be continued, an inexact
    merge.
    """
    found = []
    if (recipe.output / "recipe.yaml").is_file():
        found.append(f"{recipe.output} holds a run already: it is continued from its newest valid checkpoint")
    if not recipe.adapter.exact_merge:
        found.append(
            f"{recipe.adapter.method} does not merge exactly: the merged weights are rounded again, and "
            "the loss of that is measured"
        )
    if recipe.quant.from_checkpoint and recipe.adapter.delta_unit is not None and recipe.adapter.exact_merge:
        found.append(
            f"{recipe.model.path} comes quantized, without residual bits: a code moves once the low-rank "
            "product passes half a step; "
            "where few do (the report counts them), raise train.learning_rate"
        )
    if (source := getattr(recipe.adapter, "init_from", None)) is not None:
        base, ours = read_lora(source).base, recipe.model.path
        if Path(base).name.lower() != Path(ours).name.lower():
            found.append(
                f"the LoRA {source} was trained on {base or 'an unnamed base'}, this run starts from "
                f"{ours}: the same weights?"
            )
    if local_folder(recipe.model.path, recipe.model.revision) is None:
        found.append(
            f"{recipe.model.path} is a hub id: layer names and widths are checked once it is fetched"
        )
    exporter = EXPORTERS[recipe.export.format]
    if reason := exporter.no_server(recipe.quant.grid_for("")):
        found.append(f"{reason}; transformers loads it all the same")
    shapes = _shapes(recipe.model)
    if exporter.fused_by_servers and shapes is not None:
        quant = recipe.quant
        names = [layer.name for layer in shapes.linears]
        conflict = fused_conflict(
            {n: quant.grid_for(n) if quant.skip_reason(n) is None else None for n in names}
        )
        found += [conflict] if conflict else []
    return found


# ---------------------------------------------------------------- words


def _list(names: Any) -> str:
    return ", ".join(map(str, names))


def _path(path: KeyPath) -> str:
    return ".".join(map(str, path))


def _methods_on(kind: str) -> list[str]:
    return [name for name, config in ADAPTERS.items() if config.grid_name == kind]


def _pattern_error(pattern: str) -> str:
    """What is wrong with a pattern that is neither a glob nor a regex, or ''."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return "" if any(character in pattern for character in "*?[") else str(error)
    return ""


def _kinds_of(names: list[str]) -> str:
    """Layer names with their numbers left out, each once: 'model.layers.*.mlp.up_proj, ...'."""
    kinds = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)
    return _list(list(kinds)[:8])


def _nearest_layers(pattern: str, names: list[str]) -> str:
    ends = dict.fromkeys(name.rpartition(".")[2] for name in names)
    word = re.sub(r"[^\w]+", " ", pattern).split()
    return f"{did_you_mean(word[-1] if word else pattern, ends)}; the model has {_kinds_of(names)}"


CHECKS: tuple[tuple[tuple[str, ...], Callable[[Any], Problems]], ...] = (
    (("model",), check_model),
    (("model",), check_device),
    (("quant",), check_grid),
    (("quant", "adapter"), check_method),
    (("quant", "export"), check_export),
    (("model", "quant", "adapter"), check_adapter_layers),
    (("model", "quant"), check_layers),
    (("model", "data"), check_lengths),
    (("model", "data"), check_chat),
    (("model", "data", "train", "output"), check_offload),
    ((), check_data),
    (("train", "data"), check_train),
    (("eval",), check_tasks),
    (("eval", "export"), check_tasks_reader),
    (("output",), check_output),
)
