"""What `lowbit-ft plan` predicts against bytes that were counted, for five shapes, with and without gradient
checkpointing.

    python benchmarks/plan_error.py                     # about three minutes on two cores
    python benchmarks/plan_error.py --shapes tiny,25m   # some of them

Counted is every storage that is alive at once (lowbit_ft/plan/counting.py) over three optimizer steps and an
evaluation:

    real   training as users run it (lowbit_ft.train.train) on a CPU, inside the packed ops too
    fake   the same model, loss, backward and optimizer on tensors without data, for shapes that take this
           machine too long; small shapes are counted both ways, and must agree
    cuda   on a GPU: torch.cuda.max_memory_allocated of real training, limit 8 %

The tiny shape is the quickstart's model on its own data. The prediction is that of `plan`, from config.json
and a recipe, without what the process holds beside tensors. More than --limit per cent of error in a total
fails.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowbit_ft.adapters.attach import adapted_layers, attach
from lowbit_ft.data.batches import Batches
from lowbit_ft.data.examples import load_examples
from lowbit_ft.data.windows import Example, Examples
from lowbit_ft.model.attention import Segments, switch
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.load import load_tokenizer
from lowbit_ft.plan.counting import Counter
from lowbit_ft.plan.fake import fake, quiet, rules_of, targets_without_data
from lowbit_ft.plan.model import _bytes, _dense, _pack, _stamp, _start_free
from lowbit_ft.plan.plan import Card, Plan, plan
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.quantize.table import plan_layers
from lowbit_ft.recipe.recipe import Recipe, load_recipe
from lowbit_ft.train import run as train_run
from lowbit_ft.train.loop import train
from lowbit_ft.train.losses import LOGITS_AT_A_TIME, ChunkedHead, next_token_loss
from lowbit_ft.train.setup import activation_checkpointing

ROOT = Path(__file__).resolve().parent.parent
QUICK = ROOT / "recipes" / "quickstart.yaml"
PLANES = ["quant.grid=binary", "quant.calibrate=greedy", "export.format=native"]
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _llama(
    hidden: int, layers: int, heads: int, kv: int, inner: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    return LLAMA | {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        **more,
    }


# name -> (config.json, None: the quickstart's; recipe overrides; how it is counted)
SHAPES: dict[str, tuple[dict[str, Any] | None, list[str], tuple[str, ...]]] = {
    "tiny": (None, ["adapter={method: lr_qat, rank: 16}", "train.micro_batch_size=4"], ("real", "fake")),
    "25m": (
        _llama(384, 6, 6, 2, 1152, 8192),
        [
            "adapter={method: l4q, rank: 8}",
            "quant.bits=3",
            "quant.symmetric=false",
            "export.format=native",
            "data.sequence_len=128",
            "train.micro_batch_size=2",
            "train.gradient_accumulation_steps=2",
        ],
        ("real", "fake"),
    ),
    "100m": (
        _llama(768, 8, 12, 4, 2048, 32000, tie_word_embeddings=True),
        [
            "adapter={method: dl_qat, rank: 16}",
            "quant.bits=2",
            "quant.group_size=64",
            "model.dtype=bfloat16",
            "export.format=native",
            "data.sequence_len=128",
            "train.micro_batch_size=1",
        ],
        ("real", "fake"),
    ),
    "400m": (
        _llama(1024, 24, 16, 8, 4096, 32000),
        [
            "adapter={method: scale}",
            "model.dtype=bfloat16",
            "data.sequence_len=1024",
            "train.micro_batch_size=1",
            "quant.residual_bits=0",
        ],
        ("fake",),
    ),
    "1b": (
        _llama(2048, 16, 32, 8, 8192, 128256),
        [
            *PLANES,
            "adapter={method: alpha_tuning}",
            "quant.bits=3",
            "model.dtype=bfloat16",
            "data.sequence_len=2048",
            "train.micro_batch_size=1",
            "train.gradient_accumulation_steps=2",
        ],
        ("fake",),
    ),
}


def recipe_for(shape: str, folder: Path, checkpointing: bool) -> Recipe:
    """The recipe of a shape; its checkpoint is `folder` (config.json alone for shapes that are only counted
    without data).
    """
    config, overrides, _ = SHAPES[shape]
    if config is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        overrides = [*overrides, f"model.path={folder}"]
    overrides = [
        *overrides,
        f"train.gradient_checkpointing={str(checkpointing).lower()}",
        f"output={folder / 'run'}",
    ]
    return load_recipe(QUICK, overrides, check=False)


def predicted(recipe: Recipe, masked: bool) -> tuple[Plan, dict[str, int]]:
    """The plan on a CPU, and its bytes by part without the process."""
    made = plan(recipe, Path(recipe.model.path), Card(1 << 50, "a CPU", 0), 1, packed_rows=masked)
    assert made is not None
    p = made.parts
    base = p["codes"] + p["residual"] + p["scales and zeros"]
    dense = p["embeddings"] + p["head"] + p["norms and other"]
    fixed = base + dense + p["adapters"] + p["optimizer states"]
    evaluation = made.stages["evaluation while training"] - p["context"]
    total = made.stages["training"] - p["context"]
    return made, {
        "packed base": base,
        "dense": dense,
        "adapters": p["adapters"],
        "optimizer": p["optimizer states"],
        "step": total - fixed,
        "evaluation": evaluation - fixed,
        "total": total,
    }


def parts_of(model: nn.Module) -> dict[str, int]:
    """Bytes of a model's tensors: packed base, dense, adapters."""
    sums = {"packed base": 0, "dense": 0, "adapters": 0}
    for part, size in _bytes(model, lambda _: "norms and other"):
        sums[
            "adapters" if part == "adapters" else "dense" if part == "norms and other" else "packed base"
        ] += size
    return sums


