"""draw: pictures of a diffusion transformer, on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .places import LARGEST_SEED, folder_at, refuse_existing


def draw(
    folder: Annotated[Path, typer.Argument(help="diffusion transformer, or run of one", show_default=False)],
    output: Annotated[Path, typer.Argument(help="PNG file to write", show_default=False)],
    label: Annotated[
        list[str] | None, typer.Option("--label", help="class by name; may be given again; default all")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="states of a text (.safetensors), of SD3 and Flux; may be given again"),
    ] = None,
    no_text: Annotated[
        Path | None, typer.Option("--no-text", help="states that stand for no text; default zeros")
    ] = None,
    count: Annotated[int, typer.Option("--count", help="pictures of each class")] = 4,
    steps: Annotated[int, typer.Option("--steps", help="from noise to a picture")] = 20,
    guidance: Annotated[float, typer.Option("--guidance", help="1: none; more holds to the class")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, max=LARGEST_SEED, help="of the noise")] = 0,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="write over an existing file")] = False,
) -> None:
    """Draw pictures with a diffusion transformer that was trained here: a row for each class, or text."""
    from .. import pipeline  # slow: torch, transformers; --help needs neither

    refuse_existing(output, force, "choose another name")
    options: dict[str, Any] = {
        "count": count,
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
        "device": device,
    }
    options |= {"texts": text or [], "no_text": no_text}
    typer.echo(pipeline.draw(folder_at(folder), output, label or [], **options))
