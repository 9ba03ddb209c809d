"""A and B from an existing PEFT LoRA: an adapter that was trained beside a 16-bit (or QLoRA) base goes on
inside the integers.

A PEFT LoRA adds gain B A to a weight, in units of the weight (gain = alpha / r, alpha / sqrt(r) with rslora).
What a method makes of it:

    dl_qat, l4q, lora   D counts weight units too: A and B are taken over, B times the quotient of the gains.
                        Exact in fp32.
    lr_qat              D counts grid steps, so the product wanted is gain B A / S, which has rank r only
                        where S is an outer product u v^T. The best product of adapter.rank in that sense is
                        taken (SVD of u (gain B A / S) v, u v^T the geometric means of S); its relative error
                        is reported, falls as adapter.rank grows, and is 0 from r times the groups of a row.

Either way the forward then rounds: of an update smaller than half a step, a base without residual shows
nothing at step 0. How much of the LoRA the rounded weights have is reported too (`shown`). Only safetensors
are read.
"""

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import regex
import torch
from torch import Tensor, nn

from ..files.jsonfile import as_shape, read_json
from ..files.tensorfile import DTYPES, TensorEntry, is_finite, parse_header, read_tensor
from ..grid import PackedWeight
from ..names import regex_matches
from . import AdapterConfig
from .attach import packed_layers
from .folder import CONFIG_FILE, TENSOR_FILE, refuse_pickle
from .low_rank import LowRank, expand

Turned = Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]]

# Keys of adapter_config.json that change what the tensors mean, and their values for a plain LoRA.
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None, []),
    "layer_replication": (None, []),
}
# Starts that leave the base as it is. The others (pissa, olora, corda, loftq, lora_ga) take their first B A
# out of it, so the adapter only means something over that changed base (peft/tuners/lora/layer.py). PEFT's
# False is a random start.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class PeftLora:
    """A LoRA folder: base model's name, and by layer (name in the model) where A [r, K] and B [N, r] lie, and
    the gain.
    """

    folder: Path
    base: str
    pairs: dict[str, tuple[TensorEntry, TensorEntry]]
    gains: dict[str, float]

    @property
    def rank(self) -> int:
        """The largest rank of its layers."""
        return max(a.shape[0] for a, _ in self.pairs.values())

    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        """A and B in fp32. ValueError for NaN or Inf."""
        a, b = (read_tensor(entry) for entry in self.pairs[layer])
        if not (is_finite(a) and is_finite(b)):
            raise ValueError(f"{self.folder / TENSOR_FILE}: NaN or Inf in the LoRA of {layer}")
        return a.float(), b.float()


def read_lora(folder: str | Path) -> PeftLora:
    """The LoRA in a folder of PEFT's save_pretrained: config and headers. ValueError for anything but a plain
    LoRA of linears.
    """
    folder = Path(folder).expanduser()
    path = folder / CONFIG_FILE
    settings = read_json(path, dict[str, Any], "give a folder of PEFT's save_pretrained")
    for key, plain in PLAIN.items():
        if key in settings and settings[key] not in plain or key == "peft_type" and key not in settings:
            raise ValueError(
                f"{path}: {key}: got {settings.get(key)!r}; allowed: {plain[0]!r}, a plain "
                "LoRA of linear layers"
            )
    if (init := settings.get("init_lora_weights")) not in PLAIN_STARTS:
        raise ValueError(
            f"{path}: init_lora_weights: got {init!r}; allowed: true, false, gaussian, "
            "eva, orthogonal, mica; "
            "other starts change the base, so this LoRA is the difference to a base that is not here; "
            "convert it to a plain one with PEFT, save_pretrained(..., "
            "path_initial_model_for_weight_conversion=<the adapter before training>), "
            "or merge it into its own base and start from that checkpoint"
        )
    refuse_pickle(folder)
    file = folder / TENSOR_FILE
    start, header = parse_header(file)
    halves: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in header.items():
        found = _KEY.fullmatch(name)
        if found is None:
            raise ValueError(
                f"{file}: got the tensor {name!r}; a plain LoRA has base_model.model.<layer>.lora_A.weight "
                "and lora_B.weight only"
            )
        begin, end = entry["data_offsets"]
        halves.setdefault(found[1], {})[found[2]] = TensorEntry(
            file, DTYPES[entry["dtype"]], tuple(entry["shape"]), start + begin, end - begin
        )
    pairs, gains = {}, {}
    for layer, half in halves.items():
        a, b = half.get("A"), half.get("B")
        if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            raise ValueError(
                f"{file}: {layer}: needs lora_A [r, in] and lora_B [out, r]; got "
                f"{[e.shape for e in half.values()]}"
            )
        pairs[layer], gains[layer] = (a, b), _gain(path, settings, layer, a.shape[0])
    if not pairs:
        raise ValueError(f"{file}: holds no tensors; there is nothing to start from")
    return PeftLora(folder, str(settings.get("base_model_name_or_path") or ""), pairs, gains)


