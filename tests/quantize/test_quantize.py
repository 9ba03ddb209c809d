"""quantize and the layer walk: what is packed, what is left alone and said, and that the dense model is never
needed whole.
"""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    JetMoeConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
)

from lowbit_ft.adapters.attach import packed_layers
from lowbit_ft.evaluate.perplexity import Reference, evaluate, table
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.load import load_model
from lowbit_ft.model.walk import LayerWalk
from lowbit_ft.quantize import progress
from lowbit_ft.quantize.quantize import Packing, quantize
from lowbit_ft.quantize.table import QuantTable, plan_layers
from lowbit_ft.recipe.sections.quant import QuantSection

TINY = Path(__file__).resolve().parents[2] / "recipes" / "assets" / "tiny-llama"
COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 128,
}
GEMMA_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]  # layers that get different masks
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**COMMON, intermediate_size=96, num_key_value_heads=2),
    "qwen2": lambda: Qwen2Config(**COMMON, intermediate_size=96, num_key_value_heads=2),
    "gemma3": lambda: Gemma3TextConfig(
        **COMMON,
        intermediate_size=96,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=8,
        layer_types=GEMMA_LAYERS,
    ),
    "gpt2": lambda: GPT2Config(**COMMON, bos_token_id=1, eos_token_id=2),
    "mixtral": lambda: MixtralConfig(
        **COMMON, intermediate_size=96, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
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
@pytest.mark.parametrize("calibrate", ["mse", "gptq", "signround"])
def test_every_linear_is_packed_or_named(name: str, calibrate: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(CONFIGS[name](), tmp_path)
    quant = QuantSection.model_validate(
        {"bits": 4, "group_size": 32, "calibrate": calibrate, "calibration": {"steps": 2}}
    )
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
        weight = checkpoint.matrix(row.layer)
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
    from lowbit_ft.model.load import load_tokenizer

    checkpoint = Checkpoint.open(TINY, dtype="float32")
    text = [
        json.loads(line)["text"]
        for line in (TINY.parent / "text" / "valid.jsonl").read_text().splitlines()[:8]
    ]
    ids = torch.tensor(
        load_tokenizer(checkpoint)("\n".join(text), verbose=False)["input_ids"][: 20 * 128]
    ).view(-1, 4, 128)
    batches = [{"input_ids": b, "labels": b} for b in ids[3:]]
    reference = Reference(
        checkpoint, batches, attention="sdpa", device=torch.device("cpu"), dtype=torch.float32
    )
    kl = {}
    for calibrate in ("mse", "gptq"):
        quant = QuantSection(bits=3, symmetric=False, calibrate=calibrate)
        model, _ = quantize(checkpoint, quant, calibration=lambda: [{"input_ids": b} for b in ids[:3]])
        kl[calibrate] = evaluate(model, batches, calibrate, reference).kl
    assert kl["gptq"] < 0.9 * kl["mse"]


def test_overrides_targets_and_what_is_said(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(CONFIGS["llama"](), tmp_path)
    quant = QuantSection.model_validate(
        {
            "bits": 3,
            "group_size": 32,
            "overrides": [{"match": "*.down_proj", "bits": 8}],
            "exclude": ["lm_head", "*.0.*"],
        }
    )
    model, rows = quantize(checkpoint, quant)
    bits = {row.layer: row.bits for row in rows.quantized}
    assert {b for name, b in bits.items() if name.endswith("down_proj")} == {8}
    assert {b for name, b in bits.items() if not name.endswith("down_proj")} == {3}
    assert all(".0." not in name for name in bits)
    assert "excluded by '*.0.*'" in str(rows)
    only = QuantSection.model_validate({"group_size": 32, "targets": ["q_proj"]})
    _, rows = quantize(checkpoint, only)
    assert {row.layer.rpartition(".")[2] for row in rows.quantized} == {"q_proj"}
    head = QuantSection.model_validate(
        {"group_size": 32, "targets": ["*.q_proj", "lm_head"], "exclude": [], "calibrate": "gptq"}
    )
    _, rows = quantize(checkpoint, head, calibration=lambda: tokens())
    row = next(row for row in rows.rows if row.layer == "lm_head")
    assert row.action == "quantized" and "mse" in row.reason


def test_what_cannot_be_packed_is_named(tmp_path: Path) -> None:
    config = JetMoeConfig(
        **COMMON,
        intermediate_size=96,
        num_local_experts=4,
        num_experts_per_tok=2,
        kv_channels=16,
        num_key_value_heads=2,
    )
    checkpoint = checkpoint_of(config, tmp_path / "jetmoe")
    with pytest.raises(ValueError, match="JetMoeForCausalLM cannot be packed as asked") as caught:
        quantize(checkpoint, QuantSection(group_size=32))
    fixes = re.findall(r"quant.exclude: \['(.*?)'\]", str(caught.value))
    assert "model.layers.*.mlp.input_linear*" in fixes
    # the way out that is named is one
    _, rows = quantize(checkpoint, QuantSection(group_size=32, exclude=["lm_head", *fixes]))
    assert (
        rows.quantized
        and sum("excluded by 'model.layers.*.mlp.input_linear*'" in row.reason for row in rows.rows) == 3
    )
    with pytest.raises(ValueError, match="no layer to quantize"):
        quantize(checkpoint, QuantSection(group_size=32, targets=["nothing"]))


def mixtral(folder: Path) -> Checkpoint:
    return checkpoint_of(CONFIGS["mixtral"](), folder)


def test_experts_are_packed_one_by_one(tmp_path: Path) -> None:
    checkpoint = mixtral(tmp_path)
    model, rows = quantize(checkpoint, QuantSection(bits=8, group_size=32))
    dense = load_model(checkpoint)
    experts = [row for row in rows.quantized if ".experts." in row.layer]
    assert len(experts) == 3 * 4 * 2
    for row in experts:
        stack, expert, key = row.layer.rsplit(".", 2)
        assert torch.equal(checkpoint.matrix(row.layer), dense.get_parameter(f"{stack}.{key}")[int(expert)])
    with torch.no_grad():
        batch = tokens(1)[0]
        gap = (model(**batch).logits - dense(**batch).logits).norm() / dense(**batch).logits.norm()
    assert gap < 0.02


def test_the_experts_of_a_layer_are_packed_together_or_not_at_all(tmp_path: Path) -> None:
    checkpoint = mixtral(tmp_path)
    with pytest.raises(ValueError, match="packed together or not at all"):
        quantize(checkpoint, QuantSection(group_size=32, exclude=["lm_head", "*.down_proj"]))
    model, rows = quantize(checkpoint, QuantSection(group_size=32, exclude=["lm_head", "*.experts.*"]))
    assert sum("excluded by '*.experts.*'" in row.reason for row in rows.rows) == 24
    assert model.model.layers[0].mlp.experts.gate_up_proj.dim() == 3


def test_an_expert_that_no_calibration_token_reached_is_said(tmp_path: Path) -> None:
    checkpoint = mixtral(tmp_path)
    few = [{"input_ids": torch.tensor([[5]])}]  # one token has two experts of four
    model, rows = quantize(checkpoint, QuantSection(group_size=32, calibrate="gptq"), calibration=lambda: few)
    idle = [row.layer for row in rows.quantized if "no calibration token reached this expert" in row.reason]
    assert len(idle) == 3 * 2 * 2 and all(".experts." in name for name in idle)
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])


def test_missing_experts_are_an_error(tmp_path: Path) -> None:
    checkpoint = mixtral(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_local_experts": 5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="4 experts .* config.json says 5"):
        quantize(Checkpoint.open(tmp_path, dtype="float32"), QuantSection(group_size=32))
    assert len(checkpoint.parts("model.layers.0.mlp.experts.3.gate_up_proj") or []) == 2


@pytest.mark.parametrize("tied", [False, True])
def test_head_and_embedding_at_their_own_bits(tied: bool, tmp_path: Path) -> None:
    config = CONFIGS["gemma3"]()
    config.tie_word_embeddings = tied
    checkpoint = checkpoint_of(config, tmp_path)
    model, rows = quantize(checkpoint, QuantSection(bits=3, group_size=32, lm_head=8, embeddings=4))
    bits = {row.layer: row.bits for row in rows.quantized}
    assert (
        bits["lm_head"] == 8 and bits["model.embed_tokens"] == 4 and bits["model.layers.0.mlp.up_proj"] == 3
    )
    dense = load_model(checkpoint)
    ids = tokens(1)[0]["input_ids"]
    embedding = model.model.embed_tokens
    with torch.no_grad():
        dense.model.embed_tokens.weight.data = embedding.weight  # gemma multiplies what it looks up
        assert torch.equal(embedding(ids), dense.model.embed_tokens(ids))
    assert model.config.tie_word_embeddings is False
    assert embedding.to(torch.bfloat16)(ids).dtype == torch.bfloat16 and embedding.num_embeddings == 128


def test_a_head_or_embedding_that_cannot_be_packed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lm_head 8 needs quant.grid: integer"):
        QuantSection(grid="binary", bits=3, lm_head=8)
    checkpoint = checkpoint_of(CONFIGS["llama"](), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    model = checkpoint.empty_model()

    class Own(torch.nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) + 1

    model.model.embed_tokens = Own(config["vocab_size"], 64)
    with pytest.raises(ValueError, match="quant.embeddings: 8: this model has none that can be packed"):
        plan_layers(model, QuantSection(group_size=32, embeddings=8), tmp_path)


def test_auto_is_gptq_at_2_3_and_4_bits_where_there_is_text(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(CONFIGS["llama"](), tmp_path)

    def digest(calibration: Any = None, **quant: Any) -> str:
        model, _ = quantize(checkpoint, QuantSection(group_size=32, **quant), calibration=calibration)
        return dict(packed_layers(model))["model.layers.0.mlp.down_proj"].base.digest()

    for bits in (2, 3, 4):
        named = {name: digest(tokens, bits=bits, calibrate=name) for name in ("gptq", "mse")}
        assert digest(tokens, bits=bits) == named["gptq"] != named["mse"] == digest(bits=bits)
    assert digest(tokens, bits=8) == digest(bits=8, calibrate="mse")


def test_a_layer_that_no_token_reached_and_sharing_that_changes(tmp_path: Path) -> None:
    """The first is calibrated without text, and said; the second costs another pass of the text and no
    error."""
    checkpoint = checkpoint_of(CONFIGS["llama"](), tmp_path)
    quant = QuantSection(bits=3, group_size=32, calibrate="gptq")

    def run(patch: Any) -> tuple[dict[str, Any], QuantTable]:
        packing = Packing(checkpoint, quant, calibration=lambda: tokens(3), keep=True)
        patch(packing.model.model.layers[1].self_attn)
        for _ in packing:
            pass
        return dict(packed_layers(packing.finished())), packing.table

    def skipping(attention: Any) -> None:  # as a layer that runs for some inputs only
        def zeros(self: Any, x: torch.Tensor) -> torch.Tensor:
            return x.new_zeros(*x.shape[:-1], self.out_features)

        attention.v_proj.__class__ = type("Skipped", (torch.nn.Linear,), {"__call__": zeros})

    plain, table = run(lambda attention: None)
    assert not any("no calibration token" in row.reason for row in table.rows)
    _, table = run(skipping)
    said = {row.layer: row.reason for row in table.quantized if "no calibration token" in row.reason}
    assert said == {
        "model.layers.1.self_attn.v_proj": "no calibration token reached this layer: calibrated by mse"
    }

    def changing(attention: Any) -> None:
        calls = iter(range(10**6))

        def another(module: Any, args: tuple[torch.Tensor]) -> Any:
            return (args[0].clone(),) if next(calls) % 2 else None

        attention.k_proj.register_forward_pre_hook(another)

    other, table = run(changing)
    assert not any("no calibration token" in row.reason for row in table.rows)
    for name, layer in plain.items():
        near = (layer.weight - other[name].weight).norm() / layer.weight.norm()
        assert near < 0.02, name


def test_packing_says_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line every EVERY seconds where there is no terminal, with layer, matrix, share and what is left."""
    checkpoint = checkpoint_of(CONFIGS["llama"](), tmp_path)
    quant = QuantSection(bits=3, group_size=32, calibrate="gptq")
    seen: dict[float, list[str]] = {}
    for every in (0.0, 1e9):
        monkeypatch.setattr(progress, "EVERY", every)
        out = io.StringIO()
        console = Console(file=out, width=200, force_terminal=False)
        quantize(checkpoint, quant, calibration=lambda: tokens(2), console=console)
        seen[every] = out.getvalue().splitlines()
    text = "\n".join(seen[0.0])
    assert "quantize  0%  layer 1 of " in text and "inputs of 7 matrices (50%)  0:00:00 passed" in text
    assert re.search(
        r"quantize  \d+%  layer 2 of \d: mlp.down_proj  0:00:0\d passed, about 0:00:0\d left", text
    )
    assert seen[1e9] == []
    shares = [int(found) for found in re.findall(r"quantize  (\d+)%", text)]
    assert shares == sorted(shares) and shares[-1] == 100


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
    reference = Reference(
        checkpoint, [batch], attention="sdpa", device=torch.device("cpu"), dtype=torch.float32
    )
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
