"""Peak memory and time of the quantize stage on a large checkpoint, and of the second run that finds base/
there.

    python benchmarks/load_memory.py --gb 4 --out benchmarks/results/load_memory.json

Writes a random Llama with the layer, embedding and head shapes of Llama 3.1 8B (bf16, a shard per layer, one
layer in memory), then runs the real stage (lowbit_ft/stages/quantize.py) for each calibrator in a fresh
process that resets its high-water mark after the imports. gptq runs on a checkpoint of one such layer
(--gptq-gb 0 leaves it out). Printed, and written as JSON:

    packing      peak resident memory until base/ is written; no packed model is in it
    stage        the same until the model is mapped and its hash taken: pages of base/ count, the limit is
                 packed + 1 GB
    second run   seconds to check the hashes and to map; RssAnon (own memory) and RssFile (pages of files)
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
ASSET = ROOT / "recipes" / "assets" / "tiny-llama"
LIMIT_GB = 1.0
HIDDEN, INNER, VOCABULARY, SMALL_VOCABULARY = 4096, 14336, 128256, 8192
LAYER_GB = 2 * ((2 + 2 * 8 / 32) * HIDDEN * HIDDEN + 3 * HIDDEN * INNER) / 1e9

CHILD = """
import json, sys, time
from pathlib import Path
import torch
import transformers.models.llama.modeling_llama
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.session import start
from lowbit_ft.stages import quantize as stage
from lowbit_ft.train.memory import peak_gb, reset_peak
recipe = load_recipe(sys.argv[1], sys.argv[3:], check=False)
cpu, row, clock = torch.device("cpu"), {}, {}

def rss():
    lines = Path("/proc/self/status").read_text().splitlines()
    keys = ("RssAnon", "RssFile")
    found = [(key, line) for line in lines for key in keys if line.startswith(key)]
    return {key: int(line.split()[1]) * 1024 / 1e9 for key, line in found}

def timed(name):
    real = getattr(stage, name)
    def call(*args, **kwargs):
        if name == "load_packed":
            row["peak_packing_gb"] = peak_gb(cpu)
        start, used = time.perf_counter(), time.process_time()
        out = real(*args, **kwargs)
        clock[name] = clock.get(name, 0.0) + time.perf_counter() - start
        clock[name + "_cpu"] = clock.get(name + "_cpu", 0.0) + time.process_time() - used
        return out
    setattr(stage, name, call)

checkpoint = Checkpoint.open(recipe.model.path)
checkpoint.empty_model()
if sys.argv[2] == "read":
    began, used = time.perf_counter(), time.process_time()
    for name in checkpoint.names():
        for piece in checkpoint.stored_pieces(name):
            pass
    seconds = {"read_gb_per_s": time.perf_counter() - began, "read_gb_per_cpu_s": time.process_time() - used}
    print(json.dumps({name: checkpoint.nbytes / 1e9 / value for name, value in seconds.items()}))
    raise SystemExit
for name in ("check_files", "pack_base", "load_packed", "base_digest"):
    timed(name)
