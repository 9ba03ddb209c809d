"""The training loss: cross entropy of the next token, summed, so that the caller divides by the global count.

With z the logits of one position and t its target, loss = logsumexp(z) - z_t and d loss / d z = softmax(z)
- e_t. Logits are the largest tensor of a step (4096 tokens x a vocabulary of 128k: 1.1 GB in bf16, and as
much again for their gradient), and F.cross_entropy keeps a float32 copy and its log-softmax as well. So

    hidden states [T, H] -> chunks of rows -> logits of one chunk -> its loss

runs chunk by chunk, and again in the backward, as gradient checkpointing does: the logits of one chunk are
all that ever exists, for one more product with the head per step. `loss_forward` makes that of a model. What
the model does between hidden states and logits (bias, packed or adapted head, soft-capping, scaling) is done
by its own forward, which is called with the decoder's output already there; a small trial shows whether that
gives the model's logits, and where it does not, the logits are made whole, and a warning says so. Within a
chunk float32 exists for a few rows at a time. Positions without a target (prompts, padding) have no logits at
all: a chunk is a stretch of the hidden states with so many targets in it, and which ones they are is read off
the labels while these are on the CPU (`Targets`), so that the device is never asked.

A mean over each micro-batch would weigh tokens of short batches more than tokens of long ones. The sum over
all micro-batches and processes, divided by the count of all their targets, does not, and it makes
accumulation and data parallelism change nothing but the order of a sum.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .liger import Fused, liger_loss, liger_problems
from .memory import upload

IGNORE = -100  # labels that are not targets
FLOATS_AT_A_TIME = 1 << 22  # float32 elements at a time (16 MB)
# Logits at a time: 256 rows of a 128k vocabulary, 67 MB in bf16. Fewer rows would read the head more often
# than a GPU can hide behind the products.
LOGITS_AT_A_TIME = 1 << 25
_SMALL_VOCABULARY = 512  # below it a chunk would be 65,536 tokens or more: batches have fewer


@dataclass(frozen=True)
class Loss:
    """A choice of train.loss. fuse(model, logits_of) -> the loss of training, for a model whose logits are
    logits_of(hidden [T, H]) -> [T, V]; None: the chunks. What is measured is always the cross entropy.
    problems(recipe): what it lacks in this recipe or on this machine.
    """

    fuse: Callable[[Any, Callable[[Tensor], Tensor]], Fused] | None = None
    problems: Callable[[Any], list[str]] = lambda recipe: []


LOSSES: dict[str, Loss] = {"chunked": Loss(), "liger": Loss(liger_loss, liger_problems)}


class _TokenLoss(torch.autograd.Function):
    """logits [T, V] (any floating dtype), targets [T] int64 -> sum of the token losses, scalar in float32
    (float64 for float64 logits).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        exact = torch.promote_types(logits.dtype, torch.float32)
        lse = torch.empty(targets.shape, dtype=exact, device=logits.device)
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for rows in _row_chunks(logits):
            z, t = logits[rows].to(exact), targets[rows]
            lse[rows] = z.logsumexp(-1)
            losses = lse[rows] - z.gather(-1, t.clamp_min(0)[:, None])[:, 0]
            total += losses.masked_fill(t == IGNORE, 0).double().sum()
        ctx.save_for_backward(logits, targets, lse)
        return total.to(exact)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, targets, lse = ctx.saved_tensors
        out = torch.empty_like(logits)
        for rows in _row_chunks(logits):
            t = targets[rows]
            p = (logits[rows].to(lse.dtype) - lse[rows, None]).exp_()
            p.scatter_add_(-1, t.clamp_min(0)[:, None], p.new_full((len(t), 1), -1))
            out[rows] = p.mul_(grad).masked_fill_((t == IGNORE)[:, None], 0)
        return out, None


