"""data.py and its parts: rows in, windows and batches out.

The masks are checked against text written out by hand, for templates and tokenizers of every kind we know;
packing against the model itself; reading against arbitrary bytes.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from lowbit_ft.data import (
    Batches,
    DataError,
    Example,
    Examples,
    collate,
    keeps_segments_apart,
    load_examples,
    pack,
    pack_text,
)
from lowbit_ft.data_batches import SHUFFLE_BUFFER
from lowbit_ft.data_format import Formatter
from lowbit_ft.data_read import TEXT_PIECE, read_rows
from lowbit_ft.recipe import DataSection, DataSource

ASSETS = Path(__file__).parents[1] / "recipes" / "assets"
TINY = ASSETS / "tiny-llama"

QUICK = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And  3+3?\n"},
    {"role": "assistant", "content": "It is six.\n\nOf course."},
]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


def load(
    path: Any, tokenizer: Any, format: str = "chat", *, seed: int = 0, limit: int | None = None, **keys: Any
):
    source = DataSource(path=str(path), format=format, limit=limit)  # pyright: ignore[reportArgumentType]
    section = DataSection(train=source, **{"sequence_len": 64, "packing": False, **keys})
    return load_examples(source, section, tokenizer, seed=seed)


def write(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def targets(tokenizer: Any, example: Example) -> list[str]:
    """The learned text, one string per run of learned tokens."""
    runs: list[list[int]] = []
    previous = -100
    for label in example.labels:
        if label != -100:
            if previous == -100:
                runs.append([])
            runs[-1].append(label)
        previous = label
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


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
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}<|end|>\n\n{{ m['content'] | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
LLAMA2 = (  # no generation prompt, strict alternation, the answer glued with spaces
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + ' ' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ system if loop.first else '' }}{{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
QWEN3 = (  # the last answer gets (empty) thoughts, earlier ones lose theirs
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% set answer = m['content'].split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}{{ answer }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
R1 = (  # the generation prompt opens thoughts that the chat itself does not show
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}<|Assistant|>{{ m['content'] }}{{ eos_token }}"
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
    tokens = Formatter("chat", "assistant", tokenizer)({"messages": TALK})
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert tokens.input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    labels = [i if t else -100 for i, t in zip(tokens.input_ids, tokens.learned, strict=True)]
    got = targets(tokenizer, Example(tokens.input_ids, labels, [len(labels)]))
    want = [w.format(eos=tokenizer.eos_token) for w in wanted]
    if name == "llama2":  # whether the space before the answer is its own token is the tokenizer's affair
        got, want = [g.strip() for g in got], [w.strip() for w in want]
    assert got == want


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
    tokens = Formatter("chat", "assistant", CharacterTokenizer(pairs=False))(row)
    assert "".join(chr(i) for i, t in zip(tokens.input_ids, tokens.learned, strict=True) if t) == "you;"
    with pytest.raises(DataError, match=r"rows.jsonl:1: this tokenizer gives no character offsets"):
        load(write(tmp_path, [{"messages": [{"role": "user", "content": "hi"}, row["messages"][1]]}]),
             CharacterTokenizer(pairs=True))  # fmt: skip


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
    tokens = Formatter("chat", "assistant", tokenizer)({"messages": chat})
    learned = [i for i, t in zip(tokens.input_ids, tokens.learned, strict=True) if t]
    ends = [i for i in learned if i == tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert len(ends) == len(turns)
    got = tokenizer.decode(learned).split("<|im_end|>")[:-1]
    # a token may hold the header's line break and the answer's own; then the answer's first break is the prompt's
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


# packing


def row_lists(longest: int):
    row = st.integers(1, longest).flatmap(
        lambda n: st.tuples(st.lists(st.integers(0, 99), min_size=n, max_size=n), st.integers(0, n))
    )
    return st.lists(row.map(lambda r: Example(r[0], [-100] * r[1] + r[0][r[1] :], [len(r[0])])), max_size=150)


def parts(window: Example) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    assert sum(window.segments) == len(window.input_ids) == len(window.labels) and min(window.segments) > 0
    out, start = [], 0
    for length in window.segments:
        out.append(
            (tuple(window.input_ids[start : start + length]), tuple(window.labels[start : start + length]))
        )
        start += length
    return out


@QUICK
@given(rows=row_lists(16))
def test_pack_keeps_every_row_whole(rows):
    windows = list(pack(rows, 16))
    assert all(0 < len(w.input_ids) <= 16 for w in windows)
    packed = sorted(p for w in windows for p in parts(w))
    assert packed == sorted((tuple(r.input_ids), tuple(r.labels)) for r in rows)
    if len(rows) < 60:  # all windows were open to all rows: no two of them could still be one
        room = sorted(len(w.input_ids) for w in windows)
        assert len(room) < 2 or room[0] + room[1] > 16


@QUICK
@given(rows=row_lists(40), size=st.integers(2, 16))
def test_pack_text_loses_no_token(rows, size):
    windows = list(pack_text(rows, size))
    assert all(len(w.input_ids) == size for w in windows[:-1]) and all(
        len(w.input_ids) <= size for w in windows
    )
    want = [i for r in rows for i in r.input_ids]
    got = [i for w in windows for i in w.input_ids]
    rest = want[len(got) :]
    assert got == want[: len(got)] and len(rest) < size
    for window in windows:
        assert all(labels[0] == -100 for _, labels in parts(window))


def test_packing_fills_the_windows(tokenizer):
    examples = load(
        ASSETS / "docstrings" / "train.jsonl", tokenizer, sequence_len=256, packing=True, limit=600
    )
    report = examples.report
    assert report.tokens / (report.windows * 256) > 0.85
    assert report.rows == 600 == report.used + report.dropped and report.windows == len(examples)
    assert report.target_tokens == sum(label != -100 for e in examples for label in e.labels)
    assert report.tokens == sum(len(e.input_ids) for e in examples)


def test_packed_rows_are_the_padded_rows(tokenizer):
    path = ASSETS / "docstrings" / "valid.jsonl"
    padded = load(path, tokenizer, sequence_len=200)
    packed = load(path, tokenizer, sequence_len=200, packing=True)
    assert sorted(p for e in packed for p in parts(e)) == sorted(p for e in padded for p in parts(e))
    assert len(packed) < len(padded) == padded.report.used
    other = load(path, tokenizer, sequence_len=200, packing=True, seed=1)
    assert [e for e in other] != [e for e in packed]
    assert other.digest != packed.digest == load(path, tokenizer, sequence_len=200, packing=True).digest


# the model and its mask


def windows_for(tokenizer: Any, count: int) -> list[Example]:
    rng = random.Random(0)
    out = []
    for _ in range(count):
        segments = rng.choice([[5, 1, 9, 7], [3, 19], [1, 1, 13], [24], [8, 8, 8]])
        ids = [rng.randrange(4, 4096) for _ in range(sum(segments))]
        out.append(Example(ids, list(ids), segments))
    return out


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("size", [1, 3])
@torch.no_grad()
def test_packed_logits_are_those_of_the_segments_alone(attention, explicit, size, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation=attention)
    windows = windows_for(tokenizer, 3 * size)
    for first in range(0, len(windows), size):
        group = windows[first : first + size]
        batch = collate(group, 1, mask_dtype=torch.float32 if explicit else None)
        assert ("attention_mask" in batch) is explicit
        labels = batch.pop("labels")
        assert labels.shape == batch["input_ids"].shape
        logits = model(**batch, use_cache=False).logits
        for b, window in enumerate(group):
            start = 0
            for length in window.segments:
                ids = torch.tensor([window.input_ids[start : start + length]])
                alone = model(input_ids=ids, use_cache=False).logits[0]
                assert torch.allclose(logits[b, start : start + length], alone, atol=2e-4, rtol=1e-4)
                start += length


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_that_ignores_positions_is_found_out(attention):
    """OPT builds its mask without position_ids: packed rows would see each other. An explicit mask keeps them
    apart."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=64, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16,
        max_position_embeddings=64, init_std=0.5, attn_implementation=attention,
    )  # fmt: skip
    opt = OPTForCausalLM(config).train()
    llama = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16, attn_implementation=attention)
    assert not keeps_segments_apart(opt) and not keeps_segments_apart(opt, 2) and opt.training
    assert keeps_segments_apart(llama, 1) and keeps_segments_apart(llama, 3)
    opt.eval()
    ids = [5, 9, 11, 30, 31, 32, 33]
    packed = Example(ids, ids, [3, 4])
    batch = collate([packed, packed], 1, mask_dtype=torch.float32)
    batch.pop("labels")
    with torch.no_grad():
        logits = opt(**batch, use_cache=False).logits
        position = torch.arange(4)[None]
        alone = opt(input_ids=torch.tensor([ids[3:]]), position_ids=position, use_cache=False).logits
    assert torch.allclose(logits[:, 3:], alone.expand(2, -1, -1), atol=1e-5)


