"""Prune Once for All in miniature: an encoder that is pruned once, then tuned for two tasks in 8 bits.

    python benchmarks/prune_once.py                  # minutes of one core; rows are kept as they come
    python benchmarks/prune_once.py --prune 400      # nearer to the paper, which prunes as long as it trains

The language is made up, so that an encoder learns it in a minute: a document has one of 12 topics, half of
its words are of the topic (which shares them with others), half of any.

A. A small BERT is trained to fill in masked words, dense, by plain PyTorch.
B. Of it three, as recipes/prune-once-for-all-1-prune.yaml says with task: masked_lm and no teacher: dense,
   85 % and 90 % zeros, equally many steps of full_qat on 8 bits.
C. Each of them becomes two classifiers, of rows seen once, as recipes/prune-once-for-all-2-task.yaml says:
   zeros locked, weights, inputs and embedding in 8 bits. `topic`: of which topic a row is; `words`: of each
   word, whether it is there for the topic.

Measured: the task's own numbers as it is packed and as it ships, on rows held out; zeros and bytes of the
encoder's matrices as they ship, through zstd (level 19), and how many times less that is than fp32."""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from quality import HERE
from sparsity import sizes
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from lowbit_ft import pipeline
from lowbit_ft.export.reader import read_weights
from lowbit_ft.files.atomic import write_text
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.rundir import environment

WINDOW, INSIDE, BATCH = 32, 30, 32  # between [CLS] and [SEP]
TOPICS, WORDS, OF_A_TOPIC, ROWS = 12, 200, 20, {"train": 6400, "valid": 300}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SIZE: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 512,
}
AMOUNTS = {"dense": None, "85 %": 0.85, "90 %": 0.9}
TASKS: dict[str, dict[str, Any]] = {
    "topic": {"kind": "sequence_classification", "text": ["text"], "label": "label"},
    "words": {"kind": "token_classification", "words": "words", "label": "tags"},
}


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--pretrain", type=int, default=1000, help="steps of stage A")
    p.add_argument("--prune", type=int, default=200, help="steps of stage B")
    p.add_argument("--tune", type=int, default=200, help="steps of stage C")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--rate", type=float, default=2.0, help="of stage C, in steps of the grid")
    p.add_argument(
        "--work", type=Path, help="a folder that is kept: what it has of these stages is not done again"
    )
    p.add_argument("--out", type=Path, default=HERE / "results" / "prune_once.json")
    return p.parse_args()


class Language:
    """Words, and what is said of a topic."""

    def __init__(self, seed: int):
        self.chance = random.Random(seed)
        self.words = [f"w{i}" for i in range(WORDS)]
        self.topics = [self.chance.sample(self.words, OF_A_TOPIC) for _ in range(TOPICS)]

    def text(self, topic: int, length: int) -> tuple[list[str], list[str]]:
        """So many words, and of each whether it is there for the topic."""
        tags = [self.chance.choice(("OF", "O")) for _ in range(length)]
        return [self.chance.choice(self.topics[topic] if t == "OF" else self.words) for t in tags], tags

    def documents(self, count: int) -> list[str]:
        return [" ".join(self.text(i % TOPICS, 10 * INSIDE)[0]) for i in range(count)]

    def rows(self, task: str, count: int) -> list[dict[str, Any]]:
        found = []
        for i in range(count):
            words, tags = self.text(i % TOPICS, 24)
            label = {"text": " ".join(words), "label": f"t{i % TOPICS}"}
            found.append(label if task == "topic" else {"words": words, "tags": tags})
        return found


def tokenizer(language: Language) -> PreTrainedTokenizerFast:
    ids = {word: i for i, word in enumerate([*SPECIAL, *language.words])}
    made = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokens = zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL, strict=True)
    names = {f"{name}_token": token for name, token in tokens}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def teach(folder: Path, documents: list[str], words: Any, steps: int, seed: int) -> None:
    """Stage A: a dense encoder, saved."""
    ids = torch.tensor(words(documents, add_special_tokens=False)["input_ids"]).view(-1, INSIDE)
    ids = F.pad(F.pad(ids, (1, 0), value=words.cls_token_id), (0, 1), value=words.sep_token_id)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(words),
        max_position_embeddings=2 * WINDOW,
        pad_token_id=0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **SIZE,
    )
    model, peak = BertForMaskedLM(config), 2e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01)
    loss = torch.zeros(())
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1, (step + 1) / 20, 2 * (steps - step) / steps)
        right = ids[torch.randint(len(ids), (BATCH,))]
        looked, drawn = torch.rand(right.shape) < 0.15, torch.rand(right.shape)
        looked[:, [0, -1]] = False
        shown = right.masked_fill(looked & (drawn < 0.8), words.mask_token_id)
        shown = torch.where(looked & (drawn > 0.9), torch.randint_like(right, len(words)), shown)
        hidden = model.bert(input_ids=shown).last_hidden_state[looked]
        loss = F.cross_entropy(model.cls(hidden), right[looked])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            print(f"stage A: step {step + 1}, loss {float(loss.detach()):.3f}", flush=True)
    model.save_pretrained(folder)
    words.save_pretrained(folder)


