"""Queries: what two detectors say of the same queries of a picture, and how far apart it is.

    mean over levels of  sum over queries q of  D(p_q, p'_q) + 5 s_q |b_q - b'_q|_1

p, b: classes and box of the teacher, p', b' of the model; s_q, how sure the teacher is of something there
(1 - p(no object), or the largest p of a class), for the box of a query that sees nothing is any; 5, what the
losses of these detectors give the distance of a box. D is the divergence of the model's own kind: over the
classes and "no object" where its classes are a softmax (DETR, YOLOS), of yes from no for each class where
they are sigmoids (RT-DETR, D-FINE). Levels: every place of the encoder's map that could become a query, and
the queries behind each layer of the decoder; of a model that gives neither, its answer.

Queries that are learned are one to one. RT-DETR, D-FINE and other detectors of two stages choose them: the
places of the picture whose scores are the highest (topk), of which a model that was rounded chooses others,
in another order. So the model is given its teacher's choice (`kept`, `followed`), and learns to choose from
the divergence of all places. Measured: LOG.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..signals import Whole
from ..signals.divergence import Divergence, divergence
from .labelled import yes_or_no
from .states import last

BOX = 5.0  # of the losses of DETR, RT-DETR, D-FINE: config.bbox_loss_coefficient, weight_loss_bbox
Level = tuple[Tensor, Tensor]  # logits [B, Q, C], boxes [B, Q, 4] as shares


def queries_apart(
    ours: Any, theirs: Any, softmax: bool, temperature: float = 1.0, kind: Divergence = "forward"
) -> Tensor:
    """The formula above, summed over the pictures: a scalar, differentiable in `ours`. ours, theirs: outputs
    of two detectors; softmax: the last class is "no object".

    ValueError where they have not the same queries and classes."""
    mine, right = levels(ours), levels(theirs)
    # D-FINE gives the last layer alone, but while it trains: that teaches those before, as in its own loss
    right = [right[0]] * (len(mine) - len(right)) + right[-len(mine) :]
    pairs = list(zip(mine, right, strict=True))
    if (places := placed(ours)) is not None and (other := placed(theirs)) is not None:
        pairs.append((places, other))
    return torch.stack([_apart(a, b, softmax, temperature, kind) for a, b in pairs]).mean()


def levels(outputs: Any) -> list[Level]:
    """Behind each layer of the decoder, where the model gives them; its answer stands last."""
    logits = getattr(outputs, "intermediate_logits", None)
    boxes = getattr(outputs, "intermediate_reference_points", None)
    if logits is None or boxes is None:
        return [(outputs.logits, outputs.pred_boxes)]
    return list(zip(logits.unbind(1), boxes.unbind(1), strict=True))


def placed(outputs: Any) -> Level | None:
    """Of every place that could become a query; None: none is chosen."""
    logits = getattr(outputs, "enc_outputs_class", None)
    boxes = getattr(outputs, "enc_outputs_coord_logits", None)
    return None if logits is None or boxes is None else (logits, boxes.sigmoid())


def _apart(ours: Level, theirs: Level, softmax: bool, temperature: float, kind: Divergence) -> Tensor:
    (logits, boxes), (right, places) = ours, theirs
    logits, boxes = last(logits, right), last(boxes, places)
    if logits.shape != right.shape:
        raise ValueError(
            f"train.teacher: says {list(right.shape[1:])} (queries, classes) of a picture, and the model "
            f"{list(logits.shape[1:])}; give a teacher of the same queries and classes, or set "
            "train.signal.kind: labels"
        )
    p = right.float().softmax(-1)[..., :-1].sum(-1) if softmax else right.float().sigmoid().amax(-1)
    distance = (p[..., None] * (boxes.float() - places.float()).abs()).sum()
    rows = [z.flatten(0, 1) if softmax else yes_or_no(z) for z in (logits, right)]
    every = torch.ones(len(rows[0]), dtype=torch.bool, device=logits.device)
    return divergence(rows[0], Whole(rows[1]), every, temperature, kind) + BOX * distance


@contextmanager
def kept(choices: list[Tensor]) -> Iterator[None]:
    """Inside, the places that a model chooses are put into the list: int64 [B, Q], a choice each."""

    def keep(scores: Tensor, count: int, plain: Callable[[], Any]) -> Any:
        found = plain()
        choices.append(found[1])
        return found

    with _Choice(keep):
        yield


@contextmanager
def followed(choices: list[Tensor]) -> Iterator[None]:
    """Inside, a model chooses the places of this list, one choice after the other. ValueError where it has
    not as many of them."""
    waiting = list(choices)

    def follow(scores: Tensor, count: int, plain: Callable[[], Any]) -> Any:
        places = waiting.pop(0) if waiting else None
        if places is None or places.shape != (len(scores), count) or int(places.max()) >= scores.shape[1]:
            theirs = "no" if places is None else f"{places.shape[1]}"
            raise ValueError(
                f"train.teacher: chooses {theirs} queries where the model chooses {count} of "
                f"{scores.shape[1]} places; give a teacher with the same queries, or set train.signal.kind: "
                "labels"
            )
        return torch.return_types.topk((scores.gather(1, places), places))  # pyright: ignore

    with _Choice(follow):
        yield


class _Choice(TorchFunctionMode):
    """Inside, choose(scores [B, S], count, the usual answer) answers topk over the places of a picture; what
    has other dimensions is no such choice (D-FINE's distributions of edges)."""

    def __init__(self, choose: Callable[[Tensor, int, Callable[[], Any]], Any]) -> None:
        super().__init__()
        self.choose = choose

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        plain = lambda: func(*args, **kwargs)  # noqa: E731
        if func not in (torch.topk, Tensor.topk) or args[0].dim() != 2:
            return plain()
        count = args[1] if len(args) > 1 else kwargs["k"]
        return self.choose(args[0], count, plain)
