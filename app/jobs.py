"""Jobs and their queue: one at a time, each in a process of its own that can really be stopped.

Nothing here knows of the interface:

```python
queue = JobQueue()
job = train_job(folder, choices)
queue.submit(job)
job.wait()
print(job.progress.state, job.comparison())
```
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safe_trainer import Comparison, from_json

from . import texts
from .catalogue import Model
from .orders import Choices, Variant, write_method_file, write_order
from .processes import process
from .progress import Progress
from .protocol import CANCEL, COMPARISON, JOB, SCAN, Reader

logger = logging.getLogger(__name__)


@dataclass
class Job:
    """Something that is computed in a process of its own.

    Args:
        folder (`Path`): Where everything about it lies.
        model ([`Model`]): What it is about.
        kind (`str`): `"train"` or `"scan"`.
        variants (`Sequence[Variant]`): What is trained.
    """

    folder: Path
    model: Model
    kind: str = "train"
    variants: Sequence[Variant] = ()
    progress: Progress = field(default_factory=Progress)
    _ended: threading.Event = field(default_factory=threading.Event)
    _cancelled_at: float | None = None

    @property
    def id(self) -> str:
        """Its name in addresses."""
        return self.folder.name

    @property
    def ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self._ended.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for its end; return whether it came."""
        return self._ended.wait(timeout)

    def cancel(self) -> None:
        """Ask it to end; [`JobQueue`] sees to it."""
        if not self.ended and self._cancelled_at is None:
            self._cancelled_at = time.monotonic()
            (self.folder / CANCEL).touch()
            self.progress.note(texts.LOG_CANCELLING)

    def comparison(self) -> Comparison | None:
        """Return what came of it, if it came that far."""
        path = self.folder / f"{COMPARISON}.json"
        return from_json(path.read_text(encoding="utf-8")) if path.is_file() else None

    def ranking(self) -> dict[str, Any] | None:
        """Return what a scan found."""
        path = self.folder / SCAN
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def run(self) -> None:
        """Carry it out, and return when its process is gone, whatever became of it."""
        try:
            if self._cancelled_at is None:
                self._follow()
            else:
                self.progress.end("cancelled")
        except Exception:
            logger.exception("A job could not be carried out.")
            self.progress.end("failed", texts.UNEXPECTED.format(name="server"))
        finally:
            self._ended.set()

    def _follow(self) -> None:
        """Read what the process tells until it is gone."""
        self.progress.begin()
        reader = Reader(self.folder)
        work = threading.Thread(target=process, args=(str(self.folder), self.model.embedded), name="work")
        work.start()
        while work.is_alive():
            work.join(0.1)
            self.progress.take(reader.new())
        if not self.progress.ended:
            if self._cancelled_at is not None:
                self.progress.end("cancelled")
            else:
                self.progress.end("failed", texts.PROCESS_LOST)


def train_job(folder: Path, choices: Choices) -> Job:
    """Write a job that trains what was chosen; see [`write_order`] for what is raised."""
    variants = write_order(folder, choices)
    listed = [{"key": variant.key, "title": variant.title} for variant in variants]
    (folder / JOB).write_text(json.dumps({"kind": "train", "variants": listed}), encoding="utf-8")
    return Job(folder, choices.model, "train", variants)


def scan_job(folder: Path, rows: Path, model: Model, vectors: Path) -> Job:
    """Write a job that ranks rows by how harmful they look.

    Args:
        folder (`Path`): A new folder of ours.
        rows (`Path`): The file of rows.
        model ([`Model`]): The model that would be trained.
        vectors (`Path`): Where its vectors are, or will be once they are fitted.
    """
    write_method_file(folder, "harmful")
    job = {"kind": "scan", "rows": str(rows), "model": model.path, "vectors": str(vectors), "max_length": 1024}
    (folder / JOB).write_text(json.dumps(job), encoding="utf-8")
    return Job(folder, model, "scan")


class JobQueue:
    """Runs one job at a time, in the order in which they came.

    Args:
        limit (`int`, *optional*, defaults to `20`): How many may wait.
    """

    def __init__(self, limit: int = 20) -> None:
        self.limit = limit
        self._jobs: list[Job] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def submit(self, job: Job) -> None:
        """Put a job at the end.

        Raises:
            ValueError: If too many wait already.
        """
        with self._changed:
            if self._closed or len(self._jobs) > self.limit:
                raise ValueError(texts.QUEUE_FULL)
            self._jobs.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True, name="jobs")
                self._thread.start()
            self._changed.notify_all()

    def place(self, job: Job) -> int | None:
        """Return how many jobs are before this one; `None` once it has ended."""
        with self._changed:
            return self._jobs.index(job) if job in self._jobs else None

    def cancel(self, job: Job) -> None:
        """End a job: at once if it waits, and else within two seconds, but for the writing of its checkpoint."""
        job.cancel()
        with self._changed:
            waiting = job in self._jobs[1:]
            if waiting:
                self._jobs.remove(job)
        if waiting:
            job.run()

    def close(self, timeout: float = 10.0) -> None:
        """End everything."""
        with self._changed:
            self._closed = True
            jobs, thread = list(self._jobs), self._thread
            self._changed.notify_all()
        for job in reversed(jobs):
            self.cancel(job)
        if thread is not None:
            thread.join(timeout)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs:
                    return
                job = self._jobs[0]
            try:
                job.run()
            finally:
                with self._changed:
                    self._jobs.remove(job)
