"""What plan predicts is what is counted while a step really runs; and what it says of shapes whose weights
are not here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import plan_counts, plan_error, plan_shapes
from lowbit_ft.adapters.attach import attach
from lowbit_ft.plan.counting import Counter, reference_workspace
from lowbit_ft.plan.plan import Card, find_card, no_card, plan
from lowbit_ft.plan.stages import optimizer_bytes, optimizer_state, throughput
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.recipe import Recipe, load_recipe
from tests.architectures import CONFIGS, checkpoint_of

ROOT = Path(__file__).resolve().parents[2]
QUICK = ROOT / "recipes" / "quickstart.yaml"
BIG = ROOT / "recipes" / "llama31-8b-w4-lr-qat.yaml"
SHAPES = ROOT / "tests" / "configs"
CPU = Card(1 << 50, "a CPU", 0)
SMALL = ["data.sequence_len=64", "train.micro_batch_size=2", "quant.group_size=32"]


def _shape(monkeypatch: pytest.MonkeyPatch, overrides: list[str], **config: Any) -> str:
    values = plan_shapes.llama(128, 3, 4, 2, 256, 1024) | config
    monkeypatch.setitem(plan_shapes.SHAPES, "test", (values, [*SMALL, *overrides], ("real", "fake")))
    return "test"


SCALES = ["adapter={method: scale}", "quant.residual_bits=0"]
CASES = {
    "lr_qat": (["adapter={method: lr_qat, rank: 8}"], {}),
    "l4q, asymmetric, accumulated": (
        [
            "adapter={method: l4q, rank: 8}",
            "quant.symmetric=false",
            "quant.bits=3",
            "train.gradient_accumulation_steps=2",
        ],
        {},
    ),
    "dl_qat, tied, bf16": (
        ["adapter={method: dl_qat, rank: 8}", "model.dtype=bfloat16", "quant.bits=2"],
        {"tie_word_embeddings": True},
    ),
    "alpha_tuning": (
        [
            "quant.grid=binary",
            "quant.calibrate=greedy",
            "export.format=native",
            "adapter={method: alpha_tuning}",
        ],
        {},
    ),
    "ef_qat in bf16": (["adapter={method: ef_qat, share: 0.25, master: bf16}"], {}),
    "packed head and embedding": (
        [
            "adapter={method: lr_qat, rank: 4}",
            "quant.lm_head=8",
            "quant.embeddings=4",
            "export.format=native",
        ],
        {},
    ),
    "static inputs that learn": (
        [*SCALES, "quant.activations={kind: tensor, dynamic: false, learn: true}", "export.format=native"],
        {},
    ),
    "clips that learn": (
        [*SCALES, "quant.activations={bits: 4, learn: true, clip: 0.9}", "export.format=native"],
        {},
    ),
    "int4 cache": (["adapter={method: scale}", "quant.residual_bits=0", "quant.kv_cache.bits=4"], {}),
    "opt": (
        ["adapter={method: scale}", "quant.residual_bits=0"],
        {
            "model_type": "opt",
            "architectures": ["OPTForCausalLM"],
            "ffn_dim": 256,
            "word_embed_proj_dim": 128,
            "max_position_embeddings": 256,
        },
    ),
    "experts": (
        ["adapter={method: scale}", "quant.residual_bits=0"],
        {
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
}


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [(name, name not in ("dl_qat, tied, bf16", "experts")) for name in CASES] + [("lr_qat", False)],
)
def test_a_step_holds_what_plan_says(
    name: str, checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 5 % of the bytes counted over real steps and an evaluation; what does not depend on the step,
    exactly.
    """
    overrides, config = CASES[name]
    shape = _shape(monkeypatch, overrides, **config)
    recipe = plan_shapes.recipe_for(shape, tmp_path / "model", checkpointing)
    _, guess = plan_error.predicted(recipe, True)
    found = plan_counts.count_real(recipe, shape, tmp_path / "model")
    assert guess["packed base"] + guess["dense"] == found["packed base"] + found["dense"]
    assert guess["adapters"] == found["adapters"] and guess["optimizer"] == found["optimizer"]
    assert guess["total"] == pytest.approx(found["total"], rel=0.05)
    fixed = guess["total"] - guess["step"]
    assert fixed + guess["evaluation"] == pytest.approx(fixed + found["evaluation"], rel=0.05)


