"""LoTA-QAF against its equations in float64: the threshold, the offset, t-SignSGD and its curve, a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lowbit_ft.adapters.attach import adapted_layers, load_adapter_state
from lowbit_ft.adapters.lota import LotaConfig
from lowbit_ft.data.batches import Batches
from lowbit_ft.grid import IntGrid
from lowbit_ft.recipe.check import notes
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.train.loop import train
from lowbit_ft.train.optim import lr_factor
from lowbit_ft.train.optimizers.t_signsgd import TSignSGD
from tests import reference
from tests.adapters.common import packed, trained
from tests.packed_tools import adapted_llama
from tests.recipe.recipe_text import GOOD, problems_with, write
from tests.toy import equal, examples, quiet, section, state

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("residual", [0, 4])
@pytest.mark.parametrize("bits", [2, 4])
def test_every_product_moves_a_code_by_its_sign_beyond_the_threshold(bits: int, residual: int) -> None:
    """All products from -r to r on all codes: round(c + gain P) is clip(c + sign(P) [|P| > w]), no tie."""
    for rank, threshold in ((64, 0.75), (64, 0.875), (16, 0.75), (5, 0.4), (1024, 0.34)):
        config = LotaConfig(rank=rank, threshold=threshold)
        base = packed(IntGrid(bits=bits, group_size=32, symmetric=False, residual_bits=residual), (24, 96))
        adapter = config.build(base)
        n, k = base.shape
        with torch.no_grad():
            adapter.A.fill_(1)
            adapter.B.zero_()
            wanted = torch.linspace(-rank, rank, n).round().long()
            for row, product in enumerate(wanted.tolist()):
                adapter.B[row, : abs(product)] = 1 if product > 0 else -1
        assert torch.equal(adapter.B @ adapter.A, wanted.float()[:, None].expand(n, k))
        step = wanted.sign() * (wanted.abs() > int(threshold * rank))
        before = reference.unpack(base.codes, bits, k)
        after = (before + step[:, None]).clamp(0, 2**bits - 1)
        merged = adapter.merge(base)
        assert torch.equal(reference.unpack(merged.codes, bits, k), after) and not torch.equal(before, after)  # pyright: ignore
        assert torch.equal(merged.scale, base.scale)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_offset_is_the_mean_of_what_the_threshold_left(symmetric: bool) -> None:
    base = packed(IntGrid(bits=2, group_size=64, symmetric=symmetric, residual_bits=0))
    adapter = trained(LotaConfig(rank=7, threshold=0.5, offset="float"), base)
    merged: Any = adapter.merge(base)
    dense, (_, k) = reference.Base.of(base), base.shape
    sign = dense.wide(dense.s0).sign()
    product = (adapter.B @ adapter.A).detach().double()  # pyright: ignore
    moved = (reference.unpack(merged.codes, 2, k) - dense.code) * sign
    left = (product - 3 * moved) / 3
    mu = torch.stack([left[:, i : i + 64].mean(1) for i in range(0, k, 64)])
    assert mu.abs().max() > 0.1
    torch.testing.assert_close(merged.offset.double(), dense.s0.abs() * mu, rtol=2**-8, atol=1e-9)


def test_t_signsgd_is_its_equation() -> None:
    """Where the quantile is interpolated, as the released code takes it: the same entries step."""
    torch.manual_seed(0)
    for share in (0.05, 0.3, 1.0, 1e-4):
        p = nn.Parameter(torch.randint(-1, 2, (31, 17)).float())
        p.grad = torch.randn(31, 17)
        p.grad[3] = 0
        p.grad[4] = 1e-10  # below tau
        g, before = p.grad.double(), p.detach().clone().double()
        sigma = torch.quantile(g.abs(), 1 - share)
        wanted = (before - torch.where((g.abs() > sigma) & (g.abs() > 1e-9), g.sign(), 0.0)).clamp(-1, 1)
        TSignSGD([p], lr=share).step()
        assert torch.equal(p.detach().double(), wanted) and not torch.equal(wanted, before)
        assert not (wanted != before)[3:5].any()


def test_the_curve_is_the_papers() -> None:
    """Of 5 %: 0.1 % when 80 % of the steps are done, 0.01 % at the end, linear between."""
    one = section(max_steps=100, scheduler="lota", warmup_ratio=0.0)
    shares = [0.05 * lr_factor(one, step, 100) for step in range(100)]
    assert [shares[i] for i in (0, 40, 80, 90)] == pytest.approx([0.05, 0.0255, 0.001, 0.00055])
    assert shares[-1] == pytest.approx(0.0001 + 0.0009 / 20)


def go(folder: Path, model: Any, **more: Any) -> Any:
    changes = {"optimizer": "t_signsgd", "learning_rate": 0.3, "scheduler": "lota", "save_every": 2}
    data = Batches(examples(9), 2, 0, 0)
    return train(model, data, None, section(**changes, max_steps=4), folder, console=quiet(), **more)


def test_a_run_stays_ternary_and_resumes_bit_equal(tmp_path: Path) -> None:
    config, grid = LotaConfig(rank=3, offset="float"), IntGrid(bits=2, group_size=32, residual_bits=0)
    model = adapted_llama(config, grid)
    go(tmp_path / "whole", model)
    values = state(model)
    assert all(bool(((t == 0) | (t.abs() == 1)).all()) for t in values.values())
    assert sum(bool(t.any()) for name, t in values.items() if name.endswith(".B")) > 7
    early = load_file(tmp_path / "whole" / "checkpoints" / "step-00000002" / "adapter.safetensors")
    assert not all(torch.equal(early[name], tensor) for name, tensor in values.items() if name in early)
    for path in (tmp_path / "whole" / "checkpoints").glob("step-00000004"):
        path.rename(tmp_path / "gone")
    again = adapted_llama(config, grid, seed=9)
    go(tmp_path / "whole", again, resume=True)
    assert equal(state(again), values)
    _, layer = next(adapted_layers(model))
    with torch.no_grad():
        layer.adapter.A.mul_(0.5)  # pyright: ignore
    with pytest.raises(ValueError, match=r"A: holds other numbers than -1, 0 and 1; train it with t-SignSGD"):
        layer.adapter.merge(layer.base)  # pyright: ignore
    with pytest.raises(ValueError, match="holds other numbers than -1, 0 and 1"):
        load_adapter_state(again, {n: t * 0.5 for n, t in adapter_tensors(again).items()})


def adapter_tensors(model: Any) -> dict[str, torch.Tensor]:
    from lowbit_ft.adapters.attach import adapter_state

    return {name: tensor.detach().clone() for name, tensor in adapter_state(model).items()}


LOTA = ("adapter={method: lota}", "train.optimizer=t_signsgd", "train.learning_rate=0.05")
REFUSED = [
    (("adapter={method: lota}",), "got 'adamw', which would leave the numbers of adapter lota: .*t_signsgd"),
    (("train.optimizer=t_signsgd",), "adapter lr_qat has numbers of any size; set optimizer: adamw"),
    ((*LOTA, "train.learning_rate=2"), "train.learning_rate: got 2, which t_signsgd takes as the share"),
    ((*LOTA, "train.weight_decay=0.1"), "train.weight_decay: got 0.1 with t_signsgd"),
    ((*LOTA, "train.gradient={kind: zeroth_order}"), "which moves by small amounts"),
    ((*LOTA, "train.gradient={kind: fogzo}"), "but lota trains nothing that is rounded"),
    ((*LOTA, "train.gradient={cage: {}}"), "but lota trains nothing that is rounded"),
    ((*LOTA, "train.reconstruct={}"), "got a section, whose optimizer is Adam"),
    ((*LOTA, "train.sharding=fsdp"), r"'t_signsgd' \(it looks at whole tensors\) cannot step on shards"),
    ((*LOTA, "adapter.threshold=0.3"), "would move a code by more than one; set threshold: 0.34"),
    ((*LOTA, "adapter.offset=float"), "float"),
    (
        (*LOTA, "quant.activations={kind: tensor, learn: true}"),
        "which has no steps for what quant.activations.learn trains",
    ),
]


@pytest.mark.parametrize(("overrides", "words"), REFUSED, ids=lambda x: str(x)[-40:])
def test_what_it_does_not_go_with(
    overrides: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import re

    monkeypatch.chdir(tmp_path)
    found = problems_with(GOOD.replace("  rank: 8\n", ""), overrides)
    assert any(re.search(words, line) for line in found), found
    assert problems_with(GOOD.replace("  rank: 8\n", ""), LOTA) == []


def test_residual_bits_that_nothing_reads_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = GOOD.replace("  rank: 8\n", "")
    said = "lota counts from the codes: quant.residual_bits 4 is memory that nothing reads"
    assert any(said in note for note in notes(load_recipe(write(text), LOTA)))
    assert not any(said in note for note in notes(load_recipe(write(text), (*LOTA, "quant.residual_bits=0"))))