def test_the_loss_never_predicts_across_a_border(tokenizer, tmp_path):
    path = write(tmp_path, [{"text": "alpha beta"}, {"text": "gamma"}, {"text": "delta epsilon " * 30}])
    for packing in (True, False):
        for example in load(path, tokenizer, "text", sequence_len=32, packing=packing):
            assert all(labels[0] == -100 for _, labels in parts(example))
    packed = load(path, tokenizer, "text", sequence_len=32, packing=True)
    whole = [i for e in packed for i in e.input_ids]
    documents = [tokenizer(row)["input_ids"] + [0] for row in ("alpha beta", "gamma", "delta epsilon " * 30)]
    assert whole == sum(documents, [])
    assert packed[0].segments[:2] == [len(documents[0]), len(documents[1])] and packed.report.truncated == 0


# collate


def test_padding(tokenizer):
    long, short = Example([7, 8, 9, 10], [-100, 8, 9, 10], [4]), Example([5, 6], [-100, 6], [1, 1])
    batch = collate([long, short], 1)
    assert batch["input_ids"].tolist() == [[7, 8, 9, 10], [5, 6, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 8, 9, 10], [-100, 6, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 0, 1, 2]]
    assert {t.dtype for t in batch.values()} == {torch.int64} and set(batch) == {
        "input_ids",
        "labels",
        "position_ids",
    }