session = start(recipe)
reset_peak(cpu)
row["before"], row["before_gb"] = rss(), peak_gb(cpu)
began = time.perf_counter()
model = stage.quantize_stage(session)
row |= {"seconds": time.perf_counter() - began, "parts_s": clock, "after": rss(), "peak_gb": peak_gb(cpu)}
row["packed_gb"] = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]) / 1e9
row["checkpoint_gb"] = checkpoint.nbytes / 1e9
table = json.loads((Path(recipe.output) / "quant.json").read_text())
row["linears_gb"] = sum(2 * r["parameters"] for r in table if r["action"] == "quantized") / 1e9
print(json.dumps(row))
"""


def write_checkpoint(folder: Path, layers: int, vocabulary: int) -> None:
    """A Llama of so many layers of an 8B model with random bf16 weights, a shard per layer, and the small
    asset's tokenizer.
    """
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    shapes: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (vocabulary, HIDDEN)}]
    linears = {f"self_attn.{p}_proj": (HIDDEN // (4 if p in "kv" else 1), HIDDEN) for p in "qkvo"}
    linears |= {
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    norms = {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
    shapes += [
        {f"model.layers.{i}.{n}.weight": s for n, s in (linears | norms).items()} for i in range(layers)
    ]
    shapes += [{"lm_head.weight": (vocabulary, HIDDEN), "model.norm.weight": (HIDDEN,)}]
    generator, where = torch.Generator().manual_seed(0), {}
    for number, shard in enumerate(shapes, 1):
        name = f"model-{number:05}-of-{len(shapes):05}.safetensors"
        tensors = {}
        for key, shape in shard.items():
            tensors[key] = torch.empty(shape, dtype=torch.bfloat16)
            for rows in tensors[key].split(4096):
                rows.copy_(
                    torch.ones(rows.shape)
                    if len(shape) == 1
                    else torch.randn(rows.shape, generator=generator).mul_(0.02)
                )
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(ASSET / name, folder / name)


def child(checkpoint: Path, out: Path, what: str, *options: str) -> dict[str, Any]:
    """One fresh process; what: read, or pack (the quantize stage, which finds base/ when it is there)."""
    options = (
        f"model.path={checkpoint}",
        "model.dtype=bfloat16",
        "model.device=cpu",
        f"output={out}",
        "eval.generate=[]",
        *options,
    )
    command = [sys.executable, "-c", CHILD, str(ROOT / "recipes" / "quickstart.yaml"), what, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measured(checkpoint: Path, root: Path, calibrate: str, options: list[str]) -> dict[str, Any]:
    """The stage twice: packing, and with base/ there."""
    out = root / "run"
    settings = [f"quant.calibrate={calibrate}", *options]
    load, first, again = (
        os.getloadavg()[0],
        child(checkpoint, out, "pack", *settings),
        child(checkpoint, out, "pack", *settings),
    )
    shutil.rmtree(out)
    row = {
        "calibrate": calibrate,
        "checkpoint_gb": first["checkpoint_gb"],
        "linears_gb": first["linears_gb"],
        "packed_gb": first["packed_gb"],
        "before_gb": first["before_gb"],
        "peak_packing_gb": first["peak_packing_gb"],
        "peak_stage_gb": first["peak_gb"],
        "over_packed_gb": first["peak_gb"] - first["before_gb"] - first["packed_gb"],
        "pack_s": first["parts_s"]["pack_base"],
        "pack_s_per_gb_of_linears": first["parts_s"]["pack_base"] / first["linears_gb"],
        "pack_cpu_s_per_gb_of_linears": first["parts_s"]["pack_base_cpu"] / first["linears_gb"],
        "second_run": {
            "check_s": again["parts_s"]["check_files"],
            "check_cpu_s": again["parts_s"]["check_files_cpu"],
            "map_s": again["parts_s"]["load_packed"],
            "rss_anon_gb": again["after"]["RssAnon"],
            "rss_anon_grown_gb": again["after"]["RssAnon"] - again["before"]["RssAnon"],
            "rss_file_gb": again["after"]["RssFile"],
        },
        "load_average": [round(load, 1), round(os.getloadavg()[0], 1)],
    }
    second = row["second_run"]
    print(
        f"{calibrate}: checkpoint {row['checkpoint_gb']:.2f} GB, packed {row['packed_gb']:.2f} GB; peak "
        f"{row['peak_packing_gb'] - row['before_gb']:.3f} GB "
        f"while packing, packed {row['over_packed_gb']:+.3f} GB with the model mapped; "
        f"{row['pack_s']:.0f} s, "
        f"{row['pack_s_per_gb_of_linears']:.0f} s per GB of linears, "
        f"{row['pack_cpu_s_per_gb_of_linears']:.0f} of its own (load {row['load_average']})\n"
        f"    second run: hashes {second['check_s']:.1f} s, mapped in {second['map_s']:.2f} s; RssAnon "
        f"grew by {second['rss_anon_grown_gb']:.3f} GB, "
        f"RssFile {second['rss_file_gb']:.2f} GB",
        flush=True,
    )
    return row


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gb", type=float, default=4.0)
    p.add_argument(
        "--gptq-gb",
        type=float,
        default=LAYER_GB,
        help="size of the checkpoint for gptq, a layer at least; 0: no gptq",
    )
    p.add_argument("--calibrate", default="absmax,mse")
    p.add_argument("--bits", type=int, default=4)
    p.add_argument("--residual-bits", type=int, default=4)
    p.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="where the checkpoint is made, and removed",
    )
    p.add_argument("--out", type=Path)
    o = p.parse_args()
    o.folder.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(o.folder).free / 1e9, 2.5 * o.gb + 1
    if free < needed:
        raise SystemExit(
            f"{o.folder}: needs about {needed:.0f} GB and has {free:.0f} GB free; choose another --folder"
        )
    options = [f"quant.bits={o.bits}", f"quant.residual_bits={o.residual_bits}", "quant.group_size=128"]
    result: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "bits": o.bits,
        "residual_bits": o.residual_bits,
        "rows": [],
    }

    def keep(row: dict[str, Any]) -> None:
        result["rows"].append(row)
        if o.out:
            o.out.write_text(json.dumps(result, indent=1) + "\n")

    with tempfile.TemporaryDirectory(dir=o.folder) as folder:
        root = Path(folder)
        large = o.gb >= 4 * VOCABULARY * HIDDEN / 1e9 + LAYER_GB
        vocabulary = VOCABULARY if large else SMALL_VOCABULARY
        layers = max(1, round((o.gb - 4 * vocabulary * HIDDEN / 1e9) / LAYER_GB))
        write_checkpoint(root / "dense", layers, vocabulary)
        result |= child(root / "dense", root / "run", "read")
        print(
            f"reading: {result['read_gb_per_s']:.2f} GB/s, {result['read_gb_per_cpu_s']:.2f} GB per second "
            "of its own time",
            flush=True,
        )
        for calibrate in filter(None, o.calibrate.split(",")):
            keep(measured(root / "dense", root, calibrate, options))
        shutil.rmtree(root / "dense")
        if o.gptq_gb:
            write_checkpoint(root / "one", max(1, round(o.gptq_gb / LAYER_GB)), SMALL_VOCABULARY)
            text = ["quant.calibration.samples=8", "quant.calibration.sequence_len=512"]
            keep(measured(root / "one", root, "gptq", [*options, *text]))
    if any(row["over_packed_gb"] >= LIMIT_GB for row in result["rows"] if row["calibrate"] != "gptq"):
        raise SystemExit(f"more than {LIMIT_GB} GB over the packed size")


if __name__ == "__main__":
    main()
