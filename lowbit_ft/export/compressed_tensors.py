"""compressed-tensors `pack-quantized`: the format transformers, vLLM and SGLang read. Integer grids,
lossless.

    weight_packed      int32 [N, ceil(K b / 32)]   unsigned codes as one bit stream along K, lowest bit first
                       (3 and 6 bit straddle words)
    weight_scale       fp32  [N, G]                bf16-valued (fp16-valued over a GPTQ or AWQ base)
    weight_zero_point  int32 [ceil(N b / 32), G]   asymmetric only; the same bit stream, along N
    weight_shape       int64 [2]                   (N, K)

W = (code - zero) * scale on their side too, so equal codes, zeros and scales are an equal weight. The bit
stream is written here with no library, so that writing needs none; the tests compare it with the library's
own `pack_to_int32`.

Why scales are stored as fp32 although their values are bfloat16: a reader multiplies in the dtype the scale
has in the file when it dequantizes while loading (transformers, dequantize=True), so a model asked for in
fp32 would get weights rounded to bf16 products. With fp32 scales the product is exact and rounded once, to
the dtype of the model; readers that cast scales to the model's dtype first (transformers' default mode, vLLM)
lose nothing either, because the values are bfloat16; where they are float16 or float32 the model's dtype must
be as wide (`reject_dtype`). Tried with compressed-tensors 0.20 and transformers 5.23, in fp32 and bf16. It
costs 16 bits per group (0.125 bit per weight at g128).

What transformers 5.23 does with these files (its default mode is CompressedTensorsConfig(dequantize=False)):

    symmetric,  one grid        exact in both modes
    symmetric,  several grids   exact in the default mode; dequantize=True decodes every layer with the first
                group: wrong
    asymmetric, one grid        exact with dequantize=True; the default mode fails on the library's own files
                                too
    asymmetric, several grids   readable in neither mode: refused here
    experts, symmetric          exact with dequantize=True, which the folder's config.json asks for
                                (reader_config)
    experts that stay dense     it looks for packed ones and fails: refused here

Inputs that are quantized too (W4A8) stand in the group as `input_activations`: dynamic, symmetric, per token
or per group of channels (segments of one width are such groups), which is what vLLM's integer kernels take.
Tried with compressed-tensors 0.20: the library computes them in the default mode with absmax / 127.5 where
training and vLLM have absmax / 127 (everything else equal), and not at all with dequantize=True; `as_served`
gives our own readers vLLM's rule.

config_groups has one group per grid and kind of input. Several name their layers; `ignore` names every linear
that is in no group, so a reader that knows layers by other classes (vLLM's fused ones) finds each layer in
exactly one place: in one group, or in `ignore`. A packed head is named beside "Linear" too: vLLM's class of
it, ParallelLMHead, is no Linear.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lowbit_kernels as kernels
import torch
from torch import Tensor, nn

from ..activations import Activation, Scheme, activation_of, read_scheme
from ..grid import BinaryGrid, Grid, IntGrid, PackedWeight, Weight
from ..grid.bitstream import pack_stream, stream_words, unpack_stream
from ..model.matrices import Matrix
from ..model.names import Part
from ..model.roles import is_head
from .base import Exporter, LayerSpec, ReadBack, TensorSpecs, check_tensors, check_values, with_versions

# Their _init_weights in transformers reads the dense weight of a packed linear and fails; decoded while
# loading, there is one.
_INIT_READS_WEIGHTS = frozenset({"falcon", "gpt_bigcode", "mamba2"})
_INPUT_BITS = (4, 8)  # what vLLM's integer products take


class CompressedTensors(Exporter):
    name = "compressed-tensors"
    quant_method = "compressed-tensors"
    kv_server = "vllm"
    chat_flag = "--default-chat-template-kwargs"
    fused_by_servers = True
    # transform_config names such a Hadamard. Tried with compressed-tensors 0.20 and transformers 5.23, which
    # leaves the tensor of the transform unread with a warning and computes other logits; of vLLM: its source.
    no_online = (
        "could name it (transform_config), but transformers reads past that and computes other logits, and "
        "vLLM raises under tensor parallelism and on linears with a bias, so it is not written"
    )
    needs = "compressed-tensors"
    checkpoint_names = True
    dense_experts = False
    layout = "pack-quantized"

    def reject(self, grid: Grid, offset: bool = False) -> str | None:
        if isinstance(grid, BinaryGrid):
            return "compressed-tensors has no sign planes; set export.format: native"
        if offset:
            return (
                "compressed-tensors holds no float offset per group; set export.format: native, or "
                "train an integer offset"
            )
        return None

    def reject_activation(self, scheme: Scheme, grid: Grid, in_features: int | None = None) -> str | None:
        out = "or export.format: native, which lowbit-ft serve computes"
        if not scheme.dynamic:
            return f"its integer kernels (vLLM) raise on static inputs; set dynamic: true, {out}"
        if scheme.bits not in _INPUT_BITS:
            return (
                f"its integer kernels (vLLM) take inputs of 8 or 4 bits, not {scheme.bits}; set "
                f"activations.bits: 8 or 4, {out}"
            )
        if len(set(scheme.segments)) > 1:
            return (
                f"it has inputs per token or per group of one width, and segments of {scheme.segments} "
                f"channels are no such groups; set activations.segments: none, {out}"
            )
        if scheme.kind not in ("token", "group"):
            return f"it has inputs per token or per group, not kind {scheme.kind}; set kind: token, {out}"
        if not scheme.symmetric:
            return f"its integer kernels (vLLM) raise on inputs with a zero point; set symmetric: true, {out}"
        if not scheme.whole_range:
            keys = "learn: false, clip: 1.0" if scheme.learn is not None else "clip: 1.0"
            return f"its readers do not clip the range of an input; set {keys}, {out}"
        if in_features is not None and scheme.kind == "group" and in_features % scheme.group_size:
            return (
                f"it needs whole groups, and {scheme.group_size} does not divide {in_features} inputs; set "
                f"activations.group_size to one that does, kind: token, {out}"
            )
        return None

    def reject_dtype(self, grid: Grid, dtype: str) -> str | None:
        return reject_cast(grid, dtype)

    def reject_checkpoint(self, config: Mapping[str, Any], folder: Path | None) -> list[str]:
        # Tried with transformers 5.23, whose _init_weights of it asks packed layers for their dense weight.
        if config.get("model_type") != "modernbert":
            return []
        return ["transformers cannot load a packed modernbert of this format; set export.format: native"]

    def reject_width(self, grid: Grid, in_features: int) -> str | None:
        if grid.group_size != -1 and in_features % grid.group_size:
            return (
                f"compressed-tensors needs whole groups, and group size {grid.group_size} does not divide "
                f"{in_features} inputs; "
                "choose a group size that does (or -1), or set export.format: native"
            )
        return None

    def reject_matrix(self, matrix: Matrix, grid: Grid, parts: Sequence[Part] | None) -> str | None:
        native = "set export.format: native"
        if matrix.rows is not None:
            return self.reject_part(matrix)
        if matrix.embedding:
            return (
                f"vLLM and SGLang read embeddings in full precision only; {native}, or leave out "
                "quant.embeddings"
            )
        if matrix.conv:
            return f"vLLM and SGLang read convolutions in full precision only; {native}"
        if matrix.transposed and matrix.expert is None:
            return (
                "a Conv1D keeps its weight turned, and compressed-tensors groups along the "
                f"other side; {native}"
            )
        if matrix.expert is not None and parts is None:
            return (
                "its readers know packed experts only where a checkpoint has one tensor per expert, as "
                f"this one has not; {native}"
            )
        if matrix.expert is not None and isinstance(grid, IntGrid) and not grid.symmetric:
            return (
                "transformers reads packed experts without their zero points; use quant.symmetric: "
                f"true, or {native}"
            )
        return None

    def reject_model(self, layers: Mapping[str, LayerSpec]) -> list[str]:
        problems = super().reject_model(layers)
        grids = {spec.grid for spec in layers.values()}
        mixed = [grid for grid in grids if isinstance(grid, IntGrid) and not grid.symmetric]
        if len(grids) > 1 and mixed:
            problems.append(
                f"{len(grids)} different grids, of which {len(mixed)} asymmetric: no mode of transformers "
                "reads such a file; "
                "use one grid for all layers, symmetric grids, or export.format: native"
            )
        return problems

    def reject_experts(self, layers: Mapping[str, LayerSpec]) -> str | None:
        if len({spec.grid for spec in layers.values()}) == 1:
            return None
        return (
            "transformers reads packed experts only where all layers have one grid; drop "
            "quant.overrides, or set export.format: native"
        )

    def reader_config(self, config: dict[str, Any], model_type: str, experts: bool) -> dict[str, Any]:
        # This key makes a plain from_pretrained decode while loading. vLLM and SGLang take named keys only.
        return config | {"dequantize": True} if experts or model_type in _INIT_READS_WEIGHTS else config

    def stored_dtype(self, local: str, dtype: torch.dtype, expert: bool, trained: torch.dtype) -> torch.dtype:
        # transformers gives decoded experts the dtype of their scales, not of the model: fp32 experts in a
        # bf16 model. The product of a bf16 scale and a code of at most 8 bits is rounded once in either
        # dtype.
        return trained if expert and local == "weight_scale" else dtype

    def specs(self, layer: LayerSpec) -> TensorSpecs:
        assert isinstance(layer.grid, IntGrid)
        (n, k), b = layer.shape, layer.grid.bits
        groups = kernels.group_count(k, layer.grid.group_size)
        out: TensorSpecs = {
            "weight_packed": ((n, stream_words(k, b)), torch.int32),
            "weight_scale": ((n, groups), torch.float32),
            "weight_shape": ((2,), torch.int64),
        }
        if not layer.grid.symmetric:
            out["weight_zero_point"] = ((stream_words(n, b), groups), torch.int32)
        return out

    def pack(self, weight: Weight) -> dict[str, Tensor]:
        assert isinstance(weight, PackedWeight) and weight.residual is None and weight.offset is None
        bits = weight.grid.bits
        out = {
            "weight_packed": pack_stream(weight.unpack_codes(), bits),
            "weight_scale": weight.scale.t().to(torch.float32).contiguous(),
            "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
        }
        if weight.zero is not None:
            out["weight_zero_point"] = pack_stream(weight.zero, bits).t().contiguous()
        return out

    def unpack(self, tensors: Mapping[str, Tensor], layer: LayerSpec) -> Weight:
        assert isinstance(layer.grid, IntGrid)
        check_tensors(tensors, self.specs(layer), str(layer))
        (n, k), grid = layer.shape, layer.grid
        if tensors["weight_shape"].tolist() != [n, k]:
            raise ValueError(f"{layer}: weight_shape is {tensors['weight_shape'].tolist()}, not {[n, k]}")
        scale = tensors["weight_scale"].t().to(getattr(torch, grid.scale_dtype)).contiguous()
        if not torch.equal(scale.float(), tensors["weight_scale"].t()):
            raise ValueError(
                f"{layer}: weight_scale has values that are not {grid.scale_dtype}; not a file of ours"
            )
        zero = None
        if not grid.symmetric:
            zero = unpack_stream(tensors["weight_zero_point"].t().contiguous(), grid.bits, n).contiguous()
        codes = kernels.pack(unpack_stream(tensors["weight_packed"], grid.bits, k), grid.bits)
        weight = PackedWeight(codes=codes, scale=scale, zero=zero, shape=(n, k), grid=grid)
        check_values(weight)
        return weight

    def model_config(self, layers: Mapping[str, LayerSpec], skipped: Sequence[str]) -> dict[str, Any]:
        names: dict[tuple[Grid, Scheme | None], list[str]] = {}
        for name, spec in layers.items():
            names.setdefault((spec.grid, spec.activation), []).append(name)
        groups: dict[str, dict[str, Any]] = {}
        for i, ((grid, scheme), targets) in enumerate(names.items()):
            assert isinstance(grid, IntGrid)
            row = grid.group_size == -1
            groups[f"group_{i}"] = {
                # One grid: every Linear that `ignore` does not name, which every reader understands, and the
                # head by name (see above). Several: all by name.
                "targets": ["Linear", *filter(is_head, targets)] if len(names) == 1 else targets,
                "weights": {
                    "num_bits": grid.bits,
                    "type": "int",
                    "symmetric": grid.symmetric,
                    "strategy": "channel" if row else "group",
                    "group_size": None if row else grid.group_size,
                    "dynamic": False,
                    "actorder": None,
                    "observer": "minmax",
                },
                "input_activations": None if scheme is None else input_arguments(scheme),
                "output_activations": None,
            }
            if scheme is not None:
                # By name: the library infers int-quantized for integer inputs, whose weights are not packed.
                groups[f"group_{i}"]["format"] = self.layout
        return {
            "quant_method": "compressed-tensors",
            "format": self.layout,
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "ignore": list(skipped),
            "config_groups": groups,
        }

    def read_back(self, tensors: Mapping[str, Tensor], layer: LayerSpec) -> ReadBack:
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        (n, _), bits = layer.shape, layer.grid.bits
        half = 1 << (bits - 1)  # the library hands out signed codes
        shape = torch.Size(tensors["weight_shape"].tolist())
        scale, zero = tensors["weight_scale"], None
        codes = unpack_from_int32(tensors["weight_packed"], bits, shape).to(torch.int16) + half
        if "weight_zero_point" in tensors:
            size = torch.Size((n, scale.shape[1]))
            zero = (
                unpack_from_int32(tensors["weight_zero_point"], bits, size, packed_dim=0).to(torch.int16)
                + half
            )
            zero = zero.t().to(torch.uint8)
        return ReadBack(codes.to(torch.uint8), scale.t(), zero)

    def load_options(self, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Asymmetric files need dequantize=True (see the table at the file's head)."""
        from transformers import CompressedTensorsConfig

        groups = config.get("config_groups") or {}
        asymmetric = any(not group["weights"]["symmetric"] for group in groups.values())
        return {"quantization_config": CompressedTensorsConfig(dequantize=True)} if asymmetric else {}

    def as_served(self, model: Any, config: Mapping[str, Any]) -> None:
        """Inputs by the rule of vLLM's kernels, absmax / 127 (7 at 4 bits), which is that of training. The
        library under transformers has absmax / 127.5, and with dequantize=True leaves the inputs alone; here
        it is told to leave them alone always."""
        groups = [g for g in (config.get("config_groups") or {}).values() if g.get("input_activations")]
        ignored = set(config.get("ignore") or ())
        for name, module in model.named_modules():
            if not isinstance(module, nn.Linear) or name in ignored:
                continue
            for group in groups:
                if any(t == "Linear" or t == name or t.endswith(f".{name}") for t in group["targets"]):
                    module.quantization_enabled = False  # pyright: ignore[reportArgumentType]
                    activation = activation_of(scheme_of_arguments(group["input_activations"]))
                    module.register_forward_pre_hook(_seen_by(activation))

    def reader(self) -> str:
        return with_versions("transformers", "compressed-tensors")

    def serve(self, folder: str) -> str:
        return f"vllm serve {folder}"


