"""Rows of recipes/assets that the quickstarts of tasks learn from, made of what is at hand; and small models.

    python -m benchmarks.task_assets questions     rows as those of SQuAD, of the functions in docstrings/;
                                                   and tiny-bert/, which has answered them
    python -m benchmarks.task_assets shapes        pictures of shapes; and tiny-vit/, which has told them
    python -m benchmarks.task_assets shape-classifier    tiny-vit-shapes/: tiny-vit with a trained head

The same command gives the same rows (the same bytes of the model on the same kind of CPU).
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

from lowbit_ft.model.images import read_processor
from lowbit_ft.tasks import TASKS
from lowbit_ft.tasks.base import Feed, inputs_of

ASSETS = Path(__file__).resolve().parents[1] / "recipes" / "assets"
LONGEST, COUNTS = 240, {"train": 700, "valid": 60}  # characters of a function; rows
SHAPES, SHAPE_COUNTS = ("circle", "square", "triangle", "cross"), {"train": 400, "valid": 80}
QUESTIONS = {
    "What is it called?": r"def (\w+)\(",
    "What are its arguments?": r"def \w+\(([^)]+)\)",
    "What does it return?": r"\breturn ([^\n]+)",
}


def questions(split: str, each: bool = False) -> Iterator[dict[str, Any]]:
    """{id, question, context, answers}: a part of a short function, by one of the questions, or by each."""
    chance = random.Random(0)
    lines = (ASSETS / "docstrings" / f"{split}.jsonl").read_text().splitlines()
    for number, line in enumerate(lines):
        context = json.loads(line)["messages"][0]["content"].partition("\n")[2].strip()
        chosen = chance.choice(list(QUESTIONS))
        for question in QUESTIONS if each else [chosen]:
            found = list(re.finditer(QUESTIONS[question], context))
            if len(context) > LONGEST or len(found) != 1:
                continue
            text, begin = found[0][1], found[0].start(1)
            yield {
                "id": f"{split}-{number}",
                "question": question,
                "context": context,
                "answers": {"text": [text], "answer_start": [begin]},
            }


def write_questions() -> None:
    for split, count in COUNTS.items():
        rows = [row for row, _ in zip(questions(split), range(count), strict=False)]
        path = ASSETS / "questions" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{path}: {len(rows)} rows, {path.stat().st_size:,} bytes")


def tokenizer_of(texts: list[str]) -> Any:
    """Byte-level BPE of 1024 tokens, with those of a BERT around a pair of texts."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made = Tokenizer(models.BPE(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator(texts, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    named = zip(("pad", "unk", "cls", "sep", "mask"), special, strict=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=160,
        **{f"{name}_token": token for name, token in named},
    )


def tiny_bert(steps: int) -> None:
    """A BERT of two layers that has answered the questions, trained on all weights in float32."""
    rows = list(questions("train", each=True))
    tokenizer = tokenizer_of([row["context"] for row in rows])
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=160,
        pad_token_id=0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    task = TASKS["question_answering"].model_validate({"kind": "question_answering", "stride": 32})
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"tiny-bert: {len(rows)} rows")
        fit(BertForQuestionAnswering, config, task, tokenizer, path, steps, "tiny-bert")