# batches


def numbered(count: int) -> Examples:
    return Examples(Example([n, n + 1, n + 2], [-100, n + 1, n + 2], [3]) for n in range(count))


def first_ids(batches: Any, count: int) -> list[list[int]]:
    return [next(batches)["input_ids"][:, 0].tolist() for _ in range(count)]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@QUICK
@given(count=st.integers(1, 23), size=st.integers(1, 5), world=st.integers(1, 4), shuffle=st.booleans())
def test_ranks_together_see_what_one_process_sees(count, size, world, shuffle):
    examples = numbered(count)
    alone = first_ids(Batches(examples, size, 0, 3, shuffle=shuffle), 6 * world)
    ranks = [Batches(examples, size, 0, 3, rank, world, shuffle) for rank in range(world)]
    turns = [first_ids(rank, 6) for rank in ranks]
    assert alone == [turns[r][k] for k in range(6) for r in range(world)]
    assert len({json.dumps(rank.state_dict()) for rank in ranks}) == 1
    # every epoch is every window once
    order = [i for micro_batch in alone for i in micro_batch]
    for start in range(0, len(order) - count + 1, count):
        assert sorted(order[start : start + count]) == list(range(count))
    if not shuffle:
        assert order == [i % count for i in range(len(order))]


@QUICK
@given(count=st.integers(1, 40), size=st.integers(1, 4), stop=st.integers(0, 60), seed=st.integers(0, 9))
def test_resume_is_bit_equal(count, size, stop, seed):
    examples = numbered(count)
    straight = Batches(examples, size, 0, seed)
    for _ in range(stop):
        next(straight)
    state = json.loads(json.dumps(straight.state_dict()))
    resumed = Batches(numbered(count), size, 0, seed)
    next(resumed)
    resumed.load_state_dict(state)
    assert all(same(next(straight), next(resumed)) for _ in range(8))
    assert straight.state_dict() == resumed.state_dict()