def input_arguments(scheme: Scheme) -> dict[str, Any]:
    """`input_activations` of a dynamic scheme. Segments of one width, a scale for each per token, are groups
    of that width."""
    group = scheme.segments[0] if scheme.segments else scheme.group_size if scheme.kind == "group" else None
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "token" if group is None else "group",
        "group_size": group,
        "dynamic": True,
    }


def scheme_of_arguments(arguments: Mapping[str, Any]) -> Scheme:
    """The inverse of `input_arguments`. ValueError for what training here does not know."""
    kind, bits = arguments.get("strategy"), arguments.get("num_bits")
    if kind not in ("token", "group") or not arguments.get("dynamic") or arguments.get("type") != "int":
        raise ValueError(
            f"input_activations: got {dict(arguments)!r}; this reads dynamic integers per token or per group"
        )
    entry = {"kind": kind, "bits": bits, "symmetric": arguments.get("symmetric", True)}
    return read_scheme(entry | ({"group_size": arguments.get("group_size")} if kind == "group" else {}))


def _seen_by(activation: Activation) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    return lambda module, args: (activation(args[0]), *args[1:])


def reject_cast(grid: Grid, dtype: str) -> str | None:
    """`reject_dtype` of formats whose readers cast scales to the model's dtype."""
    if grid.scale_dtype in ("bfloat16", dtype) or dtype == "float32":
        return None
    return (
        f"its readers cast scales to the model's dtype, and {grid.scale_dtype} scales do "
        f"not survive {dtype}; "
        f"set model.dtype: {'float32' if grid.scale_dtype == 'float32' else 'float32 (or float16)'}, or "
        "export.format: native"
    )


# Linears that vLLM and SGLang run as one: their members need one grid, or none of them any.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def fused_conflict(grids: Mapping[str, Grid | None]) -> str | None:
    """A sentence about the first layers that vLLM and SGLang fuse although their grids differ; None when
    there are none. grids: every linear layer -> its grid, None: dense."""
    for name, grid in grids.items():
        stem, _, last = name.rpartition(".")
        for members in FUSED:
            for other in members:
                theirs = grids.get(f"{stem}.{other}", grid)
                if last in members and theirs != grid:
                    both = f"{name} is {grid or 'dense'} and {other} {theirs or 'dense'}"
                    return (
                        f"vLLM and SGLang run {', '.join(members)} as one layer, and {both}: they refuse "
                        "such a folder; "
                        "transformers reads it. Give the members one grid to serve it there"
                    )
    return None
