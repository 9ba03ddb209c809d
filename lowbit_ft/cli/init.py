"""`lowbit-ft init`: a commented recipe that fits a given checkpoint (group size, window, memory from its
headers).
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from statistics import mode

from ..adapters.rates import rate_for
from ..names import HUB_ID
from ..recipe.layers import Shapes, has_chat_template, local_folder, read_shapes
from ..recipe.sections.quant import QuantSection
from ..recipe.sections.task import writes_no_text
from ..tasks import TASKS, USUAL
from .init_fit import config_folder, fitted
from .places import refuse_existing

GROUP_SIZES = (128, 64, 32)  # in the order of preference; -1 (the whole row) always fits

TEMPLATE = """\
# {title}
#
#     lowbit-ft plan {file}        # check everything, show layers and memory; loads nothing
#     lowbit-ft run  {file}        # run it; the same command resumes a run that was stopped
#
# {facts}

name: {name}

model:
  path: {path}
  revision: null                     # hub ids: pin a branch, tag or commit
  dtype: {dtype}                    # {dtype_why}
  attention: sdpa                    # or flash_attention_2, flex_attention on a GPU; eager
  device: auto                       # the GPU when there is one; or cpu, cuda

quant:
  grid: integer                      # binary: sums of sign planes, for adapter.method alpha_tuning
  bits: 4                            # 8, 4, 3 or 2: 4 loses little, 3 and 2 need the training
  group_size: {group:<4}                   # {group_why}
  symmetric: true                    # false adds zero points: more exact at 2 and 3 bits, fewer servers
  residual_bits: 4                   # 0, 1, 2, 4 bits of the rounding error kept for training; never ship
  calibrate: auto                    # gptq at 2, 3 and 4 bits: it looks at data.train; mse at 8. Or by name;
                                     # signround loses less at 2 and 3 bits and takes minutes
  targets: all-linear                # attention and MLP; or names, globs, regexes: ["q_proj", "*.mlp.*"]
  exclude: [lm_head]                 # left in full precision
  overrides: []                      # [{{match: "*.down_proj", bits: 8}}]; the last match wins
  lm_head: null                      # 8 or 4 packs and trains the head too; null leaves it in full precision
  embeddings: null                   # 8 or 4 packs the token embedding (native format); it is not trained

adapter:
  method: lr_qat                     # lr_qat, dl_qat, l4q, lota, scale, full_qat, ef_qat, alpha_tuning, lora
  rank: 16                           # more moves more weights, and costs memory
  alpha: 32                          # the low-rank product is scaled by alpha / rank

data:
  train: {{path: data/train.jsonl, format: {format}}}   # {format_why}
  # valid: {{path: data/valid.jsonl, format: {format}}}
  # synthesis: {{kind: self_generated}}  # instead of train: the model writes the rows itself (docs/data.md)
  sequence_len: {window:<4}                 # tokens per window; activations and logits grow with it
  packing: true                      # several rows per window, without attention between them
  train_on: {train_on}                # assistant, completion or all: which tokens carry loss
  on_bad_row: error                  # skip counts malformed rows and goes on

train:
  max_steps: 1000                    # or epochs: 1; 0 with reconstruct: quantize only
  # reconstruct: {{}}                  # fit each layer to the dense one first: a better start at 2 and 3 bits
  # signal: {{kind: mix}}              # learn a teacher's next-token distribution beside the labels (logits:
  # teacher: cached                  # instead of them); cached: full precision, asked once before training
  # gradient: {{kind: zeroth_order}}   # no backward, many more steps (docs/choosing-a-gradient.md)
  micro_batch_size: 1                # raise it while memory lasts
  gradient_accumulation_steps: 8     # windows per step = micro_batch_size x this
  learning_rate: auto                # of A and B, here {rate:g}: {rate_why};
                                     # `plan` and `run` print it. A LoRA's 2e-4 would move few codes or none
  scale_learning_rate: null          # of scales; null: learning_rate
  optimizer: adamw                   # paged_adamw8bit saves memory on a GPU
  scheduler: cosine                  # linear, wsd, constant
  warmup_ratio: 0.05
  gradient_checkpointing: {checkpointing}       # slower by about 30 %, far smaller activations
  # offload: cpu                     # or disk: where what it keeps waits, for long windows on a GPU
  # mlp_chunk: 4096                  # tokens at a time through the MLP, for windows beyond 16k
  # keep_codes: true                 # codes once per step: faster, bits per trained weight of memory
  # compile: true                    # torch.compile of the decoder layers (docs/speed.md)
  seed: 0
  save_every: 100                    # checkpoints are atomic and hashed
  # eval_every: 100                  # needs data.valid

eval:
  perplexity: true                   # measured on data.valid (or eval.data)
  kl: true                           # distance to the full-precision model
  window: {eval_window:<4}                       # tokens
  # tasks: [arc_easy, my_task.yaml]  # lm-eval on every stage; pip install 'lowbit-ft[eval]'
  generate: ["Once upon a time"]     # prompts answered before and after training

export:
  format: compressed-tensors         # vLLM, SGLang; gguf: llama.cpp; gptq, awq, mlx; native: every grid
  # server: vllm                     # or llama.cpp, mlx, transformers: what it refuses is said first
  verify: true                       # reload and compare codes, scales and logits

output: runs/{name}
"""


QUANTIZED = """\
quant:
  calibrate: from_checkpoint         # bits, group size, layers: the checkpoint's; others are an error

adapter:
  method: dl_qat                     # or lr_qat, scale, full_qat, ef_qat, lora; l4q needs a residual
  rank: 16                           # more moves more weights, and costs memory
  alpha: 16                          # the low-rank product is scaled by alpha / rank
  targets: null                      # or names, globs, regexes: the others ship the codes they came with
  # init_from: path/to/lora          # start A and B from a PEFT LoRA
