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

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from safe_trainer import Comparison, recipe
from safe_trainer.evaluation import from_json

from . import texts
from .materials import OwnFile
from .progress import CANCEL, COMPARISON, JOB, LOG, REVIEWED, SCAN, Progress
from .recipes import Choices, Variant, write_material, write_order
from .setup import Model

logger = logging.getLogger(__name__)
F = TypeVar("F", bound=Callable[..., Any])

GRACE, SAVING = 1.5, 30.0  # seconds that a cancelled job has to end, and to end its step and write a checkpoint

try:
    import spaces
except ImportError:
    IS_LENT = False
    """Whether a GPU is lent by the call, as on ZeroGPU."""
else:
    IS_LENT = bool(spaces.config.Config.zero_gpu)


def _lent(function: F) -> F:
    """Return the function with a GPU for up to five minutes while it runs, where GPUs are lent."""
    return spaces.GPU(duration=300)(function) if IS_LENT else function


@dataclass
class Job:
    """Something that is computed in a process of its own."""

    folder: Path
    model: Model
    kind: str = "train"
    variants: Sequence[Variant] = ()
    name: str = ""
    made: float = field(default_factory=time.time)
    draft: Job | None = None
    """What was checked, and is trained here."""
    plan: recipe.Plan | None = None
    scanned: tuple[Path, Mapping[str, Any]] | None = None
    """The file of rows that a scan ranks, and how it is read."""
    progress: Progress = field(default_factory=Progress)
    verdicts: dict[str, str] | None = None
    _ended: threading.Event = field(default_factory=threading.Event)
    _cancelled_at: float | None = None

    def __post_init__(self) -> None:
        self.progress.titles = {variant.key: variant.title for variant in self.variants}

    @property
    def id(self) -> str:
        """Its name in addresses."""
        return self.folder.name

    @property
    def label(self) -> str:
        """Its name in lists."""
        return f"{self.name} ({self.when})"

    @property
    def when(self) -> str:
        """When it was made, to the second: two runs never start together."""
        return f"{datetime.fromtimestamp(self.made):%d %b %Y, %H:%M:%S}"

    @property
    def ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self._ended.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for its end; return whether it came."""
        return self._ended.wait(timeout)

    def cancel(self, reason: str = "") -> None:
        """Ask it to end; [`JobQueue`] sees to it. The reason is what its owner will read."""
        if not self.ended and self._cancelled_at is None:
            self._cancelled_at = time.monotonic()
            (self.folder / CANCEL).write_text(reason, encoding="utf-8")

    @property
    def can_go_on(self) -> bool:
        """Whether it was stopped, by its owner or with the server, and what is missing can still be done."""
        return self.kind == "train" and self.ended and self.progress.state == "cancelled"

    def reopen(self) -> None:
        """Let a stopped training wait once more: finished variants stay, others go on from their checkpoints."""
        (self.folder / CANCEL).unlink(missing_ok=True)
        self._ended, self._cancelled_at = threading.Event(), None
        self.progress.state, self.progress.message, self.progress.ended_at = "waiting", "", 0.0
        self.progress.write(self.folder)

    def report(self, ending: str) -> Path:
        """Return the file of its comparison: with the labels given by hand, once there are any."""
        reviewed = self.folder / f"{REVIEWED}.{ending}"
        return reviewed if reviewed.is_file() else self.folder / f"{COMPARISON}.{ending}"

    def comparison(self) -> Comparison | None:
        """Return what came of it, if it came that far."""
        path = self.report("json")
        if not path.is_file():
            return None
        try:
            found = from_json(path.read_text(encoding="utf-8"))
        except ValueError:
            logger.exception("The comparison of %s could not be read back.", self.id)
            return None
        self.verdicts = {one.name: found.verdict(one.name).level for one in found.evaluations[1:]}
        return found

    @property
    def adapters(self) -> dict[str, Path]:
        """The adapters that it has finished, by title."""
        done = [v for v in self.variants if (part := self.progress.parts.get(v.key)) and part.state == "done"]
        return {variant.title: self.folder / variant.key for variant in done}

    def loading(self) -> dict[str, Any]:
        """Return the options with which its training and its comparison load the model."""
        return recipe.model_options(recipe.read_recipe(self.folder / self.variants[0].recipe))

    def ranking(self) -> dict[str, Any] | None:
        """Return what a scan found."""
        path = self.folder / SCAN
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def save(self, **more: Any) -> None:
        """Write what it is, for its process and for the next server."""
        about = {"kind": self.kind, "name": self.name, "made": self.made, "model": asdict(self.model)}
        values = {**about, "variants": [asdict(variant) for variant in self.variants], **more}
        (self.folder / JOB).write_text(json.dumps(values), encoding="utf-8")

    def run(self) -> None:
        """Carry it out, and return when its process is gone, whatever became of it."""
        try:
            if self._cancelled_at is None:
                self._follow()
            else:
                self._end_cancelled()
        except Exception:
            logger.exception("A job could not be carried out.")
            self.progress.end("failed", texts.UNEXPECTED.format(name="server"))
        finally:
            with contextlib.suppress(OSError):  # its folder may be gone
                self.progress.write(self.folder)
            self._ended.set()

    def _end_cancelled(self) -> None:
        self.progress.end("cancelled", (self.folder / CANCEL).read_text(encoding="utf-8"))

    def _follow(self) -> None:
        """Read what the process reports until it is gone."""
        self.progress.begin()
        self.progress.write(self.folder)  # its process goes on from there
        work = threading.Thread(target=_process, args=(str(self.folder), self.model.embedded), name="work")
        work.start()
        while work.is_alive():
            work.join(0.1)
            self.progress = Progress.read(self.folder) or self.progress
        self.progress = Progress.read(self.folder) or self.progress
        if not self.progress.ended:
            if self._cancelled_at is not None:
                self._end_cancelled()
            else:
                self.progress.end("failed", texts.PROCESS_LOST)


def train_job(folder: Path, choices: Choices) -> Job:
    """Write a job that trains what was chosen; see [`write_order`] for what is raised."""
    variants = write_order(folder, choices)
    data = texts.EXAMPLES[choices.example.key][0] if choices.example else choices.name or choices.data.stem
    job = Job(folder, choices.model, "train", variants, f"{data}: {', '.join(v.title for v in variants)}")
    job.save()
    return job


def started(draft: Job, folder: Path) -> Job:
    """Write a job that trains what was checked."""
    shutil.copytree(draft.folder, folder, dirs_exist_ok=True)
    job = Job(folder, draft.model, "train", draft.variants, draft.name, draft=draft)
    job.save()
    return job


def scan_job(
    folder: Path, rows: Path, reading: Mapping[str, Any], model: Model, vectors: Path, files: Mapping[str, OwnFile]
) -> Job:
    """Write a job that ranks rows by how harmful they look."""
    if "harmful_data" not in files and not model.embedded:
        raise ValueError(texts.SCAN_NEEDS)
    write_material(folder, "harmful_data", files)
    job = Job(folder, model, "scan", scanned=(rows, reading))
    more = {"rows": str(rows), "reading": dict(reading), "vectors": str(vectors)}
    job.save(**more, max_length=1024, limit=1_000_000)
    return job


def jobs_in(folder: Path) -> list[Job]:
    """Return the training jobs of an earlier server in a session's folder, the newest last."""
    found = []
    for path in folder.glob(f"job-*/{JOB}"):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            variants = [Variant(**variant) for variant in values["variants"]]
            job = Job(path.parent, Model(**values["model"]), "train", variants, values["name"], values["made"])
            job.progress = Progress.read(path.parent) or job.progress
            if not job.progress.ended:
                job.progress.end("cancelled", texts.SERVER_LOST)
        except (ValueError, KeyError, TypeError, AttributeError):
            logger.warning("The job in %s could not be read back.", path.parent.name)
            continue
        job._ended.set()
        found.append(job)
    return sorted(found, key=lambda job: job.made)


