"""data.synthesis against a slow reference: greedy beginnings, draws by the row's own numbers, filters, chats,
and the folder that goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from lowbit_ft.data.errors import BadRow
from lowbit_ft.data.formats import format_of
from lowbit_ft.data.synthesis import SYNTHESIS, FilterConfig, Row, TextConfig, Voice
from lowbit_ft.data.synthesis.base import Shard
from lowbit_ft.data.synthesis.draw import take, uniforms
from lowbit_ft.data.synthesis.filters import longest_run, repetition, unreadable, why_dropped
from lowbit_ft.data.synthesis.folder import RowsFolder, fill, read_state
from lowbit_ft.data.synthesis.text import Pages
from lowbit_ft.data.synthesis.write import write_rows
from lowbit_ft.files.manifest import MANIFEST
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.load import load_model
from tests.data_tools import TINY, load

STOPS = (0, 3)
LOOSE = {"min_tokens": 1, "max_repetition": 1.0, "max_run": 9999, "max_unreadable": 1.0}


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(Checkpoint.open(str(TINY), dtype="float32"), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


def voice(tokenizer: Any, max_len: int = 24) -> Voice:
    return Voice(tokenizer, STOPS, max_len, 4096)


def allowed(v: Voice, rows: Any, size: int = 4096) -> torch.Tensor:
    return torch.tensor([i < v.size and (i not in v.special or i in rows.drawable) for i in range(size)])


def written(model: Any, config: TextConfig, v: Voice, numbers: list[int], batch: int) -> dict[int, list[int]]:
    rows, out = config.rows(v), {}
    for at in range(0, len(numbers), batch):
        some = numbers[at : at + batch]
        those = [rows[n] for n in some]
        write_rows(
            model,
            those,
            some,
            seed=config.seed,
            max_len=v.max_len,
            temperature=config.temperature,
            top_p=config.top_p,
            drawable=lambda size: allowed(v, rows, size),
        )
        out |= dict(zip(some, (row.ids for row in those), strict=True))
    return out


def slow_draw(logits: torch.Tensor, u: float, temperature: float, top_p: float | None) -> int:
    """One token of one row, plainly: the tokens in order, until u of the whole is passed."""
    p = torch.softmax(logits / temperature, -1).double()
    order = list(range(len(p)))
    if top_p is not None:
        order.sort(key=lambda i: (-float(p[i]), i))
        kept, mass = [], 0.0
        for i in order:
            if mass >= top_p:
                break
            kept.append(i)
            mass += float(p[i])
        order = kept
    whole = sum(float(p[i]) for i in order)
    passed = 0.0
    for i in order:
        passed += float(p[i])
        if u * whole < passed:
            return i
    return order[-1]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, None), (0.7, None), (1.3, 0.8)])
def test_text_is_that_of_the_slow_reference(
    model: Any, tokenizer: Any, temperature: float, top_p: float | None
) -> None:
    """No cache, no batch: the whole row again for every token."""
    config = SYNTHESIS["self_generated"].model_validate(
        {"samples": 6, "seed": 5, "temperature": temperature, "top_p": top_p, "starts": 4}
    )
    v = voice(tokenizer)
    rows = config.rows(v)
    fast = written(model, config, v, list(range(6)), 6)
    lengths = set()
    for number in range(6):
        start, prefix = rows.pairs[number]  # pyright: ignore[reportAttributeAccessIssue]
        lengths.add(prefix)
        ids, u = [start], uniforms(5, number, 23)
        banned = ~allowed(v, rows)
        while len(ids) < 24:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()
            logits = logits.masked_fill(banned, float("-inf"))
            greedy = len(ids) < prefix
            ids.append(
                int(logits.argmax()) if greedy else slow_draw(logits, u[len(ids) - 1], temperature, top_p)
            )
            if ids[-1] in STOPS:
                break
        assert fast[number] == ids
    assert len(lengths) > 1, "one prefix length only was looked at"


def test_a_row_is_the_same_in_any_company(model: Any, tokenizer: Any) -> None:
    config, v = SYNTHESIS["self_generated"].model_validate({"samples": 12, "seed": 1}), voice(tokenizer)
    together = written(model, config, v, list(range(12)), 12)
    assert together == written(model, config, v, list(range(12)), 5)
    assert together[7] == written(model, config, v, [7], 1)[7]
    other = written(model, config.model_copy(update={"seed": 2}), v, list(range(12)), 12)
    assert other != together


def test_uniforms_belong_to_seed_and_row() -> None:
    assert np.array_equal(uniforms(3, 9, 4), uniforms(3, 9, 8)[:4])
    assert not np.array_equal(uniforms(3, 9, 4), uniforms(3, 10, 4))
    many = np.concatenate([uniforms(0, row, 100) for row in range(400)])
    assert 0 <= many.min() and many.max() < 1 and abs(many.mean() - 0.5) < 0.005


def test_draws_follow_the_distribution() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    u = torch.from_numpy(uniforms(0, 0, 20000))
    none = torch.zeros(4, dtype=torch.bool)
    _, drawn = take(p.log().expand(20000, 4), u, temperature=1.0, top_p=None, banned=none)
    found = torch.bincount(torch.tensor(drawn), minlength=4) / 20000
    assert torch.allclose(found, p, atol=0.012)
    _, drawn = take(p.log().expand(20000, 4), u, temperature=1.0, top_p=0.7, banned=none)
    found = torch.bincount(torch.tensor(drawn), minlength=4) / 20000
    assert torch.allclose(found, torch.tensor([0.625, 0.375, 0, 0]), atol=0.012)
    likeliest, drawn = take(
        p.log()[None], torch.tensor([0.9999999]).double(), temperature=1.0, top_p=None, banned=p > 0.4
    )
    assert (likeliest, drawn) == ([1], [3])


def test_starts(tokenizer: Any) -> None:
    v = voice(tokenizer)
    whole = SYNTHESIS["self_generated"].model_validate({"samples": None}).rows(v)
    starts = [whole[n].ids for n in range(whole.count)]
    assert whole.count == 3 * (4096 - 4) and {tuple(s) for s in starts} == {(i,) for i in range(4, 4096)}
    assert "4 special tokens are left out" in whole.notes[0]
    some = SYNTHESIS["self_generated"].model_validate({"samples": None, "starts": 10}).rows(v)
    assert some.count == 30 and len({some[n].ids[0] for n in range(30)}) == 10
    with pytest.raises(ValueError, match="starts: got 5000; the tokenizer has 4092 tokens"):
        SYNTHESIS["self_generated"].model_validate({"starts": 5000}).rows(v)


FILTERS = [
    ([[5, 6, 7]], "a b c", "too short"),
    ([[], list(range(40))], "words", "too short"),  # a chat without a question
    ([list(range(20)), []], "words", "too short"),  # and one without an answer
    ([[1, 2, 3, *[9] * 17, 4, 5]], "words", "one token"),
    ([[1, 2, 3, 4, 5, 6] * 6], "words", "repetition"),
    ([list(range(30))], "ab\x00\x01cd", "no text"),
    ([list(range(30))], "\ufffda\ufffdb", "no text"),
    ([list(range(30))], " \n ", "no text"),
    ([list(range(30))], "a fine text\ufffd", None),  # cut within a character
    ([[1, 2, 3, 4, *range(10, 40), 1, 2, 3, 4]], "words\n\twith lines", None),
]


@pytest.mark.parametrize(("wrote", "text", "reason"), FILTERS)
def test_planted_rows_are_dropped_for_their_reason(
    wrote: list[list[int]], text: str, reason: str | None
) -> None:
    assert why_dropped(wrote, text, FilterConfig()) == reason


def test_what_filters_measure() -> None:
    assert repetition([1, 2, 3, 1, 2, 3], 2) == pytest.approx(1 - 3 / 5) and repetition([1], 4) == 0
    assert longest_run([1, 1, 2, 2, 2, 1]) == 3 and longest_run([]) == 0
    assert unreadable("a\x00b\n") == 0.25 and unreadable("") == 0


# ------------------------------------------------------------------------------------------------ chats


def chat_of(tokenizer: Any, said: list[int], max_len: int = 64) -> Row:
    """A chat whose draws are `said`, one after the other."""
    row = SYNTHESIS["self_chat"].model_validate({"samples": 1}).rows(voice(tokenizer, max_len))[0]
    draws = iter(said)
    # while the template speaks, what is drawn is thrown away: a token that would show
    while row.take(9, 9 if row.asked and not row.answered else next(draws)):  # pyright: ignore
        pass
    return row


def test_a_chat_is_what_the_template_writes_and_its_answer_is_learned(tokenizer: Any) -> None:
    question, answer = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("Say hi.", "Hello you"))
    row = chat_of(tokenizer, [*question, 3, *answer, 3])
    facts = row.facts()
    assert facts["messages"] == [
        {"role": "user", "content": "Say hi."},
        {"role": "assistant", "content": "Hello you"},
    ]
    text = tokenizer.apply_chat_template(facts["messages"], tokenize=False).rstrip("\n")
    assert tokenizer.decode(row.ids) == text
    tokens = format_of("tokens", "assistant", tokenizer)({"input_ids": row.ids, **facts})
    learned = [i for i, flag in zip(tokens.input_ids, tokens.learned, strict=True) if flag]
    assert learned == [*answer, 3] and tokens.input_ids == row.ids
    theirs = format_of("chat", "assistant", tokenizer)({"messages": facts["messages"]})
    taught = [i for i, flag in zip(theirs.input_ids, theirs.learned, strict=True) if flag]
    assert learned == taught, "the chat format learns other tokens of this chat"
    assert all(format_of("tokens", "all", tokenizer)({"input_ids": row.ids, **facts}).learned)


def test_a_chat_that_does_not_end(tokenizer: Any) -> None:
    row = chat_of(tokenizer, [70] * 100, max_len=40)
    assert len(row.ids) == 40 and why_dropped(row.wrote(), "x", FilterConfig(**LOOSE)) == "too short"
    row = chat_of(tokenizer, [70, 71, 3, *[80] * 100], max_len=40)
    assert len(row.ids) == 40 and row.wrote()[0] == [70, 71] and set(row.wrote()[1]) == {80}


def test_chats_are_written_by_the_model(model: Any, tokenizer: Any) -> None:
    config = SYNTHESIS["self_chat"].model_validate({"samples": 8, "system": "Be brief."})
    v = voice(tokenizer, 96)
    head = tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}], tokenize=False)
    rows = written(model, config, v, list(range(8)), 8)
    assert rows == written(model, config, v, list(range(8)), 3)
    for ids in rows.values():
        assert tokenizer.decode(ids).startswith(head + "<|im_start|>user\n")
    assert any("<|im_start|>assistant\n" in tokenizer.decode(ids) for ids in rows.values())


def test_a_template_without_an_end_of_turn_is_refused(tokenizer: Any) -> None:
    other = AutoTokenizer.from_pretrained(TINY)
    other.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    with pytest.raises(ValueError, match="no token of its own .* set kind: self_generated"):
        SYNTHESIS["self_chat"].model_validate({}).rows(voice(other))


# ------------------------------------------------------------------------------------------------ the format


def test_ids_are_not_tokenized_again(tokenizer: Any, tmp_path: Path) -> None:
    odd = [[265, 17, 5, 6, 7], [9, 9, 9, 0]]  # whose text is tokenized to something else
    assert tokenizer(tokenizer.decode(odd[0]))["input_ids"] != odd[0]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"input_ids": ids, "text": "x"}) + "\n" for ids in odd))
    examples = load(path, tokenizer, "tokens")
    assert [e.input_ids for e in examples] == odd
    assert examples[0].labels == [-100, *odd[0][1:]]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"input_ids": [1, "2"]}, "input_ids[1] must be an integer; got '2'"),
        ({"input_ids": [1, True]}, "input_ids[1] must be an integer; got True"),
        ({"input_ids": [1, 1 << 31]}, "has 2147483648"),
        ({"input_ids": [1, 2], "learned": [[0, 3]]}, "within the 2 input_ids"),
        ({"input_ids": [1, 2], "learned": [[0, 1]], "labels": [1, 2]}, "give one of them"),
    ],
)
def test_wrong_ids_are_refused(tokenizer: Any, row: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRow) as error:
        format_of("tokens", "assistant", tokenizer)(row)
    assert words in str(error.value)


# ------------------------------------------------------------------------------------------------ the folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class Killed(Exception):
    pass


def run(folder: Path, model: Any, v: Voice, config: TextConfig, stop_after: int | None = None) -> None:
    rows, done = RowsFolder(folder, config.model_dump_json()), 0
    rows.by(lambda: "dense")

    def tell(more: int, tokens: int) -> None:
        nonlocal done
        done += tokens
        if stop_after is not None and done >= stop_after:
            raise Killed

    fill(rows, Pages(config, config.rows(v), v), config.batch_size, model, tell)


@pytest.fixture
def config() -> TextConfig:
    given = {
        "samples": 20,
        "valid": 6,
        "batch_size": 4,
        "starts": 8,
        "filter": {**LOOSE, "ngram": 1, "max_repetition": 0.3},
    }
    return SYNTHESIS["self_generated"].model_validate(given)


def test_a_stopped_folder_goes_on_to_the_same_bytes(
    model: Any, tokenizer: Any, tmp_path: Path, config: TextConfig
) -> None:
    v = voice(tokenizer)
    run(tmp_path / "whole", model, v, config)
    state, whole = read_state(tmp_path / "whole"), contents(tmp_path / "whole")
    assert state.done and sum(map(state.count, ("train", "valid", "dropped"))) == 20
    assert state.count("dropped") and state.reasons == {"repetition": state.count("dropped")}
    stored = [json.loads(line) for n, c in whole.items() if n != MANIFEST for line in c.decode().splitlines()]
    assert sorted(row["row"] for row in stored) == list(range(20))
    assert all(tokenizer.decode(r["input_ids"], skip_special_tokens=True) == r["text"] for r in stored)
    assert state.tokens == sum(len(row["input_ids"]) for row in stored)
    for stop in (10, 150, 301):
        with pytest.raises(Killed):
            run(tmp_path / "part", model, v, config, stop_after=stop)
        assert contents(tmp_path / "part").keys() < whole.keys() | {"nothing yet"}
    run(tmp_path / "part", model, v, config)
    assert contents(tmp_path / "part") == whole
    name = next(n for n in whole if n.startswith("train/"))  # a shard that went away
    (tmp_path / "part" / name).unlink()
    run(tmp_path / "part", model, v, config)
    assert contents(tmp_path / "part") == whole


def test_a_text_may_hold_ends_of_lines(tmp_path: Path) -> None:
    """JSON escapes line feeds, but not all that Python's splitlines splits at."""
    rows = RowsFolder(tmp_path, "key")
    row = {"row": 0, "input_ids": [5, 6], "text": "a\u2028b\x85c\nd"}
    rows.put(0, Shard(2, {"train": [row], "valid": [], "dropped": []}))
    again = RowsFolder(tmp_path, "key")
    assert again.missing(1) == [] and again.kept(0) == [row]


