"""serve: an OpenAI-compatible server for a folder of ours. It is `transformers serve`, with our format known to it.

Started by itself, `transformers serve` never imports this package, and transformers only warns about a format it does not know: it
would answer from random weights. Endpoints, options and their defaults are those of transformers. A request's "model" is the folder
as it was given here, or left out.
"""

import importlib.util
from pathlib import Path

from .export.reader import read_config
from .integrations import register

NEEDS = ("fastapi", "uvicorn", "openai")


def serve(folder: Path, options: list[str]) -> None:
    """Serve one model until it is stopped. options: further ones of `transformers serve` (--port, --device, ...).

    Raises ValueError for a folder without a model, and for missing packages.
    """
    if missing := [name for name in NEEDS if importlib.util.find_spec(name) is None]:
        raise ValueError(f"serving needs {', '.join(missing)}; run pip install 'lowbit-ft[serve]'")
    read_config(folder)
    register()
    from transformers.cli.transformers import app

    app(["serve", str(folder), *options], prog_name="lowbit-ft")
