"""What can be done in the app, without its interface; the message of a `ValueError` is for the user."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from safe_trainer import recipe

from . import texts
from .answering import Answerer
from .catalogue import EMBEDDED, Model, hub_model
from .inspection import Inspection, ending_of, example_called, inspect, tokenizer_of, write_example
from .jobs import Job, JobQueue, scan_job, train_job
from .limits import Setup
from .orders import Choices, Settings, Variant, estimate, write_order
from .sessions import Session, Sessions

MOVED = "given"
ASKED_TOKENS = 128


@dataclass
class Services:
    """What all sessions share, and what each of them can do with it.

    Args:
        setup ([`Setup`]): How the app is run.
        sessions ([`Sessions`]): Who is there.
        queue ([`JobQueue`]): What is trained.
        uploads (`Path`): Where Gradio puts what is uploaded.
        answerer ([`Answerer`]): Who answers questions.
    """

    setup: Setup
    sessions: Sessions
    queue: JobQueue
    uploads: Path
    answerer: Answerer = field(default_factory=Answerer)

    def close(self) -> None:
        """End all jobs and remove all files."""
        self.queue.close()
        self.answerer.close()
        self.sessions.close()

    def model(self, key: str, name: str = "", unaligned: str = "") -> Model:
        """Return the model that was chosen.

        Raises:
            ValueError: If it is not among those that can be.
        """
        if key in self.setup.models:
            return self.setup.models[key]
        if not self.setup.any_model:
            raise ValueError(texts.MODEL_NOT_ALLOWED)
        return hub_model(name.strip(), unaligned.strip())

    def take_example(self, session: Session, key: str) -> Inspection:
        """Use an example, with the embedded model."""
        example = example_called(key)
        path = write_example(session.new_folder("data"), example)
        found = inspect(path, path.name, tokenizer_of(EMBEDDED), self.setup.limits, example)
        return _use(session, EMBEDDED, found)

    def take_file(self, session: Session, path: Path) -> Inspection:
        """Use an uploaded file: it is moved out of the common folder at once.

        Raises:
            ValueError: If it cannot be used.
        """
        if not path.is_file() or not path.resolve().is_relative_to(self.uploads.resolve()):
            raise ValueError(texts.UNREADABLE.format(name="upload"))
        try:
            if path.stat().st_size > self.setup.limits.megabytes * 2**20:
                raise ValueError(texts.TOO_LARGE.format(size=self.setup.limits.megabytes))
            target = session.new_folder("data") / f"{MOVED}{ending_of(path.name)}"
            shutil.move(path, target)
        finally:
            path.unlink(missing_ok=True)
        found = inspect(target, path.name, tokenizer_of(session.model), self.setup.limits)
        return _use(session, session.model, found)

    def take_model(self, session: Session, model: Model) -> Inspection | None:
        """Use another model, and look at the data again as it sees them.

        Raises:
            ValueError: If its tokenizer cannot be had; then nothing has changed.
        """
        tokenizer, old = tokenizer_of(model), session.inspection
        if old is None:
            session.model = model
            return None
        return _use(session, model, inspect(old.path, old.name, tokenizer, self.setup.limits, old.example))

    def check(
        self, session: Session, protections: list[str], settings: Settings, *, skip_bad_rows: bool
    ) -> tuple[list[Variant], recipe.Plan]:
        """Write the recipes of what was chosen, check them, and return what it will take.

        Raises:
            ValueError: If something is missing or cannot be.
        """
        found = session.inspection
        if found is None:
            raise ValueError(texts.NO_DATA)
        if found.bad and not skip_bad_rows:
            raise ValueError(texts.BAD_FIRST)
        choices = Choices(session.model, found.path, protections, settings, found.example, bool(found.bad))
        folder = session.new_folder("draft")
        try:
            variants = write_order(folder, choices)
            plan = estimate(folder, variants)
        except BaseException:
            shutil.rmtree(folder)
            raise
        with session.lock:
            old, session.draft, session.choices, session.variants = session.draft, folder, choices, variants
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
        return variants, plan

    def start(self, session: Session) -> Job:
        """Train what was checked.

        Raises:
            ValueError: If nothing was checked, a job of the session is under way, or too many are waiting.
        """
        with session.lock:
            if session.choices is None:
                raise ValueError(texts.NOT_CHECKED)
            return self._submit(session, train_job(session.new_folder("job"), session.choices))

    def scan(self, session: Session) -> Job:
        """Rank the rows in use by how harmful they look.

        Raises:
            ValueError: As [`start`].
        """
        found = session.inspection
        if found is None:
            raise ValueError(texts.NO_DATA)
        with session.lock:
            vectors = self.sessions.folder / f"vectors-{session.model.key.replace('/', '--')}"
            return self._submit(session, scan_job(session.new_folder("scan"), found.path, session.model, vectors))

    def _submit(self, session: Session, job: Job) -> Job:
        if session.busy:
            shutil.rmtree(job.folder)
            raise ValueError(texts.ONE_AT_A_TIME)
        session.jobs.append(job)
        try:
            self.queue.submit(job)
        except ValueError:
            session.jobs.remove(job)
            shutil.rmtree(job.folder)
            raise
        return job

    def adapters(self, job: Job) -> dict[str, Path]:
        """Return the adapters that a job has finished, by title."""
        done = [v for v in job.variants if (part := job.progress.parts.get(v.key)) and part.state == "done"]
        return {variant.title: job.folder / variant.key for variant in done}

    def questions(self, session: Session, question: str, titles: list[str]) -> Iterator[tuple[str, str]]:
        """Ask the model before, and those that the newest training has finished; see [`Answerer.ask`].

        Raises:
            ValueError: If the question is empty or too long.
        """
        limit = self.setup.limits.question
        if not question.strip():
            raise ValueError(texts.ASK_NOTHING)
        if len(question) > limit:
            raise ValueError(texts.ASK_TOO_LONG.format(limit=limit))
        job = session.job("train")
        finished = self.adapters(job) if job is not None else {}
        asked: dict[str, Path | None] = {texts.BEFORE: None}
        asked |= {title: finished[title] for title in titles if title in finished}
        model = job.model if job is not None else session.model
        return self.answerer.ask(model, asked, question.strip(), ASKED_TOKENS)


def last_checkpoint(job: Job, key: str) -> Path | None:
    """Return the newest checkpoint of a variant."""
    found = (job.folder / key).glob("checkpoint-*")
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _use(session: Session, model: Model, inspection: Inspection) -> Inspection:
    with session.lock:
        old = session.inspection
        session.model, session.inspection, session.choices = model, inspection, None
    if old is not None and old.path != inspection.path and not session.busy:
        shutil.rmtree(old.path.parent, ignore_errors=True)
    return inspection
