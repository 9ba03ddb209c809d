"""The command line: `lowbit-ft run recipe.yaml`, and one command per stage.

Every command is a few lines that call the function of the same name in pipeline.py (imported inside, so
that --help is quick). A user error (ValueError or FileNotFoundError, whose messages say what to do) is
printed without a traceback and exits with 2; ctrl-C exits with 130; `--debug` shows the traceback.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from .. import __version__
from .draw import draw
from .loading import load, refuse_what_cannot_fit, waking
from .places import folder_at, refuse_existing
from .quiet import quiet
from .said import said
from .speech import decode, encode, speak

app = typer.Typer(
    name="lowbit-ft",
    help="Fine-tune a low-bit language model whose trained integers are the integers that ship.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeArgument = Annotated[Path, typer.Argument(help="recipe YAML", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="a.b=value: keys set over the recipe", show_default=False)
]
Anyway = Annotated[bool, typer.Option("--anyway", help="start even when plan says that it cannot fit")]
RunFolder = Annotated[Path, typer.Argument(help="folder of a run (output of the recipe)", show_default=False)]


FORMATS = (  # without importing their table, which takes seconds; a test compares the two
    "compressed-tensors, int-quantized, gguf, gptq, gptq_v2, awq, mlx, onnx, torchao or native"
)
ROWS = (
    'rows for gptq and signround: jsonl with "messages", "prompt" and "completion", "text" or another format '
    "of docs/data.md, a .txt file, or a hub data set"
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


def _gigabytes(given: float | None) -> float | None:
    if given is not None and not 0.1 <= given <= 1e6:
        raise typer.BadParameter(f"got {given}; allowed: 0.1 to 1000000")
    return given


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Options for every command. `main` looks for --debug itself, because errors pass through there."""


@app.command()
def run(recipe: RecipeArgument, overrides: Overrides = None, anyway: Anyway = False) -> None:
    """The whole line: load, quantize, attach, train, merge, evaluate, export, report. Continues a run that
    was stopped.
    """
    waking()
    from .. import pipeline  # slow: torch, transformers; --help needs neither

    loaded = load(recipe, overrides)
    refuse_what_cannot_fit(loaded, anyway)
    pipeline.run(loaded)


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", help="folder with the model's config.json, when the model is not on this disk"
        ),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            "--memory", callback=_gigabytes, help="GB to fit into; default: this machine's GPU, else 24"
        ),
    ] = None,
    processes: Annotated[
        int, typer.Option("--processes", min=1, help="of a distributed run", envvar="WORLD_SIZE")
    ] = 1,
    tokens_per_second: Annotated[
        float | None,
        typer.Option("--tokens-per-second", min=0.001, help="or images, for an estimate of the time"),
    ] = None,
    fit: Annotated[
        Path | None, typer.Option("--fit", help="write the recipe to this file, changed so that it fits")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="let --fit write over an existing file")] = False,
    search: Annotated[
        bool, typer.Option("--search/--no-search", help="look for the largest batch and length")
    ] = True,
) -> None:
    """Check a recipe and show its layers, its memory against a card, and what to change; nothing is
    loaded.
    """
    from .plan import show_plan, write_fit  # slow: torch; --help does without
    from .plan_checks import show_checks  # as above

    loaded = load(recipe, overrides, weights=False)
    wrong = show_checks(loaded)
    made = show_plan(
        loaded,
        folder=config,
        memory_gb=memory,
        processes=processes,
        tokens_per_second=tokens_per_second,
        search=search,
    )
    if fit is not None:
        write_fit(loaded, fit, folder=config, memory_gb=memory, processes=processes, force=force)
    if made is None:
        wrong.append(f"no plan without the config.json of {loaded.model.path}; give --config FOLDER")
    if wrong:
        raise ValueError("\n".join(wrong))


