"""llama.cpp against transformers: perplexity of the same gguf files on the same tokens, which must agree
within half a per cent.

    pip install --no-binary llama-cpp-python llama-cpp-python     # builds llama.cpp, ten minutes on two cores
    python benchmarks/llama_cpp_perplexity.py

Quantizes the small trained checkpoint (Q4_0 from W4 g64, Q8_0 from W8 g64, and Q4_0, Q3_K, Q2_K from 3 and 2
bits), exports it and reads the file with both. llama.cpp rounds activations to 8 bits before each product,
which is all that may differ: the weights are the same numbers. Its tokenizer, the one inside the file, must
give the same ids too.
"""

# llama-cpp-python is built by hand.
# pyright: reportMissingImports=false

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "recipes" / "assets" / "tiny-llama"
TEXT = ROOT / "recipes" / "assets" / "docstrings" / "valid.jsonl"
GRIDS = {
    "Q4_0 W4 g64": (4, 64),
    "Q8_0 W8 g64": (8, 64),
    "Q4_0 W3 g64": (3, 64),
    "Q3_K W3 g256": (3, 256),
    "Q2_K W2 g256": (2, 256),
}
SCRIPTED = ("Q4_0 W4 g64", "Q8_0 W8 g64")  # those the limit is promised for
LIMIT = 0.005


def windows(tokenizer: Any, count: int, length: int) -> list[list[int]]:
    """`count` windows of `length` tokens of the validation rows in the chat template, end to end."""
    ids: list[int] = []
    for line in TEXT.read_text(encoding="utf-8").splitlines():
        ids += tokenizer(
            tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False),
            add_special_tokens=False,
        )["input_ids"]
        if len(ids) >= count * length:
            break
    return [ids[i * length : (i + 1) * length] for i in range(count)]


def loss(logits: torch.Tensor, ids: list[int]) -> float:
    """Sum of -log p of every token but the first. logits [L, V]."""
    log_p = torch.log_softmax(logits[:-1].double(), -1)
    return float(-log_p.gather(-1, torch.tensor(ids[1:])[:, None]).sum())


@torch.no_grad()
def measure(folder: Path, texts: list[list[int]]) -> dict[str, float]:
    """Perplexity by transformers and by llama.cpp, how often they choose the same token, and whether both
    tokenize alike.
    """
    from llama_cpp import Llama  # pyright: ignore[reportMissingImports]  (built from source)
    from transformers import AutoTokenizer

    from lowbit_ft.export.reader import load_exported

    model, tokenizer = load_exported(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    size = len(texts[0])  # one thread: its threads spin, and stand still where others compute
    other = Llama(
        str(folder / "model.gguf"),
        n_ctx=size,
        n_batch=size,
        logits_all=True,
        verbose=False,
        n_threads=1,
        n_threads_batch=1,
    )
    sums, same, count = [0.0, 0.0], 0, 0
    for ids in texts:
        mine = model(torch.tensor([ids])).logits[0]
        other.reset()
        other.eval(ids)
        theirs = torch.from_numpy(other.scores[: len(ids)].copy())
        sums = [sums[0] + loss(mine, ids), sums[1] + loss(theirs, ids)]
        same += int((mine.argmax(-1) == theirs.argmax(-1)).sum())
        count += len(ids) - 1
    text = tokenizer.decode(texts[0])
    ours = tokenizer(text, add_special_tokens=False)["input_ids"]
    alike = ours == other.tokenize(text.encode(), add_bos=False, special=True)
    ours_ppl, theirs_ppl = (math.exp(total / count) for total in sums)
    ends = (
        other.token_eos() == tokenizer.eos_token_id
        and other.metadata.get("tokenizer.chat_template") == tokenizer.chat_template
    )
    other.close()
    return {
        "transformers": ours_ppl,
        "llama.cpp": theirs_ppl,
        "apart": abs(theirs_ppl / ours_ppl - 1),
        "argmax": same / (count + len(texts)),
        "tokens_alike": float(alike and ends),
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--windows", type=int, default=16)
    p.add_argument("--length", type=int, default=256)
    p.add_argument("--out", type=Path)
    o = p.parse_args()
    from transformers import AutoTokenizer

    from lowbit_ft.export import EXPORTERS
    from lowbit_ft.export.writer import write_model
    from lowbit_ft.merge import merged_weights
    from lowbit_ft.model.checkpoint import Checkpoint
    from lowbit_ft.quantize.quantize import quantize
    from lowbit_ft.recipe.sections.quant import QuantSection

    checkpoint = Checkpoint.open(MODEL, dtype="float32")
    texts = windows(AutoTokenizer.from_pretrained(MODEL), o.windows, o.length)
    rows, failed = {}, []
    for name, (bits, group) in GRIDS.items():
        section = QuantSection.model_validate({"bits": bits, "group_size": group, "residual_bits": 0})
        model, _ = quantize(checkpoint, section, dtype=torch.float32)
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder) / "m", checkpoint, merged_weights(model), EXPORTERS["gguf"])
            row = rows[name] = measure(Path(folder) / "m", texts)
        print(
            f"{name:<14} transformers {row['transformers']:9.4f}  llama.cpp {row['llama.cpp']:9.4f}  "
            f"{row['apart']:.3%} apart, same argmax "
            f"{row['argmax']:.1%}, tokenizer {'alike' if row['tokens_alike'] else 'DIFFERS'}",
            flush=True,
        )
        if name in SCRIPTED and row["apart"] > LIMIT or not row["tokens_alike"]:
            failed.append(name)
    if o.out:
        o.out.write_text(json.dumps(rows, indent=1) + "\n")
    if failed:
        raise SystemExit(f"more than {LIMIT:.1%} apart, or other tokens: {', '.join(failed)}")


if __name__ == "__main__":
    main()
