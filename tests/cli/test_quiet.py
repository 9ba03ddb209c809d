"""What a user sees of a run is ours: no bars or needless warnings of the libraries, on a terminal or not."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUICK = "recipes/quickstart.yaml"
SMALL = [
    "quant.targets=['*.layers.0.*']",
    "train.max_steps=1",
    "train.micro_batch_size=1",
    "data.sequence_len=128",
    "eval.window=128",
    "eval.windows=1",
    "eval.generate=[]",
    "data.train.limit=16",
    "data.valid.limit=4",
]
OURS = (
    "quickstart:",
    "data:",
    "quantized 7 layers",
    "trainable:",
    "verify ",
    "exported ",
    "report: ",
    "serve it: ",
)


def lines_of(command: list[str], terminal: bool) -> tuple[str, str]:
    """(what a command wrote to standard output, to standard error); on a terminal both are the first."""
    if not terminal:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr
    ours, theirs = pty.openpty()
    fcntl.ioctl(
        theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0)
    )  # a bar of no width shows nothing
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT) as process:
        os.close(theirs)
        written = b""
        try:
            while part := os.read(ours, 65536):
                written += part
        except OSError:  # how Linux says that the other end is closed
            pass
        os.close(ours)
    assert process.returncode == 0, written
    return written.decode(), ""


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [False, True], ids=["file", "terminal"])
def test_a_run_shows_its_own_lines_only(tmp_path, terminal):
    command = [sys.executable, "-m", "lowbit_ft", "run", QUICK, *SMALL, f"output={tmp_path / 'run'}"]
    out, err = lines_of(command, terminal)
    assert err == ""
    for line in OURS:
        assert line in out, line
    for foreign in (
        "it/s",
        "%|",
        "Loading weights",
        "Applying quantization",
        "Dispatching",
        "Warning",
        "[transformers]",
    ):
        assert foreign not in out, out


LOUD = """
import logging, sys
from lowbit_ft.cli.main import main
try:
    main(["schema"])
except SystemExit as left:
    assert left.code == 0
assert "torch._dynamo" not in sys.modules, "what compiles nothing waits for torch's compiler"
from tqdm.auto import tqdm
logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please", "no kernels")
logger.warning("a %s warning", "real")
list(tqdm(range(3), desc="default"))
list(tqdm(range(3), desc="insists", disable=False))
list(tqdm(range(3), desc="download", disable=None))
"""


@pytest.mark.parametrize("terminal", [False, True], ids=["file", "terminal"])
def test_real_warnings_and_the_bar_of_a_download_stay(terminal):
    written = "".join(lines_of([sys.executable, "-c", LOUD], terminal))
    assert "a real warning" in written and "gemm_4bit_forward" not in written
    assert "default" not in written.split("a real warning")[1] and "insists" not in written
    assert ("download: 100%" in written) == terminal


def test_importing_the_command_line_changes_no_library():
    check = (
        "from tqdm.std import tqdm; before = vars(tqdm)['__init__']; "
        "import lowbit_ft.cli.main as cli; assert vars(tqdm)['__init__'] is before; "
        "cli.quiet(); assert vars(tqdm)['__init__'] is not before"
    )
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT)
