"""Small random encoders with a tokenizer of their own, as checkpoints; and rows that they can learn.

Two layers, 32 wide; words are whole tokens. A row of `rows` is made of words of one colour or of another, and
its label is the colour, so that a model that reads learns it, and one that does not stays at chance.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModel,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

COLOURS = {
    "red": ["rose", "cherry", "brick", "ruby", "ember", "blood"],
    "blue": ["sky", "sea", "ink", "denim", "navy", "ice"],
    "grey": ["ash", "fog", "stone", "lead", "slate", "dust"],
}
FILLERS = ["a", "the", "of", "is", "was", "with", "and", "on"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, *FILLERS, *(word for words in COLOURS.values() for word in words)]
VOCABULARY = 64  # rows of the embedding; the words are fewer

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 66,
    "pad_token_id": 0,
}
KINDS: dict[str, Any] = {
    "bert": lambda: BertConfig(**_SIZES),
    "distilbert": lambda: DistilBertConfig(
        dim=32, n_layers=2, n_heads=2, hidden_dim=64, vocab_size=VOCABULARY, pad_token_id=0
    ),
    "roberta": lambda: RobertaConfig(**_SIZES, type_vocab_size=1, bos_token_id=2, eos_token_id=3),
    "modernbert": lambda: ModernBertConfig(
        **_SIZES, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3, local_attention=16
    ),
    "deberta-v2": lambda: DebertaV2Config(
        **_SIZES, relative_attention=True, max_relative_positions=16, pos_att_type=["p2c", "c2p"]
    ),
}


def tokenizer(pairs: bool = True) -> PreTrainedTokenizerFast:
    """Words as they are. pairs: it tells the second text of a pair by token_type_ids."""
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    made.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = ["input_ids", "token_type_ids", "attention_mask"] if pairs else ["input_ids", "attention_mask"]
    special = zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL, strict=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, model_input_names=names, **{f"{name}_token": token for name, token in special}
    )


def encoder(folder: Path, kind: str = "bert", auto: Any = AutoModel, **changes: Any) -> Path:
    """A checkpoint of that kind, as `auto` builds it; changes: of its configuration."""
    config = KINDS[kind]()
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = auto.from_config(config)
    for name, parameter in model.named_parameters():
        if (
            parameter.dim() == 2
        ):  # drawn for training from nothing, they are too small; words must be told apart
            words = "word_embed" in name or "tok_embed" in name
            torch.nn.init.normal_(parameter, std=1.0 if words else 0.02 if "embed" in name else 0.15)
    model.save_pretrained(folder)
    tokenizer(pairs=kind != "roberta").save_pretrained(folder)
    return folder


def rows(count: int, seed: int = 0, labels: tuple[str, ...] = ("red", "blue")) -> list[dict[str, Any]]:
    """{text, label} by name."""
    chance = random.Random(seed)
    found = []
    for _ in range(count):
        label = chance.choice(labels)
        words = [chance.choice(COLOURS[label]) for _ in range(2)]
        words += [chance.choice(FILLERS) for _ in range(chance.randint(2, 6))]
        chance.shuffle(words)
        found.append({"text": " ".join(words), "label": label})
    return found


def tagged(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """{tokens, ner_tags}: words of a colour by its name, all others O."""
    names = {word: colour for colour, words in COLOURS.items() for word in words}
    found = []
    for row in rows(count, seed, tuple(COLOURS)):
        words = row["text"].split()
        found.append({"tokens": words, "ner_tags": [names.get(word, "O") for word in words]})
    return found


def asked(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """{question, context, answers} as of SQuAD: the word of the text that is of a colour."""
    chance = random.Random(seed)
    found = []
    for number in range(count):
        answer = chance.choice(COLOURS[chance.choice(list(COLOURS))])
        words = [answer, *(chance.choice(FILLERS) for _ in range(chance.randint(2, 10)))]
        chance.shuffle(words)
        begin = len(" ".join([*words[: words.index(answer)], ""]))
        answers = {"text": [answer], "answer_start": [begin]}
        found.append(
            {"id": str(number), "question": "is the", "context": " ".join(words), "answers": answers}
        )
    return found


def write(path: Path, found: list[dict[str, Any]]) -> str:
    """As a jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(path)


def recipe(folder: Path, model: Path, task: Any, path: str, /, **changes: Any) -> dict[str, Any]:
    """A short run; changes: sections, whose keys are put over these (adapter: in their place)."""
    found: dict[str, Any] = {
        "name": "toy",
        "model": {"path": str(model), "dtype": "float32", "device": "cpu"},
        "task": task,
        "quant": {"bits": 4, "group_size": 32, "calibrate": "absmax"},
        "adapter": {"method": "lr_qat", "rank": 4, "alpha": 8},
        "data": {"train": {"path": path}, "sequence_len": 16},
        "train": {
            "max_steps": 2,
            "micro_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "learning_rate": 5e-3,
            "warmup_ratio": 0,
        },
        "export": {"format": "native"},
        "output": str(folder / "run"),
    }
    for section, keys in changes.items():
        over = {} if section == "adapter" else found.get(section, {})
        found[section] = {**over, **keys} if isinstance(keys, dict) else keys
    return found
