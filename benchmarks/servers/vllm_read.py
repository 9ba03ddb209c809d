"""Load folders in vLLM and say what it computes: log-probabilities of the prompts, and greedy tokens.

    python vllm_read.py < JOBS > ANSWERS

A line of JOBS is {"folder", "dtype", "prompts": [[ids]], "new_tokens", "dequantize": bool}. For each there is
a line: ANSWER {"logprobs": [[float]], "tokens": [[ids]], "kernels": [...], "version"}, or {"refused": text}.
Every job is a child that was forked when vLLM had been imported, which takes longer than the job. Runs in
vLLM's environment.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import vllm  # noqa: E402  # reads these variables

KERNEL = re.compile(r"(?:Using|Selected) (\w+Kernel) for")


def read(job: dict[str, Any]) -> dict[str, Any]:
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
    return {"logprobs": logprobs, "tokens": tokens, "kernels": list(kernels), "version": vllm.__version__}


def in_a_child(job: dict[str, Any]) -> dict[str, Any]:
    """What `read` says; its output goes to a file, where the kernels that were chosen are found."""
    with tempfile.TemporaryFile("w+") as log, tempfile.TemporaryFile("w+") as answer:
        child = os.fork()
        if child == 0:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            try:
                found = read(job)
            except Exception as error:  # whatever it is, it is what a user would see
                found = {"refused": f"{type(error).__name__}: {error}", "version": vllm.__version__}
            json.dump(found, answer)
            answer.flush()
            os._exit(0)
        os.waitpid(child, 0)
        log.seek(0)
        answer.seek(0)
        text, written = log.read(), answer.read()
    died = {"refused": f"the process died: {text[-400:]}"}
    found: dict[str, Any] = json.loads(written) if written else died
    if "refused" not in found and not found["kernels"]:
        found["kernels"] = sorted(set(KERNEL.findall(text)))
    return found


def main() -> None:
    for line in sys.stdin:
        print("ANSWER " + json.dumps(in_a_child(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
