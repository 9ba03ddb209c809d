"""Tiny random models of every architecture we say something about.

`CONFIGS` is the list. A model has hidden size 64 and two layers: wide enough for groups of 32, small enough
for a second each.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.meta import model_class

SIZE: dict[str, Any] = dict(
    vocab_size=128,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
LLAMA: dict[str, Any] = SIZE | dict(intermediate_size=96, num_key_value_heads=2)
EXPERTS: dict[str, Any] = LLAMA | dict(num_experts_per_tok=2)
VISION: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=32,
    patch_size=16,
)


def _of(name: str, fields: dict[str, Any], **more: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(**(fields | more))


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": _of("LlamaConfig", LLAMA),
    "mistral": _of("MistralConfig", LLAMA, head_dim=16),
    "qwen2": _of("Qwen2Config", LLAMA),
    "qwen3": _of("Qwen3Config", LLAMA, head_dim=16),
    "gemma2": _of("Gemma2Config", LLAMA, head_dim=16),
    "gemma3": _of("Gemma3TextConfig", LLAMA, head_dim=16, sliding_window=8),
    "phi3": _of("Phi3Config", LLAMA),
    "opt": _of("OPTConfig", SIZE, ffn_dim=96, word_embed_proj_dim=64),
    "gpt_neox": _of("GPTNeoXConfig", SIZE, intermediate_size=96),
    "falcon": _of("FalconConfig", SIZE, num_kv_heads=2, new_decoder_architecture=True),
    "olmo2": _of("Olmo2Config", LLAMA),
    "stablelm": _of("StableLmConfig", LLAMA),
    "glm": _of("GlmConfig", LLAMA, head_dim=16),
    "glm4": _of("Glm4Config", LLAMA, head_dim=16),
    "granite": _of("GraniteConfig", LLAMA),
    "cohere": _of("CohereConfig", LLAMA),
    "smollm3": _of("SmolLM3Config", LLAMA),
    "starcoder2": _of("Starcoder2Config", LLAMA),
    "phi": _of("PhiConfig", LLAMA),
    "gpt2": _of("GPT2Config", SIZE),
    "gpt_bigcode": _of("GPTBigCodeConfig", SIZE),
    "bloom": _of("BloomConfig", SIZE),
    "mixtral": _of("MixtralConfig", EXPERTS, num_local_experts=4),
    "qwen2_moe": _of(
        "Qwen2MoeConfig", EXPERTS, num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=64
    ),
    "qwen3_moe": _of("Qwen3MoeConfig", EXPERTS, num_experts=4, moe_intermediate_size=32, head_dim=16),
    "olmoe": _of("OlmoeConfig", EXPERTS, num_experts=4),
    "phimoe": _of("PhimoeConfig", EXPERTS, num_local_experts=4),
    "gpt_oss": _of("GptOssConfig", EXPERTS, num_local_experts=4, head_dim=16, sliding_window=8),
    "granitemoe": _of("GraniteMoeConfig", EXPERTS, num_local_experts=4),
    "gemma3 (multimodal)": lambda: transformers.Gemma3Config(
        text_config=CONFIGS["gemma3"]().to_dict(),
        vision_config=VISION | dict(model_type="siglip_vision_model"),
        mm_tokens_per_image=4,
        image_token_index=120,
        boi_token_index=121,
        eoi_token_index=122,
    ),
    "llava (multimodal)": lambda: transformers.LlavaConfig(
        text_config=CONFIGS["llama"]().to_dict(),
        vision_config=VISION | dict(model_type="clip_vision_model", projection_dim=32),
        image_token_index=120,
        image_seq_length=4,
    ),
    "qwen2_5_vl (multimodal)": lambda: transformers.Qwen2_5_VLConfig(
        text_config=CONFIGS["qwen2"]().to_dict()
        | dict(
            model_type="qwen2_5_vl_text",
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 3, 3]),
        ),
        vision_config=dict(
            depth=1,
            hidden_size=32,
            intermediate_size=64,
            num_heads=2,
            out_hidden_size=64,
            fullatt_block_indexes=[0],
        ),
        image_token_id=120,
        video_token_id=121,
        vision_start_token_id=122,
        vision_end_token_id=123,
    ),
    "llama4_text": _of(
        "Llama4TextConfig", EXPERTS, num_local_experts=4, head_dim=16, intermediate_size_mlp=96
    ),
    "dbrx": lambda: transformers.DbrxConfig(
        d_model=64,
        n_heads=4,
        n_layers=2,
        vocab_size=128,
        max_seq_len=64,
        ffn_config=dict(ffn_hidden_size=96, moe_num_experts=4, moe_top_k=2),
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0),
    ),
    "jetmoe": _of("JetMoeConfig", EXPERTS, num_local_experts=4, kv_channels=16),
    "qwen3_next": _of(
        "Qwen3NextConfig",
        EXPERTS,
        num_experts=4,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
        head_dim=16,
        full_attention_interval=2,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    ),
    "mamba": _of("MambaConfig", dict(vocab_size=128, hidden_size=64, num_hidden_layers=2, state_size=16)),
    "mamba2": _of(
        "Mamba2Config",
        dict(
            vocab_size=128,
            hidden_size=64,
            num_hidden_layers=2,
            num_heads=8,
            head_dim=16,
            state_size=16,
            n_groups=1,
            chunk_size=8,
        ),
    ),
    "jamba": _of(
        "JambaConfig",
        EXPERTS,
        num_experts=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=16,
        mamba_dt_rank=8,
        use_mamba_kernels=False,
    ),
    "gptj": _of("GPTJConfig", SIZE, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=64),
    "codegen": _of("CodeGenConfig", SIZE, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=64),
    "gpt_neo": _of("GPTNeoConfig", SIZE, num_layers=2, num_heads=4, attention_types=[[["global"], 2]]),
    "mpt": _of(
        "MptConfig",
        dict(vocab_size=128, d_model=64, n_heads=4, n_layers=2, max_seq_len=64, expansion_ratio=2),
    ),
    "persimmon": _of("PersimmonConfig", LLAMA),
    "nemotron": _of("NemotronConfig", LLAMA),
    "exaone4": _of("Exaone4Config", LLAMA, sliding_window=8, sliding_window_pattern=2),
    "ernie4_5": _of("Ernie4_5Config", LLAMA),
    "seed_oss": _of("SeedOssConfig", LLAMA, head_dim=16),
    "hunyuan_v1_dense": _of("HunYuanDenseV1Config", LLAMA, head_dim=16),
    "gemma": _of("GemmaConfig", LLAMA, head_dim=16),
    "olmo": _of("OlmoConfig", LLAMA),
    "cohere2": _of("Cohere2Config", LLAMA, sliding_window=8),
    "glm4_moe": _of(
        "Glm4MoeConfig",
        EXPERTS,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        head_dim=16,
    ),
    "lfm2": _of(
        "Lfm2Config",
        LLAMA,
        block_ff_dim=96,
        layer_types=["conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
    ),
    "recurrent_gemma": _of(
        "RecurrentGemmaConfig",
        LLAMA,
        lru_width=64,
        block_types=["recurrent", "attention"],
        attention_window_size=8,
        head_dim=16,
    ),
    "rwkv": _of(
        "RwkvConfig",
        dict(
            vocab_size=128, hidden_size=64, num_hidden_layers=2, context_length=64, attention_hidden_size=64
        ),
    ),
    "bamba": _of(
        "BambaConfig",
        LLAMA,
        attn_layer_indices=[1],
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_d_state=16,
        mamba_expand=2,
        mamba_chunk_size=8,
    ),
    "granitemoehybrid": _of(
        "GraniteMoeHybridConfig",
        EXPERTS,
        num_local_experts=4,
        layer_types=["mamba", "attention"],
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_d_state=16,
        mamba_expand=2,
        mamba_chunk_size=8,
        shared_intermediate_size=64,
    ),
    "qwen3_5_text": _of(
        "Qwen3_5TextConfig",
        LLAMA,
        head_dim=16,
        full_attention_interval=2,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    ),
    "minimax_m2": _of("MiniMaxM2Config", EXPERTS, num_local_experts=4, head_dim=16, rotary_dim=8),
    "ernie4_5_moe": _of(
        "Ernie4_5_MoeConfig",
        EXPERTS,
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=32,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
    ),
    "hunyuan_v1_moe": _of("HunYuanMoEV1Config", EXPERTS, num_experts=4, moe_topk=2, head_dim=16),
    "openai-gpt": _of("OpenAIGPTConfig", SIZE, n_embd=64, n_layer=2, n_head=4, n_positions=64),
    "deepseek_v3": _of(
        "DeepseekV3Config",
        EXPERTS,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        n_shared_experts=1,
        num_key_value_heads=4,
        kv_lora_rank=32,
        q_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
    ),
}


def checkpoint_of(config: Any, folder: Path, dtype: str = "float32") -> Checkpoint:
    """A random checkpoint in bfloat16. Biases, which transformers starts at zero, get values; so a lost one
    is seen.
    """
    torch.manual_seed(0)
    model: Any = model_class(config).from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return Checkpoint.open(folder, dtype=dtype)
