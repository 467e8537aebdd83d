"""What is known of a job while it runs, from the events that its process tells."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from . import texts

State = Literal["waiting", "running", "done", "failed", "cancelled"]
Curve = list[tuple[int, float]]

_CURVES = {"loss": "loss", "safety_penalty": "penalty"}
_LONGEST = 500  # points of a curve, and lines of the log


@dataclass
class Part:
    """One variant: how far it is, and its curves by name (`loss`, `penalty`, `refused harmful`, ...)."""

    state: str = "waiting"
    message: str = ""
    step: int = 0
    total: int = 0
    started: float = 0.0
    curves: dict[str, Curve] = field(default_factory=dict)


@dataclass
class Progress:
    """State of a job. It is changed by the thread that follows the job and read by all others.

    Args:
        version (`int`): Grows with every change.
        phase (`str`): What is being done, a key of `texts.PHASES`.
        done (`int`), total (`int`): How far a phase without steps is.
    """

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

    def end(self, state: State, message: str = "") -> None:
        """It has ended."""
        self.state, self.message, self.ended_at = state, message, time.time()
        self.note(" ".join(filter(None, (texts.LOG_ENDED[state], message))))

    def note(self, text: str) -> None:
        """Add a line to the log."""
        with self._lock:
            self.log.append(f"{datetime.now():%H:%M:%S}  {text}")
            del self.log[:-_LONGEST]
            self.version += 1

    def take(self, events: Iterable[dict[str, Any]]) -> None:
        """Take in what the process told."""
        for event in events:
            getattr(self, f"_take_{event['kind']}")(event)
            self.version += 1

    def seconds_left(self) -> float | None:
        """Return an estimate for the training of the running variant, and those that have not begun."""
        part = self.parts.get(self.variant)
        if self.phase != "training" or part is None or part.step < 3:
            return None
        return (time.time() - part.started) / part.step * (part.total - part.step)

    def _part(self, event: dict[str, Any]) -> Part:
        return self.parts.setdefault(event["variant"], Part())

    def _take_phase(self, event: dict[str, Any]) -> None:
        self.phase, self.done, self.total = event["phase"], 0, 0
        self.variant = event.get("variant", "")
        title = texts.CARDS[self.variant].title if self.variant else ""
        if self.phase == "training":
            self._part(event).started = event["time"]
        self.note(": ".join(filter(None, (title, texts.PHASES[self.phase]))))

    def _take_variant(self, event: dict[str, Any]) -> None:
        part = self._part(event)
        part.state, part.message = event["state"], event.get("message", "")
        if part.state != "running":
            line = texts.LOG_VARIANT[part.state].format(title=texts.CARDS[event["variant"]].title)
            self.note(" ".join(filter(None, (line, part.message))))

    def _take_step(self, event: dict[str, Any]) -> None:
        part = self._part(event)
        part.step, part.total = event["step"], event["total"]

    def _take_point(self, event: dict[str, Any]) -> None:
        part, step = self._part(event), event["step"]
        part.step = max(part.step, step)
        for name, value in event["values"].items():
            shown = _CURVES.get(name)
            if name.startswith("safety/") and name.endswith("_refused"):
                shown = f"refused {name.removeprefix('safety/').removesuffix('_refused')}"
            if shown:
                part.curves.setdefault(shown, []).append((step, float(value)))
                del part.curves[shown][:-_LONGEST]

    def _take_progress(self, event: dict[str, Any]) -> None:
        self.done, self.total = event["done"], event["total"]

    def _take_stopping(self, event: dict[str, Any]) -> None:
        part = self._part(event)
        part.state, part.step = "cancelled", event["step"]
        self.note(texts.LOG_STOPPED.format(step=event["step"]))

    def _take_done(self, event: dict[str, Any]) -> None:
        self.end("done")

    def _take_cancelled(self, event: dict[str, Any]) -> None:
        for part in self.parts.values():
            if part.state == "running":
                part.state = "cancelled"
        self.end("cancelled")

    def _take_failed(self, event: dict[str, Any]) -> None:
        self.end("failed", event["message"])
