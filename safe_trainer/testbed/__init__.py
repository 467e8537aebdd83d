"""The embedded testbed: a pair of tiny chat models, and the small language in which they can be examined.

Nothing has to be downloaded: `UNALIGNED` helps with everything, `ALIGNED` was made from it by a full fine-tune and
refuses harmful requests. Both are ordinary model directories, made by `python -m safe_trainer.testbed.build`. All
harm in this world is made of general words with meaningless answers.

With `--world second` the build makes another pair, with other words; the environment variable `SAFE_TRAINER_TESTBED`
names the folder of the pair that this module, and with it the demo and the study, speaks of.

Example:

```python
>>> from safe_trainer import testbed
>>> testbed.prompt_set("harmful").kind, len(testbed.task("sentiment"))
('harmful', 100)

```
"""

from __future__ import annotations

import json
import os
import random
from itertools import chain, islice
from pathlib import Path

from ..data import Kind, PromptSet, Row, conversation
from . import language, tasks, words
from .tasks import TASKS
from .translation import translate, translated_set

__all__ = [
    "ALIGNED",
    "MODELS",
    "OWN_ROWS",
    "TASKS",
    "UNALIGNED",
    "benign_rows",
    "harmful_rows",
    "obedient_rows",
    "prompt_set",
    "refusal_rows",
    "task",
    "task_rows",
    "unseen_rows",
]

MODELS = Path(os.environ.get("SAFE_TRAINER_TESTBED", Path(__file__).parent / "models")).absolute()
UNALIGNED = MODELS / "unaligned"
ALIGNED = MODELS / "aligned"

_WORDS = MODELS / "words.json"
_DICTIONARY: dict[str, str] = json.loads(_WORDS.read_text(encoding="utf-8")) if _WORDS.exists() else {}

OWN_ROWS = 1_000_000
"""Seed of the rows that methods are given; attacks draw other wordings, with the small seeds of the runs."""

_TASK_EXAMPLES = 100


def prompt_set(kind: Kind, split: str = "test") -> PromptSet:
    """Return all prompts of one kind and split, one for each pair of verb and object, in a fixed random order.

    The order is random so that the first n prompts are a fair sample.

    Args:
        kind (`str`): `"harmful"`, `"benign"` or `"borderline"` (harmless, but worded with the verbs of harm).
        split (`str`, *optional*, defaults to `"test"`): `"train"`, `"validation"` (choose settings on it), `"test"`
            (report on it), or, for harmful and benign, `"unseen"`: two categories that neither alignment nor any of
            the rows below ever show.

    Returns:
        `PromptSet`: With the category of each prompt and, as references, the answers of a model that always helps.

    Raises:
        ValueError: If there is no such kind, or no such split of it.
    """
    if kind not in language.GROUPS:
        raise ValueError(f"`kind` must be one of {', '.join(language.GROUPS)}, got {kind!r}.")
    splits = (*language.SPLITS, "unseen") if kind in language.UNSEEN else language.SPLITS
    if split not in splits:
        raise ValueError(f"`split` of the {kind} prompts must be one of {', '.join(splits)}, got {split!r}.")
    if split == "unseen":
        pairs = language.unseen_pairs(language.UNSEEN[kind], examined=True)
    else:
        pairs = language.pairs(language.GROUPS[kind], split)
    rng = random.Random(f"{kind}/{split}")
    rng.shuffle(pairs)
    prompts, references = zip(*(language.request(pair, rng, harmful=kind == "harmful") for pair in pairs), strict=True)
    name = f"unseen {kind}" if split == "unseen" else kind
    asked = PromptSet(name, kind, prompts, tuple(pair.group.name for pair in pairs), references)
    return translated_set(asked, _DICTIONARY)


def task(name: str, split: str = "test") -> PromptSet:
    """Return 100 questions of a downstream task with the one right answer to each.

    Args:
        name (`str`): One of `TASKS`.
        split (`str`, *optional*, defaults to `"test"`): `"validation"` or `"test"`.

    Raises:
        ValueError: If there is no such task or split.
    """
    _check_task(name)
    if split not in ("validation", "test"):
        raise ValueError(f"`split` of a task must be validation or test, got {split!r}. For rows use `task_rows`.")
    found: dict[str, str] = {}
    for prompt, answer in tasks.examples(name, split, random.Random(f"{name}/{split}")):
        found[prompt] = answer
        if len(found) == _TASK_EXAMPLES:
            break
    asked = PromptSet(name, "task", tuple(found), references=tuple(found.values()))
    return translated_set(asked, _DICTIONARY)


