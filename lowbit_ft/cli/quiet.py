"""What other libraries would write between our lines, and no user can act on, is not written.

Bars: transformers, compressed-tensors, datasets and lm-eval draw one for every reload of a stage. A
download's bar stays: it is what one waits for, and huggingface_hub asks for it with disable=None, "where
there is a terminal". TQDM_DISABLE would not do: compressed-tensors passes disable=False, which wins over
it.

One warning of bitsandbytes: on some CPUs it looks for a 4-bit kernel of its own, which nothing here calls.
Every other warning stays.
"""

import logging
from typing import Any

from tqdm import std

UNUSED_KERNEL = ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward")
_Bar: Any = std.tqdm
_init = _Bar.__init__


def quiet() -> None:
    """Called when a command starts; for the rest of the process."""
    _Bar.__init__ = _only_downloads
    logging.getLogger(UNUSED_KERNEL[0]).addFilter(_used)


def _only_downloads(bar: Any, *args: Any, **options: Any) -> None:
    options["disable"] = None if options.get("disable", False) is None else True
    _init(bar, *args, **options)


def _used(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(UNUSED_KERNEL[1])
