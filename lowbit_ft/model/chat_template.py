"""The chat template of a recipe: where its text comes from, and what it is told.

    data.chat_template         chatml, a file of Jinja, the folder or hub id of a model, or the text itself
    data.chat_template_kwargs  values of variables that the template reads: {enable_thinking: false}

A value becomes a default at the head of the text,

    {% if not enable_thinking is defined %}{% set enable_thinking = false %}{% endif %}

and the text is the tokenizer's own from then on: in training, in answers, and in what ships. So a server that
is asked without the value writes what was trained, and a request may still say another.

A template is a program of a stranger: only the sandbox of transformers runs it, for a bounded time
(data/chat.py).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files.regular import read_regular
from ..names import HUB_ID, did_you_mean, listed
from .hub import locate_small
from .tokenizer import read_tokenizer

Template = str | dict[str, str]  # a text, or texts by name ("default", "tool_use"), as transformers has them

SUFFIXES = (".jinja", ".jinja2", ".j2")
TEMPLATE_BYTES = 1 << 16  # the longest of well-known models have 20 kB
# What whoever renders fills in: rows, the library, and the tokenizer's special tokens (*_token).
FILLED = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
_BUILT_IN = {
    "chatml": (
        "{% for message in messages %}"
        "{% if message.tool_calls or not message.content is string %}"
        "{{ raise_exception('chatml has turns of text only: no tool calls') }}{% endif %}"
        "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
}
_DEFAULT = re.compile(
    r"\{% if not (?P<name>\w+) is defined %\}\{% set (?P=name) = (?P<value>.*) %\}\{% endif %\}\n"
)
_NONE = re.compile(r'(?P<text>"(?:[^"\\]|\\.)*")|\bnone\b')


def is_text(given: str) -> bool:
    """Whether that is a template itself, and not where one is."""
    return "{%" in given or "{{" in given or "\n" in given


def template_text(given: str, *, fetch: bool = True) -> str | None:
    """The text that data.chat_template means; None for a hub id that is not on this disk, where it is not to
    be fetched. ValueError when there is none, or it is no template."""
    if given in _BUILT_IN:
        return _BUILT_IN[given]
    path = Path(given).expanduser()
    if is_text(given):
        text, where = given, "the text"
    elif _is(path.is_file):
        text, where = _read(path), str(path)
    elif _is(path.is_dir) or ("/" in given and HUB_ID.fullmatch(given) and path.suffix not in SUFFIXES):
        if (found := _of_model(given, fetch)) is None:
            return None
        text, where = found, given
    else:
        raise ValueError(
            f"no such file, and no such name{did_you_mean(given, _BUILT_IN)}; allowed: {listed(_BUILT_IN)}, "
            "a file of Jinja, the folder or hub id of a model that has a template, or the text itself"
        )
    if reason := syntax_error(text, where):
        raise ValueError(reason)
    if "{%" not in text and "{{" not in text:
        raise ValueError(f"{where}: is no template: it writes the same for every chat")
    return text


def _is(test: Any) -> bool:
    try:
        return test()
    except (OSError, ValueError):  # no path
        return False


def _read(path: Path) -> str:
    try:
        return read_regular(path, TEMPLATE_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text at byte {error.start}; a template is text") from None


def _of_model(given: str, fetch: bool) -> str | None:
    """The template of the tokenizer of a model."""
    folder = locate_small(given, fetch=fetch)
    if folder is None:
        return None
    tokenizer = read_tokenizer(folder)
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer of {given} has no chat template; give a model that has one")
    return tokenizer.get_chat_template()


def syntax_error(text: str, where: str) -> str | None:
    """Why that is no template ("file:line: what"); None when it is one."""
    from jinja2 import TemplateError, TemplateSyntaxError  # slow to import, and most recipes name none

    if len(text.encode()) > TEMPLATE_BYTES:
        return f"{where}: {len(text.encode())} bytes; allowed: at most {TEMPLATE_BYTES} of a chat template"
    try:
        _compiled(text)
    except TemplateSyntaxError as error:
        return f"{where}:{error.lineno}: {error.message}"
    except (TemplateError, RecursionError) as error:
        return f"{where}: {type(error).__name__}: {error}"
    return None


def _compiled(text: str) -> Any:
    from transformers.utils import chat_template_utils  # slow to import

    return chat_template_utils._compile_jinja_template(text)


def variables(template: Template) -> set[str]:
    """The names that a template reads and does not make itself."""
    from jinja2 import meta  # slow to import

    texts = template.values() if isinstance(template, dict) else [template]
    found: set[str] = set()
    for text in texts:
        environment = _compiled(text).environment
        found |= meta.find_undeclared_variables(environment.parse(text)) - environment.globals.keys()
    return found


def refused(values: Mapping[str, Any], template: Template) -> list[tuple[str, str]]:
    """(name, why) for each of chat_template_kwargs that this template cannot be told."""
    reads = {name for name in variables(template) if not _filled(name)}
    problems = []
    for name, value in values.items():
        if _filled(name):
            problems.append((name, "is filled in by whoever writes a chat; remove it"))
        elif name not in reads:
            known = f"; it reads {listed(sorted(reads))}" if reads else "; it reads none; remove it"
            problems.append((name, f"the chat template never reads it{did_you_mean(name, reads)}{known}"))
        elif (reason := _no_literal(value)) is not None:
            problems.append((name, reason))
    return problems


def _filled(name: str) -> bool:
    return name in FILLED or name.endswith("_token")


def told(template: Template, values: Mapping[str, Any]) -> Template:
    """The template with these values where whoever renders gives none."""
    if isinstance(template, dict):
        return {name: str(told(text, values)) for name, text in template.items()}
    # A line of its own: its line break is dropped behind a block, so the text begins where it began.
    lines = [
        f"{{% if not {name} is defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}\n"
        for name, value in values.items()
    ]
    return "".join(lines) + template


def defaults(text: str) -> dict[str, Any]:
    """What `told` has put before a template."""
    found, place = {}, 0
    while (line := _DEFAULT.match(text, place)) is not None:
        try:
            found[line["name"]] = json.loads(_NONE.sub(lambda m: m["text"] or "null", line["value"]))
        except ValueError:  # an expression, which nobody but a server has to work out
            break
        place = line.end()
    return found


def _no_literal(value: Any) -> str | None:
    """Why Jinja cannot be told the value."""
    if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
        return "its keys are not all text"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is no number"
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if reason := next((reason for part in inner if (reason := _no_literal(part))), None):
        return reason
    if value is None or isinstance(value, str | bool | int | float | list | dict):
        return None
    allowed = "text, numbers, true, false, null, and lists or objects of them"
    return f"it is a {type(value).__name__}; allowed: {allowed}"


def _literal(value: Any) -> str:
    """A value as Jinja writes it, which is JSON but for null."""
    if value is None:
        return "none"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(k)}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def chosen(tokenizer: Any, text: str | None, values: Mapping[str, Any]) -> Template | None:
    """What a tokenizer is to write chats with: this text, or its own, told these values; None where it stays
    with its own. ValueError for a value that it cannot be told."""
    if text is None and not values:
        return None
    template = text or tokenizer.chat_template
    if not template:
        raise ValueError(
            "data.chat_template_kwargs: the tokenizer has no chat template that could read them; set "
            "data.chat_template"
        )
    if problems := refused(values, template):
        raise ValueError("; ".join(f"data.chat_template_kwargs.{name}: {why}" for name, why in problems))
    return told(template, values)
