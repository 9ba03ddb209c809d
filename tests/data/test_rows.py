"""What a row says is learned, counted or refused, and nothing else: turns that templates cut, weights,
columns, tools, and the end of every turn. Hypothesis writes the chats, templates after five families render
them.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit_ft.data.chat import ChatTemplate
from lowbit_ft.data.columns import LEARN_KEYS
from lowbit_ft.data.errors import BadRow, DataError
from lowbit_ft.data.formats import FORMATS, Tokens, format_of
from lowbit_ft.data.windows import Example
from tests.chat_templates import (
    LLAMA3,
    MISTRAL,
    PHI3,
    PHI3_OTHER_END,
    PLAIN,
    QWEN3,
    R1,
    TAGGED_TWICE,
)
from tests.chats import CALL, TOOL, A, Q, chat, runs, text_of, tokenizer
from tests.data_tools import QUICK, TALK, load, targets, write

# 1. what a template drops


def test_thoughts_that_a_template_cuts_from_a_learned_turn_are_refused():
    said = "<think>two and two make four</think>The answer is 4"
    row = {"messages": chat((Q, "2+2?"), (A, said))}
    with pytest.raises(BadRow, match=r"messages\[1\]: the chat template does not write the thoughts of this"):
        format_of("chat", "assistant", tokenizer(R1))(row)
    with pytest.raises(BadRow, match="does not write the thoughts"):
        format_of("chat", "all", tokenizer(R1))(row)
    (learned,) = runs(tokenizer(QWEN3), row)
    assert learned == "<think>\ntwo and two make four\n</think>\n\nThe answer is 4<|im_end|>"
    # Empty thoughts teach nothing.
    assert runs(tokenizer(R1), {"messages": chat((Q, "a"), (A, "<think>\n\n</think>b"))}) == [
        "b<|endoftext|>"
    ]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_beside_the_content(key):
    row = {"messages": chat((Q, "2+2?"), (A, "four", {key: "two and two"}))}
    with pytest.raises(BadRow, match=f"does not write the {key} of this turn"):
        format_of("chat", "assistant", tokenizer())(row)
    if key == "reasoning_content":
        assert runs(tokenizer(QWEN3), row) == ["<think>\ntwo and two\n</think>\n\nfour<|im_end|>"]


def test_thoughts_of_an_earlier_turn_need_a_word_of_the_user():
    """Qwen3 writes the thoughts of the last turn only: learned without them, the first teaches not to
    think."""
    turns = chat((Q, "2+2?"), (A, "<think>two twos</think>4"), (Q, "3+3?"), (A, "<think>two threes</think>6"))
    with pytest.raises(BadRow, match=r"messages\[1\].*data.train_on: completion or weight 0"):
        format_of("chat", "assistant", tokenizer(QWEN3))({"messages": turns})
    tokens = format_of("chat", "completion", tokenizer(QWEN3))({"messages": turns})
    assert tokens.lost == ("assistant thoughts",)
    last = ["<think>\ntwo threes\n</think>\n\n6<|im_end|>"]
    assert runs(tokenizer(QWEN3), {"messages": turns}, "completion") == last
    turns[1]["weight"] = 0
    assert runs(tokenizer(QWEN3), {"messages": turns}) == last


def test_calls_that_a_template_drops_are_refused():
    row = {
        "messages": chat(
            (Q, "weather in Paris?"), (A, None, {"tool_calls": [CALL]}), ("tool", "sun"), (A, "Sun.")
        )
    }
    for template in (R1, PHI3):  # an empty answer would be learned; "None" would be
        with pytest.raises(BadRow, match=r"messages\[1\]: the chat template does not write the tool_calls"):
            format_of("chat", "assistant", tokenizer(template))(row)


def test_roles_and_tools_that_a_template_drops_are_counted(tmp_path):
    rows = [
        {"messages": chat(("developer", "Be brief."), (Q, "hi"), (A, "hello"))},
        {"messages": chat((Q, "hi"), (A, "hello")), "tools": [TOOL]},
        {"messages": chat((Q, "hi"), (A, "hello", {"mood": "cheerful"}))},
        {"messages": chat((Q, "hi"), (A, "hello"))},
    ]
    report = load(write(tmp_path, rows), tokenizer(R1)).report
    assert (report.used, report.incomplete) == (4, 3)
    assert report.lost == {"developer content": 1, "tools": 1, "assistant mood": 1}
    assert (
        "3 rows are not written whole by the chat template, which leaves out: "
        "assistant mood (1), developer content (1), tools (1)" in str(report)
    )
    whole = load(write(tmp_path, rows[:2]), tokenizer(QWEN3)).report
    assert not whole.lost and "leaves out" not in str(whole)
    # A short word may stand elsewhere by chance: it is asked for.
    report = load(
        write(tmp_path, [{"messages": chat(("system", "hi"), (Q, "hi"), (A, "hello"))}]), tokenizer(R1)
    ).report
    assert report.lost == {"system content": 1}


words = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="<|>[]\0"), min_size=1, max_size=20
).filter(lambda s: bool(s.strip()))


@QUICK
@given(
    name=st.sampled_from(sorted(PLAIN)),
    turns=st.lists(st.tuples(words, words), min_size=1, max_size=4),
    data=st.data(),
)
def test_every_learned_turn_is_in_the_targets(name, turns, data):
    """The decoded targets are the learned answers, whole, in their order, each with its end, and no other."""
    tok = tokenizer(PLAIN[name])
    row, kept = [], []
    for asked, answer in turns:
        flag = data.draw(st.sampled_from([None, 0, 1, False, True]))
        key = data.draw(st.sampled_from(LEARN_KEYS))
        row += chat((Q, asked), (A, answer, {} if flag is None else {key: flag}))
        if flag is None or flag:
            kept.append(answer)
    tokens = format_of("chat", "assistant", tok)({"messages": row})
    labels = [i if t else -100 for i, t in zip(tokens.input_ids, tokens.learned, strict=True)]
    found = targets(tok, Example(tokens.input_ids, labels, [len(labels)]))
    bare = lambda s: "".join(s.split())  # noqa: E731
    assert len(found) == len(kept)
    for run, answer in zip(found, kept, strict=True):
        # A token may hold the header's last white space and the answer's first: then both are the prompt's.
        thoughts = bare("<think></think>") if name == "qwen3" and answer is kept[-1] else ""
        end = next(
            e
            for e in ("[end]", "<|im_end|><|endoftext|>", "<|im_end|>", "<|endoftext|>")
            if bare(run).endswith(e)
        )
        assert bare(run).removeprefix(thoughts) in (bare(answer) + end, thoughts + bare(answer) + end)


@QUICK
@given(
    turns=st.lists(st.tuples(words, words, st.booleans()), min_size=1, max_size=4),
    name=st.sampled_from(sorted(PLAIN)),
    train_on=st.sampled_from(["assistant", "all"]),
    key=st.sampled_from(LEARN_KEYS),
)
def test_weight_0_masks_exactly_its_turn(turns, name, train_on, key):
    """The same tokens; not learned are those of the turns with 0 and no others."""
    tok = tokenizer(PLAIN[name])
    plain = [m for asked, answer, _ in turns for m in chat((Q, asked), (A, answer))]
    row = [dict(m) for m in plain]
    for i, (_, _, keep) in enumerate(turns):
        row[2 * i + 1][key] = int(keep)
    form = format_of("chat", train_on, tok)
    whole, part = form({"messages": plain}), form({"messages": row})
    assert part.input_ids == whole.input_ids
    answers = format_of("chat", "assistant", tok)({"messages": plain})
    owner, turn, inside = [], -1, False
    for learned in answers.learned:
        turn += learned and not inside
        inside = learned
        owner.append(turn if learned else None)
    assert turn == len(turns) - 1
    for now, before, who in zip(part.learned, whole.learned, owner, strict=True):
        assert now == (before and (who is None or turns[who][2]))


# 2. turns that say whether they are learned


def test_weights_and_flags():
    row = {"messages": chat((Q, "hi"), (A, "BAD", {"weight": 0}), (Q, "again"), (A, "good", {"weight": 1}))}
    assert runs(tokenizer(), row) == ["good<|im_end|>"]
    shared = [
        ("human", "hi"),
        ("gpt", "BAD", {"train": False}),
        ("human", "x"),
        ("gpt", "good", {"train": True}),
    ]
    turns = [{"from": t[0], "value": t[1], **dict(*t[2:])} for t in shared]
    assert runs(tokenizer(), {"conversations": turns}) == ["good<|im_end|>"]
    # completion is the last answer, whatever the others say; and not even that where it says no
    assert runs(
        tokenizer(), {"messages": chat((Q, "a"), (A, "b", {"weight": 1}), (Q, "c"), (A, "d"))}, "completion"
    ) == ["d<|im_end|>"]
    # A turn of another role that asks for it is learned too.
    assert runs(tokenizer(), {"messages": chat((Q, "hi", {"training": True}), (A, "yo"))}) == [
        "hi<|im_end|>",
        "yo<|im_end|>",
    ]


def test_a_row_whose_turns_all_have_weight_0_is_counted(tmp_path):
    rows = [{"messages": chat((Q, "hi"), (A, "no", {"weight": 0}))}, {"messages": TALK}]
    report = load(write(tmp_path, rows), tokenizer()).report
    assert (report.rows, report.used, report.masked, report.dropped) == (2, 1, 1, 0)
    assert "1 rows dropped: each of their turns has weight 0" in str(report)


@pytest.mark.parametrize(
    "more, message",
    [
        ({"weight": 0.5}, r"messages\[1\].weight must be 0, 1, true or false; got 0.5"),
        ({"weight": -1}, "got -1"),
        ({"train": "false"}, "got a string"),
        ({"weight": 0, "train": True}, "weight and train say different things"),
        (
            {"loss_mask": 0},
            "'loss_mask', which is about the loss and is not known; known: weight, train, training",
        ),
        ({"train_detail": []}, "'train_detail', which is about the loss"),
        ({"loss": False}, "'loss', which is about"),
    ],
)
def test_a_key_about_the_loss_is_known_or_an_error(more, message):
    with pytest.raises(BadRow, match=message):
        format_of("chat", "assistant", tokenizer())({"messages": chat((Q, "hi"), (A, "x", more))})


def test_a_column_about_the_loss_is_an_error(tmp_path):
    for more in ({"loss_mask": [0, 1]}, {"sample_weight": 0.1}, {"weight": 0}, {"train": False}):
        with pytest.raises(DataError, match=f"column '{next(iter(more))}' is about the loss and is not read"):
            load(write(tmp_path, [{"prompt": "a", "completion": "b", **more}]), tokenizer(), "completion")
    assert load(write(tmp_path, [{"prompt": "a", "completion": "b", "weight": 1}]), tokenizer(), "completion")


def test_weights_where_the_template_tags_what_is_learned():
    tok = tokenizer(TAGGED_TWICE)
    turns = chat((Q, "hi"), (A, "one", {"thinking": "think one"}), (Q, "x"), (A, "two"))
    assert runs(tok, {"messages": turns}) == ["(think one)", "one<|im_end|>", "two<|im_end|>"]
    assert runs(tok, {"messages": turns}, "completion") == ["two<|im_end|>"]
    turns[3]["weight"] = 0
    assert runs(tok, {"messages": turns}) == ["(think one)", "one<|im_end|>"]
    turns[0]["train"], turns[3]["weight"] = 1, 1
    assert runs(tok, {"messages": turns})[0] == "hi<|im_end|>"
    turns[1]["thinking"] = ""
    assert runs(tok, {"messages": turns}) == ["hi<|im_end|>", "one<|im_end|>", "two<|im_end|>"]


# 3. columns


def test_a_system_column_is_the_first_turn():
    tok = tokenizer()
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "Arr"}]
    text = text_of(tok, {"system": "Answer like a pirate.", "conversations": turns})
    assert text.startswith("<|im_start|>system\nAnswer like a pirate.<|im_end|>\n<|im_start|>user\nhi")
    plain = text_of(tok, {"conversations": turns})
    assert plain == text_of(tok, {"conversations": turns, "system": "", "tools": ""})
    both = [{"from": "system", "value": "x"}, *turns]
    assert text_of(tok, {"conversations": both, "system": "x"}) == text_of(tok, {"conversations": both})
    with pytest.raises(BadRow, match=r"'system' and conversations\[0\] are two system prompts"):
        format_of("chat", "assistant", tok)({"conversations": both, "system": "y"})
    with pytest.raises(BadRow, match="'system' must be a string; got a list"):
        format_of("chat", "assistant", tok)({"conversations": turns, "system": ["y"]})


def test_alpaca_system_and_history():
    tok = tokenizer()
    row = {"instruction": "And Germany?", "input": "", "output": "Berlin"}
    row |= {"system": "You are a geographer.", "history": [["Capital of France?", "Paris"]]}
    assert text_of(tok, row, "alpaca") == (
        "You are a geographer.\n\n### Instruction:\nCapital of France?\n\n### Response:\nParis<|endoftext|>"
        "\n\n### Instruction:\nAnd Germany?\n\n### Response:\nBerlin<|endoftext|>"
    )
    assert runs(tok, row, format="alpaca") == ["Paris<|endoftext|>", "Berlin<|endoftext|>"]
    assert runs(tok, row, "completion", "alpaca") == ["Berlin<|endoftext|>"]
    assert runs(tok, row, "all", "alpaca") == [text_of(tok, row, "alpaca")]
    bare = {"instruction": "a", "output": "b"}
    assert text_of(tok, bare, "alpaca") == text_of(tok, bare | {"system": None, "history": []}, "alpaca")
    for bad in ("x", [["a"]], [["a", 1]], [["a", " "]], [{"q": "a"}]):
        with pytest.raises(BadRow, match="history"):
            format_of("alpaca", "assistant", tok)(bare | {"history": bad})


def test_columns_that_are_not_read_are_counted(tmp_path):
    rows = [
        {"prompt": "a", "completion": "b", "system": "S", "id": 4, "note": None, "tags": []},
        {"prompt": "a", "completion": "b", "id": 5},
    ]
    report = load(write(tmp_path, rows), tokenizer(), "completion").report
    assert report.unread == {"id": 2, "system": 1} and "columns not read: id (2), system (1)" in str(report)
    twice = {"messages": chat((Q, "a"), (A, "b")), "conversations": [{"from": "gpt", "value": "c"}]}
    assert load(write(tmp_path, [twice]), tokenizer()).report.unread == {"conversations": 1}


def test_ready_tokens_are_taken_as_they_are(tmp_path):
    """Nothing is added; labels say what is learned; a window of exactly sequence_len stays one window."""
    form = format_of("tokens", "assistant", tokenizer())
    assert form({"input_ids": [5, 0, 7]}) == Tokens([5, 0, 7], [True] * 3)
    assert form({"input_ids": [5, 0, 7], "labels": [-100, 0, -100]}).learned == [False, True, False]
    rows = [{"input_ids": list(range(i, i + 8))} for i in range(3)]
    for packing in (True, False):
        found = load(write(tmp_path, rows), tokenizer(), "tokens", sequence_len=8, packing=packing)
        assert sorted(found[i].input_ids for i in range(len(found))) == [row["input_ids"] for row in rows]
    for row, problem in (
        ({"ids": [1]}, "key 'input_ids' is missing; the row's keys are: 'ids'"),
        ({"input_ids": "1 2"}, "'input_ids' must be a list of integers; got a string"),
        ({"input_ids": [1, 2.5]}, "input_ids[1] must be an integer; got 2.5"),
        ({"input_ids": [True]}, "input_ids[0] must be an integer; got True"),
        ({"input_ids": []}, "'input_ids' is empty"),
        ({"input_ids": [4, -1]}, "'input_ids' has -1"),
        ({"input_ids": [4, 5], "labels": [4]}, "'labels' has 1 numbers and 'input_ids' 2"),
        ({"input_ids": [4, 5], "labels": [4, 6]}, "'labels' has 6 at 1, where 'input_ids' has 5"),
    ):
        with pytest.raises(BadRow, match=re.escape(problem)):
            form(row)


@pytest.mark.parametrize("format", list(FORMATS))
def test_every_column_of_the_table_is_read(format):
    """With another value in it the tokens differ, or the row is refused."""
    full: dict[str, dict[str, Any]] = {
        "chat": {"messages": chat((Q, "a"), (A, "b")), "system": "S", "tools": [TOOL]},
        "completion": {"prompt": "a", "completion": "b"},
        "alpaca": {"instruction": "a", "input": "b", "output": "c", "system": "d", "history": [["e", "f"]]},
        "text": {"text": "a"},
        "tokens": {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
    }
    pair = {"prompt": chat((Q, "a")), "chosen": chat((A, "b")), "rejected": chat((A, "c")), "tools": [TOOL]}
    full |= {"preference": pair, "chosen": pair}
    kept = (  # tests/speech/test_tokens.py has codec
        {"conversations", "learned", "row", "text", "messages", "about"}
        if format == "tokens"
        else {"conversations", "codec"}
    )
    form = format_of(format, "assistant", tokenizer(QWEN3))
    row = full[format]
    assert FORMATS[format].columns.keys() - kept == row.keys()
    for column in row:
        other = json.loads(
            json.dumps(row[column]).replace('"', '"z', 1) if isinstance(row[column], str) else "[]"
        )
        try:
            assert form(row | {column: other}).input_ids != form(row).input_ids, column
        except BadRow:
            pass
    if format == "chat":
        turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
        assert form({"conversations": turns}) == form({"messages": row["messages"]})


# 5. and 7. the end of a turn


@pytest.mark.parametrize(
    "template, middle, last",
    [
        (PHI3, "<|im_end|>", "<|im_end|>\n<|endoftext|>"),
        (PHI3_OTHER_END, "[end]", "<|endoftext|>"),
        (LLAMA3, "<|im_end|>", "<|im_end|>"),
        (MISTRAL, "<|endoftext|>", "<|endoftext|>"),
        (R1, "<|endoftext|>", "<|endoftext|>"),
    ],
)
def test_every_assistant_turn_learns_its_end(template, middle, last):
    row = {"messages": chat((Q, "one"), (A, "first"), (Q, "two"), (A, "second"), (Q, "three"), (A, "third"))}
    assert [run.strip() for run in runs(tokenizer(template), row)] == [
        f"first{middle}",
        f"second{middle}",
        f"third{last}",
    ]


def test_the_ending_is_one_token_or_said_to_be_none():
    foreign = (
        "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|/turn|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
    )
    assert len(ChatTemplate(tokenizer(foreign)).ending()) > 1
    assert ChatTemplate(tokenizer(PHI3)).ending() == tokenizer().convert_tokens_to_ids(["<|im_end|>"])
    assert ChatTemplate(tokenizer(R1)).ending() == [tokenizer().eos_token_id]
    silent = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    assert ChatTemplate(tokenizer(silent)).ending() == []