@app.command()
def quantize(
    target: Annotated[
        str,
        typer.Argument(metavar="RECIPE|MODEL", help="recipe YAML, or a folder or hub id", show_default=False),
    ],
    overrides: Overrides = None,
    bits: Annotated[int | None, typer.Option("--bits", help="of MODEL: 2, 3, 4 (default), 6 or 8")] = None,
    group_size: Annotated[
        int | None, typer.Option("--group-size", help="inputs that share a scale; default 128")
    ] = None,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="with zero points")] = False,
    calibrate: Annotated[
        str | None, typer.Option("--calibrate", help="mse (default), gptq, ...; gptq needs --data")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help=ROWS)] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="folder to write")] = None,
) -> None:
    """Pack a model: a recipe's into its run folder (base/), from which `run` and `train` go on; or MODEL, by
    these options, into a folder that from_pretrained reads.
    """
    waking()
    from .. import pipeline  # slow: torch, transformers; --help needs neither
    from .quantize import quantize_model  # as above

    options = {"bits": bits, "group_size": group_size, "calibrate": calibrate}
    options = {key: value for key, value in options.items() if value is not None}
    if not target.lower().endswith((".yaml", ".yml")):
        if asymmetric:
            options["symmetric"] = False
        quantize_model(target, overrides or [], options, data, output)
        return
    if options or asymmetric or data is not None or output is not None:
        raise ValueError(
            f"{target} is a recipe, which says these itself: write quant.bits=4, output=DIR, ... behind it"
        )
    pipeline.quantize(load(Path(target), overrides))


@app.command()
def train(recipe: RecipeArgument, overrides: Overrides = None, anyway: Anyway = False) -> None:
    """Load, quantize, attach and train; ends with the adapter and the merged weights."""
    waking()
    from .. import pipeline  # slow: torch, transformers; --help needs neither

    loaded = load(recipe, overrides)
    refuse_what_cannot_fit(loaded, anyway)
    pipeline.train(loaded)


@app.command()
def merge(run_dir: RunFolder) -> None:
    """Merge the trained adapter into the packed integers, and compare with the hash that training wrote."""
    from .. import pipeline  # slow: torch, transformers; --help needs neither

    pipeline.merge(folder_at(run_dir))


@app.command()
def export(
    folder: Annotated[
        Path, typer.Argument(help="folder of a run, packed model, or adapter", show_default=False)
    ],
    format: Annotated[
        str | None, typer.Option("--format", "-f", help=f"{FORMATS}; default: the recipe's")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="folder to write, where FOLDER is no run")
    ] = None,
    base: Annotated[Path | None, typer.Option("--base", help="packed base of an adapter folder")] = None,
) -> None:
    """Write a merged model as a Hugging Face folder for transformers, vLLM, ...: of a run, of a packed folder
    that any trainer saved, or of a PEFT adapter over its base.
    """
    from .. import pipeline  # slow: torch, transformers; --help needs neither

    pipeline.export(folder_at(folder), format, output, base)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="folder of a run, or an exported model", show_default=False)],
    repo: Annotated[str, typer.Argument(help="owner/name on the hub", show_default=False)],
    public: Annotated[bool, typer.Option("--public", help="open to everybody; default: private")] = False,
) -> None:
    """Upload an export to the Hugging Face hub with its model card, private unless --public."""
    from .. import pipeline  # slow: torch, transformers; --help needs neither

    pipeline.push(folder_at(folder), repo, public)


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="exported model", show_default=False)]) -> None:
    """Reload an exported folder through its real reader and compare codes, scales and logits."""
    from .. import pipeline  # slow: torch, transformers; --help needs neither

    pipeline.verify(folder_at(folder))


@app.command(name="eval")
def evaluate(
    folder: Annotated[Path, typer.Argument(help="folder of a run, or of one model", show_default=False)],
    task: Annotated[
        list[str] | None, typer.Option("--task", "-t", help="lm-eval task or task file; default: eval.tasks")
    ] = None,
    stage: Annotated[
        list[str] | None, typer.Option("--stage", "-s", help="base, quantized, trained, merged, exported")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="rows of each task")] = None,
) -> None:
    """Perplexity, KL and lm-eval tasks of base, quantized, trained, merged and exported model. With --task or
    --stage: only tasks.
    """
    waking()
    from .. import pipeline  # slow: torch, transformers; --help needs neither

    pipeline.evaluate(folder_at(folder), task or [], stage or [], limit)


