"""A packed folder in another class than it was written for: heads that are new by design, heads that are left
out, and what is missing by accident all the same."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from lowbit_ft.adapters.attach import base_digest, packed_layers
from lowbit_ft.export.writer import write_model
from lowbit_ft.integrations.peft import LowBitConfig
from lowbit_ft.integrations.transformers import mark_packed
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.linear import PackedLinear
from tests.integrations.loading import NATIVE, load
from tests.packed_tools import IDS, int_grid, random_weight, random_weights, tiny_checkpoint


def written(folder: Path, head_is_packed: bool = False, **changes: Any) -> Path:
    checkpoint = Checkpoint.open(tiny_checkpoint(folder / "dense", **changes), dtype="float32")
    weights = dict(random_weights(checkpoint.empty_model(), int_grid()))
    if head_is_packed:
        weights["lm_head"] = random_weight((64, 128), int_grid(bits=8))
    write_model(folder / "packed", checkpoint, weights, NATIVE)
    return folder / "packed"


@pytest.mark.parametrize("head_is_packed", [False, True])
def test_a_classifier_on_a_packed_base(head_is_packed: bool, tmp_path: Path) -> None:
    """The head is drawn as transformers draws it and said to be new; the base is the base, bit for bit; with
    LowBitConfig it is trained and travels with the adapter."""
    folder = written(tmp_path, head_is_packed)
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match=r"written by LlamaForCausalLM.*score.weight besides: new") as said:
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, num_labels=3, pad_token_id=0
        )
    left_out = [str(w.message) for w in said if "has no lm_head: left out" in str(w.message)]
    assert len(left_out) == head_is_packed
    spread = float(model.score.weight.std())
    assert 0.8 * model.config.initializer_range < spread < 1.2 * model.config.initializer_range
    decoder = load(folder).model
    assert torch.equal(model.model(IDS).last_hidden_state, decoder(IDS).last_hidden_state)
    assert base_digest(model.model) == base_digest(decoder) and len(list(packed_layers(model))) == 7

    model = get_peft_model(model, LowBitConfig(rank=4, task_type="SEQ_CLS"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=torch.tensor([2])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    expected = model.eval()(input_ids=IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fresh = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, num_labels=3, pad_token_id=0
        )
    assert torch.equal(
        PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()(input_ids=IDS).logits, expected
    )

    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "error", message=".*besides: new"
        )  # now it is the class that wrote the folder
        again = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "merged", dtype=torch.float32
        ).eval()
    assert torch.equal(again(input_ids=IDS).logits, expected)


def test_other_heads_and_none(tmp_path: Path) -> None:
    folder = written(tmp_path, head_is_packed=True)
    with pytest.warns(
        UserWarning, match=r"LlamaForTokenClassification has score.bias, score.weight besides: new"
    ):
        tagger = transformers.AutoModelForTokenClassification.from_pretrained(folder, dtype=torch.float32)
    assert tagger.score.bias is not None and not tagger.score.bias.any()
    with pytest.warns(UserWarning, match="LlamaModel has no lm_head: left out"):
        decoder = AutoModel.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(decoder(IDS).last_hidden_state, load(folder).model(IDS).last_hidden_state)


def test_an_encoder_with_a_pooler_that_was_not_there(tmp_path: Path) -> None:
    """The class that wrote the folder says what is new, not the place of the tensor: BERT's pooler is in the
    base."""
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "dense")
    model = transformers.BertForMaskedLM.from_pretrained(tmp_path / "dense")
    for name in ("query", "key", "value"):
        parent = model.bert.encoder.layer[0].attention.self
        setattr(
            parent,
            name,
            PackedLinear(random_weight((64, 64), int_grid(group_size=32)), getattr(parent, name).bias),
        )
    mark_packed(model)
    model.save_pretrained(tmp_path / "packed")
    new = r"BertForSequenceClassification has bert.pooler.dense.bias, .*classifier.weight besides"
    with pytest.warns(UserWarning, match=new):
        classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed")
    assert base_digest(classifier.bert) == base_digest(model.bert)


@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_of_a_decoder_alone(tied: bool, tmp_path: Path) -> None:
    """Its head is the embedding, or is missing: it is never drawn at random."""
    folder = written(tmp_path, tie_word_embeddings=tied)
    AutoModel.from_pretrained(folder, dtype=torch.float32).save_pretrained(tmp_path / "decoder")
    if tied:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*besides: new")
            assert torch.equal(load(tmp_path / "decoder")(IDS).logits, load(folder)(IDS).logits)
    else:
        with pytest.raises(ValueError, match="no file has lm_head.weight"):
            load(tmp_path / "decoder")


@pytest.mark.parametrize("missing", ["model.norm.weight", "lm_head.weight"])
def test_what_is_missing_by_accident_is_still_refused(missing: str, tmp_path: Path) -> None:
    folder = written(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors[missing]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"no file has {missing}"):
        AutoModelForCausalLM.from_pretrained(folder)
    if missing.startswith("model."):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(ValueError, match=f"no file has {missing}"):
                AutoModelForSequenceClassification.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["NobodyKnows"]  # then nothing is known to be new
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no file has score.weight"):
        AutoModelForSequenceClassification.from_pretrained(folder)
