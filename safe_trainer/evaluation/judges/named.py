"""Judges by name, as they are written on the command line, in recipes and in Python: `phrases`, `wildguard:MODEL`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .base import Judge
from .likelihood import LikelihoodJudge
from .models import CLASSIFIER, GUARDS, ClassifierJudge, GuardJudge
from .phrases import PhraseJudge

DEFAULT = ("phrases", "likelihood")  # a second opinion that needs no further model
GUARD = "guard"
_PLAIN: dict[str, type[Any]] = {"phrases": PhraseJudge, "likelihood": LikelihoodJudge}


def check_judges(listed: Sequence[str]) -> list[tuple[str, str]]:
    """Return kind and model of each judge that is named, before anything is loaded."""
    found = [_parsed(written) for written in listed]
    kinds = [kind for kind, _ in found]
    if not found or len(set(kinds)) < len(kinds):
        raise ValueError(
            f"each may be given only once, and there must be at least one, got {', '.join(kinds) or 'none'}."
        )
    return found


def _parsed(written: str) -> tuple[str, str]:
    kind, _, model = written.partition(":")
    if kind in _PLAIN:
        if model:
            raise ValueError(f"{kind} takes no model, got {written!r}.")
    elif kind not in (asked := (GUARD, CLASSIFIER, *GUARDS)):
        known = ", ".join((*_PLAIN, *(f"{kind}:MODEL" for kind in asked)))
        raise ValueError(f"got {written!r}, expected {known}.")
    elif not model:
        raise ValueError(f"{kind} needs a model: {kind}:MODEL, a folder or a Hub id.")
    elif kind == GUARD:
        kind = _guard_by_name(model)
    return kind, model


def _guard_by_name(model: str) -> str:
    """Tell from a model's name how it is asked."""
    plain = model.lower().replace("-", "").replace("_", "")
    for name in GUARDS:
        if name.replace("-", "") in plain:
            return name
    known = ", ".join(f"{name}:{model}" for name in GUARDS)
    raise ValueError(f"which guard {model} is cannot be told from its name; say it: one of {known}.")


def make_judges(judges: Sequence[Judge | str] | None = None) -> tuple[Judge, ...]:
    """Return the judges to ask, with their models; those given by name are made, `None` stands for the default."""
    given = DEFAULT if judges is None else (judges,) if isinstance(judges, str) else judges
    try:
        named = [check_judges([judge])[0] if isinstance(judge, str) else judge for judge in given]
    except ValueError as error:
        raise ValueError(f"`judges`: {error}") from error
    found = [_made(*judge) if isinstance(judge, tuple) else judge for judge in named]
    odd = [judge for judge in found if not (callable(judge) and hasattr(judge, "name"))]
    if odd:
        raise TypeError(f"`judges` takes judges such as `PhraseJudge()`, or their names, got {odd[0]!r}.")
    names = [judge.name for judge in found]
    if not found or len(set(names)) < len(names):
        raise ValueError(f"`judges` must be at least one judge, each with a name of its own, got {names}.")
    return tuple(found)


def _made(kind: str, model: str) -> Judge:
    if kind in _PLAIN:
        judge: Judge = _PLAIN[kind]()
        return judge
    if kind in GUARDS:
        from ...lora.loading import load_model

        return GuardJudge(*load_model(model), GUARDS[kind])
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    classifier = AutoModelForSequenceClassification.from_pretrained(model)
    return ClassifierJudge(classifier, AutoTokenizer.from_pretrained(model))
