"""How a job's process and the server talk: files in the job's folder, which outlive the page and the server.

`Events` and `Stop` belong to the process, `Progress` and `Reader` to the server.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from . import texts

JOB, EVENTS, LOG = "job.json", "events.jsonl", "worker.log"
"""What is to be done; what happens, a line each; what the libraries print."""
CANCEL, STOPPING = "cancel", "stopping"
"""Where this file appears, the job ends; this one, when only a checkpoint is left to be written."""
COMPARISON, SCAN, RANKING, CLEANED = "comparison", "scan.json", "ranking.csv", "cleaned.jsonl"
"""Stem of the report's files; what a scan found, its table, and the rows that it did not find suspicious."""

State = Literal["waiting", "running", "done", "failed", "cancelled"]
Curve = list[tuple[int, float]]

_CURVES = {"loss": "loss", "safety_penalty": "penalty"}
_LONGEST = 500  # points of a curve, and lines of the log


class Cancelled(Exception):  # noqa: N818, it is no error
    """The user has cancelled the job."""


class Events:
    """What a job reports, written by its process."""

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
        """Return the complete lines that have been written since the last call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._place)
                found = file.read()
        except FileNotFoundError:
            return []
        complete = found[: found.rfind(b"\n") + 1]
        self._place += len(complete)
        return [json.loads(line) for line in complete.splitlines()]


class Stop:
    """Watches, from a thread of the job's process, for the wish to end and for the server's end."""

    def __init__(self, folder: Path) -> None:
        self.wanted = threading.Event()
        self.patient, self.told = False, False
        """Whether the trainer ends by itself, between two steps; and whether it has begun to."""
        self._folder, self._parent = folder, os.getppid()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        import _thread

        while not (self._folder / CANCEL).exists():
            if os.getppid() != self._parent:
                os._exit(1)  # nobody is left to read what would come out
            time.sleep(0.1)
        self.wanted.set()
        if not self.patient:
            _thread.interrupt_main()

    def saving(self) -> None:
        """Report that only the checkpoint is left to be written."""
        self.told = True
        (self._folder / STOPPING).touch()

    def check(self) -> None:
        """Raise [`Cancelled`] if the end is wanted."""
        if self.wanted.is_set():
            raise Cancelled


@dataclass
class Part:
    """One variant: how far it is, and its curves by name (`loss`, `penalty`, `harmful`, `borderline`)."""

    state: str = "waiting"
    message: str = ""
    step: int = 0
    total: int = 0
    started: float = 0.0
    curves: dict[str, Curve] = field(default_factory=dict)


@dataclass
class Progress:
    """State of a job. It is changed by the thread that follows the job and read by all others."""

    titles: Mapping[str, str] = field(default_factory=dict)
    state: State = "waiting"
    message: str = ""
    phase: str = ""
    variant: str = ""
    done: int = 0
    total: int = 0
    version: int = 0
    started: float = 0.0
    ended_at: float = 0.0
    parts: dict[str, Part] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def ended(self) -> bool:
        """Whether it has come to an end, whichever."""
        return self.state in ("done", "failed", "cancelled")

    @property
    def seconds(self) -> float:
        """For how long it has run."""
        return (self.ended_at or time.time()) - self.started if self.started else 0.0

    def begin(self) -> None:
        """It is its turn."""
        self.state, self.started = "running", time.time()
        self.note(texts.LOG_BEGUN)

    def end(self, state: State, message: str = "", at: float | None = None) -> None:
        """It has ended."""
        self.state, self.message, self.ended_at = state, message, at or time.time()
        self.note(" ".join(filter(None, (texts.LOG_ENDED[state], message))), at)

    def note(self, text: str, at: float | None = None) -> None:
        """Add a line to the log."""
        with self._lock:
            self.log.append(f"{datetime.fromtimestamp(at or time.time()):%H:%M:%S}  {text}")
            del self.log[:-_LONGEST]
            self.version += 1

    def take(self, events: Iterable[dict[str, Any]]) -> None:
        """Take in what the process reported."""
        for event in events:
            self.started = self.started or event.get("time", 0.0)
            getattr(self, f"_take_{event['kind']}")(event)
            self.version += 1

    def restore(self, events: Iterable[dict[str, Any]]) -> None:
        """Take in what the process of an earlier server reported: what had not ended was lost with it."""
        self.state = "running"
        at = 0.0
        for event in events:
            self.take([event])
            at = event["time"]
        if not self.ended:
            self.end("failed", texts.SERVER_LOST, at)

    def seconds_left(self) -> float | None:
        """Return an estimate for the training of the running variant."""
        part = self.parts.get(self.variant)
        if self.phase != "training" or part is None or part.step < 3:
            return None
        return (time.time() - part.started) / part.step * (part.total - part.step)

    def start_rate(self) -> float | None:
        """Return the share of harmful prompts that the model refused before training, once it has been measured."""
        found = [part.curves["harmful"][0] for part in self.parts.values() if part.curves.get("harmful")]
        return found[0][1] if found and found[0][0] == 0 else None

    def _part(self, event: dict[str, Any]) -> Part:
        return self.parts.setdefault(event["variant"], Part())

    def _take_phase(self, event: dict[str, Any]) -> None:
        self.phase, self.done, self.total = event["phase"], 0, 0
        self.variant = event.get("variant", "")
        if self.phase == "training":
            self._part(event).started = event["time"]
        words = (self.titles.get(self.variant, ""), texts.PHASES.get(self.phase, self.phase))
        self.note(": ".join(filter(None, words)), event.get("time"))

    def _take_variant(self, event: dict[str, Any]) -> None:
        part = self._part(event)
        part.state, part.message = event["state"], event.get("message", "")
        if part.state != "running":
            line = texts.LOG_VARIANT[part.state].format(title=self.titles.get(event["variant"], event["variant"]))
            self.note(" ".join(filter(None, (line, part.message))), event.get("time"))

    def _take_step(self, event: dict[str, Any]) -> None:
        part = self._part(event)
        part.step, part.total = event["step"], event["total"]

    def _take_point(self, event: dict[str, Any]) -> None:
        part, step = self._part(event), event["step"]
        part.step = max(part.step, step)
        for name, value in event["values"].items():
            shown = _CURVES.get(name)
            if name.startswith("safety/") and name.endswith("_refused"):
                shown = name.removeprefix("safety/").removesuffix("_refused")
            if shown in texts.CURVES:
                part.curves.setdefault(shown, []).append((step, float(value)))
                del part.curves[shown][:-_LONGEST]

    def _take_message(self, event: dict[str, Any]) -> None:
        self.note(event["text"], event.get("time"))

    def _take_progress(self, event: dict[str, Any]) -> None:
        self.done, self.total = event["done"], event["total"]

    def _take_stopping(self, event: dict[str, Any]) -> None:
        part = self._part(event)
        part.state = "cancelled"
        self.note(texts.LOG_STOPPED.format(step=part.step), event.get("time"))

    def _take_done(self, event: dict[str, Any]) -> None:
        self.end("done", at=event.get("time"))

    def _take_cancelled(self, event: dict[str, Any]) -> None:
        for part in self.parts.values():
            if part.state == "running":
                part.state = "cancelled"
        self.end("cancelled", at=event.get("time"))

    def _take_failed(self, event: dict[str, Any]) -> None:
        self.end("failed", event["message"], event.get("time"))
