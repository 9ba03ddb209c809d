"""The tokenizer in the gguf file: the model's tokens, stop tokens and chat template, or a refusal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, trainers

from lowbit_ft.export import base, gguf_tokenizer
from lowbit_ft.export.reader import load_exported
from lowbit_ft.export.verify import verify
from lowbit_ft.export.writer import write_model
from lowbit_ft.model.checkpoint import Checkpoint
from tests.export.common import ASSET, GGUF, checkpoint
from tests.packed_tools import int_grid, packed_model, random_weights, tiny_checkpoint


def sentencepiece_tokenizer(folder: Path) -> int:
    """A tokenizer as Llama 2 has it (BPE of words with a leading space, bytes for the rest), into `folder`;
    its vocabulary.
    """
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # pyright: ignore
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )  # pyright: ignore
    text = Path(base.__file__).read_text(encoding="utf-8")
    tokenizer.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=600, special_tokens=pieces, show_progress=False)
    )  # pyright: ignore
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # bytes are ordinary pieces
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
    wrapped.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    )
    wrapped.save_pretrained(folder)
    return len(wrapped)


def test_gguf_carries_a_sentencepiece_tokenizer(tmp_path: Path) -> None:
    size = sentencepiece_tokenizer(tmp_path / "t")
    path = tiny_checkpoint(tmp_path / "c", vocab_size=size + 5)  # more embeddings than tokens
    shutil.copytree(tmp_path / "t", path, dirs_exist_ok=True)
    source = Checkpoint.open(path, dtype="float32")
    weights = random_weights(source.empty_model(), int_grid())
    write_model(tmp_path / "m", source, weights, GGUF)
    report = verify(tmp_path / "m", weights, model=packed_model(source, weights), source=path)
    assert report.ok and report.tokens == [] and report.answers is not None and report.answers.tokens > 3
    tokenizer = GGUF.tokenizer(tmp_path / "m")
    assert len(tokenizer) == size + 5 and tokenizer.decode(
        tokenizer("def unpack(self): ü").input_ids, skip_special_tokens=True
    )


def test_stop_tokens_and_template_are_in_the_gguf_file_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint(tmp_path / "c")
    (source.folder / "generation_config.json").write_text('{"eos_token_id": [3, 0]}')
    weights = random_weights(source.empty_model(), int_grid())
    write_model(tmp_path / "m", source, weights, GGUF)
    assert GGUF.stops(tmp_path / "m") == [0, 3]
    assert GGUF.tokenizer(tmp_path / "m").chat_template == (ASSET / "chat_template.jinja").read_text()
    assert verify(tmp_path / "m", weights, source=source.folder).tokens == []
    # transformers' own reader takes one of them, so the model is given the folder's
    assert load_exported(tmp_path / "m").generation_config.eos_token_id == [3, 0]
    with monkeypatch.context() as patch:
        patch.setattr(type(GGUF), "drops_generation", False)
        with pytest.raises(ValueError, match=r"stop tokens of the loaded model: \[0\], and .* \[0, 3\]"):
            verify(tmp_path / "m", weights, source=source.folder)
    other = shutil.copytree(source.folder, tmp_path / "other")
    (other / "generation_config.json").write_text('{"eos_token_id": [0, 5]}')
    (other / "chat_template.jinja").write_text("another")
    with pytest.raises(
        ValueError,
        match=r"(?s)tokens: chat_template: .*'another'.*stop tokens: \[0, 3\], and the model has \[0, 5\]",
    ):
        verify(tmp_path / "m", weights, source=other)
    (source.folder / "generation_config.json").write_text('{"eos_token_id": [3, 0, 5, 6]}')
    with pytest.raises(ValueError, match="has 4 tokens, and gguf has room for 3"):
        write_model(tmp_path / "n", source, weights, GGUF)
    assert not (tmp_path / "n").exists()


def test_a_tokenizer_without_chat_template_is_exported_and_verified_on_plain_text(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "c")
    (source.folder / "chat_template.jinja").unlink()
    weights = random_weights(source.empty_model(), int_grid())
    write_model(tmp_path / "m", source, weights, GGUF)
    report = verify(tmp_path / "m", weights, model=packed_model(source, weights), source=source.folder)
    assert (
        report.ok
        and report.answers is not None
        and report.answers.prompts == 3
        and report.answers.same == report.answers.tokens
    )
    assert GGUF.tokenizer(tmp_path / "m").chat_template is None


def test_tokenizers_that_llama_cpp_has_not_are_refused(tmp_path: Path) -> None:
    def told(words: str, change: Any) -> None:
        content = json.loads((ASSET / "tokenizer.json").read_text())
        change(content)
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        (problem,) = gguf_tokenizer.reject(tmp_path)
        assert words in problem, problem

    told("'Unigram'", lambda t: t["model"].update(type="Unigram"))
    told("no name for the way", lambda t: t["pre_tokenizer"].update(type="Whitespace"))
    split = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "x"}},
            {"type": "ByteLevel", "use_regex": False},
        ],
    }
    told("no name for the way", lambda t: t.update(pre_tokenizer=split))
    (tmp_path / "tokenizer.json").write_text("{")
    assert "json: not JSON" in gguf_tokenizer.reject(tmp_path)[0]
    (tmp_path / "tokenizer.json").unlink()
    assert "holds its tokenizer" in gguf_tokenizer.reject(tmp_path)[0]
    rules = {name: json.dumps({"Regex": rule}) for rule, name in gguf_tokenizer.PRE.items()}
    assert set(rules) == {"llama-bpe", "qwen2", "tekken"}
    for rule, name in gguf_tokenizer.PRE.items():
        split["pretokenizers"][0]["pattern"] = {"Regex": rule}
        assert gguf_tokenizer._kind({"model": {"type": "BPE"}, "pre_tokenizer": split}) == ("gpt2", name)


def test_the_splitting_rules_are_those_of_transformers_reader() -> None:
    mapping = pytest.importorskip(
        "transformers.integrations.gguf.gguf_tokenizer_mapping", reason="an older transformers"
    )
    theirs = mapping.GGUF_PRE_TOKENIZER_SPLITS
    assert {name: rule for rule, name in gguf_tokenizer.PRE.items()} == {
        name: theirs[name] for name in gguf_tokenizer.PRE.values()
    }