def test_resume_in_other_data_is_refused():
    state = Batches(numbered(9), 2, 0, 1).state_dict()
    for other in (
        Batches(numbered(8), 2, 0, 1),
        Batches(numbered(9), 2, 0, 2),
        Batches(numbered(9), 2, 0, 1, shuffle=False),
    ):
        with pytest.raises(DataError, match="cannot resume: (digest|seed|shuffle) was"):
            other.load_state_dict(state)


def test_len_seed_and_one_epoch():
    examples = numbered(10)
    assert [len(Batches(examples, 3, 0, world=w)) for w in (1, 2)] == [4, 2]
    assert first_ids(Batches(examples, 10, 0, 0), 2) != first_ids(Batches(examples, 10, 0, 1), 2)
    batches = Batches(examples, 10, 0)
    a, b = first_ids(batches, 2)
    assert a != b and a != list(range(10))  # each epoch has its own order
    state = batches.state_dict()
    both = [Batches(examples, 3, 0, rank=r, world=2).one_epoch() for r in (0, 1)]
    got = [batch["input_ids"][:, 0].tolist() for rank in both for batch in rank]
    assert got == [[0, 1, 2], [6, 7, 8], [3, 4, 5], [9]] and batches.state_dict() == state
    with pytest.raises(DataError, match="micro_batch_size 0"):
        Batches(examples, 0, 0)
    with pytest.raises(DataError, match="no examples"):
        Batches(Examples([]), 1, 0)


def test_examples_is_a_sequence():
    examples = numbered(5)
    assert examples[-1] == examples[4] == examples[3:][1] and len(list(examples)) == 5
    with pytest.raises(IndexError):
        examples[5]


# streaming


def test_stream_is_the_file(tokenizer):
    path = ASSETS / "docstrings" / "valid.jsonl"
    for format, packing in (("chat", False), ("chat", True)):
        held = load(path, tokenizer, format, packing=packing, sequence_len=128)
        stream = load(path, tokenizer, format, packing=packing, sequence_len=128, streaming=True)
        assert stream.streaming and not held.streaming
        got = list(iter(stream))
        if packing:  # packed in file order there, in a seeded order here
            assert sorted(p for e in got for p in parts(e)) == sorted(p for e in held for p in parts(e))
        else:
            assert got == list(held) and str(stream.report) == str(held.report)
        assert (stream.report.used, stream.report.truncated) == (held.report.used, held.report.truncated)
    for unable in (lambda: len(stream), lambda: stream[0], lambda: len(Batches(stream, 1, 0))):
        with pytest.raises(DataError, match="streamed data set has no"):
            unable()


def test_stream_shuffles_within_a_bounded_buffer_and_resumes(tokenizer, tmp_path):
    count = SHUFFLE_BUFFER + 70
    path = write(tmp_path, [{"text": f"{n} and on"} for n in range(count)])

    def batches(world: int = 1, rank: int = 0, shuffle: bool = True) -> Batches:
        stream = load(path, tokenizer, "text", streaming=True, sequence_len=32)
        return Batches(stream, 5, 1, 7, rank, world, shuffle)

    steps = count // 5 * 2 + 9  # into the third epoch
    straight = batches()
    seen, states = [], []
    for _ in range(steps):
        states.append(json.loads(json.dumps(straight.state_dict())))
        seen.append(next(straight))
    texts = [tokenizer.decode(ids[ids != 1]) for b in seen for ids in b["input_ids"]]
    epoch = [int(t.split()[0]) for t in texts[:count]]
    assert sorted(epoch) == list(range(count)) and epoch != sorted(epoch)
    assert all(n <= place + SHUFFLE_BUFFER for place, n in enumerate(epoch))
    assert (
        sorted(texts[count : 2 * count]) == sorted(texts[:count])
        and texts[count : 2 * count] != texts[:count]
    )
    for stop in random.Random(0).sample(range(steps - 1), 6):
        resumed = batches()
        resumed.load_state_dict(states[stop])
        assert same(next(resumed), seen[stop])
    pair = [batches(2, r) for r in (0, 1)]
    assert all(same(next(pair[k % 2]), seen[k]) for k in range(20))
    plain = next(batches(shuffle=False))
    assert tokenizer.decode(plain["input_ids"][0]).startswith("0 and on")


