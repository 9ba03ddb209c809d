"""A complete made-up run directory, and its report page parsed."""

from __future__ import annotations

import base64
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from lowbit_ft.report.page import write_report

SECTIONS = [
    "result",
    "tasks",
    "training",
    "layers",
    "trainable",
    "stages",
    "samples",
    "recipe",
    "environment",
]
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """The page as a list of tags and, per section id, its text. Checks that tags close in order."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.section = "head"
        self.text: dict[str, str] = {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self.section = dict(attrs)["id"] or ""
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text[self.section] = self.text.get(self.section, "") + data + " "

    def images(self) -> list[ElementTree.Element]:
        """The pictures, decoded and parsed."""
        sources = [attrs["src"] or "" for tag, attrs in self.tags if tag == "img"]
        return [ElementTree.fromstring(base64.b64decode(source.partition(",")[2])) for source in sources]


def files() -> dict[str, Any]:
    """A complete made-up run: file name -> content (JSON, or text for the two text files)."""
    layers = [f"model.layers.{i}.{p}" for i in range(2) for p in ("self_attn.q_proj", "mlp.down_proj")]
    metrics = [
        {
            "step": s,
            "loss": 5.0 - s / 10,
            "lr": 1e-3 / s,
            "scale_lr": 1e-4,
            "tokens": 100 * s,
            "tokens_per_s": 1234.0,
            "memory_gb": 1.5,
        }
        for s in range(1, 31)
    ]
    return {
        "recipe.yaml": "name: made-up-run\nadapter:\n  method: lr_qat\nquant:\n  bits: 3\n",
        "environment.json": {"python": "3.11.7", "gpu": None, "git_commit": "0a1b2c"},
        "metrics.jsonl": "\n".join(json.dumps(row) for row in [*metrics, {"step": 30, "valid_loss": 2.25}]),
        "quant.json": [
            *(
                {
                    "layer": n,
                    "action": "quantized",
                    "reason": None,
                    "bits": 3,
                    "group_size": 128,
                    "error": 0.02,
                    "parameters": 65536,
                }
                for n in layers
            ),
            {"layer": "lm_head", "action": "skipped", "reason": "excluded by name", "parameters": 1000},
        ],
        "moved.json": {**dict.fromkeys(layers, 0.125), "scale_change": 0.031},
        "trainable.json": {
            "share": 0.0123,
            "rows": [{"layer": "q_proj", "tensors": {"A": 4096, "B": 12}, "bytes": 9000}],
        },
        "tasks.json": {
            "lm_eval": "0.4.13",
            "rows": [
                {
                    "stage": stage,
                    "task": "arc<b>",
                    "metric": metric,
                    "value": value,
                    "stderr": stderr,
                    "higher_is_better": metric == "acc",
                }
                for stage, value in {"exported": 0.5, "base": 0.625, "trained": 0.5}.items()
                for metric, stderr in {"acc": 0.0125, "ppl": None}.items()
            ],
        },
        "evaluation.json": {
            "rows": [
                {"stage": s, "perplexity": p, "kl": 0.1, "loss": math.log(p)}
                for s, p in (
                    ("exported", 9.87654),
                    ("base", 9.0),
                    ("quantized", 12.5),
                    ("trained", 9.87654),
                    ("merged", 9.87654),
                )
            ],
            "windows": 64,
            "window": 256,
        },
        "stages.json": [
            {"stage": "train", "seconds": 90.5, "peak_memory_gb": 1.25},
            {"stage": "report", "seconds": 1.0, "peak_memory_gb": None},
        ],
        "samples.json": [{"prompt": "def f():", "before": "word word", "after": "Return nothing."}],
    }


def run(folder: Path, **changed: Any) -> Page:
    """Write the run with files replaced (None leaves a file out), build the page, parse it."""
    for name, content in {
        **files(),
        **{key.replace("__", "."): value for key, value in changed.items()},
    }.items():
        if content is not None:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    path = write_report(folder)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))
