"""Sessions: one for each browser, with a private folder.

Gradio's own session ends with a reload of the page; ours is in a cookie, and outlives the server if it has a folder.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import secrets
import shutil
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from .inspection import Inspection
from .jobs import Job, jobs_in
from .materials import OwnFile
from .recipe_in import Taken
from .setup import EMBEDDED, KINDS, Model

logger = logging.getLogger(__name__)

COOKIE = "safe_trainer_session"
CHOSEN = "chosen.json"
"""File in a session's folder that says what was chosen."""


class Chosen(TypedDict):
    """What of a session is kept there, by the names of its fields."""

    model: Model
    inspection: Inspection | None
    own: list[OwnFile]
    form: dict[str, Any]
    taken: Taken | None


_chosen = TypeAdapter(Chosen)


@dataclass
class Session:
    """What the server knows of one browser."""

    name: str
    folder: Path
    model: Model = EMBEDDED
    inspection: Inspection | None = None
    own: list[OwnFile] = field(default_factory=list)
    form: dict[str, Any] = field(default_factory=dict)
    taken: Taken | None = None
    draft: Job | None = None
    """What was checked last."""
    stale: bool = False
    jobs: list[Job] = field(default_factory=list)
    shown: str | None = None
    beside: str | None = None
    uploads: set[str] = field(default_factory=set)
    seen: float = field(default_factory=time.monotonic)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def new_folder(self, kind: str) -> Path:
        """Return a new empty folder among its files."""
        path = self.folder / f"{kind}-{secrets.token_hex(8)}"
        path.mkdir(parents=True)
        return path

    def job(self, kind: str) -> Job | None:
        """Return its newest job of a kind."""
        return next((job for job in reversed(self.jobs) if job.kind == kind), None)

    @property
    def scan(self) -> Job | None:
        """Its newest scan, if that was of the rows in use; a file of the same name may hold others."""
        job, found = self.job("scan"), self.inspection
        return job if job and found and job.scanned == (found.path, found.reading) else None

    def job_called(self, name: str | None) -> Job | None:
        """Return its job of this ID, what was checked last too; never that of another session."""
        known = [*self.jobs, self.draft] if self.draft is not None else self.jobs
        return next((job for job in known if job.id == name), None)

    def save(self) -> None:
        """Write what was chosen, so that it outlives the server."""
        values: Any = {name: getattr(self, name) for name in Chosen.__annotations__}
        fresh = self.folder / f"{CHOSEN}.new"
        fresh.write_bytes(_chosen.dump_json(values))
        fresh.replace(self.folder / CHOSEN)

    def restore(self) -> None:
        """Read what an earlier server knew: runs, and what was chosen."""
        self.jobs = jobs_in(self.folder)
        for draft in self.folder.glob("draft-*"):  # what was checked is checked again
            shutil.rmtree(draft, ignore_errors=True)
        with suppress(FileNotFoundError):
            try:
                vars(self).update(_chosen.validate_json((self.folder / CHOSEN).read_bytes()))
            except ValidationError:
                logger.warning("What was chosen in session %s could not be read back.", self.name[:8])

    @property
    def files(self) -> dict[str, OwnFile]:
        """Its own files for methods, by kind."""
        return {one.kind: one for one in self.own if one.kind not in KINDS}

    @property
    def asked(self) -> list[OwnFile]:
        """Its own prompts for the comparison."""
        return [one for one in self.own if one.kind in KINDS]

    @property
    def runs(self) -> list[Job]:
        """Its trainings that have ended, whichever way, the newest first."""
        return [job for job in reversed(self.jobs) if job.kind == "train" and job.ended]

    @property
    def compared(self) -> Job | None:
        """The run that step 4 shows: the chosen one, or the newest that was finished."""
        finished = (job for job in self.runs if job.progress.state == "done")
        return self.job_called(self.shown) or next(finished, None) or next(iter(self.runs), None)

    @property
    def busy(self) -> bool:
        """Whether a job of it waits or runs."""
        return any(not job.ended for job in self.jobs)


class Sessions:
    """All sessions.

    A cookie holds a random number and its signature, so that none can be invented, and nothing has to be remembered of
    browsers that only look in.
    """

    def __init__(self, folder: Path | None = None, idle_hours: float = 24.0) -> None:
        self._temporary = folder is None
        self.folder = (folder or Path(tempfile.mkdtemp(prefix="safe_trainer_app_"))).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.cookie_age = "" if self._temporary else "; Max-Age=31536000"  # a year: as long as there is history
        self._idle = idle_hours * 3600
        self._secret = self._kept_secret()
        self._found: dict[str, Session] = {}
        self._lock = threading.Lock()

    def new_cookie(self) -> str:
        """Return the cookie of a new session."""
        number = secrets.token_bytes(24)
        return base64.urlsafe_b64encode(number + self._signature(number)).decode()

    def get(self, cookie: str | None) -> Session | None:
        """Return the session of a cookie, or `None` if we have not given it."""
        name = self._name(cookie)
        if name is None:
            return None
        with self._lock:
            session = self._found.get(name)
            if session is None:
                session = self._found[name] = Session(name, self.folder / name)
                session.folder.mkdir(mode=0o700, exist_ok=True)
                session.restore()
            session.seen = time.monotonic()
            return session

    def sweep(self) -> int:
        """Remove the files of sessions that have been idle for long, unless the folder was given; return how many."""
        now = time.monotonic()
        with self._lock:
            old = [s for s in self._found.values() if not s.busy and now - s.seen > self._idle and self._temporary]
            for session in old:
                del self._found[session.name]
        for session in old:
            shutil.rmtree(session.folder, ignore_errors=True)
        return len(old)

    def close(self) -> None:
        """Remove everything, unless the folder was given."""
        with self._lock:
            self._found.clear()
        if self._temporary:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _kept_secret(self) -> bytes:
        """Return what cookies are signed with; kept in a folder that was given, so that cookies outlive the server."""
        path = self.folder / "secret"
        if self._temporary:
            return secrets.token_bytes(32)
        if not path.is_file():
            path.touch(mode=0o600)
            path.write_bytes(secrets.token_bytes(32))
        return path.read_bytes()

    def _signature(self, number: bytes) -> bytes:
        return hmac.digest(self._secret, number, "sha256")

    def _name(self, cookie: str | None) -> str | None:
        try:
            found = base64.urlsafe_b64decode((cookie or "").encode())
        except ValueError:
            return None
        number, signature = found[:24], found[24:]
        if not hmac.compare_digest(signature, self._signature(number)):
            return None
        return hashlib.sha256(number).hexdigest()[:32]