def _gain(path: Path, facts: dict[str, Any], layer: str, rank: int) -> float:
    """alpha / r (alpha / sqrt(r) with rslora), alpha from alpha_pattern where a pattern matches the end of
    the layer's name.
    """
    alpha: Any = facts.get("lora_alpha")
    patterns = as_shape(facts.get("alpha_pattern") or {}, dict[str, Any], f"{path}: alpha_pattern")
    for pattern, value in patterns.items():
        try:
            if regex_matches(rf"(.*\.)?({pattern})", layer, whole=True):
                alpha = value
                break
        except (regex.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{path}: alpha_pattern: {pattern!r} is no regular expression ({error})"
            ) from None
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not alpha > 0:
        raise ValueError(f"{path}: lora_alpha: got {alpha!r}; allowed: a number above 0")
    return alpha / (math.sqrt(rank) if facts.get("use_rslora") else rank)


@dataclass(frozen=True)
class LoraStartRow:
    """error: ||D - LoRA|| / ||LoRA|| in weight units before rounding. shown: the share of the LoRA that the
    rounded weights have, <W - W0, LoRA> / ||LoRA||^2 (None for lora, which is not rounded)."""

    layer: str
    rank: int
    error: float
    shown: float | None


@dataclass(frozen=True)
class LoraStart:
    lora: str
    base: str
    rows: list[LoraStartRow]
    fresh: list[str]

    def to_json(self) -> dict[str, Any]:
        return {
            "lora": self.lora,
            "base": self.base,
            "rows": [asdict(row) for row in self.rows],
            "fresh": self.fresh,
        }

    def __str__(self) -> str:
        errors = [row.error for row in self.rows]
        exact = max(errors) <= 1e-6
        lines = [
            f"start: {len(self.rows)} layers from the LoRA {self.lora} (trained on "
            f"{self.base or 'an unnamed base'})"
        ]
        lines.append(
            "  A and B are the LoRA's own, in weight units: exact"
            if exact
            else f"  in grid steps it is approximate: relative error {sum(errors) / len(errors):.2%} on "
            f"average, {max(errors):.2%} at most "
            "(a larger adapter.rank lowers it; dl_qat takes it over exactly)"
        )
        shown = [row.shown for row in self.rows if row.shown is not None]
        if shown:
            lines.append(f"  the rounded weights show {sum(shown) / len(shown):.0%} of it at step 0")
        if self.fresh:
            lines.append(
                f"  {len(self.fresh)} adapted layers have none and start fresh: "
                f"{', '.join(self.fresh[:4])}{', ...' * (len(self.fresh) > 4)}"
            )
        return "\n".join(lines)


def lora_problems(lora: PeftLora, config: AdapterConfig, shapes: dict[str, tuple[int, int]]) -> list[str]:
    """Why a LoRA cannot start these adapters. shapes: layer -> (N, K) of every layer that gets one."""
    problems = []
    for layer, (a, _) in lora.pairs.items():
        if a.shape[0] > (rank := getattr(config.of_layer(layer), "rank", 0)):
            where = f" in {layer}" if getattr(config, "rank_pattern", None) else ""
            problems.append(
                f"the LoRA has rank {a.shape[0]}{where}, adapter.rank is {rank}{' there' * bool(where)}; set "
                f"adapter.rank: {lora.rank} (or more)"
            )
            break
    strays = [layer for layer in lora.pairs if layer not in shapes]
    if apart := [layer for layer in strays if any(name.rpartition(".")[0] == layer for name in shapes)]:
        problems.append(
            f"{apart[0]} is taken apart here (quant.overrides), and the LoRA is one for the whole; give its "
            "parts the same bits, group_size and symmetric, or leave out init_from"
        )
    elif strays:
        problems.append(
            f"the LoRA has {len(strays)} layers that get no adapter here, such as {strays[0]}; it was "
            "trained on another model, or adapter.targets "
            f"or quant.targets and exclude leave them out (adapted here: {', '.join(list(shapes)[:3])}, ...)"
        )
    for layer, (a, b) in lora.pairs.items():
        if layer in shapes and (b.shape[0], a.shape[1]) != shapes[layer]:
            problems.append(
                f"{layer} is {list(shapes[layer])} here, [{b.shape[0]}, {a.shape[1]}] in the LoRA; it was "
                "trained on another model"
            )
            break
    return problems


