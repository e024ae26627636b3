"""Settings of all tests: signals, OpenMP's waiting; without a GPU Triton's interpreter, and nothing of tests/gpu."""

import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import offmoe  # noqa: F401  # sets how OpenMP threads wait
import pytest
import torch

# Programs that tests start inherit what is ignored, as SIGINT is in a shell's background and SIGHUP under nohup.
for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
    if signal.getsignal(signum) == signal.SIG_IGN:
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
collect_ignore = [] if torch.cuda.is_available() else ["gpu"]  # all in there needs one
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if find_spec("triton"):
        import fast_interpreter

        fast_interpreter.install()


@pytest.fixture(scope="module")
def whole_model() -> Iterator[None]:
    """Turn off the interpreter's overflow checks, for modules that run whole models through it."""
    with fast_interpreter.overflow_unchecked():
        yield


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one small model as `model`, a directory, and as `model.gguf`; tests change copies."""
    from checkpoint_files import model_directory

    from offmoe.checkpoint.open import open_checkpoint
    from offmoe.pack.convert import pack

    folder = tmp_path_factory.mktemp("originals")
    with open_checkpoint(model_directory(folder / "model")) as checkpoint:
        pack(checkpoint, folder / "model.gguf", "f32", lambda done, total: None)
    return folder
