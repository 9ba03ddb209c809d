"""quantize and the layer walk: what is packed, what is left alone and said, and that the dense model is never needed whole."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
)

from lowbit_ft.attach import packed_layers
from lowbit_ft.evaluate import Reference, evaluate, table
from lowbit_ft.load import Checkpoint, load_model
from lowbit_ft.quantize import quantize
from lowbit_ft.recipe import QuantSection
from lowbit_ft.walk import LayerWalk

TINY = Path(__file__).resolve().parent.parent / "recipes" / "assets" / "tiny-llama"
COMMON: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 128}
GEMMA_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]  # layers that get different masks
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**COMMON, intermediate_size=96, num_key_value_heads=2),
    "qwen2": lambda: Qwen2Config(**COMMON, intermediate_size=96, num_key_value_heads=2),
    "gemma3": lambda: Gemma3TextConfig(
        **COMMON, intermediate_size=96, num_key_value_heads=2, head_dim=16, sliding_window=8, layer_types=GEMMA_LAYERS
    ),
    "opt": lambda: OPTConfig(**COMMON, ffn_dim=96, word_embed_proj_dim=64, max_position_embeddings=64),
}


def checkpoint_of(config: Any, folder: Path) -> Checkpoint:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return Checkpoint.open(folder, dtype="float32")


def tokens(n: int = 3, length: int = 24) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 128, (2, length), generator=generator)} for _ in range(n)]


@pytest.mark.parametrize("name", CONFIGS)
def test_walking_layer_by_layer_is_the_model(name: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(CONFIGS[name](), tmp_path)
    model = checkpoint.empty_model()
    walk = LayerWalk(model, checkpoint, tokens(), torch.device("cpu"), torch.float32)
    for index, _, layer in walk:
        held = [i for i, other in enumerate(walk.layers) if not any(p.is_meta for p in other.parameters())]
        assert set(held) <= {0, index}, "more than one layer is dense"  # layer 0 was asked what it returns
        assert not any(p.is_meta for p in layer.parameters())
        walk.advance(index)
        walk.drop(index)
        assert all(p.is_meta for p in layer.parameters())
    dense = load_model(checkpoint)
    for number, batch in enumerate(tokens()):
        with torch.no_grad():
            assert torch.equal(walk.logits(number), dense(**batch, use_cache=False).logits)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("calibrate", ["mse", "gptq"])
def test_every_linear_is_packed_or_named(name: str, calibrate: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(CONFIGS[name](), tmp_path)
    quant = QuantSection(bits=4, group_size=32, calibrate=calibrate)  # pyright: ignore[reportArgumentType]
    model, rows = quantize(checkpoint, quant, calibration=lambda: tokens(4))
    named = {row.layer for row in rows.rows}
    packed = dict(packed_layers(model))
    assert packed and set(packed) == {row.layer for row in rows.quantized}
    dense = load_model(checkpoint)
    for layer, module in dense.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            assert layer in named
        if layer in packed and getattr(module, "bias", None) is not None:
            assert torch.equal(packed[layer].bias, module.bias)  # pyright: ignore[reportArgumentType]
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])
    assert all("forward" not in vars(m) for m in model.modules()), "a stub of the walk was left behind"
    for row in rows.quantized:
        weight = dense.get_submodule(row.layer).weight
        found = (packed[row.layer].weight - weight).square().sum() / weight.square().sum()
        assert row.error == pytest.approx(float(found), rel=1e-4)
        assert row.packed_bytes == packed[row.layer].base.nbytes
    with torch.no_grad():
        batch = tokens(1)[0]
        gap = (model(**batch).logits - dense(**batch).logits).norm() / dense(**batch).logits.norm()
    assert 0 < gap < 0.4  # 4 bits, random weights
    assert "left alone (embedding)" in str(rows) and "bits each" in str(rows)


def test_gptq_is_nearer_in_output_than_mse(tmp_path: Path) -> None:
    """On the trained model and its own text: KL to full precision after 3-bit rounding."""
    from lowbit_ft.load import load_tokenizer

    checkpoint = Checkpoint.open(TINY, dtype="float32")
    text = [json.loads(line)["text"] for line in (TINY.parent / "text" / "valid.jsonl").read_text().splitlines()[:8]]
    ids = torch.tensor(load_tokenizer(checkpoint)("\n".join(text), verbose=False)["input_ids"][: 20 * 128]).view(-1, 4, 128)
    batches = [{"input_ids": b, "labels": b} for b in ids[3:]]
    reference = Reference(checkpoint, batches, attention="sdpa", device=torch.device("cpu"), dtype=torch.float32)
    kl = {}
    for calibrate in ("mse", "gptq"):
        quant = QuantSection(bits=3, symmetric=False, calibrate=calibrate)
        model, _ = quantize(checkpoint, quant, calibration=lambda: [{"input_ids": b} for b in ids[:3]])
        kl[calibrate] = evaluate(model, batches, calibrate, reference).kl
    assert kl["gptq"] < 0.9 * kl["mse"]


def test_overrides_targets_and_what_is_said(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(CONFIGS["llama"](), tmp_path)
    quant = QuantSection.model_validate({
        "bits": 3, "group_size": 32, "overrides": [{"match": "*.down_proj", "bits": 8}], "exclude": ["lm_head", "*.0.*"],
    })  # fmt: skip
    model, rows = quantize(checkpoint, quant)
    bits = {row.layer: row.bits for row in rows.quantized}
    assert {b for name, b in bits.items() if name.endswith("down_proj")} == {8}
    assert {b for name, b in bits.items() if not name.endswith("down_proj")} == {3}
    assert all(".0." not in name for name in bits)
    assert "excluded by '*.0.*'" in str(rows)
    only = QuantSection.model_validate({"group_size": 32, "targets": ["q_proj"]})
    _, rows = quantize(checkpoint, only)
    assert {row.layer.rpartition(".")[2] for row in rows.quantized} == {"q_proj"}
    head = QuantSection.model_validate({"group_size": 32, "targets": ["*.q_proj", "lm_head"], "exclude": [], "calibrate": "gptq"})
    _, rows = quantize(checkpoint, head, calibration=lambda: tokens())
    row = next(row for row in rows.rows if row.layer == "lm_head")
    assert row.action == "quantized" and "mse" in row.reason


def test_what_cannot_be_packed_is_named(tmp_path: Path) -> None:
    gpt2 = checkpoint_of(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=128), tmp_path / "gpt2")
    with pytest.raises(ValueError, match="GPT2LMHeadModel: no layer to quantize"):
        quantize(gpt2, QuantSection(group_size=32))
    mixtral = checkpoint_of(
        MixtralConfig(**COMMON, intermediate_size=96, num_key_value_heads=2, num_local_experts=2), tmp_path / "mixtral"
    )
    _, rows = quantize(mixtral, QuantSection(group_size=32))
    experts = [row for row in rows.rows if "fused experts" in row.reason]
    assert len(experts) == 6 and all(row.action == "skipped" for row in experts)  # two 3-D parameters in each of three layers
    assert "fused experts" in str(rows)


def test_gptq_says_what_it_lacks(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(CONFIGS["llama"](), tmp_path)
    with pytest.raises(ValueError, match="needs calibration text"):
        quantize(checkpoint, QuantSection(group_size=32, calibrate="gptq"))


def test_evaluate_is_transformers_loss(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(CONFIGS["llama"](), tmp_path)
    dense = load_model(checkpoint)
    batch = tokens(1)[0]
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :7] = -100
    row = evaluate(dense, [batch], "base")
    with torch.no_grad():
        expected = dense(**batch).loss
    assert row.loss == pytest.approx(float(expected), rel=1e-6) and row.kl is None
    assert row.tokens == int((batch["labels"][:, 1:] != -100).sum())
    reference = Reference(checkpoint, [batch], attention="sdpa", device=torch.device("cpu"), dtype=torch.float32)
    assert evaluate(dense, [batch], "base", reference).kl == 0
    model, _ = quantize(checkpoint, QuantSection(bits=2, group_size=32))
    rows = [reference.row(), evaluate(model, [batch], "quantized", reference)]
    with torch.no_grad():
        keep = batch["labels"][:, 1:] != -100
        p = torch.log_softmax(dense(batch["input_ids"]).logits[:, :-1][keep].double(), -1)
        q = torch.log_softmax(model(batch["input_ids"]).logits[:, :-1][keep].double(), -1)
    assert rows[1].kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert rows[0].loss == pytest.approx(row.loss, rel=1e-6)
    lines = table(rows).splitlines()
    assert len(lines) == 3 and f"{rows[1].perplexity:.6f}" in lines[2]
    batch["labels"][:] = -100
    with pytest.raises(ValueError, match="no target tokens"):
        evaluate(dense, [batch], "base")