class JobQueue:
    """Runs one job at a time, in the order in which they came.

    Gradio's own queue frees a place as soon as a browser leaves, while the work goes on; jobs outlive a reload.
    """

    def __init__(self, limit: int = 20) -> None:
        self.limit = limit
        self._jobs: list[Job] = []
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = ThreadPoolExecutor(1, "jobs")

    def submit(self, job: Job) -> None:
        """Put a job at the end, a stopped one once more; or raise `ValueError` if too many wait already."""
        with self._lock:
            if self._pool is None or len(self._jobs) > self.limit:
                raise ValueError(texts.QUEUE_FULL)
            if job.ended:
                job.reopen()
            self._jobs.append(job)
            self._pool.submit(self._run, job)

    def place(self, job: Job) -> int | None:
        """Return how many jobs are before this one; `None` once it has ended."""
        with self._lock:
            return self._jobs.index(job) if job in self._jobs else None

    def cancel(self, job: Job, reason: str = "") -> None:
        """End a job: at once if it waits, within two seconds if it runs, and if it trains, after its step."""
        job.cancel(reason)
        with self._lock:
            waiting = job in self._jobs[1:]
            if waiting:
                self._jobs.remove(job)
        if waiting:
            job.run()

    def close(self) -> None:
        """End everything."""
        with self._lock:
            pool, self._pool, jobs = self._pool, None, list(self._jobs)
        for job in reversed(jobs):
            self.cancel(job, texts.SERVER_LOST)
        if pool is not None:
            pool.shutdown()

    def _run(self, job: Job) -> None:
        if job.ended:
            return
        try:
            job.run()
        finally:
            with self._lock:
                self._jobs.remove(job)


@_lent
def _process(folder: str, one_thread: bool) -> None:
    """Run a job's process and wait for its end; where a GPU is lent, with it."""
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
        while worker.poll() is None and not (place / CANCEL).exists():
            time.sleep(0.1)
        if worker.poll() is None:  # training ends with its step and a checkpoint, anything else at once
            worker.terminate()
            found = Progress.read(place)
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(SAVING if found is not None and found.phase == "training" else GRACE)
    finally:
        try:
            os.killpg(worker.pid, signal.SIGKILL)  # with all that it has started
        except (ProcessLookupError, PermissionError):
            pass
        worker.wait()


def _environment(*, one_thread: bool) -> dict[str, str]:
    """Return the environment of a job: that of the server, where the package can be found, with no telemetry."""
    root = str(Path(__file__).resolve().parents[(__package__ or "").count(".") + 1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    values = {**os.environ, "PYTHONPATH": path, "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**values, "OMP_NUM_THREADS": "1"} if one_thread else values
