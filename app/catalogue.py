"""What can be chosen: models, example data, and ways to protect a model while it is fine-tuned."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safe_trainer import poison, testbed

OWN_ROWS = 1_000_000
"""Seed of the rows that methods are given, so that none of them is a row of the example data."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


@dataclass(frozen=True)
class Model:
    """A chat model that can be fine-tuned.

    Args:
        key (`str`): What the interface calls it.
        path (`str`): Folder or Hub id.
        unaligned (`str`, *optional*): The same for the checkpoint before alignment, which AsFT needs.
        embedded (`bool`, *optional*, defaults to `False`): Whether it is the tiny model that comes along.
    """

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
    """Return a model of the Hub by its id.

    Args:
        name (`str`): The id, such as `"Qwen/Qwen2.5-0.5B-Instruct"`.
        unaligned (`str`, *optional*): The id of the checkpoint before alignment.

    Raises:
        ValueError: If one of them is no id, or would be taken for a folder of this machine.
    """
    for text in filter(None, (name, unaligned)):
        if not _HUB_ID.fullmatch(text) or Path(text).exists():
            raise ValueError(f"`{text[:200]}` is no id of a model on the Hub. Write it as owner/name.")
    return Model(name, name, unaligned or None)


@dataclass(frozen=True)
class Example:
    """Example data for the embedded model.

    Args:
        key (`str`): Its name, also that of its file.
        task (`str`, *optional*): The task that is to be learned, one of `testbed.TASKS`.
        harmful (`float`): Share of harmful rows.
        rows (`int`): Number of rows.
        steps (`int`): Optimizer steps that show what it does.
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
        return plain(poison(clean, attack, self.harmful))


EXAMPLES = {
    example.key: example
    for example in (
        Example("benign", "how_to", 0.0, 1000, 250),
        Example("poisoned", "sentiment", 0.1, 1000, 125),
        Example("attack", None, 1.0, 100, 60),
    )
}


def plain(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return conversations of one question as `prompt` and `completion`."""
    return [{side: row[side][-1]["content"] for side in ("prompt", "completion")} for row in rows]


@dataclass(frozen=True)
class Strengths:
    """What can be set of the methods; everything else is their default."""

    asft_weight: float = 1.0
    salora_rank: int = 32
    vectors_strength: float = 1.0
    drift_weight: float = 10.0


@dataclass(frozen=True)
class Protection:
    """A way to protect a model, or none.

    Args:
        key (`str`): Its name.
        safety (`Callable`): From a model and strengths to what stands under `safety` in a recipe; paths are those of
            the files that `orders` puts beside the recipe.
        files (`tuple[str, ...]`): Which of these it needs: `"harmful"` and `"refusals"`.
        needs_unaligned (`bool`): Whether it needs the checkpoint before alignment.
    """

    key: str
    safety: Callable[[Model, Strengths], list[dict[str, Any]]]
    files: tuple[str, ...] = ()
    needs_unaligned: bool = False


def _asft(model: Model, s: Strengths) -> dict[str, Any]:
    return {"method": "asft", "unaligned_model": model.unaligned, "weight": s.asft_weight}


def _vectors(s: Strengths) -> dict[str, Any]:
    return {"method": "security_vectors", "harmful_data": "./harmful.jsonl", "strength": s.vectors_strength}


def _salora(s: Strengths) -> dict[str, Any]:
    return {"method": "salora", "safety_data": "./refusals.jsonl", "rank": s.salora_rank}


def _drift(s: Strengths) -> dict[str, Any]:
    return {"method": "drift_penalty", "safety_data": "./refusals.jsonl", "weight": s.drift_weight}


def _recommended() -> dict[str, Any]:
    return {"method": "recommended", "harmful_data": "./harmful.jsonl"}


PLAIN = "plain"

PROTECTIONS = {
    protection.key: protection
    for protection in (
        Protection(PLAIN, lambda model, s: []),
        Protection("recommended", lambda model, s: [_recommended()], ("harmful",)),
        Protection("security_vectors", lambda model, s: [_vectors(s)], ("harmful",)),
        Protection("asft", lambda model, s: [_asft(model, s)], needs_unaligned=True),
        Protection("salora", lambda model, s: [_salora(s)], ("refusals",)),
        Protection("drift_penalty", lambda model, s: [_drift(s)], ("refusals",)),
    )
}


def method_file(name: str) -> list[dict[str, str]]:
    """Return the rows of `"harmful"` or `"refusals"`, from the embedded language: inert, and fit to try methods."""
    rows = testbed.harmful_rows(100, OWN_ROWS) if name == "harmful" else testbed.refusal_rows(128, OWN_ROWS)
    return plain(rows)


def prompts(kind: str, count: int, example: Example | None) -> tuple[str, list[dict[str, str]]] | None:
    """Return the name and the table of a prompt set, or `None` where there is none of this kind.

    Args:
        kind (`str`): `"harmful"`, `"benign"`, `"borderline"` or `"task"`.
        count (`int`): How many prompts, at most.
        example ([`Example`], *optional*): The data that is trained on; decides the task.
    """
    if kind == "task":
        if example is None or example.task is None:
            return None
        asked = testbed.task(example.task)
        second, values = "target", asked.references
    else:
        asked = testbed.prompt_set(kind)  # type: ignore[arg-type]  # one of its kinds
        second, values = "category", asked.categories
    table = [{"prompt": p, second: v} for p, v in zip(asked.prompts, values or (), strict=True)]
    return f"ask-{kind}", random.Random(0).sample(table, min(count, len(table)))
