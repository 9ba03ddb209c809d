"""output: the folder of the run. It is a key without a section: one path, and a check that the folder can be
made and is not a folder of something else.
"""

from __future__ import annotations

import os
from typing import Any

from ...files.atomic import visible_names
from ...files.marker import is_run
from ..paths import path_is
from ..yaml import Problem
from .base import Problems


def check_output(r: Any) -> Problems:
    """That the run folder can be made, and is not a folder of something else."""
    output = r.output
    if path_is(output, "dir"):
        try:
            inside = visible_names(output)
        except OSError as error:
            yield Problem(
                ("output",),
                f"got {str(output)!r}; it cannot be read ({error.strerror}); choose another folder",
            )
            return
        if inside and not is_run(output):
            yield Problem(
                ("output",),
                f"got {str(output)!r}, which holds other files ({inside[0]}, ...); choose "
                "a new or empty folder",
            )
    elif path_is(output, "any"):
        yield Problem(("output",), f"got {str(output)!r}, a file; choose a folder")
        return
    parent = output
    while not path_is(parent, "any") and parent != parent.parent:
        parent = parent.parent
    if not path_is(parent, "dir"):
        yield Problem(
            ("output",), f"got {str(output)!r}, but {str(parent)!r} is not a folder; choose another one"
        )
    elif not os.access(parent, os.W_OK | os.X_OK):
        yield Problem(
            ("output",),
            f"got {str(output)!r}, but {str(parent.absolute())!r} is not writable; choose another folder",
        )
