"""runnable: the folder of a model that torch computes with, for what is no server's business: draw, speak."""

from __future__ import annotations

from pathlib import Path

from ..export.folder import check_if_ours
from ..export.reader import outside_torch
from ..rundir import merged_of, shipped


def torch_folder(folder: Path) -> Path:
    """The model folder of a run, exported/ or, where that is read outside of torch, merged/; any other as it
    is. ValueError for a folder of such a format, and for one that is not what was written."""
    found = shipped(folder)
    if (name := outside_torch(found)) is not None:
        if found == folder:
            raise ValueError(
                f"{folder}: an {name} folder is computed outside of torch; give the run that it was exported "
                "from, or merged/ of it, which computes the same"
            )
        found = merged_of(folder)
    check_if_ours(found)
    return found
