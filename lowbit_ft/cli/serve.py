"""serve: an OpenAI-compatible server for a folder of ours. It is `transformers serve`, with our format known
to it.

Started by itself, `transformers serve` never imports this package, and transformers only warns about a format
it does not know: it would answer from random weights. Options and their defaults are those of transformers,
and so are the endpoints that answer; those that load or unload models are closed (serve_app.py). A request's
"model" is the folder as /v1/models lists it, or as it was typed, or left out.
"""

import importlib.util
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from ..export import EXPORTERS
from ..export.folder import check_if_ours
from ..integrations import register
from ..kv_cache import KVConfig, cache_line, place_kv_cache
from ..model.config import CONFIG, load_config, read_config, stored_dtype
from ..model.meta import meta_model
from ..recipe.layers import has_chat_template
from ..rundir import merged_of, shipped
from .serve_app import one_model

NEEDS = ("fastapi", "uvicorn", "openai")
MERGED = "serve merged/ of its run, which is the same model: lowbit-ft serve RUN/merged"


def serve(given: Path, options: list[str]) -> None:
    """Serve a model folder, or the model of a run folder, until it is stopped. options: further ones of
    `transformers serve` (--port, --device, ...). A run whose export transformers does not serve gives its
    merged/, which is the same model, and that is said.

    Raises ValueError for a folder without a model or of a format that `transformers serve` cannot load, and
    for missing packages.
    """
    if missing := [name for name in NEEDS if importlib.util.find_spec(name) is None]:
        raise ValueError(f"serving needs {', '.join(missing)}; run pip install 'lowbit-ft[serve]'")
    folder = shipped(given)
    if (reason := unserved(folder)) is not None:
        if folder == given or not (given / "merged").is_dir():
            raise ValueError(f"{reason}, or {MERGED}")
        folder = merged_of(given)
        print(f"note: {reason}. Serving {folder}, which is the same model", file=sys.stderr)
    check_if_ours(folder)
    register()
    from transformers.cli.transformers import app

    if (line := served_cache(folder)) is not None:
        print(line)
    print(how_to_ask(folder, given, options), flush=True)
    with one_model(str(folder), str(given)):
        app(["serve", str(folder), *options], prog_name="lowbit-ft")


def how_to_ask(folder: Path, given: Path, options: list[str]) -> str:
    """What a request names the model, and a request that works once the server is up."""
    chosen = {"--host": "localhost", "--port": "8000"}
    for name, value in zip(options, [*options[1:], ""], strict=True):
        key, joined, written = name.partition("=")
        if key in chosen:
            chosen[key] = written if joined else value
    content: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
    chats = has_chat_template(folder)
    body = {"model": str(given), **(content if chats else {"prompt": "Hello"})}
    url = f"http://{chosen['--host']}:{chosen['--port']}/v1/{'chat/' if chats else ''}completions"
    also = f" (or {given})" if given != folder else ""
    return (
        f"model: {folder}{also}; a request names it so, or not at all:\n"
        f"  curl {url} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
    )


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


def unserved(folder: Path) -> str | None:
    """Why `transformers serve`, which gets a folder and nothing else, would not load this one as it was
    written, and what does; None when it would.
    """
    config = read_config(folder).get("quantization_config")
    method = config.get("quant_method") if isinstance(config, dict) else None
    exporter = next((e for e in EXPORTERS.values() if e.quant_method == method), None)
    if exporter is None:  # formats of one method have one reader
        return None
    instead = f"run {exporter.serve(str(folder))}"
    if not exporter.transformers_serve:  # it would warn, and answer from random weights
        return f"{folder}: {exporter.name} is not served by transformers; {instead}"
    if reason := exporter.missing(exporter.reads_with):
        return f"{folder}: reading {exporter.name} {reason}"
    if exporter.load_options(config or {}, folder):
        return (
            f"{folder}: transformers reads this {exporter.name} folder only with options that its server "
            f"does not take (asymmetric grids are decoded while loading); {instead}"
        )
    return None
