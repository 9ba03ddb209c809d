"""Tiny random models of every architecture we say something about, and the whole line on one of them.

`CONFIGS` is the list; `line` is what tests/model/test_architectures.py asserts and what
benchmarks/support_matrix.py writes into docs/models.md. A model has hidden size 64 and two layers: wide
enough for groups of 32, small enough for a second each.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from lowbit_ft.adapters import LRQATConfig
from lowbit_ft.adapters.attach import adapted_layers, attach, begin_step
from lowbit_ft.export import EXPORTERS
from lowbit_ft.export.reader import load_exported, read_weights
from lowbit_ft.export.verify import verify
from lowbit_ft.export.writer import write_model
from lowbit_ft.merge import merge, moved
from lowbit_ft.model.linear import packed_op_only
from lowbit_ft.model.load import Checkpoint, model_class
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.sections.quant import QuantSection

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


# transformers has only its own eager attention for these.
EAGER = frozenset(
    {
        "gemma2",
        "bloom",
        "gpt_oss",
        "mamba",
        "mamba2",
        "gptj",
        "codegen",
        "gpt_neo",
        "mpt",
        "rwkv",
        "openai-gpt",
    }
)
EXACT, ROUNDING = "exact", "exact weights"


@dataclass(frozen=True)
class Result:
    """One row of docs/models.md. packed: share of the matrix weights of the decoder layers that are packed,
    in percent; native and compressed: EXACT, ROUNDING (equal weights, logits within the rounding of the
    reader's sums), or "refused: why"."""

    name: str
    model: str
    layers: int
    packed: float
    native: str
    compressed: str
    fixes: tuple[str, ...] = ()

    def row(self) -> str:
        packed = f"{self.layers} ({self.packed:.0f} %)" if self.layers else "-"
        return f"| {self.name} | {self.model} | {packed} | {self.native} | {self.compressed} |"


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


def tokens(rows: int = 2, length: int = 24, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (rows, length), generator=generator)


def train(model: Any, steps: int = 1) -> None:
    """attach LR-QAT and take real optimizer steps on random tokens; large ones, so that codes move."""
    attach(model, LRQATConfig(rank=4, alpha=4.0))  # pyright: ignore[reportCallIssue]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, layer in adapted_layers(model):  # B starts at zero, where one step cannot reach A
            layer.adapter.B.normal_(std=0.5, generator=generator)  # pyright: ignore[reportOptionalMemberAccess]
    model.train()
    for step in range(steps):
        begin_step(model, step)
        ids = tokens()
        positions = torch.arange(ids.shape[1])[None].expand_as(ids)
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]).float(), ids[:, 1:].reshape(-1)
        )
        loss.backward()
        still = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not still, f"the model's forward goes past these: {still[:3]}"
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def lines(name: str, folder: Path) -> list[Result]:
    """The row of an architecture; where a module is refused, a second row of the rest, with the exclusion
    that the error names.
    """
    first = line(name, folder / "whole")
    return [first, line(name, folder / "rest", exclude=first.fixes)] if first.fixes else [first]


def line(name: str, folder: Path, dtype: str = "float32", exclude: tuple[str, ...] = ()) -> Result:
    """quantize, attach, a step, merge, both exports, each reloaded by transformers and compared. Refusals are
    results; anything else that goes wrong is an error."""
    config = CONFIGS[name]()
    attention = "eager" if name in EAGER else "sdpa"
    checkpoint = checkpoint_of(config, folder / "checkpoint", dtype)
    kind = type(checkpoint.empty_model("eager")).__name__
    try:
        quant = QuantSection(group_size=32, calibrate="absmax", exclude=["lm_head", *exclude])
        model, rows = quantize(checkpoint, quant, attention=attention)
    except ValueError as error:
        why = re.search(r"cannot be packed as asked:\n  \S+: (.*?);", str(error))
        assert why, error
        fixes = tuple(re.findall(r"quant.exclude: \['(.*?)'\]", str(error)))
        return Result(name, kind, 0, 0.0, f"refused: {why[1]}", "refused", fixes)
    train(model)
    assert sum(share for layer, share in moved(model).items() if layer != "scale_change") > 0, (
        "training moved no code"
    )
    ids = tokens(seed=5)
    with torch.no_grad():
        trained = model(ids).logits
    merge(model, checkpoint, folder / "native")
    loaded = load_exported(folder / "native", attention=attention)
    with (
        torch.no_grad(),
        packed_op_only(loaded),
    ):  # an expert may be given few rows, which decoding would round in another way
        again = loaded(ids).logits
    native = EXACT if torch.equal(again, trained) else f"logits off by {(again - trained).abs().max():.1e}"
    merged = read_weights(folder / "native")
    try:
        write_model(folder / "ct", checkpoint, merged, EXPORTERS["compressed-tensors"])
    except ValueError as error:
        why = re.search(r"cannot hold this model:(?:\n  .*?:)? (.*?); ", str(error))
        assert why, error
        compressed = f"refused: {why[1]}"
    else:
        # raises for any difference that is not allowed; which are, does not depend on the machine
        compressed = (
            EXACT if verify(folder / "ct", merged, model=model, input_ids=ids).logit_bound == 0 else ROUNDING
        )
    inside = sum(
        row.parameters
        for row in rows.rows
        if re.search(r"\.\d+\.", row.layer) and "not part of" not in row.reason
    )
    packed = 100 * sum(row.parameters for row in rows.quantized) / inside
    name += ", the rest" if exclude else ""
    return Result(name, kind, len(rows.quantized), packed, native, compressed)