def shape(name: str, chance: random.Random) -> bytes:
    """A PNG file of 32 x 32: one shape of a light colour on a dark ground with a few spots."""
    image = Image.new("RGB", (32, 32), tuple(chance.randrange(70) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        spot = (chance.randrange(32), chance.randrange(32))
        draw.point(spot, fill=tuple(chance.randrange(256) for _ in range(3)))
    size, x, y = chance.randint(13, 20), chance.randint(1, 11), chance.randint(1, 11)
    fill, third = tuple(chance.randrange(110, 256) for _ in range(3)), size // 3
    if name == "circle":
        draw.ellipse((x, y, x + size, y + size), fill=fill)
    elif name == "square":
        draw.rectangle((x, y, x + size, y + size), fill=fill)
    elif name == "triangle":
        draw.polygon([(x, y + size), (x + size, y + size), (x + size // 2, y)], fill=fill)
    else:
        draw.rectangle((x + third, y, x + size - third, y + size), fill=fill)
        draw.rectangle((x, y + third, x + size, y + size - third), fill=fill)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_shapes() -> None:
    (ASSETS / "shapes").mkdir(exist_ok=True)
    for split, count in SHAPE_COUNTS.items():
        shapes(ASSETS / "shapes" / f"{split}.parquet", split, count)


def shapes(path: Path, seed: str, count: int) -> None:
    """So many pictures of shapes and their names, as `datasets` writes them."""
    import datasets  # slow

    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    chance = random.Random(seed)
    labels = [chance.choice(SHAPES) for _ in range(count)]
    pictures = [{"bytes": shape(label, chance), "path": None} for label in labels]
    datasets.Dataset.from_dict({"image": pictures, "label": labels}, kinds).to_parquet(str(path))
    print(f"{path}: {count} rows, {path.stat().st_size:,} bytes")


def tiny_vit(steps: int) -> None:
    """A ViT of two layers that has told the shapes apart, trained on all weights in float32."""
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=32,
        patch_size=8,
    )
    place = ASSETS / "tiny-vit"
    place.mkdir(exist_ok=True)
    config.save_pretrained(place)
    half = [0.5, 0.5, 0.5]
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    processor |= {"image_mean": half, "image_std": half}
    (place / "preprocessor_config.json").write_text(json.dumps(processor, indent=1) + "\n")
    task = TASKS["image_classification"].model_validate({"kind": "image_classification", "labels": SHAPES})
    reader = read_processor(place)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.parquet"
        shapes(rows, "model", 32 * steps)  # every picture is seen once
        fit(ViTForImageClassification, config, task, reader, rows, steps, "tiny-vit")


def tiny_vit_shapes(steps: int) -> None:
    """tiny-vit with the head that it lacks, both trained on other pictures: a classifier as it is shipped."""
    place = ASSETS / "tiny-vit-shapes"
    place.mkdir(exist_ok=True)
    source = ASSETS / "tiny-vit"
    (place / "preprocessor_config.json").write_bytes((source / "preprocessor_config.json").read_bytes())
    task = TASKS["image_classification"].model_validate({"kind": "image_classification", "labels": SHAPES})
    reader = read_processor(source)
    purpose: Any = task.purpose(0)
    config = purpose.applied(ViTConfig.from_pretrained(source), ASSETS)
    torch.manual_seed(0)
    model = ViTForImageClassification.from_pretrained(source, config=config, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.parquet"
        shapes(rows, "classifier", 32 * steps)
        train(model, task, reader, rows, steps, "tiny-vit-shapes")
    model.bfloat16().save_pretrained(place)


def fit(kind: Any, config: Any, task: Any, reader: Any, rows: Path, steps: int, name: str) -> None:
    """Train a model from nothing on these rows, and save it without its head, in bfloat16."""
    torch.manual_seed(0)
    model = kind(task.purpose(0).applied(config, ASSETS))
    train(model, task, reader, rows, steps, name)
    model.base_model.to(torch.bfloat16).save_pretrained(ASSETS / name)
    if task.reads == "text":
        reader.save_pretrained(ASSETS / name)


def train(model: Any, task: Any, reader: Any, rows: Path, steps: int, name: str) -> None:
    """Train all weights of a model on these rows, in float32."""
    source = SimpleNamespace(path=str(rows), split="train", name=None, revision=None, limit=None)
    section = SimpleNamespace(sequence_len=160, on_bad_row="error")
    feed = Feed(SimpleNamespace(train=SimpleNamespace(seed=0)), reader)
    batches = task.batches(feed, model, task.examples(source, section, reader), 32, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        batch = next(batches)
        loss = task.loss(model(**inputs_of(batch, task.answers)), batch) / task.count(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            print(f"{name}: step {step + 1}, loss {loss.item():.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("questions", "shapes", "shape-classifier"))
    parser.add_argument("--steps", type=int, default=400, help="0: the rows alone")
    given = parser.parse_args()
    write, fitted = {
        "questions": (write_questions, tiny_bert),
        "shapes": (write_shapes, tiny_vit),
        "shape-classifier": (lambda: None, tiny_vit_shapes),
    }[given.what]
    write()
    if given.steps:
        fitted(given.steps)


if __name__ == "__main__":
    main()
