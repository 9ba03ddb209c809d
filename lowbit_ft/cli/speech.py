"""encode, decode and speak: speech to codes and back, and text to speech, on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .places import LARGEST_SEED, folder_at, refuse_existing

Codec = Annotated[Path, typer.Argument(help="speech codec, or run of one", show_default=False)]
Prompt = Annotated[Path | None, typer.Option("--prompt", help="WAV file whose voice goes on")]
PromptText = Annotated[str, typer.Option("--prompt-text", help="what is said in it")]
Steps = Annotated[int | None, typer.Option("--steps", help="of the decoder; default 16")]
Guidance = Annotated[float | None, typer.Option("--guidance", help="0: none; default 1")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda")]
Force = Annotated[bool, typer.Option("--force", help="write over an existing file")]


def encode(
    folder: Codec,
    source: Annotated[
        Path, typer.Argument(help="WAV file; or rows with audio and text (.jsonl)", show_default=False)
    ],
    output: Annotated[
        Path, typer.Argument(help="codes (.json); or rows for a language model (.jsonl)", show_default=False)
    ],
    plain: Annotated[
        bool,
        typer.Option("--plain", help="rows without a chat: prompt and completion"),
    ] = False,
    device: Device = "auto",
    force: Force = False,
) -> None:
    """Turn speech into codes: a WAV file into a few integers a second, or rows into rows that a language
    model learns to speak from.
    """
    from .. import pipeline  # slow: torch, transformers; --help needs neither

    refuse_existing(output, force, "choose another name")
    typer.echo(pipeline.encode(folder_at(folder), source, output, device, plain))


def decode(
    folder: Codec,
    codes: Annotated[Path, typer.Argument(help="file that encode wrote", show_default=False)],
    output: Annotated[Path, typer.Argument(help="WAV file to write", show_default=False)],
    text: Annotated[str, typer.Option("--text", help="what is said")] = "",
    prompt: Prompt = None,
    prompt_text: PromptText = "",
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=LARGEST_SEED, help="of the noise it begins with")
    ] = 0,
    device: Device = "auto",
    force: Force = False,
) -> None:
    """Turn codes into speech again, with the text that they were spoken to where it is known."""
    from .. import pipeline  # slow: torch, transformers; --help needs neither

    refuse_existing(output, force, "choose another name")
    making = pipeline.Making(**_given(steps=steps, guidance=guidance, seed=seed))
    voice = None if prompt is None else pipeline.Voice(prompt, prompt_text)
    typer.echo(pipeline.decode(folder_at(folder), codes, output, text, voice, making, device))


def speak(
    folder: Annotated[
        Path, typer.Argument(help="language model with audio tokens, or run of one", show_default=False)
    ],
    codec: Codec,
    text: Annotated[str, typer.Argument(help="what to say", show_default=False)],
    output: Annotated[Path, typer.Argument(help="WAV file to write", show_default=False)],
    least: Annotated[int | None, typer.Option("--least", help="codes at least; default 12")] = None,
    most: Annotated[int | None, typer.Option("--most", help="codes at most; default 400")] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="0: the likeliest code; default 1")
    ] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="of the likeliest codes; default 50")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="of their sum; default 0.98")] = None,
    prompt: Prompt = None,
    prompt_text: PromptText = "",
    plain: Annotated[
        bool, typer.Option("--plain", help="ask without a chat, as rows of encode --plain do")
    ] = False,
    codes: Annotated[Path | None, typer.Option("--codes", help="write the codes too (.json)")] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=LARGEST_SEED, help="of the draws, and of the decoder's noise")
    ] = 0,
    device: Device = "auto",
    force: Force = False,
) -> None:
    """Say a text: a language model writes the codes, and their codec makes speech of them."""
    from .. import pipeline  # slow: torch, transformers; --help needs neither

    for path in (output, codes):
        if path is not None:
            refuse_existing(path, force, "choose another name")
    drawing = pipeline.Drawing(
        **_given(least=least, most=most, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    )
    making = pipeline.Making(**_given(steps=steps, guidance=guidance, seed=seed))
    voice = None if prompt is None else pipeline.Voice(prompt, prompt_text)
    where = folder_at(folder), folder_at(codec)
    typer.echo(pipeline.speak(*where, text, output, drawing, making, voice, plain, codes, device))


def _given(**options: Any) -> dict[str, Any]:
    """Options that were set."""
    return {key: value for key, value in options.items() if value is not None}
