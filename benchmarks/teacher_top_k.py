"""What a KL to a teacher loses when only its k likeliest tokens (and the mass of the rest) are known.

    python benchmarks/teacher_top_k.py                   some minutes: distributions
    python benchmarks/teacher_top_k.py --steps 120       hours of one core: students trained on them

Without steps. The teacher is the full-precision model, the student its packed base before training. For every
position of the windows: KL(teacher, student) of all tokens, and of k tokens and one more that stands for all
others. The second is never larger. Beside it the gradient with respect to the student's logits: the length of
the difference over the length of the whole one's gradient, all positions together; and the same two for the
numbers as they are kept on the disk (signals/store.py: float16).

With steps. The quickstart is run with train.teacher: cached for every k and grid; k = the vocabulary is the
whole divergence. The row is that of the trained model in its table: perplexity, and KL to full precision, of
all tokens. Rows are kept in --out as they come, so a stopped run goes on.
"""

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from lowbit_ft.data.batches import Batches
from lowbit_ft.data.examples import load_examples
from lowbit_ft.evaluate.perplexity import Reference
from lowbit_ft.files.atomic import write_text
from lowbit_ft.model.attention import segment_attention, segment_inputs, why_not
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.load import load_tokenizer
from lowbit_ft.pipeline import run
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.signals.store import bytes_per_position, condense
from lowbit_ft.train.losses import Targets, target_logits

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--recipe", default=str(HERE.parent / "recipes" / "quickstart.yaml"))
    p.add_argument("--grids", nargs="+", default=["4:128", "3:128", "2:64"], help="bits:group_size")
    p.add_argument("--k", nargs="+", type=int, default=[1, 4, 16, 32, 64, 128, 256])
    p.add_argument("--temperatures", nargs="+", type=float, default=[1.0, 2.0])
    p.add_argument("--windows", type=int, default=64)
    p.add_argument("--steps", type=int, default=0, help="train so many steps of 8 windows for every k")
    p.add_argument(
        "--on", default="all", choices=["all", "targets"], help="where the trained ones are taught"
    )
    p.add_argument("--seeds", nargs="+", type=int, default=[0])
    p.add_argument("--temperatures-trained", nargs="+", type=float, default=[1.0])
    p.add_argument("--out", default=str(HERE / "results" / "teacher_top_k.json"))
    return p.parse_args()


def sparse(ids: Tensor, logp: Tensor, rest: Tensor, logq: Tensor) -> tuple[float, Tensor]:
    """(sum of KL over k ids and the rest, its gradient with respect to the student's logits); logq [T, V]
    float64."""
    p, r = logp.double().exp(), rest.double().exp()
    total = p.sum(-1) + r
    p, r = p / total[:, None], r / total
    q, q_rest = logq.exp(), (1 - logq.gather(-1, ids).exp().sum(-1)).clamp_min(1e-30)
    kl = torch.xlogy(p, p) - p * logq.gather(-1, ids)
    others = torch.xlogy(r, r) - r * q_rest.log()
    grad = q * (1 - r / q_rest)[:, None]
    grad.scatter_(-1, ids, q.gather(-1, ids) - p)
    return float(kl.sum() + others.sum()), grad


