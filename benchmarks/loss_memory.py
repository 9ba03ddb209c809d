"""Memory of the training loss over the hidden states: logits made whole against logits made in chunks, and
each signal with a teacher that answers in logits or in its 64 most likely tokens, forward and backward.

    python benchmarks/loss_memory.py                                    # counted on meta tensors, so no
                                                                        product is computed
    python benchmarks/loss_memory.py --device cpu --tokens 600 --width 16   # computed, and counted by the
                                                                            allocator

Counted is everything that is alive at once beyond the hidden states (the teacher's too), the head, the
labels and what a sparse teacher has stored: logits, their gradient, float32 rows, and the gradient of the
hidden states. On meta tensors the outputs of operators are counted, by storage; on the CPU every allocation
is, those inside operators too, so a small shape run both ways shows what the first way misses."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast

from lowbit_ft.recipe.sections.signal import SignalSection
from lowbit_ft.signals import SIGNALS, Lesson, Sparse, Teacher, Whole
from lowbit_ft.signals.base import Answers
from lowbit_ft.train.losses import LABELS, ChunkedHead, Targets, next_token_loss

TOP = 64


class Counted(TorchDispatchMode):
    """Bytes of the storages that operators made inside the block and that are alive; `peak` is their maximum,
    `largest` the most elements that one of them had."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.alive: dict[StorageWeakRef, int] = {}
        self.known = {StorageWeakRef(t.untyped_storage()) for t in known}
        self.peak = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                key = StorageWeakRef(leaf.untyped_storage())
                if key not in self.known:
                    self.alive[key] = leaf.untyped_storage().nbytes()
                    self.largest = max(self.largest, self.alive[key] // leaf.itemsize)
        self.alive = {key: size for key, size in self.alive.items() if not key.expired()}
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


def allocator_peak(run: Any) -> int:
    """The most bytes the CPU allocator had given out at once since the start of `run()`."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # pyright: ignore
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]  (the stubs of torch lack it)
        peak = max(peak, now)
    return peak


def teachers(
    head: ChunkedHead, tokens: int, width: int, dtype: torch.dtype, device: str
) -> tuple[dict[str, Answers], list[torch.Tensor]]:
    """A teacher that makes the logits of a chunk of its hidden states, and one that has stored its most
    likely tokens; and the tensors that they hold."""
    hidden = torch.ones((tokens, width), dtype=dtype, device=device)
    ids = torch.zeros((tokens, TOP), dtype=torch.int64, device=device)
    log_p = torch.zeros((tokens, TOP), dtype=torch.float32, device=device)

    def live(positions: torch.Tensor) -> Whole:
        with torch.no_grad():
            return Whole(head.logits(hidden.index_select(0, positions), BaseModelOutputWithPast))

    def stored(positions: torch.Tensor) -> Sparse:
        return Sparse(ids[positions], log_p[positions], log_p[positions, 0])

    return {"live": live, "stored": stored}, [hidden, ids, log_p]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tokens", type=int, default=4096)
    p.add_argument("--vocabulary", type=int, default=128256)
    p.add_argument("--width", type=int, default=4096)
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--device", choices=("meta", "cpu"), default="meta")
    p.add_argument("--limit", type=float, default=0.3, help="GB; above it the chunked loss fails")
    p.add_argument(
        "--teacher-limit", type=float, default=0.5, help="GB; the same, for a signal with a teacher"
    )
    p.add_argument("--out", type=Path)
    o = p.parse_args()
    dtype = getattr(torch, o.dtype)
    config = LlamaConfig(
        vocab_size=o.vocabulary,
        hidden_size=o.width,
        intermediate_size=16,
        num_hidden_layers=0,
        num_attention_heads=1,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=dtype).requires_grad_(False)
    if o.device == "cpu":
        model.lm_head.to_empty(device="cpu")
        torch.nn.init.normal_(model.lm_head.weight, std=0.02)
    labels = torch.zeros((1, o.tokens), dtype=torch.int64)
    targets = Targets(labels, torch.device(o.device))
    labels = targets.labels
    head = ChunkedHead(model.model, model.forward, o.vocabulary)

    answers, theirs = teachers(head, o.tokens, o.width, dtype, o.device)
    cases: dict[str, tuple[Lesson, Answers | None] | None] = {"whole": None, "chunked": (LABELS, None)}
    for kind, signal in SIGNALS.items():
        for name, answer in answers.items() if signal.asks else ():
            lesson = Lesson(signal, SignalSection(kind=kind), Teacher({}))
            cases[f"{kind}_{name}"] = (lesson, answer)

    def step(case: tuple[Lesson, Answers | None] | None, hidden: torch.Tensor) -> None:
        if case is None:
            loss = next_token_loss(model.lm_head(hidden), labels)
        else:
            loss = head.loss(BaseModelOutputWithPast(last_hidden_state=hidden), targets, *case).sum()  # pyright: ignore[reportArgumentType]
        loss.backward()

    row = {
        **{k: v for k, v in vars(o).items() if k != "out"},
        "hidden_gb": o.tokens * o.width * dtype.itemsize / 1e9,
    }
    for name, case in cases.items():
        hidden = torch.ones((1, o.tokens, o.width), dtype=dtype, device=o.device, requires_grad=True)
        if o.device == "cpu":
            peak = allocator_peak(lambda hidden=hidden, case=case: step(case, hidden))
        else:
            known = [hidden, labels, targets.positions, *theirs, *model.parameters()]
            with Counted(known) as counted:
                step(case, hidden)
            peak = counted.peak
        row[f"{name}_gb"] = peak / 1e9
        print(f"{name:<16}{row[f'{name}_gb']:8.3f}", flush=True)
    if o.out:
        o.out.write_text(json.dumps(row, indent=1) + "\n")
    for name in cases:
        limit = {"whole": float("inf"), "chunked": o.limit}.get(name, o.teacher_limit)
        if row[f"{name}_gb"] >= limit:
            raise SystemExit(f"{name} holds {row[f'{name}_gb']:.3f} GB, and the limit is {limit} GB")


if __name__ == "__main__":
    main()
