"""The tokenizer inside a gguf file: vocabulary, merges, token types, special and stop tokens, chat template.

llama.cpp has no pluggable tokenizers: a byte-level BPE names the rule that splits text into words before
merging ("pre"), and a name it does not know is an error there. So the rule in tokenizer.json must be one of
PRE; another is refused. The other kind is SentencePiece BPE (Llama 2, Mistral, Gemma), whose merges are given
by scores: the score of a piece is minus the place of the first merge that makes it, which is the order
SentencePiece gave them.
"""

import json
from pathlib import Path
from typing import Any

from ..files.jsonfile import read_json
from ..model.chat_template import Template
from ..model.config import GENERATION, stop_ids
from .chat import listed_by_name

WAY_OUT = "set export.format: compressed-tensors or native"

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# The splitting rule of tokenizer.json -> the name llama.cpp has for it.
PRE = {
    _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe",  # Llama 3
    _WORDS + r"\p{N}" + _REST: "qwen2",  # Qwen 2, 2.5 and 3
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ): "tekken",  # Mistral Nemo
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's token types
# Keys for the tokens that end an answer besides eos. llama.cpp knows no more than these.
STOPS = ("eos", "eot", "eom")


def reject(folder: Path, vocab_size: int | None = None) -> list[str]:
    """Why the tokenizer of a checkpoint folder cannot be written; empty when it can. Reads JSON only.
    vocab_size: rows of the embedding; None: not known."""
    try:
        tokenizer = _json(folder / "tokenizer.json")
        _kind(tokenizer)
        if vocab_size is not None:
            _tokens(tokenizer, vocab_size, folder)
        stops(folder)
    except ValueError as error:
        return [str(error)]
    return []


def write_tokenizer(
    writer: Any, folder: Path, vocab_size: int, chat_template: Template | None = None
) -> None:
    """Put the tokenizer of `folder` into a gguf.GGUFWriter. vocab_size: rows of the embedding; rows without a
    token get one that is never used. chat_template: None: the tokenizer's own. ValueError for a tokenizer
    llama.cpp does not have."""
    from gguf import SpecialVocab

    tokenizer = _json(folder / "tokenizer.json")
    model, pre = _kind(tokenizer)
    tokens, types = _tokens(tokenizer, vocab_size, folder)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    if model == "llama":
        writer.add_token_scores(_scores(tokenizer, tokens))
        writer.add_add_space_prefix(_adds_space(tokenizer))
    writer.add_token_types(types)
    special = SpecialVocab(folder, load_merges=True, n_vocab=vocab_size)
    # What the tokenizer does, not what its files seem to say: several places may ask for a leading token.
    first, last = _adds(folder)
    special.special_token_ids |= {key: i for key, i in zip(STOPS, stops(folder), strict=False)}
    special.add_special_token = {"bos": first, "eos": last}
    if chat_template is not None:
        named = isinstance(chat_template, dict)
        special.chat_template = listed_by_name(chat_template) if named else chat_template
    special.add_to_gguf(writer, quiet=True)


def stops(folder: Path) -> list[int]:
    """Token ids that end an answer: the tokenizer's eos first, then the others of generation_config.json.

    ValueError for more than gguf has room for.
    """
    generation = folder / GENERATION
    ids = stop_ids(generation) or []
    config = _json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    eos = config.get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    own = [t["id"] for t in _json(folder / "tokenizer.json").get("added_tokens", []) if t["content"] == eos]
    found = list(dict.fromkeys([*own, *ids]))
    if len(found) > len(STOPS):
        raise ValueError(
            f"{generation}: eos_token_id has {len(found)} tokens, and gguf has room for {len(STOPS)}; "
            f"shorten the list, or {WAY_OUT}"
        )
    return found


def _json(path: Path) -> dict[str, Any]:
    fix = (
        "a gguf file holds its tokenizer, made from this file (AutoTokenizer's save_pretrained writes it); "
        f"or {WAY_OUT}"
    )
    return read_json(path, dict[str, Any], fix)


def _parts(entry: Any, key: str) -> list[dict[str, Any]]:
    """A pre-tokenizer or normalizer, or the members of a sequence of them."""
    if not isinstance(entry, dict):
        return []
    return entry[key] if entry.get("type") == "Sequence" else [entry]


def _kind(tokenizer: dict[str, Any]) -> tuple[str, str]:
    """("gpt2", name of the splitting rule) for byte-level BPE, ("llama", "default") for SentencePiece BPE."""
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE":
        raise ValueError(
            f"gguf is written for BPE tokenizers, and this one is {model.get('type')!r}; {WAY_OUT}"
        )
    if model.get("byte_fallback"):
        return "llama", "default"
    parts = _parts(tokenizer.get("pre_tokenizer"), "pretokenizers")
    if (
        [p["type"] for p in parts] == ["ByteLevel"]
        and parts[0].get("use_regex", True)
        and not parts[0].get("add_prefix_space")
    ):
        return "gpt2", "gpt-2"
    if [p["type"] for p in parts] == ["Split", "ByteLevel"] and not parts[1].get("use_regex"):
        rule = parts[0]["pattern"].get("Regex")
        if rule in PRE:
            return "gpt2", PRE[rule]
    raise ValueError(
        "llama.cpp has no name for the way this tokenizer splits words "
        f"({json.dumps(tokenizer.get('pre_tokenizer'))}); {WAY_OUT}"
    )


def _tokens(tokenizer: dict[str, Any], vocab_size: int, folder: Path) -> tuple[list[str], list[int]]:
    names = {i: token for token, i in tokenizer["model"]["vocab"].items()}
    byte_level = not tokenizer["model"].get("byte_fallback")
    kinds = dict.fromkeys(names, NORMAL)
    for i, token in names.items():
        if not byte_level and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kinds[i] = BYTE
    for added in tokenizer.get("added_tokens", []):
        names[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    unknown = tokenizer["model"].get("unk_token")
    kinds |= {i: UNKNOWN for i, token in names.items() if not byte_level and token == unknown}
    if names and max(names) >= vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has token {max(names)} ({names[max(names)]!r}), and the model "
            f"{vocab_size} embeddings; give the model rows for all its tokens, or {WAY_OUT}"
        )
    tokens = [names.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    return tokens, [kinds.get(i, UNUSED) for i in range(vocab_size)]


def _scores(tokenizer: dict[str, Any], tokens: list[str]) -> list[float]:
    made: dict[str, int] = {}
    for place, merge in enumerate(tokenizer["model"]["merges"]):
        left, right = merge if isinstance(merge, list) else merge.split(" ")
        made.setdefault(left + right, place)
    return [-float(made.get(token, 0)) for token in tokens]


def _adds_space(tokenizer: dict[str, Any]) -> bool:
    """Whether a space is put before the text."""
    normal = any(p["type"] == "Prepend" for p in _parts(tokenizer.get("normalizer"), "normalizers"))
    pre = _parts(tokenizer.get("pre_tokenizer"), "pretokenizers")
    return normal or any(p["type"] == "Metaspace" and p.get("prepend_scheme") != "never" for p in pre)


def _adds(folder: Path) -> tuple[bool, bool]:
    """Whether encoding a text puts bos before and eos after it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    ids = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    first = len(ids) > len(bare) and ids[0] == tokenizer.bos_token_id
    return first, len(ids) > len(bare) and ids[-1] == tokenizer.eos_token_id