def test_what_was_changed_is_refused(model: Any, tokenizer: Any, tmp_path: Path, config: TextConfig) -> None:
    v = voice(tokenizer)
    run(tmp_path, model, v, config)
    name = next(n for n in contents(tmp_path) if n.startswith("train/"))
    before = (tmp_path / name).read_text()
    (tmp_path / name).write_text(before.replace('"input_ids": [', '"input_ids": [7, ', 1))
    with pytest.raises(ValueError, match="is not the one that was written; remove it"):
        run(tmp_path, model, v, config)
    other = config.model_copy(update={"seed": 1})
    with pytest.raises(ValueError, match="is not the one that was written"):  # nor is it thrown away
        run(tmp_path, model, v, other)
    (tmp_path / name).write_text(before)
    run(tmp_path, model, v, other)
    assert (tmp_path / name).read_text() != before
    manifest = tmp_path / MANIFEST
    manifest.write_text(manifest.read_text().replace('"done": true', '"done": false'))
    with pytest.raises(ValueError, match="damaged"):
        run(tmp_path, model, v, other)


def test_a_strangers_file_is_not_replaced(
    model: Any, tokenizer: Any, tmp_path: Path, config: TextConfig
) -> None:
    (tmp_path / "valid").mkdir(parents=True)
    (tmp_path / "valid" / "00000.jsonl").write_text("mine\n")
    with pytest.raises(ValueError, match="was not written by this run"):
        run(tmp_path, model, voice(tokenizer), config)
    assert (tmp_path / "valid" / "00000.jsonl").read_text() == "mine\n"


def test_a_row_that_was_written_before_is_dropped(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    given = {"samples": 12, "batch_size": 4, "starts": 1, "deterministic_prefix": [3], "filter": LOOSE}
    config = SYNTHESIS["self_generated"].model_validate({**given, "temperature": 1e-3})
    run(tmp_path, model, voice(tokenizer), config)
    state = read_state(tmp_path)
    assert state.count("train") == 1 and state.reasons == {"seen before": 11}
