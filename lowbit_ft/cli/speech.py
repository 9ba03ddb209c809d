"""encode and decode: speech to codes and back, on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .places import folder_at, refuse_existing


def encode(
    folder: Annotated[Path, typer.Argument(help="speech codec, or run of one", show_default=False)],
    wav: Annotated[Path, typer.Argument(help="WAV file", show_default=False)],
    output: Annotated[Path, typer.Argument(help="file of codes to write (.json)", show_default=False)],
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="write over an existing file")] = False,
) -> None:
    """Turn speech into codes: a WAV file into a few integers a second."""
    from .. import pipeline  # slow: torch, transformers; --help needs neither

    refuse_existing(output, force, "choose another name")
    typer.echo(pipeline.encode(folder_at(folder), wav, output, device))


def decode(
    folder: Annotated[Path, typer.Argument(help="speech codec, or run of one", show_default=False)],
    codes: Annotated[Path, typer.Argument(help="file that encode wrote", show_default=False)],
    output: Annotated[Path, typer.Argument(help="WAV file to write", show_default=False)],
    text: Annotated[str, typer.Option("--text", help="what is said")] = "",
    prompt: Annotated[Path | None, typer.Option("--prompt", help="WAV file whose voice goes on")] = None,
    prompt_text: Annotated[str, typer.Option("--prompt-text", help="what is said in it")] = "",
    steps: Annotated[int | None, typer.Option("--steps", help="of the decoder; default 16")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", help="0: none; default 1")] = None,
    seed: Annotated[int, typer.Option("--seed", help="of the noise it begins with")] = 0,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="write over an existing file")] = False,
) -> None:
    """Turn codes into speech again, with the text that they were spoken to where it is known."""
    from .. import pipeline  # slow: torch, transformers; --help needs neither

    refuse_existing(output, force, "choose another name")
    options: dict[str, Any] = {"steps": steps, "guidance": guidance}
    options = {key: value for key, value in options.items() if value is not None}
    voice = None if prompt is None else pipeline.Voice(prompt, prompt_text)
    typer.echo(
        pipeline.decode(folder_at(folder), codes, output, text, voice, seed=seed, device=device, **options)
    )
