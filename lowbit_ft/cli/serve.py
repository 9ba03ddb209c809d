"""serve: an OpenAI-compatible server for a folder of ours. It is `transformers serve`, with our format known
to it.

Started by itself, `transformers serve` never imports this package, and transformers only warns about a format
it does not know: it would answer from random weights. Options and their defaults are those of transformers,
and so are the endpoints that answer; those that load or unload models are closed (serve_app.py). A request's
"model" is the folder as /v1/models lists it, or left out.
"""

import importlib.util
from pathlib import Path

from ..export import EXPORTERS
from ..export.folder import check_if_ours
from ..integrations import register
from ..kv_cache import KVConfig, cache_line, place_kv_cache
from ..model.config import CONFIG, load_config, read_config, stored_dtype
from ..model.meta import meta_model
from ..rundir import shipped
from .serve_app import one_model

NEEDS = ("fastapi", "uvicorn", "openai")


def serve(folder: Path, options: list[str]) -> None:
    """Serve a model folder, or the model of a run folder, until it is stopped. options: further ones of
    `transformers serve` (--port, --device, ...).

    Raises ValueError for a folder without a model or of a format that `transformers serve` cannot load, and
    for missing packages.
    """
    if missing := [name for name in NEEDS if importlib.util.find_spec(name) is None]:
        raise ValueError(f"serving needs {', '.join(missing)}; run pip install 'lowbit-ft[serve]'")
    folder = shipped(folder)
    refuse_format(folder)
    check_if_ours(folder)
    register()
    from transformers.cli.transformers import app

    if (line := served_cache(folder)) is not None:
        print(line)
    with one_model(str(folder)):
        app(["serve", str(folder), *options], prog_name="lowbit-ft")


def served_cache(folder: Path) -> str | None:
    """What the folder's cache takes, from its config.json; None where keys and values are as they come."""
    entry = (read_config(folder).get("quantization_config") or {}).get("kv_cache")
    if entry is None:
        return None
    config, dtype = load_config(folder), stored_dtype(folder / CONFIG, read_config(folder))
    del config.quantization_config  # a model without weights: its layers need not be packed
    model = meta_model(config, dtype, "sdpa", folder)
    place_kv_cache(model, KVConfig.from_json(entry))
    return cache_line(model, dtype)


def refuse_format(folder: Path) -> None:
    """ValueError when `transformers serve`, which gets a folder and nothing else, would not load this one as
    it was written.
    """
    config = read_config(folder).get("quantization_config")
    method = config.get("quant_method") if isinstance(config, dict) else None
    for exporter in [e for e in EXPORTERS.values() if e.quant_method == method][
        :1
    ]:  # formats of one method have one reader
        merged = "serve merged/ of its run, which is the same model: lowbit-ft serve RUN/merged"
        if not exporter.transformers_serve:  # it would warn, and answer from random weights
            raise ValueError(
                f"{folder}: {exporter.name} is not served by transformers; run "
                f"{exporter.serve(str(folder))}, or {merged}"
            )
        if reason := exporter.missing(exporter.reads_with):
            raise ValueError(f"{folder}: reading {exporter.name} {reason}; or {merged}")
        if exporter.load_options(config or {}, folder):
            raise ValueError(
                f"{folder}: transformers reads this {exporter.name} folder only with options that its "
                "server does not take "
                "(asymmetric grids are decoded while loading); run "
                f"{exporter.serve(str(folder))}, or {merged}"
            )
