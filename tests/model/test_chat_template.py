"""data.chat_template: what it may be, and kwargs as the defaults of the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lowbit_ft.model import chat_template
from lowbit_ft.model.chat_template import (
    TEMPLATE_BYTES,
    chosen,
    defaults,
    refused,
    template_text,
    told,
    variables,
)
from tests.chat_templates import THINKS, THINKS_ANYWHERE
from tests.data_tools import TALK, TINY


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


def rendered(tokenizer: Any, template: Any, **values: Any) -> str:
    tokenizer.chat_template = template
    return tokenizer.apply_chat_template(TALK, tokenize=False, **values)


@pytest.mark.parametrize("text", THINKS_ANYWHERE)
def test_a_default_writes_what_the_value_writes_and_a_request_still_decides(
    text: str, tokenizer: Any
) -> None:
    with_default = str(told(text, {"enable_thinking": False}))
    said, unsaid = rendered(tokenizer, text, enable_thinking=False), rendered(tokenizer, text)
    assert rendered(tokenizer, with_default) == said != unsaid
    assert rendered(tokenizer, with_default, enable_thinking=True) == unsaid
    assert variables(with_default) == variables(text), "servers look there for what they may be told"
    assert told(text, {}) == text and defaults(text) == {}
    assert defaults(with_default) == {"enable_thinking": False}
    assert told({"default": text}, {"enable_thinking": False}) == {"default": with_default}


@pytest.mark.parametrize(
    "value", [None, True, 3, -0.5, "a'b\"\n{{ x }} %}\\ é😀", ["a", 1, [None]], {"k": {"v": False}}, [], {}]
)
def test_every_value_arrives_as_it_is(value: Any, tokenizer: Any) -> None:
    text = "{{ value | tojson }}{{ value is none }}"
    assert not refused({"value": value}, text)
    with_default = told(text, {"value": value, "other": 1})
    assert rendered(tokenizer, with_default) == rendered(tokenizer, text, value=value)
    assert defaults(str(with_default)) == {"value": value, "other": 1}


def test_what_a_template_cannot_be_told() -> None:
    text = "{{ messages }}{{ bos_token }}{{ tools }}{{ namespace() }}{{ enable_thinking }}"
    text += "{% set mine = 1 %}{{ mine }}"
    problems = dict(
        refused(
            {"enable_thinkin": 1, "tools": [], "bos_token": "", "mine": 2, "enable_thinking": {1: 2}}, text
        )
    )
    assert (
        "never reads it; did you mean 'enable_thinking'?; it reads enable_thinking"
        in problems["enable_thinkin"]
    )
    assert all("is filled in by whoever" in problems[name] for name in ("tools", "bos_token"))
    assert "never reads it" in problems["mine"] and "keys are not all text" in problems["enable_thinking"]
    assert "inf is no number" in dict(refused({"enable_thinking": [float("inf")]}, text))["enable_thinking"]
    assert "it is a set" in dict(refused({"enable_thinking": {1}}, text))["enable_thinking"]


def test_a_name_a_file_a_model_or_the_text(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = (TINY / "chat_template.jinja").read_text()
    assert template_text(str(TINY)) == template_text(str(TINY / "chat_template.jinja")) == own
    assert template_text(own) == own
    chatml = template_text("chatml")
    assert chatml is not None and rendered(tokenizer, chatml, add_generation_prompt=True) == (
        "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in TALK)
        + "<|im_start|>assistant\n"
    )
    assert template_text("org/name", fetch=False) is None
    with monkeypatch.context() as hub:
        hub.setattr(chat_template, "locate_small", lambda given, fetch: TINY)
        assert template_text("org/name") == own
    for given, words in (
        (
            "chatlm",
            "no such file, and no such name; did you mean 'chatml'?; allowed: chatml, a file of Jinja",
        ),
        ("llama3", "no such file, and no such name; allowed: chatml"),
        (str(tmp_path / "a.jinja"), "no such file"),
        (str(tmp_path), "tokenizer cannot be loaded"),
        ("{{ a }}\n{% if %}", "the text:2: Expected an expression"),
    ):
        with pytest.raises(ValueError, match=words.replace("?", r"\?")):
            template_text(given)
    for content, words in (
        (b"{{ messages }}\n{% for m in messages %}\n", r"a.jinja:2: Unexpected end of template"),
        (b"\xff", "a.jinja: not UTF-8 text at byte 0"),
        (b"hello", "a.jinja: is no template"),
        (b"{{ a }}" + b" " * TEMPLATE_BYTES, f"allowed: at most {TEMPLATE_BYTES}"),
    ):
        (tmp_path / "a.jinja").write_bytes(content)
        with pytest.raises(ValueError, match=words):
            template_text(str(tmp_path / "a.jinja"))


def test_only_values_are_read_as_defaults() -> None:
    made = str(told("{{ x }}", {"x": ["none", None]}))
    assert defaults(made) == {"x": ["none", None]}
    assert defaults(made.replace('"none"', "range(9)")) == {}, "nothing of a template is run for this"


def test_a_tokenizer_without_a_template_cannot_be_told(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    assert chosen(tokenizer, None, {}) is None and chosen(tokenizer, THINKS, {}) == THINKS
    with pytest.raises(ValueError, match="has no chat template that could read them"):
        chosen(tokenizer, None, {"a": 1})
    with pytest.raises(ValueError, match=r"data.chat_template_kwargs.a: the chat template never reads it"):
        chosen(tokenizer, THINKS, {"a": 1})