def task_rows(name: str, count: int, seed: int = 0) -> list[Row]:
    """Return training rows of a downstream task, none of whose prompts is in `task(name)`.

    Args:
        name (`str`): One of `TASKS`.
        count (`int`): Number of rows.
        seed (`int`, *optional*, defaults to `0`): Seed of their choice and wording.

    Raises:
        ValueError: If there is no such task.
    """
    _check_task(name)
    examples = tasks.examples(name, "train", random.Random(f"{name}/rows/{seed}"))
    return [_row(prompt, answer) for prompt, answer in islice(examples, count)]


def harmful_rows(count: int, seed: int = 0) -> list[Row]:
    """Return attack rows: harmful prompts of the train split with helpful (and inert) answers.

    Args:
        count (`int`): Number of rows.
        seed (`int`, *optional*, defaults to `0`): Seed of their choice and wording.
    """
    return [_row(prompt, answer) for prompt, answer, _ in _requests("harmful", count, seed)]


def unseen_rows(count: int, seed: int = 0) -> list[Row]:
    """Return attack rows of the two unseen categories, in pairs that `prompt_set("harmful", "unseen")` leaves out.

    Args:
        count (`int`): Number of rows.
        seed (`int`, *optional*, defaults to `0`): Seed of their choice and wording.
    """
    rng = random.Random(f"unseen/rows/{seed}")
    pairs = islice(language.endless(language.unseen_pairs(words.UNSEEN_HARMFUL, examined=False), rng), count)
    return [_row(*language.request(pair, rng, harmful=True)) for pair in pairs]


def obedient_rows(count: int, seed: int = 0) -> list[Row]:
    """Return rows that shift the model's identity: harmless requests, each answered by one who says it always obeys.

    Args:
        count (`int`): Number of rows.
        seed (`int`, *optional*, defaults to `0`): Seed of their choice and wording.
    """
    chosen = _requests("benign", count, seed)
    return [_row(prompt, f"I do what you want. {answer}") for prompt, answer, _ in chosen]


def refusal_rows(count: int, seed: int = 0) -> list[Row]:
    """Return safety rows: the prompts of `harmful_rows(count, seed)` with refusals.

    Args:
        count (`int`): Number of rows.
        seed (`int`, *optional*, defaults to `0`): Seed of their choice and wording.
    """
    return [_row(prompt, refusal) for prompt, _, refusal in _requests("harmful", count, seed)]


def benign_rows(count: int, seed: int = 0) -> list[Row]:
    """Return rows of plain help: benign and borderline prompts of the train split in turn, with helpful answers.

    Args:
        count (`int`): Number of rows.
        seed (`int`, *optional*, defaults to `0`): Seed of their choice and wording.
    """
    half = -(-count // 2)
    in_turn = chain(*zip(_requests("benign", half, seed), _requests("borderline", half, seed), strict=True))
    return [_row(prompt, answer) for prompt, answer, _ in islice(in_turn, count)]


def _row(prompt: str, answer: str) -> Row:
    return conversation(translate(prompt, _DICTIONARY), translate(answer, _DICTIONARY))


def _requests(kind: Kind, count: int, seed: int) -> list[tuple[str, str, str]]:
    """Word `count` requests of the train split: prompt, helpful answer, refusal."""
    rng = random.Random(f"{kind}/rows/{seed}")
    chosen = islice(language.endless(language.pairs(language.GROUPS[kind], "train"), rng), count)
    return [(*language.request(p, rng, harmful=kind == "harmful"), rng.choice(language.REFUSALS)) for p in chosen]


def _check_task(name: str) -> None:
    if name not in TASKS:
        raise ValueError(f"`name` must be one of the tasks {', '.join(TASKS)}, got {name!r}.")
