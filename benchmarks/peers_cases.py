"""What benchmarks/peers.py compares: models with their text, grids, tools in environments of their own,
contenders.

Each is a literal table. A new contender of ours is a line of recipe keys; a new peer is a script in
peer_tools/, a line in TOOLS and a line in CONTENDERS. A row is made again when the line it came from says
something else.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parent / "recipes" / "assets"
WINDOW = 256  # tokens of every row and every window
TORCH = "torch==2.13.0"


# ------------------------------------------------------------------------------------------------ models


def source_files(name: str) -> list[str]:
    """Whole files of the Python standard library (recipes/assets/text/)."""
    lines = (ASSETS / "text" / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def docstrings_and_source() -> list[str]:
    """The docstrings of those files, and as much of the files themselves: half English, half code."""
    files, found = source_files("train.jsonl"), []
    for text in files:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found.append(ast.get_docstring(node) or "")
    english = "\n\n".join(text for text in found if text)
    return [english, "\n".join(files)[: len(english)]]


def prose() -> list[str]:
    """The fixed evaluation text (benchmarks/data/README.md)."""
    lines = (HERE / "data" / "prose.txt").read_text(encoding="utf-8").splitlines()
    return ["\n\n".join(lines)]


@dataclass(frozen=True)
class Model:
    """A checkpoint: the texts its rows are cut from, the text it is measured on, and how many windows of
    it.
    """

    path: Path
    train: Callable[[], list[str]]
    valid: Callable[[], list[str]]
    windows: int
    rows: int
    made_by: str = ""

    def at(self, path: Path) -> Model:
        """The same model in another folder."""
        return replace(self, path=path)


MODELS: dict[str, Model] = {
    "tiny-llama": Model(
        ASSETS / "tiny-llama",
        lambda: source_files("train.jsonl"),
        lambda: source_files("valid.jsonl"),
        128,
        512,
    ),
    "smollm2-135m": Model(
        HERE.parent / "runs" / "smollm2-135m",
        docstrings_and_source,
        prose,
        96,
        256,
        made_by="python benchmarks/real_model.py",
    ),
}

# ------------------------------------------------------------------------------------------------ grids


@dataclass(frozen=True, order=True)
class Grid:
    bits: int
    group_size: int
    symmetric: bool

    def __str__(self) -> str:
        group = "rows" if self.group_size == -1 else f"g{self.group_size}"
        return f"W{self.bits} {group} {'sym' if self.symmetric else 'asym'}"

    @classmethod
    def parse(cls, text: str) -> Grid:
        """bits:group_size:sym or bits:group_size:asym. ValueError for anything else."""
        bits, group, kind = text.split(":")
        if kind not in ("sym", "asym"):
            raise ValueError(f"grid {text!r}; allowed: bits:group_size:sym or bits:group_size:asym")
        return cls(int(bits), int(group), kind == "sym")


GRIDS: dict[str, list[str]] = {
    "tiny-llama": ["4:128:sym", "4:128:asym", "3:128:sym", "3:128:asym", "2:64:sym", "2:64:asym"],
    "smollm2-135m": ["4:64:sym", "3:64:sym", "3:64:asym", "2:64:sym", "2:64:asym"],  # its width is 9 x 64
}

# ------------------------------------------------------------------------------------------------ tools


@dataclass(frozen=True)
class Tool:
    """A script of peer_tools/ and the packages of its environment; none: it runs in ours."""

    script: str
    packages: tuple[str, ...] = ()


TOOLS: dict[str, Tool] = {
    "ours": Tool("run_ours.py"),
    "autoround": Tool("run_autoround.py", (TORCH, "auto-round==0.16.1")),
    "llmcompressor": Tool("run_llmcompressor.py", (TORCH, "llmcompressor==0.14.0.1")),
    "hqq": Tool("run_hqq.py", (TORCH, "hqq==0.2.8.post1", "transformers", "accelerate")),
}

# ------------------------------------------------------------------------------------------------ contenders


@dataclass(frozen=True)
class Contender:
    """A line of the table. options: of the tool's script. samples: of the rows, None for all of them.

    seeded: its result depends on the seed. symmetric: the one kind of grid it has.
    """

    tool: str
    options: dict[str, Any] = field(default_factory=dict)
    samples: int | None = None
    seeded: bool = True
    symmetric: bool | None = None

    def fits(self, grid: Grid) -> bool:
        return self.symmetric is None or self.symmetric == grid.symmetric


def start(**recipe: Any) -> Contender:
    """Ours, not trained: keys of the recipe, `__` for the dots."""
    return Contender("ours", {"recipe": _dotted(recipe), "train": False}, seeded=False)


def trained(method: str, start: str, steps: int = 120, **recipe: Any) -> Contender:
    """Ours, trained for steps of 8 rows: keys of the recipe, `__` for the dots."""
    keys = {"adapter.method": method, "quant.calibrate": start, "train.max_steps": steps}
    return Contender("ours", {"recipe": keys | _dotted(recipe), "train": True})


def _dotted(keys: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("__", "."): value for name, value in keys.items()}


# torch.compile off: on a CPU it costs AutoRound more than it gives at these sizes (LOG.md).
EAGER = {"enable_torch_compile": False}
TAUGHT: dict[str, Any] = {"train__signal__kind": "logits", "train__teacher": "cached"}
# As many rows as AutoRound's default takes; smaller steps, so that they and the training take its time.
ROUNDED: dict[str, Any] = {"quant__calibration__samples": 128, "quant__calibration__batch_tokens": 1024}
ROUNDED_170: dict[str, Any] = ROUNDED | {"quant__calibration__steps": 170}
LONG: dict[str, Any] = {"quant__calibration__batch_tokens": 1024, "quant__calibration__steps": 800}
CONTENDERS: dict[str, Contender] = {
    "HQQ": Contender("hqq", seeded=False, symmetric=False),
    "GPTQ (llm-compressor)": Contender("llmcompressor", seeded=False),
    "AutoRound": Contender("autoround", EAGER),
    "AutoRound best": Contender("autoround", EAGER | {"iters": 1000}),
    "mse": start(quant__calibrate="mse"),
    "gptq": start(quant__calibrate="gptq"),
    "mse, lr_qat": trained("lr_qat", "mse"),
    "gptq, lr_qat": trained("lr_qat", "gptq"),
    "gptq, dl_qat": trained("dl_qat", "gptq"),
    "gptq, l4q": trained("l4q", "gptq"),
    "gptq, lota": replace(
        trained("lota", "gptq", train__scheduler="lota", train__optimizer="t_signsgd"), symmetric=False
    ),
    "gptq, lr_qat, KL": trained("lr_qat", "gptq", **TAUGHT),
    "gptq, full QAT": trained("full_qat", "gptq"),
    "signround": start(quant__calibrate="signround", **ROUNDED, quant__calibration__steps=160),
    "signround, lr_qat, KL": trained("lr_qat", "signround", 55, **ROUNDED_170, **TAUGHT),
    "signround, dl_qat, KL": trained("dl_qat", "signround", 55, **ROUNDED_170, **TAUGHT),
    "signround, l4q, KL": trained("l4q", "signround", 55, **ROUNDED_170, **TAUGHT),
    "signround, full QAT, KL": trained("full_qat", "signround", 55, **ROUNDED_170, **TAUGHT),
    "signround, lr_qat, KL, long": trained("lr_qat", "signround", 280, **LONG, **TAUGHT),
}
