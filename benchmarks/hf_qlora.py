"""The QLoRA script of a Hugging Face user, on a packed base: transformers + peft + trl, SFT then DPO, DDP.

    pip install trl
    torchrun --nproc-per-node 2 benchmarks/hf_qlora.py --steps 30 --out hf_qlora.json

What a QLoRA tutorial has, with two lines changed: the model is packed by a LowBitQuantConfig while it loads
(the tiny Llama, so that the script stands alone), and the adapter's config is a LowBitConfig. Nothing of our
training loop is used. SFT is on the docstrings of the recipes' assets; DPO prefers a docstring's own text to
the same text with its words in reverse. Rank 0 writes and prints the loss curves. The adapter of SFT is
saved, loaded and merged: its logits must be those of the trained model, bit for bit.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import trl
from datasets import Dataset
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from lowbit_ft import LowBitConfig, LowBitQuantConfig
from lowbit_ft.integrations.callbacks import StepCallback

ASSETS = Path(__file__).resolve().parents[1] / "recipes" / "assets"


def texts(count: int) -> list[list[dict[str, str]]]:
    lines = (ASSETS / "docstrings" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines[:count]]


def sft_rows(count: int) -> Dataset:
    return Dataset.from_list([{"messages": messages} for messages in texts(count)])


def dpo_rows(count: int) -> Dataset:
    def pair(messages: list[dict[str, str]]) -> dict[str, Any]:
        answer = messages[-1]["content"]
        worse = " ".join(reversed(answer.split()))
        return {
            "prompt": messages[:-1],
            "chosen": [{"role": "assistant", "content": answer}],
            "rejected": [{"role": "assistant", "content": worse}],
        }

    return Dataset.from_list([pair(messages) for messages in texts(count)])


def curve(trainer: transformers.Trainer, key: str = "loss") -> list[float]:
    return [round(entry[key], 4) for entry in trainer.state.log_history if key in entry]


def arguments(kind: Any, folder: Path, steps: int, **more: Any) -> Any:
    return kind(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        max_length=128,
        seed=0,
        lr_scheduler_type="constant",
        **more,
    )


def packed(bits: int) -> Any:
    """The tiny Llama with its decoder linears on a W`bits` g128 grid."""
    config = LowBitQuantConfig(bits=bits, group_size=128)
    model = ASSETS / "tiny-llama"
    return AutoModelForCausalLM.from_pretrained(model, quantization_config=config, dtype=torch.float32)


def one_run(bits: int, folder: Path, method: str, steps: int) -> dict[str, Any]:
    """SFT, and DPO with a fresh adapter over the same base: the curves, and what was checked."""
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny-llama")
    options: dict[str, Any] = {"rank": 16} | ({"warmup_steps": steps // 3} if method == "l4q" else {})
    config = LowBitConfig(method=method, task_type="CAUSAL_LM", **options)
    sft = SFTTrainer(
        prepare_model_for_kbit_training(packed(bits)),
        arguments(SFTConfig, folder / "sft", steps, learning_rate=1e-3),
        train_dataset=sft_rows(4 * steps),
        processing_class=tokenizer,
        peft_config=config,
        callbacks=[StepCallback()],
    )
    sft.train()
    wrapped = type(sft.model_wrapped).__name__
    model = sft.accelerator.unwrap_model(sft.model_wrapped).eval()
    masters = {p.dtype for p in model.parameters() if p.requires_grad}
    ids = torch.arange(3, 60)[None].to(model.device)
    with torch.no_grad():
        trained = model(input_ids=ids).logits
        adapter = folder / f"adapter-{os.environ.get('RANK', '0')}"
        model.save_pretrained(adapter)
        merged = PeftModel.from_pretrained(packed(bits).to(model.device), adapter).merge_and_unload()
        exact = torch.equal(merged(input_ids=ids).logits, trained)
    dpo_model = prepare_model_for_kbit_training(packed(bits))
    torch.manual_seed(0)
    dpo = DPOTrainer(
        get_peft_model(dpo_model, LowBitConfig(method=method, task_type="CAUSAL_LM", rank=16)),
        args=arguments(DPOConfig, folder / "dpo", steps, learning_rate=1e-3, beta=0.1),
        train_dataset=dpo_rows(4 * steps),
        processing_class=tokenizer,
    )
    dpo.train()
    return {
        "wrapped": [wrapped, type(dpo.model_wrapped).__name__],
        "masters": sorted(map(str, masters)),
        "merged as trained": exact,
        "sft loss": curve(sft),
        "dpo loss": curve(dpo),
        "dpo reward margin": curve(dpo, "rewards/margins"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--methods", default="lr_qat,l4q")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rank = int(os.environ.get("RANK", "0"))
    found: dict[str, Any] = {
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft, trl)},
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }
    with tempfile.TemporaryDirectory() as folder:
        for method in given.methods.split(","):
            found[method] = one_run(given.bits, Path(folder, method), method, given.steps)
    if rank == 0:
        text = json.dumps(found, indent=1)
        print(text)
        if given.out:
            given.out.write_text(text + "\n", encoding="utf-8")
    bad = [m for m in given.methods.split(",") if not found[m]["merged as trained"]]
    if bad:
        raise SystemExit(f"merged is not what was trained: {', '.join(bad)}")


if __name__ == "__main__":
    main()