def counted(model: nn.Module, optimizer: Any, count: Counter) -> dict[str, int]:
    parts = parts_of(model)
    states = sum(
        t.numel() * t.element_size()
        for s in optimizer.state.values()
        for t in s.values()
        if isinstance(t, torch.Tensor)
    )
    own = sum(parts.values())
    step, evaluation = count.peaks["step"], count.peaks.get("evaluation", 0)
    return parts | {
        "optimizer": states,
        "step": step - states,
        "evaluation": max(0, evaluation - states),
        "total": own + step,
    }


def real_data(recipe: Recipe, shape: str) -> tuple[Batches, Batches, bool]:
    """(training batches, validation batches, whether rows share windows)."""
    size, length = recipe.train.micro_batch_size, recipe.data.sequence_len
    shape_keys = SHAPES[shape][0]
    if shape_keys is None:
        tokenizer = load_tokenizer(Checkpoint.open(recipe.model.path, dtype=recipe.model.dtype))
        rows = [
            load_examples(source, recipe.data, tokenizer)
            for source in (recipe.data.train, recipe.data.valid)
            if source is not None
        ]
        rows = [Examples(examples[i] for i in range(4 * size)) for examples in rows]
        return Batches(rows[0], size, 0, 0), Batches(rows[1], size, 0, 1), True
    generator, vocabulary = torch.Generator().manual_seed(0), shape_keys["vocab_size"]
    made = []
    for _ in range(2):
        ids = torch.randint(0, vocabulary, (4 * size, length), generator=generator).tolist()
        made.append(Examples([Example(row, row, [length // 2, length - length // 2]) for row in ids]))
    return Batches(made[0], size, 0, 0), Batches(made[1], size, 0, 1), True


def real_model(recipe: Recipe, shape: str, folder: Path, device: str) -> nn.Module:
    """The packed, adapted model, from random weights where the shape has none."""
    if SHAPES[shape][0] is not None and not list(folder.glob("*.safetensors")):
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), dtype=torch.bfloat16
        ).save_pretrained(folder)
    checkpoint = Checkpoint.open(recipe.model.path, dtype=recipe.model.dtype)
    model, _ = quantize(
        checkpoint,
        recipe.quant.model_copy(
            update={"calibrate": "greedy" if recipe.quant.grid == "binary" else "absmax"}
        ),
        device=device,
    )
    attach(model, recipe.adapter)
    return model


def count_real(recipe: Recipe, shape: str, folder: Path) -> dict[str, int]:
    """Three steps and an evaluation of real training, counted."""
    model = real_model(recipe, shape, folder, "cpu")
    batches, valid, _ = real_data(recipe, shape)
    section = recipe.train.model_copy(
        update={"max_steps": 3, "eval_every": 2, "save_every": None, "keep_best": False, "trackers": []}
    )
    seen: dict[str, Any] = {}
    build, evaluate = train_run.build_optimizer, train_run.Run.evaluate
    with Counter() as count, tempfile.TemporaryDirectory() as run, count.phase("step"):

        def watched_build(*args: Any) -> Any:
            seen["optimizer"] = build(*args)
            return seen["optimizer"]

        def watched_evaluate(self: Any, log: Any, stop: Any) -> None:
            with count.phase("evaluation"):
                evaluate(self, log, stop)

        def first_batch(step: int) -> None:
            if step == 0:
                count.peaks.clear()  # the trial of the loss on a few tokens, before the first step

        train_run.build_optimizer, train_run.Run.evaluate = watched_build, watched_evaluate
        try:
            train(model, batches, valid, section, run, on_step=first_batch, console=Console(quiet=True))
        finally:
            train_run.build_optimizer, train_run.Run.evaluate = build, evaluate
        return counted(model, seen["optimizer"], count)


def count_fake(recipe: Recipe, masked: bool) -> dict[str, int]:
    """The same without data: every layer of the model, two steps."""
    folder = Path(recipe.model.path)
    import copy

    dense = _dense(str(folder), _stamp(folder), recipe.model.dtype, recipe.model.attention)
    targets, _ = plan_layers(dense, recipe.quant)
    model, config = copy.deepcopy(dense), _start_free(recipe.adapter)
    _pack(
        model,
        [(n, recipe.quant.grid_for(n), config.trains(n)) for n in targets],
        config,
        getattr(torch, recipe.model.dtype),
    )
    windows, length, train_section = recipe.train.micro_batch_size, recipe.data.sequence_len, recipe.train
    vocabulary = dense.config.vocab_size
    with FakeTensorMode(allow_non_fake_inputs=True), quiet():
        fake(model)
        switch(model.get_decoder())
        if train_section.gradient_checkpointing:
            activation_checkpointing(model, True)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
        plain = model.forward
        head = (
            ChunkedHead(model.model, plain, vocabulary)
            if windows * length > LOGITS_AT_A_TIME // vocabulary
            else None
        )

        def forward(_: nn.Module, labels: torch.Tensor, **inputs: Any) -> torch.Tensor:
            inputs["segments"] = Segments([[length // 2, length - length // 2]] * windows)
            if head is not None:
                return head.loss(head.base(**inputs, use_cache=False), targets_without_data(windows, length))
            return next_token_loss(plain(**inputs, use_cache=False).logits, labels)

        model.forward = MethodType(forward, model)

        def batch() -> dict[str, torch.Tensor]:
            return {
                name: torch.empty((windows, length), dtype=torch.int64)
                for name in ("input_ids", "position_ids", "labels")
            }

        with Counter(rules_of(0)) as count:
            for step in range(2):
                model.train()
                with count.phase("step"):
                    micro = [batch() for _ in range(train_section.gradient_accumulation_steps)]
                    for one in micro:
                        (model(**one) * 1.0).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    del micro, one
                if step == 1:
                    model.eval()
                    with torch.no_grad(), count.phase("evaluation"):
                        model(**batch())
            return counted(model, optimizer, count)


def count_cuda(recipe: Recipe, shape: str, folder: Path) -> dict[str, int]:
    """Real training on the GPU, by PyTorch's allocator."""
    model = real_model(recipe, shape, folder, "cuda")
    batches, valid, _ = real_data(recipe, shape)
    section = recipe.train.model_copy(
        update={"max_steps": 3, "eval_every": 2, "save_every": None, "keep_best": False, "trackers": []}
    )
    with tempfile.TemporaryDirectory() as run:
        train(
            model,
            batches,
            valid,
            section,
            run,
            on_step=lambda s: torch.cuda.reset_peak_memory_stats() if s == 0 else None,
            console=Console(quiet=True),
        )
    assert next(adapted_layers(model))[1].adapter is not None
    return parts_of(model) | {"total": torch.cuda.max_memory_allocated()}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shapes", default=",".join(SHAPES))
    p.add_argument("--limit", type=float, help="per cent of error of a total (default 5, on a GPU 8)")
    p.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "plan_error.json")
    o = p.parse_args()
    torch.set_num_threads(o.threads)
    limit = o.limit or (8.0 if o.device == "cuda" else 5.0)
    rows, worst = [], 0.0
    names = ("packed base", "dense", "adapters", "optimizer", "step", "evaluation", "total")
    print(
        f"{'shape':<7}{'method':<13}{'ckpt':<6}{'counted':<9}"
        + "".join(f"{n:>24}" for n in names)
        + f"{'error':>9}   (MB: predicted / counted)"
    )
    with tempfile.TemporaryDirectory() as folder:
        for shape in o.shapes.split(","):
            for checkpointing in (False, True):
                path = Path(folder) / shape
                recipe = recipe_for(shape, path, checkpointing)
                ways: dict[str, Callable[[], dict[str, int]]] = {
                    "real": lambda r=recipe, s=shape, f=path: count_real(r, s, f),
                    "fake": lambda r=recipe: count_fake(r, True),
                    "cuda": lambda r=recipe, s=shape, f=path: count_cuda(r, s, f),
                }
                _, guess = predicted(recipe, True)
                for way in ("cuda",) if o.device == "cuda" else SHAPES[shape][2]:
                    began = time.perf_counter()
                    with nullcontext():
                        found = ways[way]()
                    error = 100 * (guess["total"] / found["total"] - 1)
                    worst = max(worst, abs(error))
                    rows.append(
                        {
                            "shape": shape,
                            "method": recipe.adapter.method,
                            "checkpointing": checkpointing,
                            "counted_by": way,
                            "predicted": guess,
                            "counted": found,
                            "error_percent": error,
                            "seconds": time.perf_counter() - began,
                        }
                    )
                    cells = "".join(
                        f"{guess.get(n, 0) / 1e6:>13.3f} /{found.get(n, 0) / 1e6:>9.3f}" for n in names
                    )
                    start = (
                        f"{shape:<7}{recipe.adapter.method:<13}{'yes' if checkpointing else 'no':<6}{way:<9}"
                    )
                    print(f"{start}{cells}{error:>8.2f}%", flush=True)
                    o.out.parent.mkdir(parents=True, exist_ok=True)
                    o.out.write_text(
                        json.dumps(
                            {
                                "device": o.device,
                                "torch": torch.__version__,
                                "limit_percent": limit,
                                "rows": rows,
                            },
                            indent=1,
                        )
                        + "\n"
                    )
    print(f"largest error of a total: {worst:.2f} %")
    if worst > limit:
        raise SystemExit(f"plan is {worst:.2f} % off, and the limit is {limit} %")


if __name__ == "__main__":
    main()
