"""ef_qat through PEFT: rows allotted over the network and chosen anew, saved and read back, in a loop of
one's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from lowbit_ft.adapters.ef_qat import EfQAT
from lowbit_ft.integrations.callbacks import begin_step
from lowbit_ft.integrations.peft import LowBitConfig
from tests.integrations.peft_models import logits, packed_model, tokens


def test_rows_of_the_network_that_change_are_saved_and_read(tmp_path: Path) -> None:
    model = get_peft_model(
        packed_model(), LowBitConfig("ef_qat", scope="network", share=0.4, refresh_steps=2)
    )
    ids, on = tokens(), [m for m in model.modules() if isinstance(m, EfQAT)]
    counts = {len(adapter.rows) for adapter in on}
    assert len(counts) > 1 and all(count % 16 == 0 for count in counts), (
        "one threshold, not one share per layer"
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.3)
    for step in range(5):
        begin_step(model, step, optimizer)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert any(len(adapter.left) for adapter in on), "no row left: nothing was looked at"
    expected = logits(model)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(packed_model(), str(tmp_path))
    assert torch.equal(logits(again), expected)
    assert torch.equal(logits(again.merge_and_unload()), expected)


def test_a_d_that_only_our_optimizer_steps_on_is_refused_for_training_and_read(tmp_path: Path) -> None:
    config = LowBitConfig("full_qat", master="none")
    with pytest.raises(ValueError, match="master: got 'none', which is for the AdamW of `lowbit-ft run`"):
        get_peft_model(packed_model(), config)
    config.inference_mode = True
    model = get_peft_model(packed_model(), config)
    for name, parameter in model.named_parameters():
        if name.endswith("delta"):
            parameter.data.add_(1)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(packed_model(), str(tmp_path))
    assert torch.equal(logits(again), logits(model))