"""


def write_recipe(
    model_path: str,
    output: Path,
    *,
    force: bool = False,
    memory_gb: float | None = None,
    config: Path | None = None,
) -> None:
    """Write a recipe for the model at `model_path` (folder or hub id) to `output`; with memory_gb, one that
    fits a card of that size, by the config.json in `config` where the model is not on this disk.

    Raises:
        ValueError: `output` exists (and not `force`), the path is neither a checkpoint folder nor a hub id,
        or nothing fits.
    """
    refuse_existing(output, force, "choose another name with -o")
    folder = local_folder(model_path)
    if folder is None and (not HUB_ID.fullmatch(model_path) or "/" not in model_path):
        raise ValueError(
            f"model path: got {model_path!r}; there is no such folder; give a checkpoint folder or a hub "
            "id owner/name"
        )
    if folder is not None and not (folder / "config.json").is_file():
        raise ValueError(
            f"model path: got {model_path!r}, which has no config.json; give a checkpoint folder"
        )
    if (why := writes_no_text(TASKS[USUAL].model_validate({"kind": USUAL}), folder)) is not None:
        raise ValueError(
            f"model path: got {model_path!r}: {why}, in a copy of one of its recipes; init writes those of "
            "language models"
        )
    if config is not None and memory_gb is None:
        raise ValueError("--config: what its config.json is for is --memory GB; give both")
    shapes_from = folder if folder is not None and any(folder.glob("*.safetensors")) else None
    shapes = read_shapes(shapes_from) if shapes_from is not None else None
    text = _render(model_path, output, shapes, card=memory_gb is not None)
    if memory_gb is not None:
        text = fitted(text, memory_gb, config_folder(model_path, config))
    output.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, output)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _render(model_path: str, output: Path, shapes: Shapes | None, card: bool = False) -> str:
    """The text of the recipe. card: it is for a GPU, whether one is here or not."""
    import torch

    gpu = card or torch.cuda.is_available()
    group, group_why, window, chat = (
        128,
        "inputs per scale: smaller is more exact and costs memory",
        2048,
        True,
    )
    facts = (
        f"{model_path} is not on this disk, so that its layer widths were not looked at: `plan` checks "
        "them once it is."
    )
    if shapes is not None:
        widths = [
            layer.in_features for layer in shapes.linears if QuantSection().skip_reason(layer.name) is None
        ]
        weights = sum(
            x.in_features * x.out_features
            for x in shapes.linears
            if QuantSection().skip_reason(x.name) is None
        )
        if not widths:
            raise ValueError(
                f"{shapes.folder}: no linear layers of decoder layers found in its safetensors headers"
            )
        group = next((size for size in GROUP_SIZES if all(width % size == 0 for width in widths)), -1)
        all_widths = ", ".join(map(str, sorted(set(widths))))
        group_why = f"divides the layers' inputs ({all_widths}); " + (
            "the whole row" if group == -1 else "smaller is more exact"
        )
        window = min(window, shapes.positions or window)
        chat = has_chat_template(shapes.folder)
        groups = sum(x.out_features * (1 if group == -1 else x.in_features // group) for x in shapes.linears)
        packed = (weights / 2 + 2 * groups) / 1e6
        facts = (
            f"{len(widths)} linear layers, {weights / 1e6:,.1f}M weights: {packed:,.1f} MB at 4 bit, and "
            f"{weights / 2 / 1e6:,.1f} MB of residual while training."
        )
    name = re.sub(r"[^\w.+-]+", "-", Path(model_path.rstrip("/")).name).strip("-.") or "model"
    incoming = shapes.incoming if shapes is not None else None
    name = f"{name.lower()}-dl-qat" if incoming is not None else f"{name.lower()}-w4-lr-qat"
    plain = re.fullmatch(r"[\w./~+][\w./~+-]*", model_path) and not model_path.replace(".", "").isdigit()
    template, what = TEMPLATE, "in 4 bit with LR-QAT"
    if incoming is not None:
        # Sections of the template that would say otherwise than the checkpoint.
        head, _, rest = TEMPLATE.partition("quant:\n")
        template, what = (
            head + QUANTIZED + rest[rest.index("\ndata:") :],
            f"as it is quantized ({incoming}), tuned with DL-QAT",
        )
        facts = f"{len(incoming.layers)} layers are packed already; their codes are taken as they are."
    method, bits = "lr_qat", 4
    if incoming is not None:
        method, bits = "dl_qat", mode(layer.grid.bits for layer in incoming.layers.values())
    rate, rate_why = rate_for(method, bits)
    return template.format(
        title=f"{_comment(model_path)} {what}.",
        file=_comment(str(output)),
        facts=_comment(facts),
        name=json.dumps(name) if name[0].isdigit() else name,
        path=model_path if plain else json.dumps(model_path),
        dtype="bfloat16" if gpu else "float32 ",
        dtype_why="float16 on GPUs without bfloat16" if gpu else "fastest on a CPU; bfloat16 on a GPU",
        group=group,
        group_why=group_why,
        format="chat" if chat else "text",
        format_why='rows {"messages": [...]}; or completion, alpaca, text, tokens'
        if chat
        else 'rows {"text": ...}; the model has no chat template',
        window=window,
        train_on="assistant" if chat else "all      ",
        eval_window=min(window, 256),
        checkpointing="true " if gpu else "false",
        rate=rate,
        rate_why=rate_why,
    )


def _comment(text: str) -> str:
    """Text that stays on its comment line."""
    return "".join(character if character.isprintable() else "?" for character in text)
