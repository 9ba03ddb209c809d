"""What a rotation is worth where weights, inputs, keys and values are rounded: W4A4KV4 of a tiny Llama.

    python benchmarks/rotations.py                                    # resumable; one folder per run in --out
    python benchmarks/rotations.py --steps 3 --windows 8 --seeds 0    # a look, without meaning
    python benchmarks/rotations.py --models FOLDER --group 64         # another model (real_model.py)

Rows are round-to-nearest (plain), SmoothQuant-like (smooth), every site turned (hadamard), each layer as it
likes (adaptive), with and without the online site r4, on the checkpoint as it is and with outliers
(outliers.py). Each is trained for equally many steps on the same source files with the straight-through
estimator and the full-precision model's answers. Perplexity and KL to it are of files it has not seen, before
training (round-to-nearest) and after. Keys and values are as vLLM's int4_per_token_head has them, in every
row.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from outliers import plant

from lowbit_ft import pipeline
from lowbit_ft.files.records import Evaluation
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.rundir import RunDir

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "recipes" / "assets" / "tiny-llama"
TEXT = ROOT / "recipes" / "assets" / "text"
ROWS: dict[str, list[str]] = {
    "plain": [],
    "smooth": ["quant.smooth=auto"],
    "hadamard r1 r2": ["quant.rotation.kind=hadamard"],
    "hadamard": ["quant.rotation.kind=hadamard", "quant.rotation.sites.r4=true"],
    "adaptive": ["quant.rotation.kind=adaptive", "quant.rotation.sites.r4=true"],
    "adaptive, smooth": [
        "quant.rotation.kind=adaptive",
        "quant.rotation.sites.r4=true",
        "quant.smooth=auto",
    ],
}


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("runs/rotations"))
    p.add_argument("--models", nargs="+", default=["outliers", "plain"], help="these, or folders")
    p.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    p.add_argument("--steps", type=int, default=120)
    p.add_argument("--windows", type=int, default=64)
    p.add_argument("--valid-rows", type=int, default=None, help="texts to validate on behind the last step")
    p.add_argument("--samples", type=int, default=64, help="calibration windows of 256 tokens")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    p.add_argument("--group", type=int, default=128, help="quant.group_size; 64 for SmolLM2-135M")
    p.add_argument("--batch", type=int, default=8, help="train.micro_batch_size")
    p.add_argument("--bits", nargs=3, type=int, default=[4, 4, 4], help="of weights, inputs, keys and values")
    return p.parse_args()


def measure(o: argparse.Namespace, model: Path, row: str, seed: int) -> dict[str, Any]:
    """One run of the line; what is there already is not done again."""
    name = f"{model.name}-{row}-{seed}".replace(", ", "-").replace(" ", "-")
    output = o.out / name
    recipe = load_recipe(
        ROOT / "recipes" / "quickstart.yaml",
        [
            f"name={name}",
            f"output={output}",
            f"model.path={model}",
            "model.dtype=bfloat16",
            f"quant.bits={o.bits[0]}",
            f"quant.group_size={o.group}",
            f"quant.activations.bits={o.bits[1]}",
            f"quant.kv_cache.bits={o.bits[2]}",
            "quant.calibrate=mse",
            f"quant.calibration.samples={o.samples}",
            "quant.calibration.sequence_len=256",
            f"quant.rotation.seed={seed}",
            f"data.train={{path: {TEXT / 'train.jsonl'}, format: text}}",
            f"data.valid={{path: {TEXT / 'valid.jsonl'}, format: text, limit: {json.dumps(o.valid_rows)}}}",
            "data.train_on=all",
            "train.signal.kind=logits",
            "train.teacher=cached",
            f"train.max_steps={o.steps}",
            f"train.micro_batch_size={o.batch}",
            f"train.seed={seed}",
            f"eval.windows={o.windows}",
            "eval.generate=[]",
            "export.format=native",
            "export.verify=false",
            *ROWS[row],
        ],
    )
    run = RunDir(output)
    found = run.read_json("evaluation.json", Evaluation, Evaluation())
    if not found.rows:
        pipeline.run(recipe)
        found = run.read_json("evaluation.json", Evaluation, Evaluation())
    return {r.stage: (r.perplexity, r.kl) for r in found.rows}


def main() -> None:
    o = options()
    o.out.mkdir(parents=True, exist_ok=True)
    models = {"plain": TINY, "outliers": o.out / "model-outliers"}
    if not (models["outliers"] / "model.safetensors").is_file():
        plant(TINY, models["outliers"])
    table = {}
    for model in o.models:
        for row in o.rows:
            for seed in o.seeds:
                folder = models.get(model, Path(model))
                name = model if model in models else folder.name
                found = measure(o, folder.resolve(), row, seed)
                table[f"{name} / {row} / {seed}"] = found
                stages = "  ".join(
                    f"{stage} {found[stage][0]:9.3f} KL {found[stage][1]:.4f}"
                    for stage in ("base", "quantized", "trained")
                )
                print(f"{name:9} {row:18} seed {seed}  {stages}", flush=True)
                (o.out / "table.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