@torch.no_grad()
def start_from_lora(
    model: nn.Module, config: AdapterConfig, lora: PeftLora, turned: Turned | None = None
) -> LoraStart:
    """Fill A and B of an attach()-ed model. turned: takes a layer's name, A and B to the basis in which the
    base is (quant.rotation, quant.smooth). ValueError, before anything is changed, when ranks, layers or
    shapes do not fit.
    """
    layers = {name: layer for name, layer in packed_layers(model) if layer.adapter is not None}
    if problems := lora_problems(lora, config, {name: layer.base.shape for name, layer in layers.items()}):
        raise ValueError(f"adapter.init_from: {lora.folder}: " + "\n  ".join(problems))
    rows = []
    for name in lora.pairs:
        own: Any = config.of_layer(name)
        layer = layers[name]
        adapter, base = layer.adapter, layer.base
        assert isinstance(base, PackedWeight) and adapter is not None
        assert isinstance(adapter.A, Tensor) and isinstance(adapter.B, Tensor)
        factors = lora.factors(name)
        factors = factors if turned is None else turned(name, *factors)
        lora_a, lora_b = (t.to(adapter.A.device) for t in factors)
        update = lora.gains[name] * (lora_b @ lora_a)
        scale = expand(base.scale, base.shape[1], base.grid.group_size).abs()
        adapter.B.zero_()
        errors = []
        # The parts of a fused matrix each start from the LoRA of the whole.
        for first, part in adapter.pieces() if isinstance(adapter, LowRank) else [(0, slice(None))]:
            if config.delta_unit == "grid":
                b, a = in_grid_steps(update[part], scale[part], own.rank)
                b, unit = b / own.gain, scale[part]
            else:
                a, b, unit = lora_a, lora_b[part] * (lora.gains[name] / own.gain), torch.ones(())
            rank = a.shape[0]
            adapter.A[first : first + rank].copy_(a)
            adapter.B[part, :rank] = b
            errors.append(float((own.gain * unit * (b @ a) - update[part]).norm()))
        size = float(update.norm())
        error = math.hypot(*errors) / max(size, 1e-30)
        shown = None
        if config.exact_merge:
            moved = adapter.merge(base).dequantize() - base.dequantize()
            shown = float((moved * update).sum()) / max(size * size, 1e-30)
        rows.append(LoraStartRow(name, lora.pairs[name][0].shape[0], error, shown))
    return LoraStart(str(lora.folder), lora.base, rows, [name for name in layers if name not in lora.pairs])


def in_grid_steps(update: Tensor, scale: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(b [N, q], a [q, K]) with scale * (b a) near update [N, K], q <= rank; scale [N, K] > 0.

    With scale = u v^T exactly the error is that of the best product of rank q; else u and v are its geometric
    means.
    """
    log = scale.log()
    u = (log.mean(1, keepdim=True) - log.mean() / 2).exp()  # [N, 1]
    v = (log.mean(0, keepdim=True) - log.mean() / 2).exp()  # [1, K]
    wanted = u * (update / scale) * v
    q = min(rank, *update.shape)
    if 4 * (q + 8) < min(update.shape):
        left, values, right = torch.svd_lowrank(
            wanted, q=q + 8, niter=4
        )  # as adapters/base.py: only the top is wanted
    else:
        left, values, right_t = torch.linalg.svd(wanted, full_matrices=False)
        right = right_t.t()
    root = values[:q].sqrt()
    return left[:, :q] * root / u, (right[:, :q] * root).t() / v
