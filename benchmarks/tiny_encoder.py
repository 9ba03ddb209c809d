"""A small BERT that tells methods from functions, for recipes/quickstart-ternary.yaml: made in a minute.

    python -m benchmarks.tiny_encoder [--output runs/tiny-encoder] [--steps 300]

Two layers, 64 wide, over the tokenizer of recipes/assets/tiny-llama, trained in full precision from nothing
on recipes/assets/functions: what the recipe rounds to three levels, and its teacher. Printed: the accuracy on
the held-out rows.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

ASSETS = Path(__file__).resolve().parents[1] / "recipes" / "assets"
LABELS = ("function", "method")
BATCH, LENGTH, RATE = 16, 128, 1e-3


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (ASSETS / "functions" / f"{name}.jsonl").open()]


def batch_of(some: list[dict[str, str]], tokenizer: Any) -> dict[str, Tensor]:
    texts = [row["text"] for row in some]
    found = tokenizer(texts, truncation=True, max_length=LENGTH, padding=True, return_tensors="pt")
    labels = torch.tensor([LABELS.index(row["label"]) for row in some])
    return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"], "labels": labels}


def made(tokenizer: Any, steps: int) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=LENGTH,
        pad_token_id=tokenizer.pad_token_id,
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
    )
    model = BertForSequenceClassification(config)
    for (
        name,
        parameter,
    ) in model.named_parameters():  # so few steps would hardly move less
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=1.0 if "word_embed" in name else 0.02 if "embed" in name else 0.15)
    optimizer, chance, train = torch.optim.AdamW(model.parameters(), lr=RATE), random.Random(0), rows("train")
    for _ in range(steps):
        loss = model(**batch_of(chance.sample(train, BATCH), tokenizer)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/tiny-encoder"))
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny-llama")
    model = made(tokenizer, given.steps)
    with torch.no_grad():
        held = batch_of(rows("valid"), tokenizer)
        right = (model(**held).logits.argmax(-1) == held["labels"]).float().mean()
    model.save_pretrained(given.output)
    tokenizer.save_pretrained(given.output)
    print(f"{given.output}: accuracy {float(right):.3f} on {len(held['labels'])} held-out rows")


if __name__ == "__main__":
    main()
