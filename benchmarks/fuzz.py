"""Files that were cut, edited or meant to harm, thousands of them: each must be taken or answered.

    python -m benchmarks.fuzz --count 10000 --seed 0

One process. Honest files are made once (a tiny Llama, dense and in three packed formats, a short run, rows,
a recipe); every case is a copy of links to them with one file changed (fuzz_mutate.py), and a door that opens
it (fuzz_doors.py). A case is

    fine       taken, and it makes sense
    answered   ValueError or OSError, as the command line tells it, naming the file (or the key of the recipe)
    nameless   answered without the file's name
    traceback  any other exception
    hang       no end within --limit seconds
    nonsense   taken, and what was made of it is wrong

Counts go to --out as JSON, the first offenders of each class to the screen, with the number that makes the
case again: `--only NUMBER ... --seed S`. It exits with 1 when there is one.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "recipes" / "assets"
BAD = ("nameless", "traceback", "hang", "nonsense")
GIGABYTES = 12  # of address space: a case that wants more gets MemoryError, not the machine


class Hang(BaseException):
    """The watchdog; no Exception, so that nobody takes it for one."""


def honest_files(folder: Path) -> None:
    """What every case starts from."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from lowbit_ft import pipeline
    from lowbit_ft.export import EXPORTERS, Weights
    from lowbit_ft.export.writer import write_model
    from lowbit_ft.model.checkpoint import Checkpoint
    from lowbit_ft.quantize.quantize import Packing
    from lowbit_ft.recipe.recipe import load_recipe
    from lowbit_ft.recipe.sections.quant import QuantSection

    from .fuzz_doors import TOKENIZER

    torch.manual_seed(0)
    dense = folder / "dense"
    config = LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=0, pad_token_id=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(dense)
    for path in (ASSETS / "tiny-llama").glob("*"):
        if "token" in path.name or path.name in ("chat_template.jinja", "generation_config.json"):
            shutil.copyfile(path, dense / path.name)
    TOKENIZER[:] = [AutoTokenizer.from_pretrained(dense)]
    _rows(folder)
    recipe = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text())
    recipe["model"]["path"], recipe["output"] = str(dense), str(folder / "run")
    recipe["quant"] |= {"group_size": 32}
    recipe["data"] |= {
        "train": {"path": str(folder / "chat.jsonl"), "format": "chat"},
        "valid": {"path": str(folder / "chat.jsonl"), "format": "chat"},
        "sequence_len": 64,
    }
    recipe["train"] |= {"max_steps": 2, "micro_batch_size": 2, "eval_every": 1, "save_every": 1}
    recipe["eval"] |= {"windows": 2, "window": 64, "max_new_tokens": 2, "generate": ["Say hello."]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    pipeline.run(load_recipe(folder / "recipe.yaml"))
    for name, symmetric in (("gptq", True), ("awq", False), ("compressed-tensors", False)):
        quant = QuantSection(group_size=32, symmetric=symmetric, residual_bits=0, calibrate="minmax", bits=4)
        checkpoint = Checkpoint.open(dense, dtype="float32")
        packing = Packing(
            checkpoint, quant, device=torch.device("cpu"), dtype=torch.float32, attention="sdpa",
            calibration=lambda: [],
        )  # fmt: skip
        write_model(folder / name, checkpoint, Weights(packing.layer_specs, packing.take), EXPORTERS[name])


def _rows(folder: Path) -> None:
    words = ["read the file", "close it", "return nothing", "ä ö ü", "1 2 3", "a b c d e f g"]
    made = {
        "chat": lambda a, b: {
            "messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]
        },
        "alpaca": lambda a, b: {"instruction": a, "input": "", "output": b},
        "completion": lambda a, b: {"prompt": a, "completion": b},
        "text": lambda a, b: {"text": f"{a} {b} " * 20},
    }
    for name, row in made.items():
        lines = [json.dumps(row(words[i % 6], words[(i + 1) % 6])) for i in range(12)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def links_to(honest: Path, folder: Path, needs: Sequence[str]) -> None:
    """The honest files again, as hard links: whoever changes one removes it first. What names the old place
    is written anew."""
    folder.mkdir()
    for name in needs:
        if (honest / name).is_dir():
            shutil.copytree(honest / name, folder / name, copy_function=os.link)
        else:
            os.link(honest / name, folder / name)
    for path in (folder / "recipe.yaml", folder / "run" / "recipe.yaml"):
        if not path.is_file():
            continue
        text = path.read_text().replace(str(honest), str(folder))
        path.unlink()
        path.write_text(text)


def judged(door: Callable[[], None], folder: Path, limit: float) -> tuple[str, str]:
    """(class, first line of what was said) of one case."""
    from .fuzz_doors import Nonsense

    def stop(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        try:
            door()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Hang:
        return "hang", "".join(traceback.format_stack(limit=1)).strip()
    except Nonsense as error:
        return "nonsense", str(error)
    except (ValueError, OSError) as error:
        text = str(error) or type(error).__name__
        named = isinstance(error, OSError) and error.filename
        return "answered" if named or str(folder) in text else "nameless", text
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "lowbit_ft" in f.filename][-1:]
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in [place, *ours])
        return "traceback", f"{type(error).__name__}: {error} at {where}"
    return "fine", ""


def fuzz(
    honest: Path, numbers: Sequence[int], seed: int, limit: float, show: int = 3, until: float = math.inf
) -> dict[str, Any]:
    """Counts by kind and class, seconds by kind, and the offenders: [number, kind, what was done,
    what was said]."""
    from .fuzz_doors import KINDS

    counts: dict[str, Counter[str]] = defaultdict(Counter)
    offenders, slowest, shown = [], (0.0, ""), Counter()
    names, weights = list(KINDS), [kind.share for kind in KINDS.values()]
    for name, kind in KINDS.items():
        links_to(honest, folder := honest.parent / f"honest-{name}", kind.needs)
        verdict = judged(partial(kind.read, folder, kind.honest), folder, limit)
        assert verdict == ("fine", ""), f"{name}: an honest file is {verdict}"
        shutil.rmtree(folder)
    seconds: dict[str, float] = defaultdict(float)
    for number in numbers:
        if time.monotonic() > until:
            break
        rng = random.Random(f"{seed}-{number}")
        name = rng.choices(names, weights)[0]
        kind, folder = KINDS[name], honest.parent / f"case-{number}"
        links_to(honest, folder, kind.needs)
        what, changed = kind.change(folder, rng)
        began = time.monotonic()
        verdict, said = judged(partial(kind.read, folder, changed), folder, limit)
        took = time.monotonic() - began
        seconds[name] += took
        slowest = max(slowest, (took, f"{number} {what}"))
        counts[name][verdict] += 1
        if verdict in BAD:
            offenders.append([number, name, what, said[:400]])
            shown[verdict] += 1
            if shown[verdict] <= show:
                print(
                    f"{verdict.upper()} {number} ({name}): {ascii(what)}\n    {ascii(said[:400])}", flush=True
                )
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "seed": seed,
        "cases": sum(sum(found.values()) for found in counts.values()),
        "seconds": {name: round(spent, 1) for name, spent in seconds.items()},
        "counts": {kind: dict(sorted(found.items())) for kind, found in sorted(counts.items())},
        "slowest": [round(slowest[0], 2), ascii(slowest[1])[:200]],
        "offenders": offenders,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", type=int, nargs="+", help="these cases alone")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of a case")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end after so long")
    parser.add_argument("--show", type=int, default=5, help="offenders of each class on the screen")
    parser.add_argument("--out", type=Path, help="JSON of the counts")
    options = parser.parse_args(arguments)
    resource.setrlimit(resource.RLIMIT_AS, (GIGABYTES << 30, GIGABYTES << 30))
    warnings.simplefilter("ignore")
    os.environ["TQDM_DISABLE"] = "1"
    import transformers

    transformers.logging.set_verbosity(logging.CRITICAL)
    numbers = options.only or range(options.first, options.first + options.count)
    with tempfile.TemporaryDirectory() as place:
        honest = Path(place) / "honest"
        honest.mkdir()
        honest_files(honest)
        began = time.monotonic()
        until = began + 60 * options.minutes
        found = fuzz(honest, numbers, options.seed, options.limit, options.show, until)
    print(json.dumps({key: value for key, value in found.items() if key != "offenders"}, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if found["offenders"] else 0


if __name__ == "__main__":
    sys.exit(main())
