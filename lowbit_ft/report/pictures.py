"""The pictures of the report page: what the model made at each stage, from the same noise."""

from __future__ import annotations

from ..files.regular import read_regular
from .files import STAGES, NotShown, RunFiles
from .html import escape, image, note

FOLDER = "pictures"
MOST = 8 << 20  # bytes of a sheet
PNG = b"\x89PNG\r\n\x1a\n"


def pictures_section(run: RunFiles) -> str:
    """A sheet for each stage that has one. NotShown when there is none, or one is no PNG file."""
    found = []
    for stage, name in STAGES.items():
        place = f"{FOLDER}/{stage}.png"
        try:
            sheet = read_regular(run.folder / place, MOST)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise NotShown(f"{place} cannot be read: {error}") from None
        if not sheet.startswith(PNG):
            raise NotShown(f"{place} is no PNG file.")
        found.append(f"<h3>{escape(name)}</h3>{image(sheet, f'pictures of the model: {name}')}")
    if not found:
        raise NotShown(f"No sheet of pictures was made ({FOLDER}/ has none).")
    return "".join(found) + note("A row is a class, or a text; every stage starts from the same noise.")
