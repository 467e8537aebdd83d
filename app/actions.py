"""What can be done in the app, without its interface; the message of a `ValueError` is for the user."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safe_trainer import write_model_card, write_report
from safe_trainer.data import suites
from safe_trainer.evaluation import Review

from . import texts
from .answering import Answerer, Turn, messages
from .inspection import (
    ENDINGS,
    Inspection,
    Sample,
    Unusable,
    apart,
    ending_of,
    example_called,
    fetch,
    first_rows,
    inspect,
    tokenizer_of,
    write_lines,
)
from .jobs import Job, JobQueue, scan_job, started, train_job
from .materials import take
from .progress import CLEANED, REVIEWED
from .recipe_in import Taken, read_settings
from .recipes import GUARD, JUDGES, Choices, Settings, estimate
from .sessions import Session, Sessions
from .setup import EMBEDDED, KINDS, Model, Setup, hub_model

ASKED_TOKENS = 128
_HELD = 4  # times the size of the largest upload: what a session may hold of files


@dataclass
class Services:
    """What all sessions share, and what each of them can do with it."""

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
        """Return the model that was chosen."""
        if key in self.setup.models:
            return self.setup.models[key]
        if not self.setup.any_model:
            raise ValueError(texts.MODEL_NOT_ALLOWED)
        return hub_model(name.strip(), unaligned.strip())

    def judges(self, settings: Settings) -> tuple[str, ...]:
        """Return who judges, as in a recipe; a guard model has to be there before anything is trained."""
        if settings.judge != GUARD:
            return tuple((settings.judge if settings.judge in JUDGES else next(iter(JUDGES))).split(","))
        form, _, name = settings.guard.strip().rpartition(":")
        if not name:
            raise ValueError(texts.GUARD_MISSING)
        model = self.model(name, name)
        tokenizer_of(model)
        return (f"{form or GUARD}:{model.path}", "phrases")

    def take_example(self, session: Session, key: str) -> Inspection:
        """Use an example, with the embedded model."""
        example = example_called(key)
        path = session.new_folder("data") / f"{key}.jsonl"
        write_lines(example.make(), path)
        found = inspect(path, path.name, EMBEDDED, self.setup.limits, example)
        return _use(session, EMBEDDED, found)

    def take_file(self, session: Session, path: Path) -> Iterator[None]:
        """Use an uploaded file of training rows; yields while it is read, and ends the reading when closed."""
        _forget_data(session)
        name, target = path.name, self._moved(session, path)
        yield from self._read(session, target, name, {})

    def take_dataset(self, session: Session, *source: Any) -> Iterator[None]:
        """Use rows of a dataset on the Hub: name, subset, split, first row and number of rows."""
        name, subset, split, first, count = source
        if not self.setup.hub:
            raise ValueError(texts.MODEL_NOT_ALLOWED)
        limits, numbers = self.setup.limits, (first, count)
        if not all(isinstance(number, int) and number > 0 for number in numbers) or count > limits.rows:
            raise ValueError(texts.HUB_ROWS.format(limit=limits.rows))
        checked = [hub_model(name.strip()).path, subset.strip(), split.strip() or "train", *numbers]
        target = session.new_folder("data") / "given.jsonl"
        token = False if self.setup.space else None
        with _removed_if_failed(target.parent):
            yield from apart(5 * limits.seconds, fetch, checked, target, limits, token)
        shown = texts.HUB_NAME.format(name=", ".join(filter(None, checked[:3])), first=first)
        yield from self._read(session, target, shown, {})

    def reading_of(self, session: Session, columns: Mapping[str, str], encoding: str) -> dict[str, Any]:
        """Return how to read the last file with other columns, by role, or another encoding."""
        found, chosen = session.inspection, {role: name for role, name in columns.items() if name}
        if found is None or found.example is not None:
            raise ValueError(texts.NO_DATA)
        if chosen and (not {"prompt", "answer"} <= set(chosen) or len(set(chosen.values())) < len(chosen)):
            raise ValueError(texts.BOTH_COLUMNS)
        return ({"columns": chosen} if chosen else {}) | ({"encoding": encoding} if encoding else {})

    def read_again(self, session: Session, columns: Mapping[str, str], encoding: str) -> Iterator[None]:
        """Read the last file with other columns or another encoding."""
        reading, found = self.reading_of(session, columns, encoding), session.inspection
        assert found is not None  # otherwise there is no such reading
        yield from self._read(session, found.path, found.name, reading)

    def preview(
        self, session: Session, columns: Mapping[str, str], encoding: str, rows: list[Sample]
    ) -> Iterator[None]:
        """Put into `rows` the first of the last file, read with other columns or another encoding."""
        reading, found = self.reading_of(session, columns, encoding), session.inspection
        assert found is not None
        limits = self.setup.limits
        rows += yield from apart(limits.seconds, first_rows, found.path, found.name, session.model, limits, reading)

    def take_model(self, session: Session, key: str, name: str = "", unaligned: str = "") -> Iterator[None]:
        """Use another model, and look at the data again as it sees them; see [`model`]."""
        yield from self._take(session, self.model(key, name, unaligned))

    def _take(self, session: Session, model: Model) -> Iterator[None]:
        old = session.inspection
        if old is not None and old.example is not None and model != EMBEDDED:
            old = None  # its rows are in the embedded model's own language
        if old is None or not old.rows:
            _use(session, model, old)
        else:
            yield from self._read(session, old.path, old.name, old.reading, model)

    def take_recipe(self, session: Session, path: Path) -> Iterator[None]:
        """Put the settings of an uploaded recipe into the form, and keep what the form has no place for."""
        name, source = path.name, self._moved(session, path, (".yaml", ".yml"))
        try:
            taken = read_settings(source.read_text(encoding="utf-8", errors="replace"), name)
        finally:
            shutil.rmtree(source.parent)
        model, left = self._model_of(taken) if taken.model else session.model, list(taken.left)
        if model is None:
            left.append(f"model.path: {taken.model}"[:200])
        elif model != session.model:
            yield from self._take(session, model)
        if taken.unaligned and Path(taken.unaligned).name != Path(session.model.unaligned or "").name:
            left.append(f"unaligned_model: {taken.unaligned}"[:200])
        session.form, session.taken = dict(taken.form), replace(taken, left=tuple(left))
        changed(session)

    def _model_of(self, taken: Taken) -> Model | None:
        """Return the model that a recipe names, if it is one that can be chosen here."""
        if Path(taken.model).name == Path(EMBEDDED.path).name:
            return EMBEDDED
        offered = next((m for m in self.setup.models.values() if taken.model in (m.key, m.path)), None)
        if offered is None and self.setup.any_model:
            with suppress(ValueError):
                return hub_model(taken.model, taken.unaligned)
        return offered

    def take_own(self, session: Session, path: Path | None, what: str, said: Mapping[str, str]) -> Iterator[None]:
        """Use an uploaded file of a kind, or a published suite, for methods or the comparison; see [`take`]."""
        is_suite = what in suites()
        if (path is None and not is_suite) or what not in (*texts.MATERIALS, *KINDS, *suites()):
            raise ValueError(texts.OWN_NOTHING)
        if path is None and not self.setup.hub:
            raise ValueError(texts.SUITE_OFFLINE)
        if "{prompt}" not in (said.get("template") or "{prompt}"):
            raise ValueError(texts.FRAME_WITHOUT_PROMPT)
        if what in texts.MATERIALS and (said.get("system_prompt") or said.get("template")):
            raise ValueError(texts.FRAME_UNSEEN)
        name = path.name if path is not None else what
        source = self._moved(session, path) if path is not None else None
        folder = source.parent if source is not None else session.new_folder("data")
        limits = self.setup.limits
        with _removed_if_failed(folder):
            taken = yield from apart(limits.seconds, take, source, name, what, said, limits, folder)
        for rest in set(folder.iterdir()) - {one.path for one in taken}:
            rest.unlink()
        if what in texts.MATERIALS:
            self.drop(session, what)
        session.own += taken
        changed(session)

    def drop(self, session: Session, what: str) -> None:
        """Do without the files of a kind, or those of a suite, and go back to what is built in."""
        gone = [one for one in session.own if what == (one.name if what in suites() else one.kind)]
        session.own = [one for one in session.own if one not in gone]
        for one in gone:
            one.path.unlink(missing_ok=True)
            if not any(one.path.parent == other.path.parent for other in session.own):
                shutil.rmtree(one.path.parent, ignore_errors=True)
        changed(session)

    def drop_recipe(self, session: Session) -> None:
        """Go back to the app's own settings."""
        session.form, session.taken = {}, None
        changed(session)

    def _moved(self, session: Session, path: Path, endings: Sequence[str] = ENDINGS) -> Path:
        """Move an uploaded file out of the common folder at once, and return its place."""
        session.uploads.discard(str(path))
        if not path.is_file() or not path.resolve().is_relative_to(self.uploads.resolve()):
            raise ValueError(texts.UNREADABLE.format(name="upload"))
        try:
            if path.stat().st_size > self.setup.limits.megabytes * 2**20:
                raise ValueError(texts.TOO_LARGE.format(size=self.setup.limits.megabytes))
            held = sum(file.stat().st_size for file in session.folder.glob("data-*/*"))
            if held > _HELD * self.setup.limits.megabytes * 2**20:
                raise ValueError(texts.TOO_MANY_FILES.format(size=_HELD * self.setup.limits.megabytes))
            target = session.new_folder("data") / f"given{ending_of(path.name, endings)}"
            shutil.move(path, target)
        finally:
            path.unlink(missing_ok=True)
        return target

    def _read(
        self, session: Session, path: Path, name: str, reading: Mapping[str, Any], model: Model | None = None
    ) -> Iterator[None]:
        limits, model, old = self.setup.limits, model or session.model, session.inspection
        example = old.example if old is not None and old.path == path else None
        try:
            found = yield from apart(limits.seconds, inspect, path, name, model, limits, example, reading)
        except Unusable as error:  # the file stays at hand: to be read again with other options
            _use(session, model, Inspection(path, name, reading=reading, columns=error.columns))
            raise
        _use(session, model, found)

    def check(
        self, session: Session, methods: list[str], settings: Settings, fields: Mapping[str, Any], *, skip_bad: bool
    ) -> None:
        """Write the recipes of what was chosen and check them; the session keeps them, and what they will take."""
        found = session.inspection
        if found is None or not found.rows:
            raise ValueError(texts.NO_DATA)
        if found.bad and not skip_bad:
            raise ValueError(texts.BAD_FIRST)
        reading = dict(found.reading) | ({"on_bad_row": "skip"} if found.bad else {})
        choices = Choices(
            session.model,
            found.path,
            methods,
            settings,
            fields,
            example=found.example,
            name=found.name,
            reading=reading,
            files=session.files,
            asked=session.asked,
            judges=self.judges(settings),
            kept=session.taken.kept if session.taken else {},
        )
        folder = session.new_folder("draft")
        with _removed_if_failed(folder):
            draft = train_job(folder, choices)
            draft.plan = estimate(folder, draft.variants)
        with session.lock:
            old, session.draft, session.stale = session.draft, draft, False
        if old is not None:
            shutil.rmtree(old.folder, ignore_errors=True)

    def start(self, session: Session) -> Job:
        """Train what was checked."""
        with session.lock:
            if session.draft is None or session.stale:
                raise ValueError(texts.STALE if session.stale else texts.NOT_CHECKED)
            return self._submit(session, started(session.draft, session.new_folder("job")))

    def go_on(self, session: Session) -> None:
        """Go on with the newest training, which was stopped."""
        job = session.job("train")
        if job is None or not job.can_go_on:
            raise ValueError(texts.NOTHING_STOPPED)
        with session.lock:
            if session.busy:
                raise ValueError(texts.ONE_AT_A_TIME)
            self.queue.submit(job)

    def scan(self, session: Session) -> Job:
        """Rank the rows in use by how harmful they look."""
        found = session.inspection
        if found is None or not found.rows:
            raise ValueError(texts.NO_DATA)
        with session.lock:
            own = session.files.get("harmful_data")
            place = own.path.parent if own is not None else self.sessions.folder
            vectors = place / f"vectors-{session.model.key.replace('/', '--')}"
            folder = session.new_folder("scan")
            job = scan_job(folder, found.path, found.reading, session.model, vectors, session.files)
            return self._submit(session, job)

    def leave_out(self, session: Session) -> Iterator[None]:
        """Go on with those of the rows in use that the newest scan did not find suspicious."""
        job, found = session.scan, session.inspection
        ranking = job.ranking() if job is not None else None
        if job is None or ranking is None or found is None:
            raise ValueError(texts.NO_DATA)
        path = session.new_folder("data") / CLEANED
        shutil.copyfile(job.folder / CLEANED, path)
        name = texts.LEFT_OUT.format(name=found.name, count=ranking["above"])
        reading = {key: value for key, value in found.reading.items() if key != "encoding"}
        yield from self._read(session, path, name, reading)

    def _submit(self, session: Session, job: Job) -> Job:
        if session.busy:
            shutil.rmtree(job.folder)
            raise ValueError(texts.ONE_AT_A_TIME)
        session.jobs.append(job)
        session.shown = session.beside = None
        try:
            self.queue.submit(job)
        except ValueError:
            session.jobs.remove(job)
            shutil.rmtree(job.folder)
            raise
        return job

    def rename(self, session: Session, name: str) -> None:
        """Give the run that is shown another name."""
        job = session.compared
        if job is not None and name.strip():
            job.name = name.strip()[:200]
            job.save()

    def delete(self, session: Session) -> None:
        """Delete the run that is shown with all its files."""
        job = session.compared
        if job is not None and job.ended:
            session.jobs.remove(job)
            session.shown = session.beside = None
            shutil.rmtree(job.folder, ignore_errors=True)

    def label(self, session: Session, number: int, label: Any) -> None:
        """Label an answer of the run that is shown, and count its rates again; see [`Review`]."""
        job = session.compared
        if job is None or job.comparison() is None:
            raise ValueError(texts.NO_COMPARISON)
        with session.lock:
            review = Review(job.folder)
            review.set_label(review.questions[number], label)
            comparison = review.result()
            write_report(comparison, job.folder, REVIEWED)
            for title, folder in job.adapters.items():
                write_model_card(folder, comparison, name=title)
            for packed in job.folder.glob("*.zip"):  # which hold the old cards
                packed.unlink()

    def questions(
        self, session: Session, talk: list[Turn], titles: list[str], system: str, temperature: float
    ) -> Iterator[tuple[str, str]]:
        """Ask the model before and those of the run that is shown the last question; see [`Answerer.ask`]."""
        limit = self.setup.limits.question
        if not talk[-1].question.strip():
            raise ValueError(texts.ASK_NOTHING)
        if max(len(talk[-1].question), len(system)) > limit:
            raise ValueError(texts.ASK_TOO_LONG.format(limit=limit))
        job = session.compared
        possible: dict[str, Path | None] = {texts.BEFORE: None, **(job.adapters if job is not None else {})}
        asked = {title: possible[title] for title in possible if title in titles}
        if not asked:
            raise ValueError(texts.ASK_NOBODY)
        model = job.model if job is not None else session.model
        conversations = {title: messages(talk, title, system) for title in asked}
        options = job.loading() if job is not None else {}
        return self.answerer.ask(model, asked, conversations, ASKED_TOKENS, temperature, options)


@contextmanager
def _removed_if_failed(folder: Path) -> Iterator[None]:
    """Leave no folder behind of what came to nothing."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _forget_data(session: Session) -> None:
    with session.lock:
        session.inspection, session.stale = None, session.draft is not None


def _use(session: Session, model: Model, inspection: Inspection | None) -> Any:
    old = session.inspection
    with session.lock:
        if model != session.model:
            session.form, session.taken = {}, None
        if old is None or inspection is None or old.path != inspection.path:
            session.form.pop("skip_bad", None)
        session.model, session.inspection = model, inspection
        changed(session)
    if old is not None and inspection is not None and old.path != inspection.path and not session.busy:
        shutil.rmtree(old.path.parent, ignore_errors=True)
    return inspection


def changed(session: Session) -> None:
    """Keep what was chosen; what was checked before no longer holds."""
    with session.lock:
        session.stale = session.draft is not None
        session.save()
