"""Load gguf files in llama.cpp and say what it computes, as `vllm_read.py` does.

    python llama_cpp_read.py < JOBS > ANSWERS

A job has "flags" of llama-server (--cache-type-k, --cache-type-v, --flash-attn) and "environment" besides.
Runs in an environment that has llama-cpp-python.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

TYPES = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0, "q4_0": llama_cpp.GGML_TYPE_Q4_0}


def keywords(flags: list[str]) -> dict[str, Any]:
    """The flags of llama-server as arguments of Llama."""
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    made: dict[str, Any] = {"flash_attn": given.pop("--flash-attn", "off") == "on"}
    for letter in "kv":
        if (kind := given.pop(f"--cache-type-{letter}", None)) is not None:
            made[f"type_{letter}"] = TYPES[kind]
    assert not given, f"unknown flags: {given}"
    return made


def log_softmax(scores: Any) -> Any:
    high = scores.astype(np.float64)
    high -= high.max(-1, keepdims=True)
    return high - np.log(np.exp(high).sum(-1, keepdims=True))


def read(job: dict[str, Any]) -> dict[str, Any]:
    model = llama_cpp.Llama(
        str(Path(job["folder"]) / "model.gguf"),
        n_ctx=512,
        logits_all=True,
        verbose=False,
        n_threads=1,
        n_threads_batch=1,
        **keywords(job["flags"]),
    )
    logprobs, tokens = [], []
    for prompt in job["prompts"]:
        model.reset()
        model.eval(prompt)
        scores = log_softmax(model.scores[: len(prompt)])
        logprobs.append([float(scores[i, token]) for i, token in enumerate(prompt[1:])])
        made: list[int] = []
        while len(made) < job["new_tokens"]:
            made.append(int(model.scores[model.n_tokens - 1].argmax()))
            if made[-1] == model.token_eos():
                break
            model.eval(made[-1:])
        tokens.append(made)
    model.close()
    return {"logprobs": logprobs, "tokens": tokens, "kernels": [], "version": llama_cpp.__version__}


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        if os.fork() == 0:  # a variable is read once per process
            os.environ |= job["environment"]
            try:
                found = read(job)
            except Exception as error:  # whatever it is, it is what a user would see
                found = {"refused": f"{type(error).__name__}: {error}", "version": llama_cpp.__version__}
            print("ANSWER " + json.dumps(found), flush=True)
            os._exit(0)
        os.wait()


if __name__ == "__main__":
    main()
