"""Start vLLM's server on folders and ask it over HTTP, as `vllm_read.py` asks offline.

    python vllm_http.py < JOBS > ANSWERS

Lines as there; a job has "flags" besides, for the command line. Standard library only; it runs in vLLM's
environment.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from typing import Any

MODULE = "vllm.entrypoints.openai.api_server"
KERNEL = re.compile(r"(?:Using|Selected) (\w+Kernel) for")
ERROR = re.compile(r"(\w*(?:Error|Exception): .+)")
DEADLINE = 400  # seconds for a start


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def post(url: str, content: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(content).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def is_up(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def answers(address: str, job: dict[str, Any]) -> dict[str, Any]:
    logprobs, tokens = [], []
    for prompt in job["prompts"]:
        asked = {"model": "m", "prompt": prompt, "max_tokens": job["new_tokens"], "temperature": 0}
        asked |= {"prompt_logprobs": 0, "return_token_ids": True}
        choice = post(f"{address}/v1/completions", asked)["choices"][0]
        places = zip(prompt[1:], choice["prompt_logprobs"][1:], strict=True)
        logprobs.append([place[str(token)]["logprob"] for token, place in places])
        tokens.append(choice["token_ids"])
    return {"logprobs": logprobs, "tokens": tokens}


def serve(job: dict[str, Any]) -> dict[str, Any]:
    address = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", MODULE, "--model", job["folder"], "--served-model-name", "m"]
    command += ["--port", str(port), "--dtype", job["dtype"], "--max-model-len", "512", "--enforce-eager"]
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            [*command, *job["flags"]], stdout=log, stderr=log, env={**os.environ, **variables}
        )
        try:
            start = time.monotonic()
            while (
                server.poll() is None and not (up := is_up(address)) and time.monotonic() - start < DEADLINE
            ):
                time.sleep(1)
            found = answers(address, job) if server.poll() is None and up else {}
        finally:
            server.terminate()
            server.wait()
        log.seek(0)
        text = log.read()
    if not found:
        lines = ERROR.findall(text)
        return {"refused": lines[0] if lines else text[-400:]}
    return found | {"kernels": sorted(set(KERNEL.findall(text)))}


def main() -> None:
    for line in sys.stdin:
        print("ANSWER " + json.dumps(serve(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
