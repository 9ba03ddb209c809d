"""FAMILIES: where the residual stream, the heads and the MLP of each architecture are, by model_type.

What a rotation has to know is written down here and nowhere guessed: which linears read the output of which
norm, which write to the residual stream, where the values of the heads lie in a fused matrix, which norms
keep a gain of 1 + weight. An architecture without a line is refused by name, and so is a model of a known
one that has a parameter of which its line says nothing (sites.py).

Names are relative to a decoder layer; one that a layer has not is not looked for (hybrids, mixtures whose
first layers are dense), `*` stands for any part. A name is a module with a weight and perhaps a bias, or a
parameter itself (the stacks of experts).
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Family:
    """norms: norm of a layer -> what reads it. writers: what is added to the stream. down: the linears whose
    input r4 turns. values, outputs: v and o of attention, and `heads`, how the rows of v lie in a fused
    matrix (sites.py: value_rows). inner: what is between a reader and a writer, and whatever else stays
    as it is (an absolute name, where it is outside the layers). layers, embeddings, final,
    head: absolute names, the readers of `final` being the head. one_plus: norms multiply with 1 + weight.
    centered: they subtract the mean. no_r1, no_r2, no_smooth: why not."""

    norms: dict[str, tuple[str, ...]]
    writers: tuple[str, ...]
    down: tuple[str, ...]
    values: str = "self_attn.v_proj"
    outputs: str = "self_attn.o_proj"
    heads: str = "plain"
    inner: tuple[str, ...] = ()
    layers: str = "model.layers"
    embeddings: tuple[str, ...] = ("model.embed_tokens",)
    final: str = "model.norm"
    head: str = "lm_head"
    one_plus: bool = False
    centered: bool = False
    no_r1: str | None = None
    no_r2: str | None = None
    no_smooth: str | None = None


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATED = ("mlp.gate_proj", "mlp.up_proj")
_O, _DOWN = "self_attn.o_proj", "mlp.down_proj"
_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.gate", "mlp.router")
_IN, _POST = "input_layernorm", "post_attention_layernorm"
_POST_NORM = (
    "a norm with a gain stands between a layer's output and the residual stream, and no linear follows it "
    "that could take the gain in"
)

_LLAMA = Family({_IN: _QKV, _POST: _GATED}, (_O, _DOWN), (_DOWN,))
_QK_LLAMA = replace(_LLAMA, inner=_QK_NORMS)
_LAYER_LLAMA = replace(_LLAMA, centered=True)
_FUSED = replace(
    _LLAMA, norms={_IN: ("self_attn.qkv_proj",), _POST: ("mlp.gate_up_proj",)}, values="self_attn.qkv_proj"
)
_MIXTURE = Family({_IN: _QKV, _POST: _EXPERTS}, (_O, "mlp.experts.down_proj"), (), inner=_QK_NORMS)
_NEOX_MLP = ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"


def _shared(name: str, gate: tuple[str, ...] = ()) -> Family:
    """A mixture with dense experts beside it, and perhaps dense first layers."""
    readers = (*_EXPERTS, *gate, f"mlp.{name}.gate_proj", f"mlp.{name}.up_proj", *_GATED)
    downs = (f"mlp.{name}.down_proj", _DOWN)
    return replace(
        _MIXTURE, norms={_IN: _QKV, _POST: readers}, writers=(*_MIXTURE.writers, *downs), down=downs
    )


def _gpt2(**more: object) -> Family:
    """The names of GPT-2 and those after it; norms with means and biases."""
    plain = Family(
        {"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",)},
        ("attn.c_proj", "mlp.c_proj"),
        ("mlp.c_proj",),
        values="attn.c_attn",
        outputs="attn.c_proj",
        heads="last",
        layers="transformer.h",
        embeddings=("transformer.wte", "transformer.wpe"),
        final="transformer.ln_f",
        centered=True,
    )
    return replace(plain, **more)  # pyright: ignore[reportArgumentType]


_GPTJ = _gpt2(
    norms={"ln_1": ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.qkv_proj", "mlp.fc_in")},
    writers=("attn.out_proj", "mlp.fc_out"),
    down=("mlp.fc_out",),
    values="attn.v_proj",
    outputs="attn.out_proj",
    heads="plain",
    embeddings=("transformer.wte",),
)
_BLOOM = _gpt2(
    norms={_IN: ("self_attention.query_key_value",), _POST: _NEOX_MLP[0]},
    writers=("self_attention.dense", _NEOX_MLP[1]),
    down=(_NEOX_MLP[1],),
    values="self_attention.query_key_value",
    outputs="self_attention.dense",
    heads="interleaved",
    embeddings=("transformer.word_embeddings",),
)
_LINEAR_READERS = tuple(f"linear_attn.in_proj_{part}" for part in ("qkvz", "ba", "qkv", "z", "b", "a"))
_QWEN_NEXT = Family(
    {
        _IN: (*_QKV, *_LINEAR_READERS),
        _POST: (*_shared("shared_expert", ("mlp.shared_expert_gate",)).norms[_POST],),
    },
    (_O, "linear_attn.out_proj", "mlp.experts.down_proj", "mlp.shared_expert.down_proj", _DOWN),
    ("mlp.shared_expert.down_proj", _DOWN),
    inner=(
        *_QK_NORMS,
        "linear_attn.dt_bias",
        "linear_attn.A_log",
        "linear_attn.conv1d",
        "linear_attn.norm",
    ),
    one_plus=True,
    no_r2="a gate multiplies the output of its attention channel by channel",
)
_MAMBA_INNER = tuple(
    f"{name}.{part}"
    for name in ("mamba", "mixer")
    for part in ("A_log", "D", "dt_bias", "conv1d", "x_proj", "dt_proj", "norm", "*_layernorm")
)
_MAMBA = Family(
    {"norm": ("mixer.in_proj",)},
    ("mixer.out_proj",),
    (),
    inner=_MAMBA_INNER,
    layers="backbone.layers",
    embeddings=("backbone.embeddings",),
    final="backbone.norm_f",
    no_r2="it has no attention",
)
_HYBRID_FF = tuple(
    f"feed_forward.{name}" for name in ("gate_proj", "up_proj", "router", "experts.gate_up_proj")
)
_JAMBA = Family(
    {_IN: (*_QKV, "mamba.in_proj"), "pre_ff_layernorm": _HYBRID_FF},
    (_O, "mamba.out_proj", "feed_forward.down_proj", "feed_forward.experts.down_proj"),
    ("feed_forward.down_proj",),
    inner=_MAMBA_INNER,
    final="model.final_layernorm",
)
_GRANITE_MOE = Family(
    {
        _IN: (*_QKV, "mamba.in_proj"),
        _POST: (
            "block_sparse_moe.router",
            "block_sparse_moe.experts.gate_up_proj",
            "shared_mlp.input_linear",
        ),
    },
    (_O, "mamba.out_proj", "block_sparse_moe.experts.down_proj", "shared_mlp.output_linear"),
    ("shared_mlp.output_linear",),
    inner=_MAMBA_INNER,
)
_BEHIND = "its norms stand behind its linears, not before them"
_POST_NORMED = replace(
    _LLAMA,
    norms={},
    inner=(*_QK_NORMS, *_QKV, *_GATED, _POST, "post_feedforward_layernorm"),
    no_r1=_POST_NORM,
    no_smooth=_BEHIND,
)
_SANDWICHED = replace(
    _LLAMA,
    norms={_IN: _QKV, "pre_feedforward_layernorm": _GATED},
    inner=(*_QK_NORMS, _POST, "post_feedforward_layernorm"),
    one_plus=True,
    no_r1=_POST_NORM,
)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "granite": _LLAMA,
    "smollm3": _LLAMA,
    "seed_oss": _LLAMA,
    "ernie4_5": _LLAMA,
    "qwen3": _QK_LLAMA,
    "hunyuan_v1_dense": replace(_LLAMA, inner=("self_attn.query_layernorm", "self_attn.key_layernorm")),
    "gemma": replace(_LLAMA, one_plus=True),
    "gemma2": _SANDWICHED,
    "gemma3_text": _SANDWICHED,
    "phi3": replace(_FUSED, heads="last"),
    "glm": replace(_LLAMA, norms={_IN: _QKV, _POST: ("mlp.gate_up_proj",)}),
    "glm4": replace(
        _LLAMA,
        norms={_IN: _QKV, _POST: ("mlp.gate_up_proj",)},
        inner=("post_self_attn_layernorm", "post_mlp_layernorm"),
        no_r1=_POST_NORM,
    ),
    "olmo2": _POST_NORMED,
    "exaone4": _POST_NORMED,
    "olmo": replace(_LAYER_LLAMA, no_smooth="its norms have no weight that could carry the factors"),
    "stablelm": _LAYER_LLAMA,
    "cohere": replace(_LAYER_LLAMA, norms={_IN: (*_QKV, *_GATED)}),
    "cohere2": replace(_LAYER_LLAMA, norms={_IN: (*_QKV, *_GATED)}),
    "nemotron": replace(_LAYER_LLAMA, norms={_IN: _QKV, _POST: ("mlp.up_proj",)}, one_plus=True),
    "starcoder2": replace(
        _LAYER_LLAMA,
        norms={_IN: _QKV, _POST: ("mlp.c_fc",)},
        writers=(_O, "mlp.c_proj"),
        down=("mlp.c_proj",),
    ),
    "phi": replace(
        _LAYER_LLAMA,
        norms={_IN: (*_QKV, "mlp.fc1")},
        writers=("self_attn.dense", "mlp.fc2"),
        down=("mlp.fc2",),
        outputs="self_attn.dense",
        final="model.final_layernorm",
    ),
    "persimmon": replace(
        _LAYER_LLAMA,
        norms={_IN: ("self_attn.query_key_value",), _POST: _NEOX_MLP[0]},
        writers=("self_attn.dense", _NEOX_MLP[1]),
        down=(_NEOX_MLP[1],),
        values="self_attn.query_key_value",
        outputs="self_attn.dense",
        heads="interleaved",
        inner=("self_attn.q_layernorm", "self_attn.k_layernorm"),
        final="model.final_layernorm",
    ),
    "opt": replace(
        _LAYER_LLAMA,
        norms={"self_attn_layer_norm": _QKV, "final_layer_norm": ("fc1",)},
        writers=("self_attn.out_proj", "fc2"),
        down=("fc2",),
        outputs="self_attn.out_proj",
        layers="model.decoder.layers",
        embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        final="model.decoder.final_layer_norm",
    ),
    "gpt_neox": replace(
        _BLOOM,
        norms={_IN: ("attention.query_key_value",), _POST: _NEOX_MLP[0]},
        writers=("attention.dense", _NEOX_MLP[1]),
        values="attention.query_key_value",
        outputs="attention.dense",
        layers="gpt_neox.layers",
        embeddings=("gpt_neox.embed_in",),
        final="gpt_neox.final_layer_norm",
    ),
    "falcon": replace(
        _BLOOM,
        norms={  # the first that a layer has takes a reader
            "ln_attn": ("self_attention.query_key_value",),
            "ln_mlp": _NEOX_MLP[0],
            _POST: _NEOX_MLP[0],
            _IN: ("self_attention.query_key_value", *_NEOX_MLP[0]),
        },
        heads="grouped",
    ),
    "bloom": replace(
        _BLOOM,
        inner=("transformer.word_embeddings_layernorm",),
        no_r1="a norm with a gain stands behind its embedding",
    ),
    "gpt2": _gpt2(),
    "gpt_bigcode": _gpt2(heads="query"),
    "openai-gpt": _gpt2(
        norms={},
        inner=("ln_1", "ln_2", "attn.c_attn", "mlp.c_fc"),
        no_r1=_POST_NORM,
        no_smooth=_BEHIND,
        embeddings=("transformer.tokens_embed", "transformer.positions_embed"),
    ),
    "gptj": _GPTJ,
    "codegen": replace(_GPTJ, values="attn.qkv_proj", heads="codegen"),
    "gpt_neo": _gpt2(
        norms={
            "ln_1": tuple(f"attn.attention.{name}" for name in ("q_proj", "k_proj", "v_proj")),
            "ln_2": ("mlp.c_fc",),
        },
        writers=("attn.attention.out_proj", "mlp.c_proj"),
        values="attn.attention.v_proj",
        outputs="attn.attention.out_proj",
        heads="plain",
    ),
    "mpt": _gpt2(
        norms={"norm_1": ("attn.Wqkv",), "norm_2": ("ffn.up_proj",)},
        writers=("attn.out_proj", "ffn.down_proj"),
        down=("ffn.down_proj",),
        values="attn.Wqkv",
        outputs="attn.out_proj",
        layers="transformer.blocks",
        embeddings=("transformer.wte",),
        final="transformer.norm_f",
    ),
    "mixtral": _MIXTURE,
    "qwen3_moe": _MIXTURE,
    "olmoe": _MIXTURE,
    "minimax_m2": _MIXTURE,
    "phimoe": replace(_MIXTURE, centered=True),
    "gpt_oss": replace(_MIXTURE, inner=("self_attn.sinks",)),
    "qwen2_moe": _shared("shared_expert", ("mlp.shared_expert_gate",)),
    "glm4_moe": _shared("shared_experts"),
    "ernie4_5_moe": replace(_shared("shared_experts"), inner=("mlp.gate.moe_statics.*",)),
    "hunyuan_v1_moe": replace(
        _shared("shared_mlp", ("mlp.gate.wg",)),
        inner=("self_attn.query_layernorm", "self_attn.key_layernorm"),
    ),
    "deepseek_v3": replace(
        _shared("shared_experts"),
        norms={
            _IN: ("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
            _POST: _shared("shared_experts").norms[_POST],
        },
        values="self_attn.kv_b_proj",
        heads="latent",
        inner=("self_attn.q_a_layernorm", "self_attn.q_b_proj", "self_attn.kv_a_layernorm"),
    ),
    "granitemoe": _GRANITE_MOE,
    "granitemoehybrid": _GRANITE_MOE,
    "jamba": _JAMBA,
    "bamba": _JAMBA,
    "mamba": _MAMBA,
    "mamba2": _MAMBA,
    "qwen3_next": _QWEN_NEXT,
    "qwen3_5_text": _QWEN_NEXT,
    "lfm2": Family(
        {
            "operator_norm": (*_QKV, "conv.in_proj"),
            "ffn_norm": ("feed_forward.w1", "feed_forward.w3"),
        },
        ("self_attn.out_proj", "conv.out_proj", "feed_forward.w2"),
        ("feed_forward.w2",),
        outputs="self_attn.out_proj",
        inner=("conv.conv", "self_attn.q_layernorm", "self_attn.k_layernorm"),
        final="model.embedding_norm",
    ),
    "recurrent_gemma": Family(
        {
            "temporal_pre_norm": tuple(
                f"temporal_block.{name}" for name in ("q_proj", "k_proj", "v_proj", "linear_x", "linear_y")
            ),
            "channel_pre_norm": ("mlp_block.gate_proj", "mlp_block.up_proj"),
        },
        ("temporal_block.o_proj", "temporal_block.linear_out", "mlp_block.down_proj"),
        ("mlp_block.down_proj",),
        values="temporal_block.v_proj",
        outputs="temporal_block.o_proj",
        inner=("temporal_block.conv_1d", "temporal_block.rg_lru.*"),
        final="model.final_norm",
        one_plus=True,
    ),
}