def test_counts_without_data_are_the_counts_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = _shape(monkeypatch, ["adapter={method: lr_qat, rank: 8}", "train.gradient_accumulation_steps=2"])
    recipe = plan_shapes.recipe_for(shape, tmp_path / "model", True)
    real, fake = (
        plan_counts.count_real(recipe, shape, tmp_path / "model"),
        plan_counts.count_fake(recipe, True),
    )
    assert fake["step"] == pytest.approx(real["step"], rel=0.01), "every position is a target there"


def test_the_counter_counts_inside_packed_ops() -> None:
    """Against the CPU's own allocator, which sees every allocation."""
    import lowbit_kernels as kernels

    from benchmarks.loss_memory import allocator_peak

    n, k, m = 96, 256, 40
    codes, scale = torch.zeros(n, kernels.packed_width(k, 4), dtype=torch.int16), torch.ones(2, n)
    x = torch.randn(m, k, requires_grad=True)
    a, b, s = (
        torch.randn(4, k, requires_grad=True),
        torch.zeros(n, 4, requires_grad=True),
        torch.ones(2, n, requires_grad=True),
    )

    def run() -> None:
        weight = (codes, None, scale, None, a, b, None, None, s, None, None, None)
        y = kernels.grid_linear(x, *weight, 1.0, "grid", 4, 0, 0, 128, False)
        y.backward(torch.ones_like(y))

    for tensor in (x, a, b, s):
        tensor.grad = None
    with Counter() as count:
        run()
    held = count.live
    for tensor in (x, a, b, s):
        tensor.grad = None
    want = allocator_peak(run)
    # The allocator also sees what a matrix product packs for itself; that is little here.
    assert count.peak == pytest.approx(want, rel=0.1) and count.peak <= want
    assert held == 4 * (m * k + 4 * k + 4 * n + 2 * n)


