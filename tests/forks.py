"""Python processes that have imported everything before they begin: 4 s of processor time less for each.

They are forked from a process that has done nothing but import (the forkserver of multiprocessing), so they
share no state with this one. What they share with each other is the seed of `hash`: what must not depend on
the order of a set is compared with a run of this process. Not for what is decided by an import or before it
(TRITON_INTERPRET, the first line of a program): that takes subprocess.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest import mock

from tests.processes import ROOT, environment

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "lowbit_ft.cli.main",
        "lowbit_ft.pipeline",
        "lowbit_ft.report.plots",
        "transformers.models.llama.modeling_llama",
    ]
)


class Forked:
    """What subprocess.Popen([sys.executable, *arguments]) is, with what was written taken at the end.

    arguments: a script, `-m` and a module, or `-c` and code; and what follows.
    """

    def __init__(self, arguments: Sequence[object], env: Mapping[str, str] | None = None, cwd: Path = ROOT):
        self.folder = Path(tempfile.mkdtemp(prefix="lowbit-forked-"))
        given = dict(environment(OMP_NUM_THREADS="1") if env is None else env)
        paths = (str(self.folder / "out"), str(self.folder / "err"))
        self.process = CONTEXT.Process(
            target=_begin, args=([str(a) for a in arguments], given, str(cwd), paths)
        )
        with mock.patch.dict(os.environ, environment(OMP_NUM_THREADS="1")):  # the first one starts the server
            self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0)
        return self.process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """(what it printed, what it printed to stderr); TimeoutExpired when it is not over by then."""
        self.wait(timeout)
        said = [
            path.read_text() if path.exists() else "" for path in map(self.folder.joinpath, ("out", "err"))
        ]
        shutil.rmtree(self.folder)
        return said[0], said[1]


def run(
    arguments: Sequence[object], env: Mapping[str, str] | None = None, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """subprocess.run of a Python process, its output captured."""
    return _done([Forked(arguments, env)], timeout)


def together(*arguments: object) -> list[Forked]:
    """Two processes that know each other, as torchrun starts them."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common["OMP_NUM_THREADS"] = "1"
    return [Forked(arguments, environment(**common, RANK=rank, LOCAL_RANK=rank)) for rank in ("0", "1")]


def run_together(*arguments: object, timeout: float = 900) -> subprocess.CompletedProcess[str]:
    """`together`, waited for: the first failure of the two, and what both of them said."""
    return _done(together(*arguments), timeout)


def _done(processes: list[Forked], timeout: float) -> subprocess.CompletedProcess[str]:
    try:
        said = [process.communicate(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    code = next((p.returncode for p in processes if p.returncode), 0)
    return subprocess.CompletedProcess(
        ["python"], code, "".join(out for out, _ in said), "".join(err for _, err in said)
    )


def _begin(arguments: list[str], env: dict[str, str], folder: str, paths: tuple[str, str]) -> None:
    """In the new process: what `python arguments` does after its start."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    for number, path in enumerate(paths, 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    first, *rest = arguments
    try:
        if first == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif first == "-c":
            sys.argv = ["-c", *rest[1:]]
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(rest[0], "<string>", "exec"), main.__dict__)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(first).parent))
            runpy.run_path(first, run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        atexit._run_exitfuncs()  # multiprocessing ends its processes without them
