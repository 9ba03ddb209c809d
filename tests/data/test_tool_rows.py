"""Rows with tools, of every layout: calls, their arguments, the tools, and the nulls of Arrow."""

from __future__ import annotations

import json
import shutil

import datasets
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lowbit_ft.data.columns import ROLES
from lowbit_ft.data.errors import BadRow
from lowbit_ft.data.formats import format_of
from lowbit_ft.data.messages import read_chat
from tests.chat_templates import LLAMA3, MISTRAL, QWEN3, TEXT_ARGUMENTS
from tests.chats import CALL, TOOL, A, Q, chat, runs, tokenizer
from tests.data_tools import QUICK, load, write


@pytest.mark.parametrize("template", [QWEN3, LLAMA3, MISTRAL, TEXT_ARGUMENTS])
def test_arguments_as_text_are_the_object_they_say(template):
    """In the form that the template can write: an object, or text between texts."""
    tok = tokenizer(template)
    learned = []
    for written in (CALL["function"]["arguments"], json.dumps(CALL["function"]["arguments"])):
        call = CALL | {"function": {"name": "weather", "arguments": written}}
        row = chat((Q, "Paris?"), (A, None, {"tool_calls": [call]}), ("tool", "sun"), (A, "Sun."))
        learned.append(runs(tok, {"messages": row}))
    assert learned[0] == learned[1] and '{"city": "Paris"}' in learned[0][0] and "None" not in learned[0][0]
    assert len(learned[0]) == 2


@pytest.mark.parametrize("arguments", ["{", "[1]", 4, "weather()"])
def test_arguments_that_are_no_object_are_refused(arguments):
    call = {"name": "weather", "arguments": arguments}
    row = {"messages": chat((Q, "?"), (A, None, {"tool_calls": [call]}))}
    with pytest.raises(BadRow, match="arguments of 'weather' must be an object, or JSON text of one"):
        format_of("chat", "assistant", tokenizer(QWEN3))(row)


def test_tool_rows_of_sharegpt():
    tok = tokenizer(QWEN3)
    turns = [
        {"from": "human", "value": "Paris?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Paris"}}'},
        {"from": "observation", "value": "sun"},
        {"from": "gpt", "value": "Sun."},
    ]
    openai = chat((Q, "Paris?"), (A, None, {"tool_calls": [CALL]}), ("tool", "sun"), (A, "Sun."))
    wrapped = {"type": "function", "function": TOOL}
    want = format_of("chat", "assistant", tok)({"messages": openai, "tools": [wrapped]})
    assert want.lost == () and sum(want.learned) > 10
    for tools in (json.dumps([TOOL]), [TOOL], [json.dumps(wrapped)], json.dumps([wrapped])):
        assert format_of("chat", "assistant", tok)({"conversations": turns, "tools": tools}) == want
    old = chat((Q, "Paris?"), (A, None, {"function_call": CALL["function"]}), ("tool", "sun"), (A, "Sun."))
    assert format_of("chat", "assistant", tok)({"messages": old, "tools": [TOOL]}) == want
    roles = chat((Q, "Paris?"), ("function_call", turns[1]["value"]), ("observation", "sun"), (A, "Sun."))
    assert format_of("chat", "assistant", tok)({"messages": roles, "tools": [TOOL]}) == want
    with pytest.raises(
        BadRow, match=r"conversations\[1\], a function_call, must be a list of objects; got text that"
    ):
        format_of("chat", "assistant", tok)(
            {"conversations": [turns[0], {"from": "function_call", "value": "weather()"}]}
        )
    with pytest.raises(BadRow, match="tools' must be a list of objects; got a string that is no JSON"):
        format_of("chat", "assistant", tok)({"conversations": turns, "tools": "[{"})
    assert set(ROLES.values()) == {"system", "user", "assistant", "tool"}


some_arguments = st.fixed_dictionaries(
    {},
    optional={
        "city": st.sampled_from(["Paris", "Rome"]),
        "day": st.integers(0, 9),
        "open": st.booleans(),
        "where": st.lists(st.just("a"), min_size=1, max_size=2),
        "more": st.fixed_dictionaries({"x": st.just("y")}, optional={"z": st.just("w")}),
    },
)
calls_of_a_row = st.lists(st.tuples(st.sampled_from(["sky", "sea"]), some_arguments), max_size=2)


@QUICK
@given(calls=st.lists(calls_of_a_row, min_size=2, max_size=4), saved=st.booleans())
def test_no_null_of_arrow_reaches_the_text(calls, saved, tmp_path):
    """Rows that differ in their keys, through Arrow: what is read has no null, and is what JSON lines
    give."""
    assume(any(inner for row in calls for _, inner in row))  # a parquet file holds no object without a key
    rows = []
    for row in calls:
        turn = {"tool_calls": [{"function": {"name": n, "arguments": a}} for n, a in row]} if row else {}
        tools = [
            {"type": "function", "function": {"name": n, "parameters": {"properties": a}}} for n, a in row
        ]
        rows.append({"messages": chat((Q, "now"), (A, None if row else "no", turn)), "tools": tools})
    table = datasets.Dataset.from_list(rows)
    path = tmp_path / ("saved" if saved else "rows.parquet")
    if saved:
        shutil.rmtree(path, ignore_errors=True)
        table.save_to_disk(str(path))
    else:
        table.to_parquet(str(path))
    tok = tokenizer(QWEN3)
    read = load(path, tok, sequence_len=1024)
    want = load(write(tmp_path, rows), tok, sequence_len=1024)
    assert len(read) == len(want) == len(rows)
    for arrow, lines in zip(read, want, strict=True):
        text = tok.decode(arrow.input_ids)
        assert "null" not in text and "None" not in text
        assert sorted(text) == sorted(tok.decode(lines.input_ids))  # Arrow has an order of keys of its own


def test_a_null_of_json_text_stays():
    call = {"name": "weather", "arguments": '{"city": null}'}
    row = {"messages": chat((Q, "?"), (A, None, {"tool_calls": [call], "name": None}))}
    assert '{"city": null}' in runs(tokenizer(QWEN3), row)[0]
    assert "name" not in read_chat(row).messages[1]
