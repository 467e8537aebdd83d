"""Sessions: one for each browser, with a folder of its own that nobody else is shown and that goes with it."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .catalogue import EMBEDDED, Model
from .inspection import Inspection
from .jobs import Job
from .orders import Choices, Variant

COOKIE = "safe_trainer_session"


@dataclass
class Session:
    """What the server knows of one browser.

    Args:
        name (`str`): Name of its folder; made from its cookie, which cannot be told from it.
        folder (`Path`): Its files.
        model ([`Model`]): The model in use.
        inspection ([`Inspection`], *optional*): The data in use.
        choices ([`Choices`], *optional*): What has been checked and can be trained.
        draft (`Path`, *optional*): Folder with the recipes of these choices.
        variants (`Sequence[Variant]`): The recipes in it.
        jobs (`list[Job]`): Its jobs, the newest last.
    """

    name: str
    folder: Path
    model: Model = EMBEDDED
    inspection: Inspection | None = None
    choices: Choices | None = None
    draft: Path | None = None
    variants: Sequence[Variant] = ()
    jobs: list[Job] = field(default_factory=list)
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

    def job_called(self, name: str) -> Job | None:
        """Return its job of this name; never that of another session."""
        return next((job for job in self.jobs if job.id == name), None)

    @property
    def busy(self) -> bool:
        """Whether a job of it waits or runs."""
        return any(not job.ended for job in self.jobs)


class Sessions:
    """All sessions.

    A cookie holds a random number and its signature, so that none can be invented, and nothing has to be remembered of
    browsers that only look in.

    Args:
        folder (`Path`, *optional*): Where their files are; a temporary folder that is removed at the end if left out.
        idle_hours (`float`, *optional*, defaults to `24.0`): After which time without a sign of life a session's files
            are removed.
    """

    def __init__(self, folder: Path | None = None, idle_hours: float = 24.0) -> None:
        self._temporary = folder is None
        self.folder = (folder or Path(tempfile.mkdtemp(prefix="safe_trainer_app_"))).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._idle = idle_hours * 3600
        self._secret = secrets.token_bytes(32)
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
            session.seen = time.monotonic()
            return session

    def is_ours(self, cookie: str | None) -> bool:
        """Tell whether we have given this cookie."""
        return self._name(cookie) is not None

    def sweep(self) -> int:
        """Remove the files of sessions that have been idle for long; return of how many."""
        now = time.monotonic()
        with self._lock:
            old = [s for s in self._found.values() if not s.busy and now - s.seen > self._idle]
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