def test_workspace_rules_are_asked_first_and_known_shapes_once() -> None:
    asked = []
    rule = reference_workspace(
        lambda name, args: asked.append(name) or (77 if name == "packed_matmul" else -1)
    )
    from lowbit_kernels import packed_width

    x, codes, scale = (
        torch.empty(3, 64),
        torch.empty(8, packed_width(64, 4), dtype=torch.int16),
        torch.empty(2, 8),
    )
    assert rule("packed_matmul", (x, codes, scale, None, None, 4, 32)) == 77
    assert rule("packed_matmul", (x, codes, scale, None, None, 4, 32)) == 77 and asked == ["packed_matmul"]
    own = rule("packed_matmul_dx", (torch.empty(3, 8), codes, scale, None, None, 4, 64, 32))
    assert own >= 4 * (3 * 64 + 8 * 64), "the product and a decoded chunk"


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt", "gpt2", "mixtral", "falcon", "qwen3_next"])
def test_every_architecture_is_counted_as_quantize_and_attach_make_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes by part against the real packed, adapted model; with the weights there and with config.json
    alone.
    """
    monkeypatch.chdir(ROOT)
    checkpoint = checkpoint_of(CONFIGS[name](), tmp_path / "model")
    changes = [
        f"model.path={tmp_path / 'model'}",
        "quant.group_size=32",
        "data.sequence_len=32",
        "train.micro_batch_size=1",
    ]
    recipe = load_recipe(
        QUICK, [*changes, "adapter={method: lr_qat, rank: 4}", f"output={tmp_path / 'run'}"], check=False
    )
    made = plan(recipe, card=CPU)
    assert (
        made is not None
        and made.stages["training"] > 0
        and not any("estimate" in note for note in made.notes)
    )
    model, _ = quantize(checkpoint, recipe.quant)
    attach(model, recipe.adapter)
    found = plan_counts.parts_of(model)
    p = made.parts
    assert p["codes"] + p["residual"] + p["scales and zeros"] == found["packed base"]
    assert p["embeddings"] + p["head"] + p["norms and other"] == found["dense"]
    assert p["adapters"] == found["adapters"]
    for file in (tmp_path / "model").glob("*.safetensors*"):
        file.unlink()
    alone = plan(recipe, card=CPU)
    assert alone is not None and alone.parts == made.parts


def test_a_model_that_does_not_run_without_data_is_an_estimate_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowbit_ft.plan import plan as planning

    def broken(*_: Any) -> Any:
        raise RuntimeError("data-dependent")

    monkeypatch.setattr(planning, "step_costs", broken)
    monkeypatch.setattr(planning, "_TRACED", {})
    exact, rough = (
        load_recipe(QUICK, [f"train.gradient_checkpointing={word}"]) for word in ("true", "false")
    )
    made, more = plan(exact), plan(rough)
    assert made is not None and more is not None
    assert "estimate" in made.notes[0] and "data-dependent" in made.notes[0]
    assert 0 < made.parts["saved layer inputs"] < more.parts["saved layer inputs"]


def _big(overrides: list[str] = (), folder: str = "llama31_8b", card: Card | None = None) -> Any:  # pyright: ignore[reportArgumentType]
    made = plan(load_recipe(BIG, list(overrides), check=False), SHAPES / folder, card or no_card())
    assert made is not None
    return made


def test_the_parts_of_8b_are_its_shapes() -> None:
    made = _big(["train.optimizer=adamw"])
    weights = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    masters = 32 * 32 * (2 * 8192 + 2 * 5120 + 3 * 18432) + weights // 128
    p = made.parts
    assert p["codes"] == p["residual"] == weights // 2 and p["scales and zeros"] == weights // 128 * 2
    assert p["embeddings"] == p["head"] == 128256 * 4096 * 2
    assert made.trainable == masters and p["adapters"] == p["gradients"] == 4 * masters
    assert p["optimizer states"] == 8 * masters + 4 * 3 * 7 * 32, "two averages, and a step count per tensor"
    assert p["saved layer inputs"] == pytest.approx(31 * 2048 * 4096 * 2, rel=0.001), (
        "in the backward of the last layer its own is used"
    )
    assert sum(p.values()) == made.stages["training"] and made.fits
    assert made.needs.disk["base/"] == sum(
        p[name] for name in ("codes", "residual", "scales and zeros", "embeddings", "head", "norms and other")
    )


def test_offload_and_paged_states_are_in_ram_not_on_the_card() -> None:
    here, away = _big(), _big(["train.offload=cpu"])
    hidden = 2048 * 4096 * 2  # the input that is fetched one layer ahead
    assert hidden <= away.parts["saved layer inputs"] < hidden + 0.01 * here.parts["saved layer inputs"]
    assert away.needs.offloaded == 32 * 2048 * 4096 * 2
    assert away.needs.ram - here.needs.ram == away.needs.offloaded
    paged, own = _big(["train.optimizer=paged_adamw8bit"]), _big(["train.optimizer=adamw8bit"])
    assert paged.parts["optimizer states"] < 0.1 * own.parts["optimizer states"]
    assert paged.needs.ram > own.needs.ram
    on_cpu = _big(["train.offload=cpu", "model.device=cpu"], card=CPU)
    assert on_cpu.parts["saved layer inputs"] > 0.9 * here.parts["saved layer inputs"], (
        "on a CPU they stay where they are"
    )


def test_shards_hold_a_part_and_gather_a_layer() -> None:
    alone = _big(["train.optimizer=adamw"])
    recipe = load_recipe(BIG, ["train.optimizer=adamw", "train.sharding=fsdp"], check=False)
    two = plan(recipe, SHAPES / "llama31_8b", no_card(), processes=2)
    ddp = plan(
        load_recipe(BIG, ["train.optimizer=adamw"], check=False),
        SHAPES / "llama31_8b",
        no_card(),
        processes=2,
    )
    assert two is not None and ddp is not None
    for part in ("codes", "residual", "adapters", "gradients", "optimizer states"):
        assert (
            two.parts[part] == pytest.approx(alone.parts[part] / 2, abs=1)
            and ddp.parts[part] == alone.parts[part]
        )
    layer = alone.parts["codes"] * 2 / 32
    root = alone.parts["embeddings"] + alone.parts["head"]
    assert root + 2 * layer < two.parts["gathered layers"] < root + 4 * layer
    assert two.stages["training"] < alone.stages["training"] < ddp.stages["training"]


def test_a_teacher_holds_its_hidden_states_and_another_model_its_weights() -> None:
    """8B: the residual teacher adds [B, L, H] and a third of a step; another one 8 bits of every weight."""
    plain = _big()
    tokens = plain.recipe.train.micro_batch_size * plain.recipe.data.sequence_len
    hidden = tokens * 4096 * 2
    own = _big(["train.signal.kind=mix", "train.teacher=residual"])
    assert own.parts["teacher"] == hidden
    assert own.stages["training"] - plain.stages["training"] == hidden
    assert any("signal mix, teacher residual" in note and "more time per step" in note for note in own.notes)
    other = _big(["train.signal.kind=logits", "train.teacher=meta/other"])
    weights = sum(row.out_features * row.in_features for row in other.rows)
    assert weights < other.parts["teacher"] - hidden < 1.5 * weights + 3e9
    assert "teacher" not in plain.parts


def test_longer_windows_and_more_of_them_hold_more() -> None:
    totals = [_big([f"data.sequence_len={n}"]).stages["training"] for n in (1024, 2048, 4096)]
    assert totals[0] < totals[1] < totals[2]
    assert _big(["train.micro_batch_size=2"]).stages["training"] > _big().stages["training"]
    plain, flash, eager = (
        _big(["data.sequence_len=8192", f"model.attention={kind}"])
        for kind in ("sdpa", "flash_attention_2", "eager")
    )
    assert plain.parts["batch and masks"] == flash.parts["batch and masks"], (
        "rows of a window are attended one by one"
    )
    assert eager.parts["batch and masks"] - flash.parts["batch and masks"] >= 8192 * 8192, (
        "a mask over pairs of tokens"
    )


def test_mlp_and_norms_in_chunks_hold_less() -> None:
    long = ["data.sequence_len=16384", "train.gradient_checkpointing=true"]
    whole, cut = _big(long), _big([*long, "train.mlp_chunk=2048"])
    assert not whole.notes and not cut.notes and cut.parts["one layer"] < 0.5 * whole.parts["one layer"]


def test_the_loss_of_a_long_window_lies_on_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """2048 tokens of a 128k vocabulary by the line through two and four chunks, and chunk by chunk."""
    from lowbit_ft.plan import step as plan_step

    recipe = load_recipe(BIG, [], check=False)
    made = plan_step.step_costs(plan_module_skeleton(recipe), _setting())
    monkeypatch.setattr(
        plan_step,
        "_tail",
        lambda around, s, rules, known: plan_step._tail_of(around, s, rules, s.windows, s.length),
    )
    whole = plan_step.step_costs(plan_module_skeleton(recipe), _setting())
    assert made.tail.backward == pytest.approx(whole.tail.backward, rel=0.01)
    assert made.tail.forward == pytest.approx(whole.tail.forward, rel=0.03)


def plan_module_skeleton(recipe: Recipe) -> Any:
    from lowbit_ft.plan.model import skeleton

    return skeleton(recipe, SHAPES / "llama31_8b")


def _setting() -> Any:
    from lowbit_ft.plan.costs import Setting

    return Setting(1, 2048, "bfloat16", "no", True, True, False, "sdpa", 89)


def test_optimizer_states() -> None:
    assert [
        optimizer_bytes(name) for name in ("adamw", "adamw8bit", "paged_lion8bit", "sgd32bit", "ademamix")
    ] == [8, 2, 1, 4, 12]
    assert optimizer_state("adamw", [10, 1 << 20]) == (8 * (10 + (1 << 20)) + 8, 0)
    here, away = optimizer_state("paged_adamw8bit", [10, 5000, 1 << 20])
    assert here == 2 * (40 + 5000 + 4 * 20) + 2 * 1024 and away == 2 * ((1 << 20) + 4 * (1 << 12))
    assert sum(optimizer_state("adamw8bit", [10, 5000, 1 << 20])) == here + away


def test_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    quick, big = load_recipe(QUICK), load_recipe(BIG, check=False)
    assert find_card(quick).arch == 0 and find_card(quick, 3.5).nbytes == 3_500_000_000
    if not torch.cuda.is_available():
        assert find_card(big).nbytes == 24_000_000_000 and find_card(big).arch > 0
        assert find_card(big, in_use=True).arch == 0, "a run started here would take the CPU"
    assert find_card(big, 80.0).nbytes == 80_000_000_000
    alone = find_card(quick).nbytes
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert find_card(quick).nbytes == pytest.approx(alone / 4, rel=0.1)


def test_throughput_of_an_earlier_run(tmp_path: Path) -> None:
    assert throughput(tmp_path) is None
    rows = [{"step": i, "tokens_per_s": 10.0 * (i > 4) + 1} for i in range(10)]
    (tmp_path / "metrics.jsonl").write_text(
        "\n".join(json.dumps(row) for row in [*rows, {"step": 10, "valid_loss": 1}]) + "\n"
    )
    assert throughput(tmp_path) == 11.0
