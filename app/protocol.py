"""How a job's process and the server talk: files in the job's folder, which outlive a reload of the page."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

JOB = "job.json"
"""What is to be done."""
EVENTS = "events.jsonl"
"""What happens, a line each."""
CANCEL = "cancel"
"""Where this file appears, the job ends."""
STOPPING = "stopping"
"""Appears when training has stopped and the checkpoint is being written."""
LOG = "worker.log"
"""What the libraries print."""
COMPARISON = "comparison"
"""Stem of the report's files."""
SCAN = "scan.json"
"""The ranking of a scan."""


class Cancelled(Exception):  # noqa: N818, it is no error
    """The user has had enough."""


class Events:
    """What a job tells, written by its process."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / EVENTS).open("a", encoding="utf-8", buffering=1)
        self._next = 0.0

    def tell(self, kind: str, **values: Any) -> None:
        """Write one event."""
        self._file.write(json.dumps({"kind": kind, "time": time.time(), **values}) + "\n")

    def tell_sometimes(self, kind: str, **values: Any) -> None:
        """Write an event of which there are many, at most five a second."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + 0.2
            self.tell(kind, **values)


class Reader:
    """Reads the events of a job as they come, from the server."""

    def __init__(self, folder: Path) -> None:
        self._path, self._place = folder / EVENTS, 0

    def new(self) -> list[dict[str, Any]]:
        """Return the whole lines that have been written since the last call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._place)
                found = file.read()
        except FileNotFoundError:
            return []
        whole = found[: found.rfind(b"\n") + 1]
        self._place += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


class Stop:
    """Watches, from a thread of the job's process, for the wish to end and for the server's end."""

    def __init__(self, folder: Path) -> None:
        self.wanted = threading.Event()
        self._folder, self._parent, self._patient = folder, os.getppid(), False
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        import _thread

        while not (self._folder / CANCEL).exists():
            if os.getppid() != self._parent:
                os._exit(1)  # nobody is left to read what would come out
            time.sleep(0.1)
        self.wanted.set()
        if not self._patient:
            _thread.interrupt_main()

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Leave it to the trainer to end between two steps."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False
            self.check()

    def saving(self) -> None:
        """Say that nothing is left to do but to write what there is."""
        (self._folder / STOPPING).touch()

    def check(self) -> None:
        """Raise [`Cancelled`] if the end is wanted."""
        if self.wanted.is_set():
            raise Cancelled
