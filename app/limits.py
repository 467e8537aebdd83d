"""How the app is run: for whom, and how much of everything."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .catalogue import EMBEDDED, HUB_MODELS, Model


@dataclass(frozen=True)
class Limits:
    """What is let in.

    Args:
        megabytes (`int`): Of an uploaded file.
        rows (`int`), columns (`int`), characters (`int`): Rows of a file, columns of a row, characters of a row.
        question (`int`): Characters of a question that is asked freely.
        waiting (`int`): Jobs in the queue.
        idle_hours (`float`): After this time without a sign of life the files of a session are removed.
    """

    megabytes: int = 50
    rows: int = 100_000
    columns: int = 100
    characters: int = 100_000
    question: int = 2_000
    waiting: int = 20
    idle_hours: float = 24.0


@dataclass(frozen=True)
class Setup:
    """How the app is run.

    Args:
        models (`Mapping[str, Model]`): What can be fine-tuned, by key; all that there is on a Space.
        any_model (`bool`): Whether other models of the Hub can be named.
        space (`bool`): Whether it runs as a Space, in a frame of another site and behind a proxy.
        push (`bool`): Whether adapters can be pushed with the login of this machine.
        limits ([`Limits`]): What is let in.
    """

    models: Mapping[str, Model] = field(default_factory=lambda: {EMBEDDED.key: EMBEDDED})
    any_model: bool = False
    space: bool = False
    push: bool = False
    limits: Limits = Limits()


def local_setup(folders: Mapping[str, str] | None = None, *, shared: bool = False) -> Setup:
    """Return how the app is run on one's own machine.

    Args:
        folders (`Mapping[str, str]`, *optional*): Models on disk, by the name to show.
        shared (`bool`, *optional*, defaults to `False`): Whether others can reach it; then nobody pushes with the
            owner's login.
    """
    own = {name: Model(name, str(Path(path).resolve())) for name, path in (folders or {}).items()}
    models = {EMBEDDED.key: EMBEDDED, **own}
    if os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0"):
        models |= {model.key: model for model in HUB_MODELS}
    return Setup(models, any_model=True, push=not shared)


def space_setup() -> Setup:
    """Return how the app is run as a Space: with no models but the embedded one and those in `ALLOWED_MODELS`."""
    named = [name.strip() for name in os.environ.get("ALLOWED_MODELS", "").split(",") if name.strip()]
    known = {model.key: model for model in HUB_MODELS}
    models = {EMBEDDED.key: EMBEDDED, **{name: known.get(name, Model(name, name)) for name in named}}
    return Setup(models, space=True, limits=Limits(megabytes=10, rows=10_000, idle_hours=2.0))
