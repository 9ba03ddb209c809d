"""A chat template is a program: one that does not end is stopped, and costs the run an answer instead."""

from __future__ import annotations

import signal
import threading
import time

import pytest
from transformers import AutoTokenizer

from lowbit_ft.data import chat
from lowbit_ft.data.chat import ChatTemplate, limited
from lowbit_ft.data.errors import DataError
from lowbit_ft.evaluate.generate import encode_prompt
from tests.checkpoint_tools import TINY

LONG = "".join("{% for a in range(99999) %}" for _ in range(3)) + "x" + "{% endfor %}" * 3


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chat, "RENDER_SECONDS", 0.3)
    return AutoTokenizer.from_pretrained(TINY)


def test_a_template_of_nested_ranges_is_stopped(tokenizer) -> None:
    tokenizer.chat_template = LONG
    began = time.process_time()
    with pytest.raises(DataError, match="the chat template takes more than 0.3 seconds"):
        ChatTemplate(tokenizer)
    with pytest.raises(DataError, match="takes more than"):
        encode_prompt(tokenizer, "a", chat=True)
    assert time.process_time() - began < 20


def test_an_honest_template_renders_and_leaves_no_timer(tokenizer) -> None:
    before = signal.getsignal(signal.SIGVTALRM)
    assert "hello" in ChatTemplate(tokenizer).render([{"role": "user", "content": "hello"}])
    assert (
        signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0) and signal.getsignal(signal.SIGVTALRM) is before
    )


def test_other_threads_render_without_a_limit() -> None:
    done = []

    def work() -> None:
        with limited(0.01):
            done.append(sum(range(10_000)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [sum(range(10_000))]