def _row_chunks(logits: Tensor) -> list[slice]:
    step = max(1, FLOATS_AT_A_TIME // logits.shape[-1])
    return [slice(i, i + step) for i in range(0, logits.shape[0], step)]


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over the targets of -log p(label), scalar in float32 (or float64), differentiable in logits.

    logits [B, L, V]; labels [B, L] int64, not shifted: position i of the logits predicts label i + 1;
    labels of -100, and the first of every row, are not targets. Divide by `count_targets` of the whole
    global batch.
    """
    assert logits.shape[:2] == labels.shape, f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}"
    return _TokenLoss.apply(logits.reshape(-1, logits.shape[-1]), _targets(labels))  # pyright: ignore


def _targets(labels: Tensor) -> Tensor:
    """[B, L] labels -> [B L]: what each position is to predict."""
    targets = torch.full_like(labels, IGNORE)
    targets[:, :-1] = labels[:, 1:]
    return targets.reshape(-1)


class Targets:
    """The targets of a batch: how many, and where, is known to the host. An object that wrappers of models
    leave as it is.

    labels [B, L] int64 on the CPU, not shifted; device: where the loss is computed.
    """

    def __init__(self, labels: Tensor, device: torch.device) -> None:
        assert labels.device.type == "cpu", "read before the batch moves, or the host waits for the device"
        targets = _targets(labels)
        where = (targets != IGNORE).nonzero()[:, 0]
        if not len(where):
            where = where.new_zeros(1)  # one that counts nothing: every tensor still gets its (zero) gradient
        self.where: list[int] = where.tolist()
        self.positions, self.tokens, self.labels = (
            upload(t, device) for t in (where, targets[where], labels)
        )

    def stretches(self, rows: int) -> tuple[list[int], list[tuple[Tensor, Tensor]]]:
        """The B L positions cut so that each stretch has `rows` targets, the last one what is left: the
        lengths of the stretches, and of each its targets' places within it and their tokens."""
        starts = [0, *self.where[rows::rows], self.labels.numel()]
        lengths = [b - a for a, b in zip(starts, starts[1:], strict=False)]
        return lengths, [
            (p - start, t)
            for start, p, t in zip(starts, self.positions.split(rows), self.tokens.split(rows), strict=False)
        ]


def target_count(labels: Tensor) -> Tensor:
    """How many labels [B, L] the loss counts, int64, a scalar on their device."""
    return (labels[:, 1:] != IGNORE).sum()


def count_targets(labels: Tensor) -> int:
    """`target_count` as a number: on a GPU the host waits for it."""
    return int(target_count(labels))


def loss_forward(model: nn.Module, kind: str = "chunked") -> Callable[..., Any]:
    """A forward for `model` (to be bound to it) that gives the loss: f(model, labels=Targets, **inputs) ->
    the sum of `next_token_loss`, a scalar. Without labels it is the model's own forward. kind: train.loss;
    ValueError for one that this model cannot have.

    Being the model's forward, it runs inside whatever wraps the model: autocast, DDP.
    """
    plain = model.forward
    head, reason = _head_of(model)
    fuse = LOSSES[kind].fuse
    if fuse is not None:
        if head is None:
            raise ValueError(
                f"train.loss: got {kind!r}, but the head cannot be taken off: {reason}; "
                "set train.loss: chunked"
            )
        owner: Any = model
        probe = torch.zeros((1, 1), dtype=torch.int64, device=owner.device)
        output = type(head.base(input_ids=probe, use_cache=False))
        head.fused = fuse(model, lambda hidden: head.logits(hidden, output))

    def forward(_: nn.Module, *args: Any, labels: Targets | None = None, **inputs: Any) -> Any:
        if labels is None:
            return plain(*args, **inputs)
        if head is not None and (labels.labels.numel() > head.rows or head.fused is not None):
            return head.loss(head.base(*args, **inputs, use_cache=False), labels)
        logits = plain(*args, **inputs, use_cache=False).logits
        if logits.numel() > LOGITS_AT_A_TIME:
            size = logits.numel() * logits.element_size() / 1e9
            warnings.warn(
                f"the loss holds all logits at once ({size:.1f} GB, and their gradient): {reason}",
                stacklevel=2,
            )
        return next_token_loss(logits, labels.labels)

    return forward


def target_logits(model: nn.Module) -> Callable[[dict[str, Any], Targets], Iterator[tuple[Tensor, Tensor]]]:
    """f(inputs, targets) -> the logits [r, V] that predict them and their tokens [r], so many targets at a
    time as a chunk of the loss has; r is the same for every model of a vocabulary. For measuring: nothing
    here is differentiable.
    """
    plain = model.forward
    head, _ = _head_of(model)

    @torch.no_grad()
    def chunks(inputs: dict[str, Any], targets: Targets) -> Iterator[tuple[Tensor, Tensor]]:
        if head is None:
            logits = plain(**inputs, use_cache=False).logits
            logits = logits.view(-1, logits.shape[-1])
            rows = max(1, LOGITS_AT_A_TIME // logits.shape[-1])
            for positions, tokens in zip(
                targets.positions.split(rows), targets.tokens.split(rows), strict=True
            ):
                yield logits[positions], tokens
            return
        output = head.base(**inputs, use_cache=False)
        lengths, pairs = targets.stretches(head.rows)
        hidden = output.last_hidden_state.reshape(targets.labels.numel(), -1)
        for part, (places, tokens) in zip(hidden.split(lengths), pairs, strict=True):
            yield head.logits(part[places], type(output)), tokens

    return chunks


class ChunkedHead:
    """What a model does between its decoder's hidden states and its logits, and the loss of that in chunks.

    base: the decoder; plain: the model's forward; rows: tokens per chunk.
    """

    fused: Fused | None = None

    def __init__(self, base: nn.Module, plain: Callable[..., Any], vocabulary: int) -> None:
        self.base, self.plain = base, plain
        self.rows = max(1, LOGITS_AT_A_TIME // vocabulary)

    def logits(self, hidden: Tensor, kind: Callable[..., Any]) -> Tensor:
        """hidden [T, H] -> [T, V]; kind: the class of the decoder's output."""
        ids = torch.zeros(
            (1, len(hidden)), dtype=torch.int64, device=hidden.device
        )  # only their shape matters
        with _answering(self.base, kind(last_hidden_state=hidden[None])):
            return self.plain(input_ids=ids, use_cache=False).logits[0]

    @torch.no_grad()
    def differs(self, device: torch.device) -> str:
        """Why these are not the logits that the model makes of a few tokens; "" when they are."""
        ids = torch.arange(8, device=device)[None]
        inputs = {"input_ids": ids, "position_ids": ids, "use_cache": False}
        try:
            want = self.plain(**inputs).logits[0]
            output = self.base(**inputs)
            got = torch.cat(
                [self.logits(part, type(output)) for part in output.last_hidden_state[0].split(5)]
            )
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            return f"its logits cannot be made of hidden states ({error})"
        # The same numbers but for the order of sums, and bf16 keeps 8 bits of them.
        close = got.shape == want.shape and bool((got - want).abs().max() <= 2e-2 * want.abs().max())
        return "" if close else "its logits are not a function of its hidden states alone"

    def loss(self, output: Any, targets: Targets) -> Tensor:
        """Sum of the token losses of the decoder's output (last_hidden_state [B, L, H])."""
        hidden, kind = output.last_hidden_state, type(output)
        if self.fused is not None and torch.is_grad_enabled():
            return self.fused(
                hidden.reshape(-1, hidden.shape[-1]).index_select(0, targets.positions), targets.tokens
            )

        def chunk_loss(part: Tensor, places: Tensor, tokens: Tensor) -> Tensor:
            chosen = part if len(places) == len(part) else part.index_select(0, places)
            return _TokenLoss.apply(self.logits(chosen, kind), tokens)  # pyright: ignore

        # split, not slices: its backward joins the gradients once; every slice would make a whole one.
        lengths, pairs = targets.stretches(self.rows)
        parts = hidden.reshape(-1, hidden.shape[-1]).split(lengths)
        sums = [
            checkpoint(chunk_loss, part, *pair, use_reentrant=False)
            for part, pair in zip(parts, pairs, strict=True)
        ]
        total = torch.stack(sums)  # pyright: ignore[reportArgumentType]
        return total.double().sum().to(total.dtype)


@contextmanager
def _answering(module: nn.Module, output: Any) -> Iterator[None]:
    """Inside, calling `module` computes nothing and returns `output`."""
    own = vars(module).get("forward")
    module.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _head_of(model: nn.Module) -> tuple[ChunkedHead | None, str]:
    """The head of a model whose decoder is a module of its own, tried on a few tokens; otherwise why not."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return None, f"{type(model).__name__} is no model of transformers"
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", 0)
    if vocabulary < _SMALL_VOCABULARY:
        return None, "its vocabulary is small"
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    reason = f"the decoder of {type(model).__name__} is no module of its own"
    try:
        for base in {model.base_model: None, model.get_decoder(): None}:  # OPT's forward calls the second
            if base is not model and isinstance(base, nn.Module):
                head = ChunkedHead(base, model.forward, vocabulary)
                reason = head.differs(model.device)
                if not reason:
                    return head, ""
    finally:
        for module, mode in modes:
            module.training = mode
    return None, f"{type(model).__name__}: {reason}"
