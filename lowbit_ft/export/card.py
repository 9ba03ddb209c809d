"""The model card (README.md) of a shipped folder: what it is, how it was trained, what was measured, how to
serve it.

Names of folders and tasks come from elsewhere, and a card is shown as a page: `shown` writes them so that no
character of theirs is Markdown, HTML or the end of a table cell. The recipe is data in a fence that nothing
in it can close.
"""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..evaluate.perplexity import EvalRow
from ..evaluate.tasks import TaskRow, by_task
from ..grid import Grid
from ..kv_cache import KVConfig
from ..names import listed, python_line
from . import EXPORTERS
from .base import Exporter
from .servers import SERVERS

HEADS = {"server": "Server", "chat template": "Chat template", "kv cache": "Key-value cache"}
WRITES = "text-generation"  # the pipeline of language models, which servers run


# Of pipelines, how they are asked where that is not with a text; transformers has none of question-answering.
ASKED = {
    "image-classification": "from transformers import pipeline; "
    "print(pipeline('image-classification', FOLDER)('IMAGE.png'))",
    "object-detection": "from transformers import pipeline; "
    "print(pipeline('object-detection', FOLDER)('IMAGE.png'))",
    "question-answering": "from transformers import AutoModelForQuestionAnswering as M, AutoTokenizer as T; "
    "t = T.from_pretrained(FOLDER); x = t('QUESTION', 'TEXT', return_tensors='pt'); "
    "y = M.from_pretrained(FOLDER)(**x); "
    "print(t.decode(x['input_ids'][0, y.start_logits.argmax() : y.end_logits.argmax() + 1]))",
}
# Of pipelines, which auto class makes what a model is given, where that is no tokenizer; None: none does.
MAKER: dict[str, str | None] = {
    "image-classification": "AutoImageProcessor",
    "object-detection": "AutoImageProcessor",
    "unconditional-image-generation": None,
    "text-to-image": None,
}


@dataclass(frozen=True)
class CardFacts:
    """What a card says of a run besides its figures. base: the checkpoint, a folder or a hub id; grid: the
    one that ships. method, recipe: None where a folder that no run wrote does not say them. chat: what the
    chat template is told where a request says nothing (data.chat_template_kwargs). pipeline, auto: what the
    model is for, as the hub calls it, and the class that loads it. command: what a shell does with it, with
    {folder} in it; None: a server or a pipeline.
    """

    name: str
    base: str
    method: str | None
    exact_merge: bool
    grid: Grid
    recipe: str | None
    kv_cache: KVConfig | None = None
    chat: Mapping[str, Any] = field(default_factory=dict)
    zeros: float | None = None  # the share of the packed weights that quant.sparsity held at zero
    dense: tuple[str, ...] = ()  # modules trained whole (adapter.modules_to_save), as the model names them
    grown: bool = False  # these zeros came while it trained
    convolutions: tuple[str, ...] = ()  # those that stayed dense, as they came
    pipeline: str = WRITES
    auto: str = "AutoModelForCausalLM"
    generation: bool = False  # the folder has a generation_config.json
    command: str | None = None


def serve_line(facts: CardFacts, format: str, folder: Path, here: Path | None = None) -> str:
    """How to use the folder, for the console. here: of a run that was computed on a CPU, its folder, which
    our own server takes there; None: the format's server comes first."""
    command, about = _served(facts, format, str(folder))
    lines = [f"serve it: {command}"]
    if here is not None and facts.pipeline == WRITES and not command.startswith("lowbit-ft"):
        vllm, exporter = SERVERS["vllm"], EXPORTERS[format]
        cached = facts.kv_cache is not None
        why = vllm.reject_cpu(exporter, facts.grid, cached) if exporter.name in vllm.formats else None
        ours = f"lowbit-ft serve {shlex.quote(str(here))}"
        lines = [f"serve it: {ours}", f"  {'or' if why is None else 'on a GPU'}: {command}"]
        lines += [] if why is None else [f"  on a CPU: {why}"]
    return "\n".join([*lines, *(f"  {what}: {text}" for what, text in about.items())])


def _served(facts: CardFacts, format: str, folder: str) -> tuple[str, dict[str, str]]:
    """The command line that runs the folder, and what to know about its chats and its cache."""
    exporter, kv_cache, quoted = EXPORTERS[format], facts.kv_cache, shlex.quote(folder)
    if facts.command is not None and exporter.measurable:  # it computes with torch
        return facts.command.format(folder=quoted), {}
    if facts.pipeline != WRITES:
        first = "import lowbit_ft; " if format == "native" else ""
        ask = ASKED.get(
            facts.pipeline,
            f"from transformers import pipeline; print(pipeline('{facts.pipeline}', FOLDER)('TEXT'))",
        ).replace("FOLDER", repr(folder))
        if not exporter.transformers_serve:
            graph = repr(f"{folder}/model.onnx")
            ask = f"import onnxruntime; print(onnxruntime.InferenceSession({graph}).get_inputs())"
        return python_line(first + ask), {}
    command, about = exporter.serve(quoted), {}
    chat_flag, kv_server = exporter.chat_flag, exporter.kv_server
    server = SERVERS.get(command.split()[0])
    if server is not None and (why := server.reject(exporter, facts.grid)) is not None:
        command, about = f"lowbit-ft serve {quoted}", {"server": why}
        chat_flag = kv_server = None  # those flags are the other server's
    if facts.chat:
        values = json.dumps(dict(facts.chat), ensure_ascii=False)
        about["chat template"] = (
            f"{listed(facts.chat)} as in training where a request says nothing (data.chat_template_kwargs)"
        )
        if chat_flag is not None:
            command += f" {chat_flag} {shlex.quote(values)}"
            about["chat template"] += "; the flag says so to a server with defaults of its own"
    if kv_cache is not None and exporter.carries_kv_cache:
        about["kv cache"] = f"{kv_cache}; the folder says so, and its reader does it"
    elif kv_cache is not None:
        command, about["kv cache"] = kv_cache.served(kv_server, command)
    return command, about


