"""A low-rank product for each part of a fused matrix: the law, its gradient, starts, files, its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lowbit_kernels.codes import grid_values
from peft import PeftModel, get_peft_model
from torch import Tensor

from lowbit_ft import pipeline
from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import adapter_state, attach, base_digest, load_adapter_state
from lowbit_ft.adapters.base import LowRankOptions
from lowbit_ft.adapters.lora_start import read_lora, start_from_lora
from lowbit_ft.adapters.low_rank import LowRank, rounding_error
from lowbit_ft.grid import IntGrid, PackedWeight
from lowbit_ft.integrations.adapter_files import read_adapter, write_adapter
from lowbit_ft.integrations.peft import LowBitConfig
from lowbit_ft.plan.model import skeleton
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.sections.quant import QuantSection
from lowbit_ft.segments import Parts, Segment, check_parts, layout, read_layout, segments_in
from tests.adapters.common import LOW_RANK, packed, randomize, trained
from tests.adapters.test_lora_start import make_lora
from tests.architectures import CONFIGS
from tests.export.common import checkpoint
from tests.family_rows import recipe_file
from tests.packed_tools import IDS, adapter_config, int_grid, random_weights, set_packed

N, K, RANK = 24, 64, 3
RANGES: Parts = (Segment(0, 12), Segment(12, 6), Segment(18, 6))  # grouped queries: unequal
STRIDED: Parts = tuple(Segment(2 * i, 2, 4, 6) for i in range(3))  # GPT-NeoX
GRIDS = [
    IntGrid(bits=bits, group_size=group, symmetric=symmetric, residual_bits=4)
    for bits, group, symmetric in ((2, 32, False), (3, -1, True), (4, 32, True), (8, 64, False))
]


def config_of(method: str, parts: Parts, **options: Any) -> LowRankOptions:
    config = adapter_config(method, RANK, **options)
    assert isinstance(config, LowRankOptions)
    return config.with_plan({"x": parts}).of_layer("x")


def built(method: str, parts: Parts, base: PackedWeight, **options: Any) -> LowRank:
    adapter = trained(config_of(method, parts, **options), base)
    assert isinstance(adapter, LowRank)
    return adapter


def test_every_low_rank_method_is_here() -> None:
    assert {name for name, kind in ADAPTERS.items() if issubclass(kind, LowRankOptions)} == set(LOW_RANK)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("parts", [RANGES, STRIDED], ids=["ranges", "strided"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("method", LOW_RANK)
def test_what_is_trained_is_what_ships(method: str, grid: IntGrid, parts: Parts) -> None:
    base = packed(grid, (N, K))
    adapter = built(method, parts, base)
    merged = adapter.merge(base)
    assert isinstance(merged, PackedWeight) and not torch.equal(merged.codes, base.codes)
    for dtype in (torch.float32, torch.bfloat16):
        weight = merged.dequantize(dtype)
        assert torch.equal(adapter(torch.eye(K, dtype=dtype), base), weight.t())
    a, b = adapter.factors()
    assert a.shape == (3 * RANK, K) and adapter.B.shape == (N, RANK)
    for number, part in enumerate(parts):
        rows, own = part.channels(), slice(number * RANK, (number + 1) * RANK)
        torch.testing.assert_close((b @ a)[rows], adapter.B[rows] @ adapter.A[own])
    with torch.no_grad():  # another part's A changes nothing of the first part
        adapter.A[RANK:] += 1
    again, first = adapter.merge(base), parts[0].channels()
    assert isinstance(again, PackedWeight)
    assert torch.equal(again.unpack_codes()[first], merged.unpack_codes()[first])
    assert not torch.equal(again.codes, merged.codes)


@pytest.mark.parametrize("method", LOW_RANK)
def test_gradients_are_those_of_the_whole_product(method: str) -> None:
    torch.manual_seed(0)
    base = packed(GRIDS[0], (N, K))
    adapter = built(method, STRIDED, base)
    x, upstream = torch.randn(7, K), torch.randn(7, N)
    factors = [factor.detach().requires_grad_() for factor in adapter.factors()]
    adapter(x, base).backward(upstream)
    adapter.factors = lambda: (factors[0], factors[1])  # pyright: ignore[reportAttributeAccessIssue]
    adapter(x, base).backward(upstream)
    whole_a, whole_b = (factor.grad for factor in factors)
    assert whole_a is not None and whole_b is not None and adapter.A.grad is not None
    assert torch.equal(adapter.A.grad, whole_a) and adapter.A.grad.any(1).all()
    for number, part in enumerate(STRIDED):
        own = whole_b[part.channels(), number * RANK : (number + 1) * RANK]
        assert adapter.B.grad is not None and own.any()
        assert torch.equal(adapter.B.grad[part.channels()], own)


@pytest.mark.parametrize("parts", [RANGES, STRIDED], ids=["ranges", "strided"])
@pytest.mark.parametrize("method", LOW_RANK)
def test_a_pull_and_a_step_are_those_of_every_part(method: str, parts: Parts) -> None:
    """Of each part what an adapter of its rows alone, with its A, would have."""
    torch.manual_seed(0)
    base = packed(IntGrid(bits=3, group_size=-1, symmetric=False, residual_bits=4), (N, K))
    adapter = built(method, parts, base)
    pull, drawn = adapter.pull(base, True), adapter.drawn(base, 0.5, True)
    da = []
    for number, part in enumerate(parts):
        rows, own = part.channels(), slice(number * RANK, (number + 1) * RANK)
        small = base.chosen(rows)
        alone = adapter_config(method, RANK).build(small)
        state = {name: t[rows] if name == "B" else t[..., rows] for name, t in adapter.state_dict().items()}
        alone.load_state_dict(state | {"A": adapter.A[own]})
        want = alone.pull(small, True)
        torch.testing.assert_close(pull["B"][rows], want["B"])
        torch.testing.assert_close(drawn["B"][rows], alone.drawn(small, 0.5, True)["B"], atol=1e-6, rtol=1e-3)
        da.append(want["A"])
    torch.testing.assert_close(pull["A"], torch.cat(da))
    with torch.no_grad():
        adapter.A[:RANK] *= 20  # parts of very different size
        before = base.on_grid(adapter.grid_args(base))
        adapter.B += torch.randn_like(adapter.B) * adapter.one_step(base)["B"]
    values = [grid_values(slice(0, N), g, K, -1) for g in (before, base.on_grid(adapter.grid_args(base)))]
    assert float((values[1] - values[0]).square().mean().sqrt()) == pytest.approx(1, rel=0.5)


def test_starts_are_those_of_every_part() -> None:
    torch.manual_seed(0)
    grid = IntGrid(bits=3, group_size=-1, symmetric=False, residual_bits=0)
    weight = torch.randn(N, K)
    base = packed(grid, (N, K))
    adapter = config_of("lr_qat", STRIDED, init="loftq").build(base, weight)
    assert isinstance(adapter, LowRank)
    error, (a, b) = rounding_error(base, weight), adapter.factors()
    for part in STRIDED:
        left = (error - adapter.config.gain * (b @ a))[part.channels()]
        best = torch.linalg.svdvals(error[part.channels()])[RANK:]
        torch.testing.assert_close(left.norm(), best.norm())
    svd = config_of("dl_qat", STRIDED, init="svd").build(packed(GRIDS[0], (N, K)))
    assert isinstance(svd, LowRank) and not svd.B.any()
    torch.testing.assert_close(svd.A[:RANK] @ svd.A[:RANK].t(), torch.eye(RANK), atol=1e-5, rtol=0)


PHI3: dict[str, Any] = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=4096,
    max_position_embeddings=128,
    pad_token_id=0,
    eos_token_id=2,
)


def test_a_lora_of_the_whole_starts_every_part(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "phi3", transformers.Phi3Config(**PHI3))
    theirs = make_lora(source.folder, tmp_path / "lora", target_modules=["qkv_proj", "down_proj"])
    plan = {name: own.outputs for name, own in segments_in(source.folder).items()}
    errors: dict[str, float] = {}
    for method in ("dl_qat", "lr_qat"):
        for segments in ({}, plan):
            config = adapter_config(method, 4)
            assert isinstance(config, LowRankOptions)
            config = config.with_plan(segments)
            model, _ = quantize(source, QuantSection(group_size=32, calibrate="absmax"))
            attach(model, config)
            report = start_from_lora(model, config, read_lora(tmp_path / "lora"))
            errors[f"{method} {bool(segments)}"] = report.rows[0].error
            name = report.rows[0].layer
            adapter = model.get_submodule(name).adapter
            a, b = adapter.factors()
            if method == "dl_qat":
                delta = theirs.base_model.model.get_submodule(name).get_delta_weight("default")
                torch.testing.assert_close(config.gain * (b @ a), delta, rtol=1e-5, atol=1e-9)
    assert errors["dl_qat True"] < 1e-6
    assert errors["lr_qat True"] < errors["lr_qat False"], "three products of rank 4 fit better than one"


def test_parts_that_are_not_the_rows_are_refused() -> None:
    for wrong in (RANGES[:2], (*RANGES[:2], Segment(17, 6)), (Segment(0, 12), Segment(12, 13))):
        with pytest.raises(ValueError, match=r"are not its 24 rows, each in one of them"):
            check_parts(wrong, N, "q")
    assert read_layout(json.loads(json.dumps(layout({"a": RANGES, "b": RANGES})))) == {
        "a": RANGES,
        "b": RANGES,
    }
    good: dict[str, Any] = {"parts": [[0, 1, 1, 0], [1, 1, 1, 0]], "layers": ["a"]}
    for entries, words in (
        ({}, "needs a list"),
        ([{}], "`parts` and `layers`"),
        ([good | {"parts": [[0, 1, 1, 0]]}], "two or more lists"),
        ([good | {"parts": [[0, 1, 1, 0], [1, 0, 1, 0]]}], "two or more lists"),
        ([good, good], "each once"),
    ):
        with pytest.raises(ValueError, match=r"^segments") as told:
            read_layout(entries)
        assert words in str(told.value)


def fused_model() -> Any:
    """A packed GPT-NeoX: q, k and v of a head after each other in one matrix."""
    torch.manual_seed(0)
    config = CONFIGS["gpt_neox"]()
    model = transformers.AutoModelForCausalLM.from_config(config)
    weights = random_weights(model, int_grid(group_size=32, residual_bits=4))
    return set_packed(model, {k: v for k, v in weights.items() if not k.endswith("embed_out")}).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_peft_and_the_folder_read_each_other(tmp_path: Path) -> None:
    wrapped = get_peft_model(fused_model(), LowBitConfig(method="lr_qat", rank=RANK, segments="auto"))
    for module in wrapped.modules():
        if isinstance(module, LowRank):
            randomize(module, 0.3)
    wanted = logits(wrapped)
    fused: Any = wrapped.base_model.model.gpt_neox.layers[0].attention.query_key_value
    assert fused.lowbit_adapters["default"].A.shape == (3 * RANK, 64)
    wrapped.save_pretrained(tmp_path / "theirs")
    config, state, digest = read_adapter(tmp_path / "theirs")
    ours = fused_model()
    attach(ours, config)
    load_adapter_state(ours, state)
    assert digest == base_digest(ours) and torch.equal(logits(ours), wanted)
    write_adapter(tmp_path / "ours", adapter_state(ours), config, digest, "base")
    again = PeftModel.from_pretrained(fused_model(), tmp_path / "ours")
    assert torch.equal(logits(again), wanted)
    assert torch.equal(logits(again.merge_and_unload()), wanted)
    facts = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    (entry,) = facts["segments"]
    assert len(entry["layers"]) == 2 and entry["parts"] == [[16 * i, 16, 4, 48] for i in range(3)]
    assert "segments" not in facts["options"]


def test_who_has_no_parts_says_so() -> None:
    with pytest.raises(ValueError, match="segments: scale has no A and B"):
        LowBitConfig(method="scale", segments="auto")
    with pytest.raises(ValueError, match="segments: got 'heads'; allowed: auto, none"):
        LowBitConfig(segments="heads")
    with pytest.raises(ValueError, match="set low_rank_gradient: exact, or segments: none"):
        adapter_config("lr_qat", segments="auto", low_rank_gradient="factorised")


def test_without_segments_the_folder_is_what_it_was(tmp_path: Path) -> None:
    model = fused_model()
    attach(model, config := adapter_config("lr_qat"))
    write_adapter(tmp_path / "a", adapter_state(model), config, base_digest(model), "base")
    assert "segments" not in (tmp_path / "a" / "adapter_config.json").read_text()


def test_the_line_trains_a_product_for_each_part(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "phi3", transformers.Phi3Config(**PHI3))
    changes = {
        "model.path": str(source.folder),
        "quant": {"bits": 4, "group_size": 32, "calibrate": "absmax"},
        "adapter": {"method": "lr_qat", "rank": RANK, "segments": "auto"},
        "train.max_steps": 1,
        "eval.perplexity": False,
    }
    recipe = load_recipe(recipe_file(tmp_path, changes))
    run = pipeline.train(recipe).parent
    table = json.loads((run / "trainable.json").read_text())
    rows = {row["layer"].rpartition(".")[2]: row["tensors"] for row in table["rows"]}
    assert rows["qkv_proj"]["A"] == 3 * RANK * 64 and rows["qkv_proj"]["B"] == 128 * RANK
    assert rows["gate_up_proj"]["A"] == 2 * RANK * 64 and rows["o_proj"]["A"] == RANK * 64
    assert skeleton(recipe, source.folder).trainable == table["trainable"]
    config, state, _ = read_adapter(run / "adapter")
    assert isinstance(config, LowRankOptions)
    assert config.plan == {n: s.outputs for n, s in segments_in(source.folder).items() if s.outputs}
    moved = state["base_model.model.model.layers.0.self_attn.qkv_proj.lowbit_adapters.B"]
    assert moved.abs().sum(1).gt(0).sum() > 100, "every row learns"
    pipeline.merge(run)  # again from the files: it must be the same