def trained(o: argparse.Namespace) -> None:
    """Students of every k, one run of the whole line each."""
    out = Path(o.out).with_stem(Path(o.out).stem + "_trained")
    rows: list[dict[str, object]] = json.loads(out.read_text()) if out.exists() else []
    for seed, grid, temperature, k in itertools.product(o.seeds, o.grids, o.temperatures_trained, o.k):
        case = {"grid": grid, "k": k, "temperature": temperature, "seed": seed, "steps": o.steps, "on": o.on}
        if any(all(row[name] == value for name, value in case.items()) for row in rows):
            continue
        bits, group = grid.split(":")
        with tempfile.TemporaryDirectory() as folder:
            overrides = [
                f"quant.bits={bits}",
                f"quant.group_size={group}",
                f"train.max_steps={o.steps}",
                "train.eval_every=null",
                "train.save_every=null",
                f"train.seed={seed}",
                "train.teacher=cached",
                f"train.signal={{kind: logits, top_k: {k}, temperature: {temperature}, on: {o.on}}}",
                "eval.generate=[]",
                f"output={folder}/run",
            ]
            began = time.process_time()
            run(load_recipe(o.recipe, overrides))
            measured = json.loads((Path(folder) / "run" / "evaluation.json").read_text())["rows"]
        by_stage = {row["stage"]: row for row in measured}
        rows.append(
            case
            | {"perplexity": by_stage["trained"]["perplexity"], "kl": by_stage["trained"]["kl"]}
            | {"kl before": by_stage["quantized"]["kl"], "seconds": time.process_time() - began}
        )
        print(rows[-1], flush=True)
        write_text(out, json.dumps(rows, indent=1) + "\n")


def main() -> None:
    o = options()
    if o.steps:
        return trained(o)
    recipe = load_recipe(o.recipe)
    checkpoint = Checkpoint.open(recipe.model.path, dtype=recipe.model.dtype)
    examples = load_examples(recipe.data.train, recipe.data, load_tokenizer(checkpoint), rows=None)
    found = list(Batches(examples, 8, 0, shuffle=False).one_epoch())[: o.windows // 8]
    rows: list[dict[str, object]] = []
    for grid in o.grids:
        bits, group = grid.split(":")
        quant = load_recipe(o.recipe, [f"quant.bits={bits}", f"quant.group_size={group}"]).quant
        model, _ = quantize(checkpoint, quant, device=CPU, dtype=torch.float32)
        teacher = Reference(
            checkpoint, found, attention="sdpa", device=CPU, dtype=torch.float32, segments=not why_not(model)
        )
        student = target_logits(model)
        sums: dict[tuple[int, float], list[float]] = {}
        counted = 0
        with torch.no_grad(), segment_attention(model):
            for number, batch in enumerate(found):
                targets = Targets(batch["labels"], CPU)
                counted += len(targets.where)
                inputs = {k: v for k, v in batch.items() if k != "labels"}
                inputs |= segment_inputs(model, batch["position_ids"])
                pairs = zip(teacher.target_logits(number, targets), student(inputs, targets), strict=True)
                for (theirs, _), (ours, _) in pairs:
                    for temperature in o.temperatures:
                        logp = (theirs.double() / temperature).log_softmax(-1)
                        logq = (ours.double() / temperature).log_softmax(-1)
                        kl = float((logp.exp() * (logp - logq)).sum())
                        slope = logq.exp() - logp.exp()
                        for k in o.k:
                            kept = condense(theirs, k, temperature)
                            exact = logp.gather(-1, kept[0])
                            rest = logp.scatter(-1, kept[0], float("-inf")).logsumexp(-1)
                            mine = sums.setdefault((k, temperature), [0.0] * 8)
                            for at, (value, grad) in (
                                (0, sparse(kept[0], exact, rest, logq)),
                                (2, sparse(*kept, logq)),
                            ):
                                mine[at] += value
                                mine[at + 1] += float((grad - slope).square().sum())
                            mine[4] += kl
                            mine[5] += float(slope.square().sum())
                            mine[6] += float(rest.exp().sum())
        for (k, temperature), s in sorted(sums.items(), key=lambda item: (item[0][1], item[0][0])):
            row = {
                "grid": grid,
                "temperature": temperature,
                "k": k,
                "bytes": bytes_per_position(k, 4096),
                "mass of the rest": s[6] / counted,
                "kl": s[4] / counted,
                "kl lost": 1 - s[0] / s[4],
                "kl lost in float16": 1 - s[2] / s[4],
                "gradient error": (s[1] / s[5]) ** 0.5,
                "gradient error in float16": (s[3] / s[5]) ** 0.5,
                "positions": counted,
            }
            rows.append(row)
            print("  ".join(f"{v:.5g}" if isinstance(v, float) else str(v) for v in row.values()), flush=True)
        write_text(Path(o.out), json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
