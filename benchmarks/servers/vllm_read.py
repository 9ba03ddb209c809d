"""Load one folder in vLLM and write what it says: log-probabilities of the prompts, and greedy tokens.

    python vllm_read.py JOB.json ANSWER.json

JOB: {"folder", "dtype", "prompts": [[ids]], "new_tokens", "dequantize": bool}. ANSWER: {"logprobs":
[[float]], "tokens": [[ids]], "kernels": [...], "version"} or {"refused": "the message"}. Runs in vLLM's
environment.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def read(job: dict[str, Any]) -> dict[str, Any]:
    import vllm

    kernels: dict[str, int] = {}
    if job["dequantize"]:
        import vllm_dequantize

        vllm_dequantize.register()
        kernels = vllm_dequantize.DequantizingKernel.seen
    model = vllm.LLM(
        job["folder"], dtype=job["dtype"], max_model_len=512, enforce_eager=True, disable_log_stats=True
    )
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=job["new_tokens"], prompt_logprobs=0)
    outputs = model.generate([{"prompt_token_ids": p} for p in job["prompts"]], sampling, use_tqdm=False)
    logprobs = [
        [
            place[token].logprob
            for token, place in zip(o.prompt_token_ids[1:], o.prompt_logprobs[1:], strict=True)
        ]
        for o in outputs
    ]
    tokens = [list(o.outputs[0].token_ids) for o in outputs]
    return {
        "logprobs": logprobs,
        "tokens": tokens,
        "kernels": list(kernels),
        "version": vllm.__version__,
    }


def main() -> None:
    job, answer = (Path(text) for text in sys.argv[1:])
    try:
        found = read(json.loads(job.read_text()))
    except (RuntimeError, ValueError, NotImplementedError, KeyError, AssertionError) as error:
        found = {"refused": f"{type(error).__name__}: {error}"}
    answer.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
