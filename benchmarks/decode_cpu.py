"""Decoding on a CPU: tokens/s of the packed native format against bfloat16 transformers, the same random
Llama, one interleaved run.

    python benchmarks/decode_cpu.py                     # 300M weights, 4 bit, groups of 128; asks for a ratio
                                                        of 2
    python benchmarks/decode_cpu.py --inputs 16 8 4     # and the same weights, inputs on a grid per token

All models go through `generate` (greedy, one sequence); only the steps after the first are timed, because
the first is a prompt and runs the packed op (its time is printed too). The head and the embeddings stay
bfloat16 in all. Rounds alternate between the models, so that a busy neighbour slows all; the ratios are those
of the medians to bf16. Exit code 1 when that of the first --inputs is below --at-least. One thread by
default: on a shared machine several wait for each other at every layer, and what is measured is the
scheduler.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

import lowbit_ft  # noqa: F401  (from_pretrained reads the native format)
from lowbit_ft.activations import Scheme
from lowbit_ft.activations.place import hosts, place_activations
from lowbit_ft.export import EXPORTERS
from lowbit_ft.export.writer import write_model
from lowbit_ft.merge import base_weights
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.sections.quant import QuantSection
from lowbit_ft.rundir import environment

HIDDEN, INNER, VOCABULARY = 1024, 4096, 32000


class Clock(BaseStreamer):
    """When each token came out of `generate` (the prompt first)."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def write_dense(folder: Path, layers: int) -> int:
    """A random Llama in bfloat16; returns its number of weights."""
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def decode(model: Any, prompt: torch.Tensor, tokens: int) -> tuple[float, float]:
    """(seconds until the first new token, tokens/s after it)."""
    clock = Clock()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        min_new_tokens=tokens + 1,
        max_new_tokens=tokens + 1,
        pad_token_id=0,
        streamer=clock,
    )
    times = clock.times  # of the prompt, which is put before it is read, then of tokens + 1 new ones
    assert len(times) == tokens + 2
    return times[1] - times[0], tokens / (times[-1] - times[1])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--bits", type=int, default=4)
    p.add_argument("--group-size", type=int, default=128)
    p.add_argument("--asymmetric", action="store_true")
    p.add_argument(
        "--inputs", nargs="+", type=int, default=[16], choices=[16, 8, 4], help="bits; 16: as they come"
    )
    p.add_argument("--layers", type=int, default=18)
    p.add_argument("--prompt", type=int, default=8)
    p.add_argument("--tokens", type=int, default=32)
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--at-least", type=float, default=2.0)
    p.add_argument("--out", type=Path)
    o = p.parse_args()
    torch.set_num_threads(o.threads)
    with tempfile.TemporaryDirectory() as temporary:
        dense, native = Path(temporary) / "dense", Path(temporary) / "native"
        weights = write_dense(dense, o.layers)
        checkpoint = Checkpoint.open(dense)
        section = QuantSection.model_validate(
            {
                "bits": o.bits,
                "group_size": o.group_size,
                "symmetric": not o.asymmetric,
                "residual_bits": 0,
                "calibrate": "minmax" if o.asymmetric else "absmax",
            }
        )
        packed, _ = quantize(checkpoint, section, dtype=torch.bfloat16)
        write_model(native, checkpoint, base_weights(packed), EXPORTERS["native"])
        del packed
        models = {"bf16": AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16).eval()}
        for bits in o.inputs:
            name = f"W{o.bits}A{bits}"
            models[name] = AutoModelForCausalLM.from_pretrained(native, dtype=torch.bfloat16).eval()
            if bits < 16:
                scheme = Scheme(kind="token", bits=bits)
                place_activations(models[name], {layer: scheme for layer, _ in hosts(models[name])})
    prompt = torch.randint(3, VOCABULARY, (1, o.prompt))
    first: dict[str, list[float]] = {name: [] for name in models}
    speed: dict[str, list[float]] = {name: [] for name in models}
    for round_number in range(o.rounds + 1):
        for name, model in models.items():
            seconds, rate = decode(model, prompt, o.tokens)
            if round_number:  # the first round repacks and warms up
                first[name].append(seconds)
                speed[name].append(rate)
    packed_name = f"W{o.bits}A{o.inputs[0]}"
    result = {
        "weights": weights,
        "tokens_per_s": {name: median(rates) for name, rates in speed.items()},
        "spread": {name: [min(rates), max(rates)] for name, rates in speed.items()},
        "prompt_seconds": {name: median(times) for name, times in first.items()},
        "ratio": {name: median(rates) / median(speed["bf16"]) for name, rates in speed.items()},
        "ratios": [a / b for a, b in zip(speed[packed_name], speed["bf16"], strict=True)],
    }
    print(
        f"{weights / 1e6:.0f}M weights, {o.threads} threads, {o.tokens} tokens after a prompt of "
        f"{o.prompt}, {o.rounds} rounds"
    )
    for name in models:
        low, high = result["spread"][name]
        print(
            f"{name:<8}{result['tokens_per_s'][name]:8.2f} tokens/s ({low:.2f} to {high:.2f}), prompt "
            f"{result['prompt_seconds'][name]:.2f} s, {result['ratio'][name]:.2f} of bf16"
        )
    print(
        f"{packed_name}: ratio {result['ratio'][packed_name]:.2f} (asked for: {o.at_least}), by round "
        f"{', '.join(f'{r:.2f}' for r in result['ratios'])}"
    )
    if o.out:
        options = {key: str(value) for key, value in vars(o).items()}
        o.out.write_text(
            json.dumps({"environment": environment(), "options": options, **result}, indent=1) + "\n"
        )
    if result["ratio"][packed_name] < o.at_least:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
