"""How a job's process and the server talk: files in the job's folder, which outlive the page and the server.

The process writes its `Progress`, which the server reads; where the file `CANCEL` appears, it is ended.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from . import texts

JOB, PROGRESS, LOG = "job.json", "progress.json", "worker.log"
"""What is to be done; how far it is; what the libraries print."""
CANCEL = "cancel"
"""Where this file appears, the job ends; it says why."""
COMPARISON, REVIEWED = "comparison", "comparison.reviewed"
"""Stems of the report's files: as judged, and with what people have labelled."""
SCAN, RANKING, CLEANED = "scan.json", "ranking.csv", "cleaned.jsonl"
"""What a scan found, its table, and the rows that it did not find suspicious."""

State = Literal["waiting", "running", "done", "failed", "cancelled"]

_CURVES = {"loss": "loss", "eval_loss": "held_out", "safety_penalty": "penalty"}
_CURVES |= {"learning_rate": "rate", "grad_norm": "gradient"}
_LONGEST = 500  # points of a curve, and lines of the log
_PAUSE = 0.2  # seconds between two writes of what changes often


@dataclass
class Part:
    """One variant: how far it is, since which step, and its curves by a key of `texts.CURVES`."""

    state: str = "waiting"
    message: str = ""
    step: int = 0
    total: int = 0
    first: int = 0
    started: float = 0.0
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)


@dataclass
class Progress:
    """State of a job: `phase` is a key of `texts.PHASES`, `memory` bytes; `version` grows with every change."""

    titles: Mapping[str, str] = field(default_factory=dict)
    state: State = "waiting"
    message: str = ""
    phase: str = ""
    variant: str = ""
    done: int = 0
    total: int = 0
    version: int = 0
    memory: int = 0
    started: float = 0.0
    ended_at: float = 0.0
    parts: dict[str, Part] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    _written: float = 0.0

    @classmethod
    def read(cls, folder: Path) -> Progress | None:
        """Return what a job's process has written, if it has."""
        try:
            values = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        parts = {key: Part(**part) for key, part in values.pop("parts").items()}
        return cls(**values, parts=parts)

    def write(self, folder: Path, *, seldom: bool = False) -> None:
        """Write it, complete or not at all; at most five times a second if `seldom`."""
        self.version += 1
        if seldom and time.monotonic() < self._written + _PAUSE:
            return
        self._written = time.monotonic()
        fresh = folder / f"{PROGRESS}.new"
        fresh.write_text(json.dumps({**asdict(self), "_written": 0.0}), encoding="utf-8")
        fresh.replace(folder / PROGRESS)

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
        for part in self.parts.values():
            if part.state == "running":
                part.state = state
        self.state, self.message, self.ended_at = state, message, time.time()
        self.note(" ".join(filter(None, (texts.LOG_ENDED[state], message))))

    def note(self, text: str) -> None:
        """Add a line to the log."""
        self.log.append(f"{datetime.now():%H:%M:%S}  {text}")
        del self.log[:-_LONGEST]
        self.version += 1

    def seconds_left(self) -> float | None:
        """Return an estimate for the training of the running variant."""
        part = self.parts.get(self.variant)
        if self.phase != "training" or part is None or part.step - part.first < 3:
            return None
        return (time.time() - part.started) / (part.step - part.first) * (part.total - part.step)

    def start_rate(self) -> float | None:
        """Return the share of harmful prompts that the model refused before training, once it has been measured."""
        found = [part.curves["harmful"][0] for part in self.parts.values() if part.curves.get("harmful")]
        return found[0][1] if found and found[0][0] == 0 else None

    def enter(self, phase: str, variant: str = "") -> None:
        """Note that a phase begins."""
        self.phase, self.variant, self.done, self.total = phase, variant, 0, 0
        if phase == "training":
            part = self.part(variant)
            part.started, part.first = time.time(), part.step
        words = (self.titles.get(variant, ""), texts.PHASES.get(phase, phase))
        self.note(": ".join(filter(None, words)))

    def part(self, variant: str) -> Part:
        """Return how far a variant is."""
        return self.parts.setdefault(variant, Part())

    def turn(self, variant: str, state: str, message: str = "") -> None:
        """Note that a variant begins or ends."""
        part = self.part(variant)
        part.state, part.message = state, message
        if state != "running":
            line = texts.LOG_VARIANT[state].format(title=self.titles.get(variant, variant))
            self.note(" ".join(filter(None, (line, message))))

    def point(self, variant: str, entry: Mapping[str, Any]) -> None:
        """Add an entry of the trainer's log to the curves of a variant."""
        for shown, value in _shown(entry).items():
            step, curve = int(entry["step"]), self.part(variant).curves.setdefault(shown, [])
            while curve and curve[-1][0] >= step:  # a run that goes on does so from its checkpoint
                curve.pop()
            curve.append((step, value))
            del curve[:-_LONGEST]


def _shown(entry: Mapping[str, Any]) -> dict[str, float]:
    """Return what is drawn of an entry, by curve: of several sets of a kind the rate of all prompts together."""
    found = {_CURVES[name]: float(value) for name, value in entry.items() if name in _CURVES}
    rates: dict[str, list[tuple[float, float]]] = {}
    for name, value in entry.items():
        if name.startswith("safety/") and name.endswith("_refused"):
            own = name.removesuffix("_refused")
            kind = own.removeprefix("safety/").partition(":")[0]
            rates.setdefault(kind, []).append((float(value), float(entry.get(f"{own}_judged", 1))))
    for kind in rates.keys() & texts.CURVES.keys():
        if judged := sum(count for _, count in rates[kind]):
            found[kind] = sum(rate * count for rate, count in rates[kind]) / judged
    return found
