"""The Triton kernels on the CPU, through Triton's interpreter, in fp32.

TRITON_INTERPRET is read when a kernel is decorated, so it has to be set before the first import of a kernel
and for the whole process: `tests/kernels/test_interpreter.py` runs this folder in a process of its own.
Collected by any other run, the folder is left out here, and counted there.

What the interpreter cannot show: races, asynchronous copies, 16-bit arithmetic, inline assembly. Those are
the AOT gate's (tests/kernels/aot) and the GPU tests' business.
"""

import dataclasses
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True, scope="session")
def the_language_is_patched_once() -> Iterator[None]:
    """The interpreter puts its own functions into triton.language when a kernel is launched, and looks for
    what it has to replace again whenever one jitted function calls another: two fifths of the time of these
    tests. A module whose `load` is no builtin any more was replaced by the launch, and is left alone here.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch: Callable[[Any], Any] = interpreter._patch_lang
    known: dict[int, list[Any]] = {}  # the languages that a module's globals hold

    def once(function: Any) -> Any:
        names = function.__globals__
        if (languages := known.get(id(names))) is None:
            found = [m for m in names.values() if inspect.ismodule(m) and m in (tl, tl.core)]
            languages = known[id(names)] = found
        replaced = languages and not any(tl.core.is_builtin(module.load) for module in languages)
        return interpreter._LangPatchScope() if replaced else patch(function)

    with pytest.MonkeyPatch.context() as changes:
        changes.setattr(interpreter, "_patch_lang", once)
        yield


@pytest.fixture(autouse=True, scope="session")
def nothing_is_computed_that_nobody_reads() -> Iterator[None]:
    """Beside every sum and product of integers the interpreter computes it again in 64 bits and compares; the
    assertion that reads the comparison is there in debug mode only, so it is thrown away: a third of the
    time. And it makes its table of dtypes anew for every tensor."""
    from triton.runtime import interpreter

    options = interpreter.interpreter_builder.options
    assert not options.debug, "somebody reads them now"
    plain: Callable[[Any], Any] = interpreter._get_np_dtype
    dtypes: dict[str, Any] = {}

    def kept(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = plain(dtype.scalar)
        return dtypes[name]

    with pytest.MonkeyPatch.context() as changes:
        changes.setattr(
            interpreter.interpreter_builder, "options", dataclasses.replace(options, sanitize_overflow=False)
        )
        changes.setattr(interpreter, "_get_np_dtype", kept)
        yield


@pytest.fixture(autouse=True)
def poisoned(poison):
    """Every allocation is NaN until written, so a kernel that reads a pad or leaves an output unwritten
    shows.
    """


@pytest.fixture(autouse=True)
def own_table(monkeypatch, tmp_path):
    """The packaged table alone, not one that the user of this machine has tuned."""
    from lowbit_kernels import dispatch

    monkeypatch.setenv("LOWBIT_KERNELS_CACHE", str(tmp_path / "none.json"))
    dispatch.reload()