class Chain:
    """The stages of one seed, in a folder."""

    def __init__(self, o: argparse.Namespace, folder: Path):
        self.o, self.folder = o, folder
        language = Language(o.seed)
        text = {"train": language.documents(360), "valid": language.documents(2 * TOPICS)}
        found = {part: [{"text": one} for one in some] for part, some in text.items()}
        self.text = {n: {**self.write(f"text-{n}", rows), "format": "text"} for n, rows in found.items()}
        self.rows = {
            task: {n: self.write(f"{task}-{n}", language.rows(task, count)) for n, count in ROWS.items()}
            for task in TASKS
        }
        if not (folder / "A").is_dir():
            teach(folder / "A", text["train"], tokenizer(language), o.pretrain, o.seed)

    def write(self, name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """A source of the data section."""
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"path": str(path)}

    def prune(self, case: str) -> dict[str, Any]:
        """Stage B: the row of it."""
        amount = AMOUNTS[case]
        schedule = {"start": 0, "end": 0.5, "every": max(1, self.o.prune // 50)}
        zeros = {"kind": "magnitude", "amount": amount, "schedule": schedule}
        return self.ran(
            f"B {case}",
            {
                "model": {"path": str(self.folder / "A"), "dtype": "float32", "device": "cpu"},
                "task": "masked_lm",
                "quant": {"bits": 8, "group_size": -1, "calibrate": "absmax"}
                | ({} if amount is None else {"sparsity": zeros}),
                "data": {**self.text, "sequence_len": WINDOW},
                "train": {
                    "max_steps": self.o.prune,
                    "scheduler": "wsd",
                    "decay_ratio": 0.5,
                    "learning_rate": 0.4,
                },
                "eval": {"windows": 256},
                "export": {"format": "compressed-tensors"},
            },
        )

    def tune(self, case: str, task: str) -> dict[str, Any]:
        """Stage C: the row of it."""
        inputs = {"kind": "tensor", "bits": 8, "symmetric": False, "dynamic": False}
        quant = {
            "embeddings": 8,
            "activations": inputs,
            "calibration": {"samples": 64, "sequence_len": WINDOW},
        }
        return self.ran(
            f"C {case} {task} {self.o.tune} {self.o.rate:g}",
            {
                "model": {
                    "path": str(self.folder / f"B {case}" / "exported"),
                    "dtype": "float32",
                    "device": "cpu",
                },
                "task": TASKS[task],
                "quant": quant | ({} if AMOUNTS[case] is None else {"sparsity": {"kind": "locked"}}),
                "data": {**self.rows[task], "sequence_len": WINDOW},
                "train": {
                    "max_steps": self.o.tune,
                    "scheduler": "linear",
                    "learning_rate": self.o.rate,
                    "modules_learning_rate": 1e-2,
                },
                "export": {"format": "native"},
            },
        )

    def ran(self, name: str, recipe: dict[str, Any]) -> dict[str, Any]:
        """Run it in the folder of that name, and what came of it."""
        run = self.folder / name
        train = {"micro_batch_size": BATCH, "gradient_accumulation_steps": 1, "scale_learning_rate": 1e-3}
        recipe["train"] |= train | {"warmup_ratio": 0.01, "weight_decay": 0.0, "seed": self.o.seed}
        whole = {"name": "prune-once", "adapter": {"method": "full_qat"}, **recipe, "output": str(run)}
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(whole))
        began = time.process_time()
        if not (run / "report.html").is_file():
            pipeline.run(load_recipe(file))
        seconds = time.process_time() - began
        measured = json.loads((run / "evaluation.json").read_text())["rows"]
        stages = {row["stage"]: {"loss": row["loss"], **row["scores"]} for row in measured}
        merged = read_weights(run / "merged")
        encoder = [merged[layer] for layer in merged.specs if "embeddings" not in layer]
        size = sizes(encoder)
        dense = 4 * sum(w.shape[0] * w.shape[1] for w in encoder)
        return {
            "stages": stages,
            **size,
            "fp32_bytes": dense,
            "times": dense / size["zstd_bytes"],
            "cpu_s": seconds,
        }


def print_table(stored: dict[str, Any]) -> None:
    print(
        "| zeros | stage | share | loss, packed | loss, shipped | accuracy | F1 | bits a weight | of fp32 |"
    )
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|")
    for row in stored["rows"]:
        before, after = row["stages"]["quantized"], row["stages"]["merged"]
        f1 = after.get("f1", after.get("micro_f1"))
        print(
            f"| {row['case']} | {row['stage']} | {row['zeros']:.1%} | {before['loss']:.3f} | "
            f"{after['loss']:.3f} | {after['accuracy']:.3f} | {'' if f1 is None else f'{f1:.3f}'} | "
            f"{row['bits']:.2f} | 1/{row['times']:.1f} |"
        )


def main() -> None:
    o = options()
    torch.set_num_threads(1)
    stored: dict[str, Any] = json.loads(o.out.read_text()) if o.out.exists() else {}
    kept: list[dict[str, Any]] = stored.setdefault("rows", [])
    stored["environment"] = environment()
    asked = f"{o.pretrain} + {o.prune} + {o.tune} steps of {BATCH} x {WINDOW}"
    with tempfile.TemporaryDirectory() as place:
        chain = Chain(o, o.work or Path(place))

        def keep(case: str, stage: str, row: dict[str, Any]) -> None:
            key = {"case": case, "stage": stage, "asked": asked, "seed": o.seed}
            kept[:] = [other for other in kept if {k: other[k] for k in key} != key] + [key | row]
            o.out.parent.mkdir(parents=True, exist_ok=True)
            write_text(o.out, json.dumps(stored, indent=1) + "\n")
            print(json.dumps(key | row), flush=True)

        for case in AMOUNTS:
            keep(case, "masked_lm", chain.prune(case))
            for task in TASKS:
                keep(case, task, chain.tune(case, task))
    print_table(stored)


if __name__ == "__main__":
    main()