def model_card(facts: CardFacts, format: str, rows: list[EvalRow], tasks: list[TaskRow] | None = None) -> str:
    """Markdown with the hub's front matter. rows, tasks: the measured tables; empty before they were
    measured.
    """
    base, (command, about) = facts.base, _served(facts, format, "PATH")
    front = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {facts.pipeline}",
        "tags: [lowbit_ft, quantized, qat]",
    ]
    if not Path(base).exists() and _is_hub_id(base):
        front.insert(1, f"base_model: {base}")
    lines = [
        *front,
        "---",
        *((f"> {first}", "") if (first := EXPORTERS[format].read_first) else ()),
        f"# {facts.name}",
        "",
        f"{shown(base if _is_hub_id(base) and not Path(base).exists() else Path(base).name)} "
        + (
            f"packed with lowbit_ft: grid {facts.grid}."
            if facts.method is None
            else f"fine-tuned with lowbit_ft: method `{facts.method}`, grid {facts.grid}."
        ),
        "The weights in this folder are the integers and scales of the packed model it was written from; "
        "nothing was rounded on the way."
        if facts.method is None
        else "The weights in this folder are the integers and scales the training forward ran on; nothing "
        "was rounded afterwards."
        if facts.exact_merge
        else "The adapter was trained beside the quantizer, so merging it rounded the weights once more.",
        *(
            (
                f"{facts.zeros:.1%} of these integers stand for zero, "
                + ("pruned while it trained." if facts.grown else "and did in every step."),
            )
            if facts.zeros
            else ()
        ),
        *(
            (f"Trained whole, and not packed: {listed(shown(name) for name in facts.dense)}.",)
            if facts.dense
            else ()
        ),
        *(
            (f"Convolutions, no linear layers, stayed dense, as they came: {listed(facts.convolutions)}.",)
            if facts.convolutions
            else ()
        ),
        "",
        f"## Use (format `{format}`)",
        "",
        _use(facts, EXPORTERS[format]),
        "",
        "From a shell, where PATH is this folder or its hub id:",
        "",
        *fenced(command),
        *(f"{HEADS[what]}: {text}.\n" for what, text in about.items()),
    ]
    if rows:
        scored = any(row.scores for row in rows)
        names = list(dict.fromkeys(name for row in rows for name in row.numbers)) if scored else _LANGUAGE
        lines += [f"| stage | {' | '.join(names)} |", "|---|" + "--:|" * len(names)]
        lines += [f"| {r.stage} | {' | '.join(_cell(r, name) for name in names)} |" for r in rows]
        over = "answers" if scored else "target tokens"
        lines += ["", f"Mean over {rows[0].tokens} {over} of the evaluation data.", ""]
    if tasks:
        stages, metrics = by_task(tasks)
        lines += [f"| lm-eval task | metric | {' | '.join(stages)} |", "|---|---|" + "--:|" * len(stages)]
        for (task, metric), values in metrics.items():
            cells = " | ".join(f"{values[stage].value:.5g}" if stage in values else "" for stage in stages)
            lines.append(f"| {escaped(task)} | {escaped(metric)} | {cells} |")
        lines.append("")
    if facts.recipe is not None:
        lines += ["## Recipe", "", *fenced(facts.recipe.rstrip(), "yaml")]
    return "\n".join(lines)


def _use(facts: CardFacts, exporter: Exporter) -> str:
    """Markdown: how Python loads the folder, with its stop tokens."""
    code = exporter.use("PATH").replace("AutoModelForCausalLM", facts.auto)
    maker = MAKER.get(facts.pipeline, "AutoTokenizer")
    if maker is None:
        made = '\ntokenizer = AutoTokenizer.from_pretrained("PATH")'
        return code.replace(", AutoTokenizer", "").replace(made, "")
    if maker != "AutoTokenizer":
        return code.replace("AutoTokenizer", maker).replace("tokenizer =", "processor =")
    if not (exporter.drops_generation and facts.generation):
        return code
    line = 'model.generation_config = GenerationConfig.from_pretrained("PATH")  # its stop tokens'
    code = code.replace("AutoTokenizer\n", "AutoTokenizer, GenerationConfig\n", 1)
    return code.replace("\ntokenizer = ", f"\n{line}\ntokenizer = ", 1)


def fenced(text: str, language: str = "") -> list[str]:
    """The lines of a block that nothing in the text can close."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return [f"{fence}{language}", text, fence, ""]


_LANGUAGE = ["loss", "perplexity", "KL to base"]


def _cell(row: EvalRow, name: str) -> str:
    value = row.numbers.get(name)
    return "" if value is None else f"{value:.{5 if name == 'KL to base' else 4}f}"


def shown(name: str) -> str:
    """A name in the text of a card: code where its characters are those of ordinary names, else escaped."""
    return f"`{name}`" if re.fullmatch(r"[\w.+@/-][\w.+@/ -]*", name) else escaped(name)


def escaped(name: str) -> str:
    """A name with every character that is none of ordinary names as its number (&#60;), which no reader of
    Markdown takes for more than the character."""
    return re.sub(r"[^\w.+@/(), -]", lambda found: f"&#{ord(found[0])};", name)


def _is_hub_id(base: str) -> bool:
    try:
        validate_repo_id(base)
    except HFValidationError:
        return False
    return True
