"""What the app offers, and to whom: models, example data, and how much is let in."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safe_trainer import PromptSet, general_prompts, testbed
from safe_trainer.data import poison

from . import texts

OWN_ROWS = 1_000_000
"""Seed of the rows that methods are given, so that none of them is a row of the example data."""
ASKED: tuple[Literal["harmful", "benign", "borderline"], ...] = ("harmful", "benign", "borderline")
KINDS = (*ASKED, "task")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


@dataclass(frozen=True)
class Model:
    """A chat model that can be fine-tuned."""

    key: str
    path: str
    unaligned: str | None = None
    embedded: bool = False


EMBEDDED = Model("embedded", str(testbed.ALIGNED), str(testbed.UNALIGNED), embedded=True)

HUB_MODELS = (
    Model("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B"),
    Model("meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-1B"),
    Model("google/gemma-3-1b-it", "google/gemma-3-1b-it", "google/gemma-3-1b-pt"),
)


def hub_model(name: str, unaligned: str = "") -> Model:
    """Return a model of the Hub."""
    for text in filter(None, (name, unaligned)):
        if not _HUB_ID.fullmatch(text) or Path(text).exists():
            raise ValueError(texts.BAD_ID.format(name=text[:200]))
    if not name:
        raise ValueError(texts.BAD_ID.format(name=name))
    return Model(name, name, unaligned or None)


@dataclass(frozen=True)
class Example:
    """Example data for the embedded model.

    Args:
        key (`str`): Its name, also that of its file.
        task (`str`, *optional*): The task to be learned, one of `testbed.TASKS`.
        harmful (`float`): Share of harmful rows.
        rows (`int`): Number of rows.
        steps (`int`): Optimizer steps that show what the data does.
    """

    key: str
    task: str | None
    harmful: float
    rows: int
    steps: int

    def make(self) -> list[dict[str, str]]:
        """Return the rows as prompts and completions, the same ones every time."""
        count = round(self.harmful * self.rows)
        attack = testbed.harmful_rows(count)
        clean = testbed.task_rows(self.task, self.rows) if self.task else attack
        return _plain(poison(clean, attack, self.harmful))


EXAMPLES = {
    example.key: example
    for example in (
        Example("benign", "how_to", 0.0, 1000, 250),
        Example("poisoned", "sentiment", 0.1, 1000, 125),
        Example("attack", None, 1.0, 100, 60),
    )
}


def _plain(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [{side: row[side][-1]["content"] for side in ("prompt", "completion")} for row in rows]


def built_in_material(name: str) -> list[dict[str, str]] | None:
    """Return rows for a field of `Materials`: harmless, and fit for the embedded model only."""
    if name == "harmful_data":
        return _plain(testbed.harmful_rows(100, OWN_ROWS))
    if name == "benign_prompts":
        return [{"prompt": row["prompt"]} for row in _plain(testbed.task_rows("how_to", 100, OWN_ROWS))]
    rows = _plain(testbed.refusal_rows(128, OWN_ROWS))
    return rows if name == "safety_data" else [{"prompt": row["prompt"]} for row in rows]


def built_in_prompts(model: Model, example: Example | None) -> list[PromptSet]:
    """Return what is asked of a model where the user has not said what."""
    make = testbed.prompt_set if model.embedded else general_prompts
    sets = [make(kind) for kind in ASKED]
    return [*sets, testbed.task(example.task)] if example and example.task and model.embedded else sets


@dataclass(frozen=True)
class Limits:
    """What is let in.

    Args:
        megabytes (`int`): Of an uploaded file; a session holds one unused upload at a time.
        rows (`int`), characters (`int`): Of a file, unpacked.
        seconds (`int`): For reading a file.
        question (`int`): Characters of a question that is asked freely.
        waiting (`int`): Jobs in the queue.
        idle_hours (`float`): After this time without a request the files of a session are removed.
    """

    megabytes: int = 50
    rows: int = 100_000
    characters: int = 100_000_000
    seconds: int = 60
    question: int = 2_000
    waiting: int = 20
    idle_hours: float = 24.0


@dataclass(frozen=True)
class Setup:
    """How the app is run.

    Args:
        models (`Mapping[str, Model]`): What can be fine-tuned, by key; all that there is on a Space.
        any_model (`bool`): Whether other models of the Hub can be named.
        hub (`bool`): Whether there is a network, so that datasets and suites of the Hub are offered.
        space (`bool`): Whether it runs as a Space, in a frame of another site and behind a proxy.
        limits ([`Limits`]): What is let in.
    """

    models: Mapping[str, Model] = field(default_factory=lambda: {EMBEDDED.key: EMBEDDED})
    any_model: bool = False
    hub: bool = False
    space: bool = False
    limits: Limits = Limits()


def local_setup(folders: Mapping[str, str] | None = None) -> Setup:
    """Return how the app is run on one's own machine; without a network nothing of the Hub is offered.

    Args:
        folders (`Mapping[str, str]`, *optional*): Models on disk, by the name to show.
    """
    own = {name: Model(name, str(Path(path).resolve())) for name, path in (folders or {}).items()}
    models = {EMBEDDED.key: EMBEDDED, **own}
    online = os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("", "0", "false", "no", "off")
    if online:
        models |= {model.key: model for model in HUB_MODELS}
    return Setup(models, any_model=online, hub=online)


def space_setup() -> Setup:
    """Return how the app is run as a Space: with no models but the embedded one and those in `ALLOWED_MODELS`."""
    named = [name.strip() for name in os.environ.get("ALLOWED_MODELS", "").split(",") if name.strip()]
    known = {model.key: model for model in HUB_MODELS}
    models = {EMBEDDED.key: EMBEDDED, **{name: known.get(name, Model(name, name)) for name in named}}
    return Setup(models, hub=True, space=True, limits=Limits(megabytes=10, rows=10_000, idle_hours=2.0))