@app.command()
def generate(
    folder: Annotated[Path, typer.Argument(help="exported model or run folder", show_default=False)],
    prompt: Annotated[str, typer.Argument(help="what to answer; - reads standard input", show_default=False)],
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="tokens at most")
    ] = 128,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda")] = "auto",
) -> None:
    """Answer a prompt."""
    from .. import pipeline  # slow: torch, transformers; --help needs neither

    answer = pipeline.generate(
        folder_at(folder), sys.stdin.read() if prompt == "-" else prompt, max_new_tokens, device
    )
    if answer is not None:
        typer.echo(answer)


app.command()(draw)
app.command()(encode)
app.command()(decode)
app.command()(speak)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="exported model or run folder", show_default=False)],
) -> None:
    """Answer requests over HTTP as OpenAI's API does: `transformers serve`, whose options may follow (--host
    localhost, --port 8000, --device auto, --dtype auto, --enable-cors, ...; all: transformers serve --help).
    """
    from .serve import serve as serve_folder  # slow: torch; --help does without

    serve_folder(folder_at(folder), context.args)


@app.command()
def report(run_dir: RunFolder) -> None:
    """Write report.html of a run again."""
    from .. import pipeline  # slow: torch, transformers; --help needs neither

    typer.echo(pipeline.report(folder_at(run_dir)))


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe (for editors: it completes and checks YAML)."""
    from ..recipe.recipe import recipe_schema  # slow: torch; --help does without

    typer.echo(json.dumps(recipe_schema(), indent=2))


@app.command()
def init(
    model_path: Annotated[str, typer.Argument(help="checkpoint folder or hub id", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="recipe to write")] = Path("recipe.yaml"),
    force: Annotated[bool, typer.Option("--force", help="write over an existing file")] = False,
    memory: Annotated[
        float | None,
        typer.Option(
            "--memory", callback=_gigabytes, help="GB of the GPU that it is written for, here or elsewhere"
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="folder with the model's config.json, for --memory")
    ] = None,
) -> None:
    """Write a commented recipe for a model; with --memory, one that fits."""
    refuse_existing(output, force, "choose another name with -o")  # before seconds of imports
    from .init import write_recipe  # slow: torch; --help does without

    write_recipe(model_path, output, force=force, memory_gb=memory, config=config)
    typer.echo(f"wrote {output}: set data.train.path and output, then  lowbit-ft plan {output}")


@app.command(name="import-recipe")
def import_recipe(
    file: Annotated[Path, typer.Argument(help="YAML of Axolotl or LLaMA-Factory", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="recipe to write")] = Path("recipe.yaml"),
    force: Annotated[bool, typer.Option("--force", help="write over an existing file")] = False,
) -> None:
    """Write a recipe from another trainer's YAML, and list what it could not take over."""
    from .import_recipe import write_imported  # slow: torch; --help does without

    draft = write_imported(file, output, force=force)
    for key, why in draft.left:
        typer.echo(f"left: {key}: {why}", err=True)
    typer.echo(
        f"wrote {output} ({draft.trainer}): {len(draft.values)} keys set, {len(draft.left)} left; next  "
        f"lowbit-ft plan {output}"
    )


STOPPED = "stopped; what was finished is kept, and the same command goes on from there"


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `lowbit-ft` command; always leaves through SystemExit (0 fine, 2 user error, 130
    ctrl-C).
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    quiet()
    try:
        app([a for a in arguments if a != "--debug"], prog_name="lowbit-ft", standalone_mode=True)
    except KeyboardInterrupt:
        typer.echo(STOPPED, err=True)
        sys.exit(130)
    except SystemExit as left:
        if left.code == 130:  # typer took the KeyboardInterrupt, and said nothing
            typer.echo(STOPPED, err=True)
        raise
    except (ValueError, OSError) as error:
        if debug:
            raise
        typer.echo(f"error: {said(error)}", err=True)
        sys.exit(2)
    except Exception as error:
        if (
            type(error).__name__ != "RunStopped"
        ):  # by name: importing the pipeline here would slow every --help
            raise
        typer.echo(str(error), err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
