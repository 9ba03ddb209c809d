"""Prune Once for All in miniature: an encoder that is pruned once, then tuned for two tasks in 8 bits.

    python benchmarks/prune_once.py                  # three minutes of one core; rows are kept as they come
    python benchmarks/prune_once.py --prune 400      # nearer to the paper, whose encoder loses little

A. A small BERT and its tokenizer are trained on recipes/assets/text, masked and dense, by plain PyTorch.
B. Of it three, as recipes/prune-once-for-all-1-prune.yaml says with task: masked_lm and no teacher: dense,
   85 % and 90 % zeros, equally many steps of full_qat on 8 bits.
C. Each of them becomes two classifiers, as recipes/prune-once-for-all-2-task.yaml says: zeros locked,
   weights, inputs and embedding in 8 bits. `functions`: whether code is the body of a method; `calls`: of
   each word of such a body, whether it is called, an attribute, or neither. A fifth of the rows is held out.

Measured: the task's own numbers as it is packed and as it ships; zeros and bytes of the encoder's matrices as
they ship, through zstd (level 19), and how many times less that is than fp32."""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from quality import ASSETS, HERE
from sparsity import sizes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from lowbit_ft import pipeline
from lowbit_ft.export.reader import read_weights
from lowbit_ft.files.atomic import write_text
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.rundir import environment

WINDOW, BATCH, VOCABULARY = 64, 16, 2048
SIZE = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
AMOUNTS = {"dense": None, "85 %": 0.85, "90 %": 0.9}
TASKS: dict[str, dict[str, Any]] = {
    "functions": {"kind": "sequence_classification", "text": ["text"], "label": "label"},
    "calls": {"kind": "token_classification", "words": "words", "label": "tags"},
}
WORD = re.compile(r"\w+|[^\w\s]")


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--pretrain", type=int, default=400, help="steps of stage A")
    p.add_argument("--prune", type=int, default=120, help="steps of stage B")
    p.add_argument("--tune", type=int, default=60, help="steps of stage C")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=HERE / "results" / "prune_once.json")
    return p.parse_args()


def texts(name: str) -> list[str]:
    """Some of the documents: of a third of the text, and of a few windows for validation."""
    lines = (ASSETS / "text" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in (lines[::3] if name == "train" else lines[::9])]


def tokenizer() -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made = Tokenizer(models.BPE(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts("train"), trainer)
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {
        f"{name}_token": token
        for name, token in zip(("pad", "unk", "cls", "sep", "mask"), special, strict=True)
    }
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def teach(folder: Path, steps: int, seed: int) -> None:
    """Stage A: a dense encoder, saved."""
    words = tokenizer()
    ids = torch.tensor(words("\n".join(texts("train")), add_special_tokens=False, verbose=False)["input_ids"])
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=2 * WINDOW,
        pad_token_id=0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **SIZE,
    )
    model = BertForMaskedLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 20, 2 * (steps - step) / steps)
        right = windows[torch.randint(len(windows), (BATCH,))]
        looked, drawn = torch.rand(right.shape) < 0.15, torch.rand(right.shape)
        shown = right.masked_fill(looked & (drawn < 0.8), words.mask_token_id)
        shown = torch.where(looked & (drawn > 0.9), torch.randint_like(right, VOCABULARY), shown)
        hidden = model.bert(input_ids=shown).last_hidden_state[looked]
        loss = F.cross_entropy(model.cls(hidden), right[looked])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"stage A: {steps} steps, loss {float(loss.detach()):.3f}", flush=True)
    model.save_pretrained(folder)
    words.save_pretrained(folder)


def tags(code: str) -> tuple[list[str], list[str]]:
    """The words of some code, and of each what it is."""
    words = WORD.findall(code)
    around = ["", *words, ""]
    found = []
    for before, word, behind in zip(around, words, around[2:], strict=False):
        name = word.isidentifier()
        found.append("CALL" if name and behind == "(" else "ATTRIBUTE" if name and before == "." else "O")
    return words, found


def rows(folder: Path, seed: int) -> dict[str, dict[str, Any]]:
    """data.train and data.valid of each task."""
    found: dict[str, dict[str, Any]] = {name: {} for name in TASKS}
    lines = [line for n in ("train", "valid") for line in (ASSETS / "functions" / f"{n}.jsonl").open()]
    plain = [json.loads(line) for line in lines]
    random.Random(seed).shuffle(plain)
    for part, chosen in {"valid": plain[: len(plain) // 5], "train": plain[len(plain) // 5 :]}.items():
        made: dict[str, list[dict[str, Any]]] = {"functions": chosen, "calls": []}
        for row in chosen:
            words, tagged = tags(row["text"])
            made["calls"].append({"words": words, "tags": tagged})
        for name, values in made.items():
            path = folder / f"{name}-{part}.jsonl"
            path.write_text("".join(json.dumps(value) + "\n" for value in values))
            found[name][part] = {"path": str(path)}
    return found


class Chain:
    """The stages of one seed, in a folder."""

    def __init__(self, o: argparse.Namespace, folder: Path):
        self.o, self.folder = o, folder
        self.rows = rows(folder, o.seed)
        teach(folder / "A", o.pretrain, o.seed)

    def prune(self, case: str) -> dict[str, Any]:
        """Stage B: the row of it."""
        amount = AMOUNTS[case]
        schedule = {"start": 0, "end": 0.5, "every": max(1, self.o.prune // 50)}
        zeros = {"kind": "magnitude", "amount": amount, "schedule": schedule}
        text = {}
        for part in ("train", "valid"):
            path = self.folder / f"text-{part}.jsonl"
            path.write_text("".join(json.dumps({"text": one}) + "\n" for one in texts(part)))
            text[part] = {"path": str(path), "format": "text"}
        return self.ran(
            f"B {case}",
            {
                "model": {"path": str(self.folder / "A"), "dtype": "float32", "device": "cpu"},
                "task": "masked_lm",
                "quant": {"bits": 8, "group_size": -1, "calibrate": "absmax"}
                | ({} if amount is None else {"sparsity": zeros}),
                "data": {**text, "sequence_len": WINDOW},
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
            f"C {case} {task}",
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
                    "learning_rate": 0.2,
                    "modules_learning_rate": 2e-3,
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
        chain = Chain(o, Path(place))

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