def test_stream_reports_the_bad_row_when_it_comes(tokenizer, tmp_path):
    path = write(tmp_path, [{"text": "fine"}, {"text": "fine too"}, {"text": 3}])
    stream = load(path, tokenizer, "text", streaming=True)
    batches = Batches(stream, 2, 0, shuffle=False)
    next(batches)
    with pytest.raises(DataError, match=r"rows.jsonl:3: 'text' must be a string; got a number"):
        next(batches)
    with pytest.raises(DataError, match="empty"):
        load(write(tmp_path, []), tokenizer, "text", streaming=True)


# reading


def test_every_file_type_gives_the_same_rows(tokenizer, tmp_path, monkeypatch):
    rows = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(7)]
    write(tmp_path, rows)
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "rows.jsonl").read_bytes() + b"\n\n")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "nested.json").write_text(json.dumps({"version": 1, "data": rows}))
    (tmp_path / "lines.json").write_bytes((tmp_path / "rows.jsonl").read_bytes())
    (tmp_path / "rows.csv").write_text(
        "prompt,completion\n" + "".join(f'{r["prompt"]},"{r["completion"]}"\n\n' for r in rows)
    )
    (tmp_path / "rows.tsv").write_text(
        "prompt\tcompletion\n" + "".join(f"{r['prompt']}\t{r['completion']}\n" for r in rows)
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows [1].parquet"))
    want = list(load(tmp_path / "rows.jsonl", tokenizer, "completion"))
    files = sorted(f for f in tmp_path.iterdir() if f.is_file())
    assert len(files) == 8
    for file in files:
        assert list(load(file, tokenizer, "completion")) == want, file.name
    assert len(load(tmp_path / "*.?sv", tokenizer, "completion")) == 14
    assert len(load(tmp_path, tokenizer, "completion")) == 8 * 7
    assert list(load(tmp_path / "rows.jsonl", tokenizer, "completion", limit=3)) == want[:3]


def test_chat_from_parquet(tokenizer, tmp_path):
    rows = [{"messages": TALK}, {"messages": TALK[:3]}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    assert list(load(tmp_path / "rows.parquet", tokenizer)) == list(load(write(tmp_path, rows), tokenizer))


def test_text_files_are_documents_cut_at_line_ends(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("first line\n\nsecond\n")
    (tmp_path / "b.md").write_text("# other\n")
    examples = load(tmp_path, tokenizer, "text")
    assert [tokenizer.decode(e.input_ids) for e in examples] == [
        "first line\n\nsecond\n<|endoftext|>", "# other\n<|endoftext|>",
    ]  # fmt: skip
    line = "x" * 1023 + "\n"
    (tmp_path / "big.txt").write_text(line * (TEXT_PIECE // 1024 + 10))
    rows = list(read_rows(DataSource(path=str(tmp_path / "big.txt"), format="text")))
    assert [row.number for row in rows] == [1, TEXT_PIECE // 1024 + 1]
    assert [len(row.value["text"]) for row in rows if row.value] == [TEXT_PIECE, 10 * 1024]


@pytest.mark.parametrize("streaming", [False, True])
def test_hub(tokenizer, tmp_path, monkeypatch, streaming):
    asked = {}

    def load_dataset(path, name, **keys):
        asked.update(path=path, name=name, **keys)
        table = datasets.Dataset.from_list([{"text": "one"}, {"text": None}, {"text": "three"}])
        return table.to_iterable_dataset() if keys["streaming"] else table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = DataSource(path="who/what", format="text", split="validation", name="big", revision="abc")
    section = DataSection(train=source, packing=False, on_bad_row="skip", streaming=streaming)
    examples = load_examples(source, section, tokenizer)
    assert len(list(iter(examples))) == 2
    assert asked == dict(path="who/what", name="big", split="validation", revision="abc", streaming=streaming)
    assert examples.report.problems == ["hub:who/what[validation]:2: 'text' must be a string; got null"]

    def fail(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        DataError, match="who/what: no local file or folder, and the hub answered ConnectionError: no route$"
    ):
        load_examples(source, section, tokenizer)


ASKS = {"role": "user", "content": "q"}
BAD_ROWS = [
    ("chat", b'{"messages": [', "invalid JSON: Expecting value at column"),
    ("chat", b'\xff{"messages": []}', "not UTF-8: byte 0xff at column 1"),
    ("chat", b"[1, 2]", "a row is an object with keys; got a list"),
    ("chat", b"{}", r"key 'messages' \(or 'conversations'\) is missing; the row's keys are: none"),
    ("chat", {"text": "x"}, r"key 'messages' \(or 'conversations'\) is missing; the row's keys are: 'text'"),
    ("chat", {"messages": "hello"}, "'messages' must be a list of messages; got a string"),
    ("chat", {"messages": []}, "'messages' is empty"),
    ("chat", {"messages": [ASKS]}, "no assistant turn to learn from; the roles are: 'user'"),
    ("chat", {"messages": ["hello"]}, r"messages\[0\] must be an object; got a string"),
    ("chat", {"messages": [ASKS, {"content": "x"}]}, r"messages\[1\]: key 'role' is missing"),
    ("chat", {"messages": [ASKS, {"role": "assistant"}]}, r"messages\[1\]: content is missing"),
    ("chat", {"messages": [ASKS, {"role": "assistant", "content": None}]}, r"messages\[1\]: content is null"),
    (
        "chat",
        {"messages": [ASKS, {"role": "assistant", "content": 4}]},
        r"messages\[1\].content must be a string; got a number",
    ),
    (
        "chat",
        {"messages": [ASKS, {"role": "assistant", "content": " "}]},
        r"messages\[1\]: the assistant's content is empty",
    ),
    (
        "chat",
        {"messages": [ASKS, {"role": 1, "content": "x"}]},
        r"messages\[1\].role must be a string; got a number",
    ),
    (
        "chat",
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        r"messages\[0\].content has a part that is not text",
    ),
    (
        "chat",
        {"conversations": [{"from": "alien", "value": "x"}]},
        r"conversations\[0\].from is 'alien'; known: system",
    ),
    ("chat", {"messages": TALK, "tools": "hammer"}, "'tools' must be a list of objects; got a string"),
    ("completion", {"prompt": "x"}, "key 'completion' is missing; the row's keys are: 'prompt'"),
    ("completion", {"prompt": 1, "completion": "x"}, "'prompt' must be a string; got a number"),
    ("completion", {"prompt": "x", "completion": ""}, "'completion' is empty"),
    ("alpaca", {"instruction": "x", "input": {}, "output": "y"}, "'input' must be a string; got an object"),
    ("alpaca", {"instruction": "", "output": "y"}, "'instruction' is empty"),
    ("text", {"text": "   "}, "'text' is empty"),
    ("text", {"text": True}, "'text' must be a string; got a boolean"),
    ("text", b'{"text": "a\\ud800"}', "not valid Unicode: a lone surrogate at character 2"),
    ("text", b'{"text": ' + b"[" * 100_000, "invalid JSON"),
    ("text", b'{"text": ' + b"9" * 5000 + b"}", "invalid JSON"),
]
GOOD = {"messages": TALK, "prompt": "a", "completion": "b", "instruction": "c", "output": "d", "text": "e f"}


@pytest.mark.parametrize("format, row, message", BAD_ROWS)
def test_a_bad_row_is_named_or_skipped(format, row, message, tokenizer, tmp_path):
    raw = row if isinstance(row, bytes) else json.dumps(row).encode()
    good = json.dumps(GOOD).encode()
    path = tmp_path / "rows.jsonl"
    path.write_bytes(good + b"\n\n" + raw + b"\n" + good + b"\n")
    with pytest.raises(DataError, match=rf"rows\.jsonl:3: {message}") as caught:
        load(path, tokenizer, format, sequence_len=256)
    assert (caught.value.file, caught.value.row) == (str(path), 3) and "on_bad_row: skip" in str(caught.value)
    examples = load(path, tokenizer, format, sequence_len=256, on_bad_row="skip")
    assert (len(examples), examples.report.rows, examples.report.skipped) == (2, 3, 1)
    assert "1 rows skipped" in str(examples.report) and f"{path}:3: " in str(examples.report)
    path.write_bytes(raw)
    with pytest.raises(DataError, match="no usable row"):
        load(path, tokenizer, format, on_bad_row="skip")


BAD_FILES = [
    ("none.jsonl", None, "none.jsonl: no such file"),
    ("no/such/folder", None, "no such file, folder or hub data set"),
    ("*.jsonl", None, "no file matches"),
    ("nul\0.jsonl", None, "is no path|no such file"),
    ("empty.jsonl", b"", "empty.jsonl: the data set is empty"),
    ("blank.jsonl", b"\n \n", "the data set is empty"),
    ("empty.csv", b"", "the data set is empty"),
    ("header.csv", b"text\n", "the data set is empty"),
    ("rows.pickle", b"x", r"unknown suffix '.pickle'; known: .jsonl"),
    (
        "broken.json",
        b'[{"text": "a"},\n{"text": }]',
        r"broken.json:2: invalid JSON: Expecting value at column 10",
    ),
    ("bytes.json", b'[\n"\xff"]', "bytes.json:2: not UTF-8: byte 0xff"),
    ("number.json", b"3", "expected a list of rows; got a number"),
    ("deep.json", b"[" * 100_000, "invalid JSON"),
    ("item.json", b'[{"text": "a"}, 3]', "item.json:2: a row is an object with keys; got a number"),
    ("fields.csv", b"text,b\nx,1\ny\n", "fields.csv:3: 1 fields; the header has 2"),
    ("quote.csv", b'text,b\n"x"y,1\n', "quote.csv:2: invalid CSV"),
    (
        "bytes.csv",
        b"text\nab\xffc\n",
        "bytes.csv:2: not valid Unicode: byte 0xff is not UTF-8 at character 3",
    ),
    ("bytes.txt", b"good\n\xfe", "bytes.txt:1: not valid Unicode: byte 0xfe"),
    ("broken.parquet", b"PAR1 not really", "not a readable parquet file"),
]


@pytest.mark.parametrize("name, content, message", BAD_FILES)
def test_a_bad_file_is_named(name, content, message, tokenizer, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(path, tokenizer, "text")


def test_empty_folder_and_unreadable_file(tokenizer, tmp_path):
    with pytest.raises(DataError, match="the folder holds no data file"):
        load(tmp_path, tokenizer, "text")
    with pytest.raises(DataError, match=r"data format 'xml'; allowed: chat"):
        Formatter("xml", "all", tokenizer)
    with pytest.raises(DataError, match=r"train_on 'me'; allowed"):
        Formatter("text", "me", tokenizer)
    source = DataSource(path=str(write(tmp_path, [GOOD])), format="text")
    with pytest.raises(DataError, match="sequence_len 1; at least 2"):
        load_examples(source, SimpleNamespace(sequence_len=1), tokenizer)  # pyright: ignore[reportArgumentType]


def test_a_long_csv_field_leaves_the_csv_module_as_it_was(tokenizer, tmp_path):
    import csv

    limit = csv.field_size_limit()
    (tmp_path / "long.csv").write_text('text\n"' + "word, " * 40_000 + '"\n')
    examples = load(tmp_path / "long.csv", tokenizer, "text", packing=True)
    assert examples.report.tokens > 40_000 and csv.field_size_limit() == limit


def test_truncation_is_counted_and_a_row_without_target_dropped(tokenizer, tmp_path):
    ask = lambda n: {"role": "user", "content": "why " * n}  # noqa: E731
    answer = {"role": "assistant", "content": "so " * 40}
    path = write(tmp_path, [{"messages": [ask(n), answer]} for n in (1, 10, 200)])
    report = (examples := load(path, tokenizer, sequence_len=32)).report
    assert (report.rows, report.used, report.truncated, report.dropped, report.skipped) == (3, 2, 2, 1, 0)
    assert all(len(e.input_ids) == 32 for e in examples)
    assert "2 rows truncated to 32 tokens" in str(report) and "1 rows dropped" in str(report)
    with pytest.raises(DataError, match="no usable row.*\n.*\n?1 rows dropped"):
        load(write(tmp_path, [{"messages": [ask(200), answer]}]), tokenizer, sequence_len=32)


# fuzz

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=8), x, max_size=4),
    max_leaves=10,
)
role = (
    st.sampled_from(["system", "user", "assistant", "tool", "human", "gpt"]) | st.text(max_size=5) | anything
)
message = st.fixed_dictionaries({}, optional={
    "role": role, "content": st.text(max_size=20) | anything, "from": role, "value": anything, "tool_calls": anything,
    "reasoning_content": anything, "name": anything,
})  # fmt: skip
some_row = anything | st.fixed_dictionaries({}, optional={
    "messages": st.lists(message, max_size=4) | anything, "conversations": st.lists(message, max_size=4) | anything,
    "prompt": st.text() | anything, "completion": st.text() | anything, "instruction": st.text() | anything,
    "input": anything, "output": st.text() | anything, "text": st.text() | anything, "tools": anything,
})  # fmt: skip
form = st.sampled_from(["chat", "completion", "alpaca", "text"])


def survives(path: Path, tokenizer: Any, format: str, packing: bool, bad: str, train_on: str) -> None:
    try:
        examples = load(
            path, tokenizer, format, sequence_len=16, packing=packing, on_bad_row=bad, train_on=train_on
        )
    except DataError as error:
        assert str(path.name) in str(error)
        return
    assert len(examples) > 0 and examples.report.used > 0
    for example in examples:
        assert 2 <= len(example.input_ids) <= 16 and any(label != -100 for label in example.labels)
        assert all(labels[0] == -100 for _, labels in parts(example))
    next(Batches(examples, 2, 1))


@settings(QUICK, max_examples=300)
@given(
    rows=st.lists(some_row, max_size=5), format=form, packing=st.booleans(), bad=st.sampled_from(["error", "skip"]),
    train_on=st.sampled_from(["assistant", "completion", "all"]), whole=st.booleans(),
)  # fmt: skip
def test_fuzz_rows(rows, format, packing, bad, train_on, whole, tokenizer, tmp_path):
    path = tmp_path / ("fuzz.json" if whole else "fuzz.jsonl")
    path.write_text(json.dumps(rows) if whole else "\n".join(map(json.dumps, rows)))
    survives(path, tokenizer, format, packing, bad, train_on)


@settings(QUICK, max_examples=200)
@given(
    content=st.binary(max_size=300) | st.text(max_size=200).map(lambda s: s.encode("utf-8", "surrogatepass")),
    suffix=st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".txt"]),
    format=form, packing=st.booleans(), bad=st.sampled_from(["error", "skip"]), head=st.sampled_from([b"", b"text\n", b'{"text": "']),
)  # fmt: skip
def test_fuzz_bytes(content, suffix, format, packing, bad, head, tokenizer, tmp_path):
    path = tmp_path / f"fuzz{suffix}"
    path.write_bytes(head + content)
    survives(path, tokenizer, format, packing, bad, "assistant")
