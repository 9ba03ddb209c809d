"""What a gguf file says about a model besides its matrices: architecture, tensor names, row order, metadata.

Names come from the gguf package's own map, so a tensor llama.cpp does not know is refused instead of dropped.
What is written here:

    llama, mistral      architecture "llama". Rows of q and k are reordered inside each head: llama.cpp
                        rotates neighbours (x0, x1), Hugging Face halves (x0, x_d/2). Whole rows move, so
                        packed blocks do too.
    qwen2, qwen3        as they are
    gemma2, gemma3      norms hold weight + 1, which is what llama.cpp multiplies with

    rope "llama3"       one divisor per frequency, the tensor rope_freqs.weight; "linear": a factor in the
                        metadata

Everything llama.cpp would compute in another way than transformers (a sliding window in llama, other rope
scalings, another activation) is refused by `reject`, before a model is trained for it. Facts:
convert_hf_to_gguf.py and llama-model.cpp of llama.cpp.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model.config import read_config
from ..model.roles import NEIGHBOURS

FILE = "model.gguf"
WAY_OUT = "set export.format: compressed-tensors or native"


@dataclass(frozen=True)
class Architecture:
    """name in gguf files; what is added to norm weights; the activation it computes."""

    name: str
    norm_offset: float = 0.0
    activation: str = "silu"


ARCHITECTURES = {
    "llama": Architecture("llama"),
    "mistral": Architecture("llama"),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma2": Architecture("gemma2", norm_offset=1.0, activation="gelu_pytorch_tanh"),
    "gemma3_text": Architecture("gemma3", norm_offset=1.0, activation="gelu_pytorch_tanh"),
}
# Layers of gemma between two with full attention, as llama.cpp has it fixed.
_PERIOD = {"gemma2": 2, "gemma3_text": 6}


def reject(config: Mapping[str, Any]) -> list[str]:
    """Why llama.cpp would not compute this model (a config's to_dict()); empty when it does."""
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        return [f"gguf is written for {known}, and this model is {kind!r}; {WAY_OUT}"]
    problems = []
    activation = config.get("hidden_activation") or config.get("hidden_act")
    if activation != ARCHITECTURES[kind].activation:
        problems.append(
            f"llama.cpp computes {ARCHITECTURES[kind].activation} in {kind} models, and this one has "
            f"{activation!r}"
        )
    rope = config["rope_parameters"]
    ropes = list(rope.values()) if isinstance(next(iter(rope.values())), dict) else [rope]
    allowed = ("default", "linear", "llama3") if kind in ("llama", "mistral") else ("default", "linear")
    problems += [
        f"rope scaling {r['rope_type']!r} is not written (only {', '.join(allowed)})"
        for r in ropes
        if r["rope_type"] not in allowed
    ]
    period = _PERIOD.get(kind)
    if period is None:
        windowed = config.get("sliding_window") is not None and config.get("use_sliding_window", True)
        if windowed:
            problems.append(
                f"llama.cpp has no sliding window in {kind} models (config.json: sliding_window: "
                f"{config['sliding_window']})"
            )
    else:
        layers, local = config["num_hidden_layers"], "sliding_attention"
        pattern = ["full_attention" if i % period == period - 1 else local for i in range(layers)]
        fixed = {
            "query_pre_attn_scalar": config["head_dim"],
            "layer_types": pattern,
            "use_bidirectional_attention": False,
        }
        if kind == "gemma3_text":
            fixed |= {"attn_logit_softcapping": None, "final_logit_softcapping": None}
            if rope[local].get("rope_theta") != 10000.0 or rope[local]["rope_type"] != "default":
                problems.append("llama.cpp has rope_theta 10000 fixed for the sliding layers of gemma3")
        problems += [
            f"llama.cpp has {key} {value} fixed for {kind}, and config.json has {config.get(key)}"
            for key, value in fixed.items()
            if (config.get(key) or None) != (value or None)
        ]
        if kind == "gemma2":
            problems += [
                f"llama.cpp always caps logits in gemma2, and config.json has {key} null"
                for key in ("attn_logit_softcapping", "final_logit_softcapping")
                if config.get(key) is None
            ]
        if kind == "gemma2" and layers == 46:
            problems.append(
                "llama.cpp takes 46 layers for gemma-2-27b, whose attention is scaled in another way"
            )
    return [f"{problem}; {WAY_OUT}" for problem in problems]


class Names:
    """Model parameter -> the tensor of the gguf file, for a model that `reject` has passed."""

    def __init__(self, config: Mapping[str, Any]):
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        self.kind = ARCHITECTURES[config["model_type"]]
        self.neighbours = config["model_type"] in NEIGHBOURS
        self.heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == self.kind.name)
        self.map = get_tensor_name_map(arch, config["num_hidden_layers"])

    def __call__(self, parameter: str) -> str:
        """ValueError for a parameter the package has no name for."""
        stem, dot, last = parameter.rpartition(".")
        name = self.map.get_name(stem)
        if name is None or last not in ("weight", "bias"):
            raise ValueError(
                f"{parameter}: the gguf package has no name for it in {self.kind.name} models; {WAY_OUT}"
            )
        return name + dot + last

    def rows(self, parameter: str, count: int) -> Tensor | None:
        """The order in which the rows of a parameter are stored, None when as they are."""
        heads = self.heads.get(parameter.split(".")[-2])
        if heads is None or not self.neighbours:
            return None
        return torch.arange(count).view(heads, 2, -1).transpose(1, 2).reshape(-1)

    def dense(self, parameter: str, tensor: Tensor) -> Tensor:
        """A tensor that stays dense, as it is stored: vectors in fp32 (llama.cpp has no others), rows in
        order, norms offset.
        """
        order = self.rows(parameter, len(tensor))
        tensor = tensor if order is None else tensor[order]
        if tensor.dim() > 1:
            return tensor
        offset = self.kind.norm_offset if parameter.endswith("norm.weight") else 0.0
        return tensor.float() + offset


