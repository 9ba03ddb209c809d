"""Memory of one training step at length L, counted: a Llama 3.1 8B of two of its 32 blocks, W4, LR-QAT rank
32, one window.

    python benchmarks/long_step.py --tokens 65536

Nothing is computed: tensors are fake, and what every operator makes is counted by storage while it is alive
(loss_memory.py). Two blocks have all that more would have: what is in use, and the input of the next one on
its way back. Each further block adds its own trained tensors' gradients only, which are counted apart, as
resident. The layer ops are opaque, so their work space is not counted (it has no term in tokens;
kernels/README.md). The loss is counted by itself, at the end of the forward, where no block is at work.

    none      gradient checkpointing alone            offload   layer inputs elsewhere            mlp   and
              MLP and norms in chunks
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from loss_memory import Counted
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import attach
from lowbit_ft.grid import IntGrid, empty_weight
from lowbit_ft.model import attention
from lowbit_ft.model.linear import PackedLinear
from lowbit_ft.model.mlp_chunks import run_in_chunks
from lowbit_ft.train.losses import ChunkedHead, Targets
from lowbit_ft.train.offload import Offload
from lowbit_ft.train.setup import activation_checkpointing

BLOCKS, VOCABULARY = 32, 128256
SHAPE: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131072,
)


class Elsewhere:
    """A store that holds nothing: bytes that are away, and what is fetched is counted where it arrives."""

    ahead = True

    def __init__(self) -> None:
        self.away = self.peak = 0

    def put(self, x: torch.Tensor) -> int:
        self.away += x.nbytes
        self.peak = max(self.peak, self.away)
        return x.nbytes

    def get(self, slot: int, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    def wait(self, got: torch.Tensor) -> torch.Tensor:
        return got

    def release(self, slot: int) -> None:
        self.away -= slot

    def close(self) -> None:
        pass


def model_of(bits: int, residual_bits: int) -> Any:
    model: Any = LlamaForCausalLM._from_config(
        LlamaConfig(**SHAPE, num_hidden_layers=2), dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            base = empty_weight(
                (layer.out_features, layer.in_features),
                IntGrid(bits=bits, residual_bits=residual_bits),
                "cpu",
            )
            model.set_submodule(name, PackedLinear(base))
    attach(model, ADAPTERS["lr_qat"](rank=32, init="zero"))  # pyright: ignore[reportCallIssue]
    attention.switch(model.get_decoder())
    return model.train()


def resident(model: Any) -> dict[str, int]:
    """Bytes of the whole model between steps: 32 blocks, the embedding and the head."""
    block = model.model.layers[0]
    trained = [p for p in block.parameters() if p.requires_grad]
    held = [*(p for p in block.parameters() if not p.requires_grad), *block.buffers()]
    ends = [
        *model.model.embed_tokens.parameters(),
        *model.lm_head.parameters(),
        *model.model.norm.parameters(),
    ]
    return {
        "packed": BLOCKS * sum(t.nbytes for t in held),
        "ends": sum(t.nbytes for t in ends),
        "trained": BLOCKS * sum(4 * p.nbytes for p in trained),  # value, gradient, two moments
    }


def block_peak(
    tokens: int, way: str, chunk: int, segments: list[int], bits: int, residual_bits: int
) -> tuple[int, int, int]:
    """(peak of forward and backward of the blocks without gradients of what trains, largest single tensor's
    elements, bytes away).
    """
    store = Elsewhere()
    with FakeTensorMode():
        model = model_of(bits, residual_bits)
        activation_checkpointing(model, True, None if way == "none" else Offload(store))
        if way == "mlp":
            parts = [
                (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm)
                for layer in model.model.layers
            ]
            run_in_chunks([model.model.norm, *(part for three in parts for part in three)], chunk)
        gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        ids, positions = (
            torch.zeros((1, tokens), dtype=torch.int64),
            torch.zeros((1, tokens), dtype=torch.int64),
        )
        with Counted([*model.parameters(), *model.buffers(), ids, positions]) as counted:
            out = model.model(
                input_ids=ids,
                position_ids=positions,
                use_cache=False,
                segments=attention.Segments([segments]),
            )
            out.last_hidden_state.backward(torch.empty_like(out.last_hidden_state))
        return counted.peak - gradients, counted.largest, store.peak


def loss_peak(tokens: int) -> int:
    targets = Targets(torch.zeros((1, tokens), dtype=torch.int64), torch.device("cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model: Any = LlamaForCausalLM._from_config(
            LlamaConfig(**SHAPE, num_hidden_layers=0), dtype=torch.bfloat16
        ).requires_grad_(False)
        hidden = torch.empty((1, tokens, SHAPE["hidden_size"]), dtype=torch.bfloat16, requires_grad=True)
        with Counted(
            [*model.parameters(), hidden, targets.positions, targets.tokens, targets.labels]
        ) as counted:
            ChunkedHead(model.model, model.forward, VOCABULARY).loss(
                BaseModelOutputWithPast(last_hidden_state=hidden), targets
            ).backward()  # pyright: ignore
        return counted.peak + hidden.nbytes


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tokens", type=int, nargs="+", default=[65536])
    p.add_argument("--ways", nargs="+", default=["none", "offload", "mlp"])
    p.add_argument("--chunk", type=int, default=4096)
    p.add_argument("--packed", type=int, default=1, help="segments in the window")
    p.add_argument("--bits", type=int, default=4)
    p.add_argument("--residual-bits", type=int, default=1)
    p.add_argument(
        "--limit",
        type=float,
        default=24.0,
        help="GB; the last way must stay below it with 1.5 GB to spare for context and work space",
    )
    p.add_argument("--out", type=Path)
    o = p.parse_args()
    with FakeTensorMode():
        held = resident(model_of(o.bits, o.residual_bits))
    print("resident GB  " + "  ".join(f"{k} {v / 1e9:.3f}" for k, v in held.items()))
    rows = []
    for tokens in o.tokens:
        loss = loss_peak(tokens)
        segments = [tokens // o.packed] * (o.packed - 1)
        segments.append(tokens - sum(segments))
        for way in o.ways:
            peak, largest, away = block_peak(tokens, way, o.chunk, segments, o.bits, o.residual_bits)
            inputs = tokens * SHAPE["hidden_size"] * 2
            if way == "none":
                peak += (BLOCKS - 2) * inputs  # which the other blocks keep
            row = {
                "tokens": tokens,
                "way": way,
                "blocks_gb": peak / 1e9,
                "loss_gb": loss / 1e9,
                "away_gb": away / 2 * BLOCKS / 1e9,
                "largest_elements": largest,
                "total_gb": (sum(held.values()) + max(peak, loss + (BLOCKS * inputs if way == "none" else 0)))
                / 1e9,
            }
            assert tokens < 16384 or largest < tokens * tokens, (
                f"a tensor of {largest} elements: length x length"
            )
            rows.append(row)
            print(
                "  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()),
                flush=True,
            )
    if o.out:
        o.out.write_text(json.dumps({"resident": held, "rows": rows}, indent=1) + "\n")
    if rows[-1]["total_gb"] > o.limit - 1.5:
        raise SystemExit(
            f"{rows[-1]['total_gb']:.1f} GB and 1.5 for context and work space are more than {o.limit:g} GB"
        )


if __name__ == "__main__":
    main()
