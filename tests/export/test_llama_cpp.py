"""The gguf files in llama.cpp itself. Slow, and only where llama-cpp-python is installed (it builds from
source).
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import environment

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None,
    reason="needs llama-cpp-python (benchmarks/llama_cpp_perplexity.py says how)",
)
def test_llama_cpp_has_the_perplexity_of_transformers() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "llama_cpp_perplexity.py"), "--windows", "4"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("alike") == 5