def describe(writer: Any, config: Mapping[str, Any], name: str) -> None:
    """The metadata of the architecture, into a gguf.GGUFWriter."""
    from gguf import RopeScalingType

    kind, rope = config["model_type"], config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_name(name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if kind in _PERIOD:
        writer.add_sliding_window(config["sliding_window"])
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def rope_divisors(config: Mapping[str, Any]) -> Tensor | None:
    """rope_freqs.weight, fp32 [head_dim / 2]: what each frequency is divided by under rope scaling
    "llama3".
    """
    rope = config["rope_parameters"]
    if rope.get("rope_type") != "llama3":
        return None
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    divisors = []
    for i in range(0, head, 2):
        # How often this frequency turns within the context it was trained on: often stays, seldom is slowed,
        # between is blended.
        turns = rope["original_max_position_embeddings"] * rope["rope_theta"] ** (-i / head) / (2 * math.pi)
        blend = min(1.0, max(0.0, (turns - low) / (high - low)))
        divisors.append(1 / ((1 - blend) / factor + blend))
    return torch.tensor(divisors, dtype=torch.float32)


# Facts that are in the metadata (or in config.json beside it) and that transformers' reader does not take
# over.
_NOT_READ = (
    "head_dim",
    "rope_parameters",
    "attention_bias",
    "mlp_bias",
    "sliding_window",
    "layer_types",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)


def reader_config(folder: Path) -> Any:
    """The configuration that transformers reads from the file, completed from config.json by what its reader
    leaves out.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        str(folder), gguf_file=FILE, local_files_only=True, trust_remote_code=False
    )
    stored = read_config(folder)
    full = AutoConfig.for_model(
        **{key: value for key, value in stored.items() if key != "quantization_config"}
    )
    for key in _NOT_READ:
        if hasattr(config, key) and hasattr(full, key):
            setattr(config, key, getattr(full, key))
    return config
