"""Processes forked from one that has imported torch and TRL, which is most of what starting one costs."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["trl", "peft", "safe_trainer.trainer", "safe_trainer.methods"])
LONGEST, GRACE = 600.0, 30.0  # seconds that two processes have, and one of them when the other has failed


def python(command: list[str], log: Path, folder: Path | None = None, **variables: str) -> None:
    """Be `python COMMAND`, with everything that it says in a file; the target of a process."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(variables)
    if folder is not None:
        os.chdir(folder)
    if command[0] == "-m":
        sys.argv[:] = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = command
        runpy.run_path(command[0], run_name="__main__")


def on_two_processes(*command: str, check: bool = True) -> None:
    """Run `python COMMAND` on two processes of this machine, with what torch's launcher tells each of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, str(rank)) for rank in range(2)]
        variables = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        started = [
            PROCESSES.Process(target=python, args=(list(command), log), kwargs=own)
            for log, own in zip(logs, variables, strict=True)
        ]
        for process in started:
            process.start()
        _see_to_their_end(started)
        told = "".join(log.read_text()[-3000:] for log in logs if log.exists())
    assert not check or all(process.exitcode == 0 for process in started), told


def _see_to_their_end(started: list[Any]) -> None:
    """Wait for processes, and end the rest when one has failed, as torch's launcher does."""
    running, deadline = started, time.monotonic() + LONGEST
    while running:
        wait([process.sentinel for process in running], timeout=max(0.0, deadline - time.monotonic()))
        ended = [process for process in running if process.exitcode is not None]
        running = [process for process in running if process not in ended]
        if not ended or any(process.exitcode for process in ended):
            for process in running:
                process.terminate()
                process.join(GRACE)
                process.kill()
                process.join()
            return
