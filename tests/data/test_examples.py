"""From a row to tokens and their mask: checked against text written out by hand, for templates and tokenizers
of every kind we know.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from lowbit_ft.data.errors import DataError
from lowbit_ft.data.formats import format_of
from lowbit_ft.data.windows import Example
from tests.data_tools import QUICK, TALK, TINY, load, targets, write


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


# masks


def test_chatml_mask_is_every_answer_with_its_end_of_turn(tokenizer, tmp_path):
    examples = load(write(tmp_path, [{"messages": TALK}]), tokenizer, sequence_len=512)
    example = examples[0]
    assert tokenizer.decode(example.input_ids) == tokenizer.apply_chat_template(TALK, tokenize=False)
    assert targets(tokenizer, example) == ["Four.<|im_end|>", "It is six.\n\nOf course.<|im_end|>"]
    assert all(label in (-100, i) for i, label in zip(example.input_ids, example.labels, strict=True))
    # by hand, token for token
    one = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    prompt = tokenizer("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    answer = tokenizer("yo<|im_end|>")["input_ids"]
    newline = tokenizer("\n")["input_ids"]
    example = load(write(tmp_path, [{"messages": one}]), tokenizer)[0]
    assert example.input_ids == prompt + answer + newline
    assert example.labels == [-100] * len(prompt) + answer + [-100] * len(newline)
    assert example.segments == [len(example.input_ids)]


def test_train_on(tokenizer, tmp_path):
    path = write(tmp_path, [{"messages": TALK}])
    last = load(path, tokenizer, sequence_len=512, train_on="completion")[0]
    assert targets(tokenizer, last) == ["It is six.\n\nOf course.<|im_end|>"]
    whole = load(path, tokenizer, sequence_len=512, train_on="all")[0]
    assert whole.labels == [-100, *whole.input_ids[1:]]


def test_conversations_layout_is_the_same_chat(tokenizer, tmp_path):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    shared = [{"from": names[m["role"]], "value": m["content"]} for m in TALK]
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in TALK]
    examples = load(
        write(tmp_path, [{"messages": TALK}, {"conversations": shared}, {"messages": parts}]),
        tokenizer,
        sequence_len=512,
    )
    assert examples[0] == examples[1] == examples[2]


LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}<|end|>\n\n"
    "{{ m['content'] | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
LLAMA2 = (  # no generation prompt, strict alternation, the answer glued with spaces
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + ' ' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token }}[INST] "
    "{{ system if loop.first else '' }}{{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
QWEN3 = (  # the last answer gets (empty) thoughts, earlier ones lose theirs
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% set answer = m['content'].split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}{{ answer }}{% else %}{{ m['content'] }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
R1 = (  # the generation prompt opens thoughts that the chat itself does not show
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "<|Assistant|>{{ m['content'] }}{{ eos_token }}"
    "{% else %}<|User|>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
EOS_ONCE = (  # EOS only behind the last message
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% if loop.last %}{{ eos_token }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
TAGGED = (  # tags around the content alone: the end of turn stands outside
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
)
TAGGED_WHOLE = TAGGED.replace("{% endgeneration %}", "<|im_end|>\n{% endgeneration %}").replace(
    "{% endif %}<|im_end|>\n{% endfor %}", "<|im_end|>\n{% endif %}{% endfor %}"
)
NO_HEADER = TAGGED.replace("{% generation %}", "").replace(
    "{% endgeneration %}", ""
)  # ignores the prompt flag
TEMPLATES = {
    "llama3": (LLAMA3, ["Four.<|eot|>", "It is six.\n\nOf course.<|eot|>"]),
    "llama2": (LLAMA2, ["Four. {eos}", "It is six.\n\nOf course. {eos}"]),
    "qwen3": (QWEN3, ["Four.<|im_end|>", "<think>\n\n</think>\n\nIt is six.\n\nOf course.<|im_end|>"]),
    "r1": (R1, ["Four.{eos}", "It is six.\n\nOf course.{eos}"]),
    "eos once": (EOS_ONCE, ["Four.", "It is six.\n\nOf course.{eos}"]),
    "tags": (TAGGED, ["Four.<|im_end|>", "It is six.\n\nOf course.<|im_end|>"]),
    "tags around the end of turn": (TAGGED_WHOLE, ["Four.<|im_end|>", "It is six.\n\nOf course.<|im_end|>"]),
    "no generation prompt": (NO_HEADER, ["Four.<|im_end|>", "It is six.\n\nOf course.<|im_end|>"]),
}
SPECIALS = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>"]
SPECIALS += ["<|User|>", "<|Assistant|>"]


def small_tokenizer(style: str) -> Any:
    """A tokenizer trained on TALK, of one of the families that differ in how they give offsets."""
    words = [m["content"] for m in TALK] * 3 + ["assistant user system [INST] [/INST] <think> </think>"] * 3
    if style == "metaspace":  # SentencePiece: a space belongs to the word behind it
        tok = Tokenizer(models.BPE(unk_token="<unk>"))
        tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tok.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = sorted(set("".join(words)) | set("▁:/[]|{}"))
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIALS, initial_alphabet=alphabet)  # pyright: ignore
    else:  # GPT-2, Llama 3: bytes; "trimmed" offsets leave white space out
        tok = Tokenizer(models.BPE())
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.decoder = decoders.ByteLevel()
        if style == "trimmed":
            tok.post_processor = processors.ByteLevel(trim_offsets=True)
        trainer = trainers.BpeTrainer(  # pyright: ignore[reportCallIssue]
            vocab_size=400, special_tokens=SPECIALS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
    tok.train_from_iterator(words, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("style", ["bytes", "trimmed", "metaspace"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_mask_for_any_template_and_tokenizer(name, style):
    template, wanted = TEMPLATES[name]
    tokenizer = small_tokenizer(style)
    tokenizer.chat_template = template
    tokens = format_of("chat", "assistant", tokenizer)({"messages": TALK})
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert tokens.input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    labels = [i if t else -100 for i, t in zip(tokens.input_ids, tokens.learned, strict=True)]
    got = targets(tokenizer, Example(tokens.input_ids, labels, [len(labels)]))
    want = [w.format(eos=tokenizer.eos_token) for w in wanted]
    if name == "llama2":  # whether the space before the answer is its own token is the tokenizer's affair
        got, want = [g.strip() for g in got], [w.strip() for w in want]
    assert got == want


def test_thoughts_and_tool_calls(tokenizer):
    """A turn whose thoughts the template drops, and which is not learned; turns that are a call, without
    content."""
    qwen = small_tokenizer("bytes")
    qwen.chat_template = QWEN3
    chat = [dict(m) for m in TALK]
    chat[2]["content"] = "<think>\ntwo and two\n</think>\n\nFour."
    tokens = format_of("chat", "completion", qwen)({"messages": chat})
    learned = [i for i, t in zip(tokens.input_ids, tokens.learned, strict=True) if t]
    assert qwen.decode(learned).startswith("<think>\n\n</think>") and tokens.lost == ("assistant thoughts",)
    caller = AutoTokenizer.from_pretrained(TINY)
    caller.chat_template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'] or '' }}{% for c in m['tool_calls'] or [] %}CALL {{ c['name'] }}{% endfor %}"
        "<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    chat = [
        {"role": "user", "content": "Time?"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]},
        {"role": "tool", "content": "noon"},
        {"role": "assistant", "content": "It is noon."},
    ]
    tokens = format_of("chat", "assistant", caller)({"messages": chat, "tools": [{"name": "clock"}]})
    learned = [i for i, t in zip(tokens.input_ids, tokens.learned, strict=True) if t]
    assert caller.decode(learned) == "CALL clock<|im_end|>It is noon.<|im_end|>"
    assert caller.decode(tokens.input_ids).startswith('[{"name": "clock"}]<|im_start|>user')


class CharacterTokenizer:
    """A slow tokenizer: no offsets. One token per character, or per pair of them if `pairs`."""

    is_fast, eos_token_id, eos_token, special_tokens_map = False, 0, "\0", {}
    chat_template = "x"

    def __init__(self, pairs: bool):
        self.pairs = pairs

    def get_chat_template(self) -> str:
        return self.chat_template

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        step = 2 if self.pairs else 1
        return {"input_ids": [sum(map(ord, text[i : i + step])) for i in range(0, len(text), step)]}

    def apply_chat_template(self, messages, *, add_generation_prompt: bool, **_: Any) -> str:
        text = "".join(f"{m['role'][0]}:{m['content']};" for m in messages)
        return text + "a:" if add_generation_prompt else text


def test_slow_tokenizer_is_exact_or_refused(tmp_path):
    row = {"messages": [{"role": "user", "content": "hey"}, {"role": "assistant", "content": "you"}]}
    tokens = format_of("chat", "assistant", CharacterTokenizer(pairs=False))(row)
    assert "".join(chr(i) for i, t in zip(tokens.input_ids, tokens.learned, strict=True) if t) == "you;"
    with pytest.raises(DataError, match=r"rows.jsonl:1: this tokenizer gives no character offsets"):
        load(
            write(tmp_path, [{"messages": [{"role": "user", "content": "hi"}, row["messages"][1]]}]),
            CharacterTokenizer(pairs=True),
        )


@pytest.mark.parametrize(
    "template, message",
    [
        (
            "{% for m in messages|reverse %}{{ m['content'] }}|{{ messages|length }}{% endfor %}",
            "in their order",
        ),
        ("{{ messages | tojson | upper }}", "cannot be split"),
        ("{{ messages[0]['content'] }}", "cannot be split"),
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages[0]['nothing']['deeper'] }}", "template refuses"),
        ("{% generation %}{% endgeneration %}{{ messages[0]['content'] }}", "template"),
    ],
)
def test_template_that_cannot_be_split_is_refused(template, message, tokenizer, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=message):
        load(write(tmp_path, [{"messages": TALK}]), tokenizer)


def test_no_template_and_no_end_of_turn(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    examples = load(write(tmp_path, [{"messages": TALK}]), tokenizer, sequence_len=512)
    assert "will not learn to stop" in str(examples.report)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template.*format: completion"):
        load(write(tmp_path, [{"messages": TALK}]), tokenizer)


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(
    lambda s: bool(s.strip())
)


@QUICK
@given(turns=st.lists(st.tuples(words, words), min_size=1, max_size=4), system=st.none() | words)
def test_mask_is_exact_for_any_text(turns, system, tokenizer):
    """Tokens in spans between the specials, which no text here may contain: each piece tokenized alone must
    agree."""
    chat = [] if system is None else [{"role": "system", "content": system}]
    for user, answer in turns:
        chat += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    if any(mark in m["content"] for m in chat for mark in ("<|", "|>")):
        return
    tokens = format_of("chat", "assistant", tokenizer)({"messages": chat})
    learned = [i for i, t in zip(tokens.input_ids, tokens.learned, strict=True) if t]
    ends = [i for i in learned if i == tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert len(ends) == len(turns)
    got = tokenizer.decode(learned).split("<|im_end|>")[:-1]
    # a token may hold the header's line break and the answer's own: then both are the prompt's
    assert [g.lstrip() for g in got] == [answer.lstrip() for _, answer in turns]


# other formats


def test_completion_and_alpaca(tokenizer, tmp_path):
    path = write(
        tmp_path, [{"prompt": "2+2=", "completion": " 4"}, {"prompt": "", "completion": "free text"}]
    )
    examples = load(path, tokenizer, "completion")
    assert targets(tokenizer, examples[0]) == [" 4<|endoftext|>"]
    assert tokenizer.decode(examples[0].input_ids) == "2+2= 4<|endoftext|>"
    glued = load(write(tmp_path, [{"prompt": "self.ret", "completion": "urn"}]), tokenizer, "completion")[0]
    pieces = [tokenizer("self.ret")["input_ids"], tokenizer("urn")["input_ids"] + [0]]
    assert pieces[0] + pieces[1][:-1] != tokenizer("self.return")["input_ids"]  # whole, one token would cross
    assert glued.input_ids == sum(pieces, []) and glued.labels == [-100] * len(pieces[0]) + pieces[1]
    write(tmp_path, [{"prompt": "2+2=", "completion": " 4"}])
    whole = load(path, tokenizer, "completion", train_on="all")[0]
    assert whole.labels == [-100, *whole.input_ids[1:]]
    rows = [
        {"instruction": "Add", "input": "1 2", "output": "3"},
        {"instruction": "Say {x}", "output": "{y}"},
    ]
    examples = load(write(tmp_path, rows), tokenizer, "alpaca", sequence_len=256)
    assert [targets(tokenizer, e) for e in examples] == [["3<|endoftext|>"], ["{y}<|endoftext|>"]]
    first, second = (tokenizer.decode(e.input_ids) for e in examples)
    assert "### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n3" in first
    assert "paired with an input" not in second and "### Input" not in second and "Say {x}" in second


def test_text_documents_and_bos(tmp_path):
    tokenizer = small_tokenizer("bytes")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    example = load(write(tmp_path, [{"text": "Four."}]), tokenizer, "text")[0]
    assert (
        tokenizer.decode(example.input_ids) == "<s>Four.</s>"
    )  # EOS once, though the tokenizer adds one itself
    assert example.labels == [-100, *example.input_ids[1:]]
    example = load(write(tmp_path, [{"prompt": "And", "completion": " Four."}]), tokenizer, "completion")[0]
    assert targets(tokenizer, example) == [" Four.</s>"]
