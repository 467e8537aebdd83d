"""The process of a job: started, waited for, and ended when its time is up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from .hardware import lent
from .protocol import CANCEL, LOG, STOPPING

GRACE = 1.5  # seconds that a cancelled job has to end its step
SAVING = 30.0  # and, once it has, to write its checkpoint


@lent
def process(folder: str, one_thread: bool) -> None:
    """Run a job's process and wait for its end; where a GPU is lent, with it.

    Args:
        folder (`str`): The job's.
        one_thread (`bool`): Whether it computes with a single thread.
    """
    place = Path(folder)
    with (place / LOG).open("wb") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.worker", folder],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(one_thread=one_thread),
            start_new_session=True,
        )
    try:
        while worker.poll() is None and not _overdue(place):
            time.sleep(0.1)
    finally:
        _kill(worker)


def _overdue(folder: Path) -> bool:
    """Tell whether a cancelled job has had its time."""
    try:
        asked = (folder / CANCEL).stat().st_mtime
    except FileNotFoundError:
        return False
    return time.time() - asked > (SAVING if (folder / STOPPING).exists() else GRACE)


def _environment(*, one_thread: bool) -> dict[str, str]:
    """Return the environment of a job: that of the server, where the package can be found, with no telemetry."""
    root = str(Path(__file__).resolve().parents[__package__.count(".") + 1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    values = {**os.environ, "PYTHONPATH": path, "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**values, "OMP_NUM_THREADS": "1"} if one_thread else values


def _kill(worker: subprocess.Popen[bytes]) -> None:
    """End a process with all that it has started."""
    try:
        os.killpg(worker.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    worker.wait()
