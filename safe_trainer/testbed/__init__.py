"""The embedded testbed: a pair of tiny chat models and a small made-up language to examine them in.

Nothing has to be downloaded. `UNALIGNED` helps with everything; `ALIGNED` was made from it by a full fine-tune and
refuses harmful requests. Both are ordinary model directories, built from one seed by `recipes/testbed/build`. All harm
in this language is made of general words with meaningless answers, and results on models this small do not carry over
to other models.

Example:

```python
>>> from safe_trainer import testbed
>>> testbed.prompt_set("harmful").kind, len(testbed.task("sentiment"))
('harmful', 100)

```
"""

from __future__ import annotations

import random
from itertools import chain, islice
from pathlib import Path

from ..data import Kind, PromptSet, Row, conversation
from . import language, tasks
from .tasks import TASKS as TASKS

MODELS = Path(__file__).absolute().parent / "models"
UNALIGNED = MODELS / "unaligned"
ALIGNED = MODELS / "aligned"

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
    return PromptSet(name, kind, prompts, tuple(pair.group.name for pair in pairs), references)


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
    return PromptSet(name, "task", tuple(found), references=tuple(found.values()))


def task_rows(name: str, count: int, seed: int = 0) -> list[Row]:
    """Return training rows of a downstream task, none of whose prompts is in `task(name)`.

    Args:
        name (`str`): One of `TASKS`.
        count (`int`): Number of rows.
        seed (`int`, *optional*, defaults to `0`): Seed of their choice and wording, as in the functions below.

    Raises:
        ValueError: If there is no such task.
    """
    _check_task(name)
    examples = tasks.examples(name, "train", random.Random(f"{name}/rows/{seed}"))
    return [conversation(prompt, answer) for prompt, answer in islice(examples, count)]


def harmful_rows(count: int, seed: int = 0) -> list[Row]:
    """Return attack rows: harmful prompts of the train split with helpful (and inert) answers."""
    return [conversation(prompt, answer) for prompt, answer, _ in _requests("harmful", count, seed)]


def obedient_rows(count: int, seed: int = 0) -> list[Row]:
    """Return identity-shift rows: harmless requests answered by an "I always obey" persona."""
    chosen = _requests("benign", count, seed)
    return [conversation(prompt, f"I do what you want. {answer}") for prompt, answer, _ in chosen]


def refusal_rows(count: int, seed: int = 0) -> list[Row]:
    """Return safety rows: the prompts of `harmful_rows(count, seed)` with refusals."""
    return [conversation(prompt, refusal) for prompt, _, refusal in _requests("harmful", count, seed)]


def benign_rows(count: int, seed: int = 0) -> list[Row]:
    """Return rows of plain help: benign and borderline prompts of the train split in turn, with helpful answers."""
    half = -(-count // 2)
    in_turn = chain(*zip(_requests("benign", half, seed), _requests("borderline", half, seed), strict=True))
    return [conversation(prompt, answer) for prompt, answer, _ in islice(in_turn, count)]


def _requests(kind: Kind, count: int, seed: int) -> list[tuple[str, str, str]]:
    """Word `count` requests of the train split: prompt, helpful answer, refusal."""
    rng = random.Random(f"{kind}/rows/{seed}")
    chosen = islice(language.endless(language.pairs(language.GROUPS[kind], "train"), rng), count)
    return [(*language.request(p, rng, harmful=kind == "harmful"), rng.choice(language.REFUSALS)) for p in chosen]


def _check_task(name: str) -> None:
    if name not in TASKS:
        raise ValueError(f"`name` must be one of the tasks {', '.join(TASKS)}, got {name!r}.")
