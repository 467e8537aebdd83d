"""From what a user has chosen to recipes in a folder: what is shown, what is run, and what can be run again."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from safe_trainer import METHODS, recipe, recommended
from safe_trainer.methods.base import MethodCard

from . import texts
from .inspection import write_lines
from .materials import OwnFile, prompt_lines
from .setup import KINDS, Example, Model, built_in_material, built_in_prompts

PLAIN, RECOMMENDED = "plain", "recommended"
ROWS = "rows"
"""The stem of the file of training rows in a job's folder."""
WATCHED, CHECKS = 40, 8
"""Prompts of each kind whose refusals are watched while training, and how often."""
GUARD = "guard"
JUDGES = dict(zip(("phrases,likelihood", "phrases", GUARD), texts.JUDGES, strict=True))
"""Who may judge: what a recipe says, and what the page says."""
_MATERIALS = tuple(texts.MATERIALS)
_MARKS = {name: f"./{name}.jsonl" for name in _MATERIALS}
_UNALIGNED, _ALIGNED = "<unaligned>", "<aligned>"
_SETTING = (str, bool, int, float)
AT_A_TIME = "training.per_device_train_batch_size"
"""Where a recipe says how many rows of a batch are in memory at a time."""


@cache
def materials() -> Any:
    """Return the paths that a method is built from, as they are written into a recipe."""
    from safe_trainer.methods.base import Materials

    return Materials(**_MARKS, unaligned_model=_UNALIGNED, aligned_model=_ALIGNED)


def cards() -> dict[str, MethodCard]:
    """Return what can be chosen, by key: plain LoRA, what is recommended, and all methods of the library."""
    together = [method.card for method in recommended(_MARKS["harmful_data"]) if method.card is not None]
    titles = " and ".join(card.title for card in together)
    best = MethodCard(
        title="Recommended",
        summary=f"Start here: {titles} together.",
        needs=texts.RECOMMENDED_NEEDS,
        cost="; ".join(dict.fromkeys(card.cost for card in together)),
        avoid="finding out which of them made the difference: compare with each alone",
        fields=(),
        example=lambda given: recommended(given.harmful_data)[0],
    )
    title, summary, needs, cost, avoid = texts.PLAIN
    plain = MethodCard(title, summary, needs, cost, avoid, (), example=lambda given: None)  # type: ignore[arg-type, return-value]
    return {PLAIN: plain, RECOMMENDED: best, **{name: method.card for name, method in METHODS.items() if method.card}}


@dataclass(frozen=True)
class Settings:
    """How to train and how to ask; the same for every variant, so that they can be compared.

    `held_out` is the percentage of the rows that are not trained on, so that their loss can be taken.
    """

    steps: int = 125
    learning_rate: float = 2e-3
    lora_rank: int = 8
    batch_size: int = 16
    max_length: int = 128
    seed: int = 42
    held_out: int = 0
    prompts: int = 100
    answer_tokens: int = 40
    system_prompt: str = ""
    judge: str = next(iter(JUDGES))
    guard: str = ""


def defaults(model: Model, rows: int, example: Example | None) -> Settings:
    """Return settings that suit a model and a number of rows."""
    if model.embedded:
        return Settings(steps=example.steps if example else min(300, max(30, math.ceil(3 * rows / 16))))
    return Settings(max(10, math.ceil(rows / 16)), 1e-4, 16, 16, 1024, answer_tokens=128)


@dataclass(frozen=True)
class Choices:
    """Everything that a user has chosen.

    Args:
        model ([`Model`]): What to fine-tune.
        data (`Path`): The file of training rows, in the session's folder.
        methods (`Sequence[str]`): Keys of [`cards`], in order.
        settings ([`Settings`]): How to train.
        fields (`Mapping[str, Mapping[str, Any]]`): By method, what the form says of its fields.
        example ([`Example`], *optional*): Where the data comes from, if it is an example.
        name (`str`): What the user calls the data; the name of its file if left out.
        reading (`Mapping[str, Any]`): How the data is read: `columns`, `encoding` and `on_bad_row` of a recipe.
        files (`Mapping[str, OwnFile]`): Own files, by a key of `texts.MATERIALS`.
        asked (`Sequence[OwnFile]`): Own prompts of the comparison; other kinds are asked with built-in ones.
        judges (`Sequence[str]`): Who judges the answers, as in a recipe.
        kept (`Mapping[str, Any]`): What was kept of the user's recipe; see [`recipe_in.Taken`].
    """

    model: Model
    data: Path
    methods: Sequence[str]
    settings: Settings
    fields: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    example: Example | None = None
    name: str = ""
    reading: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, OwnFile] = field(default_factory=dict)
    asked: Sequence[OwnFile] = ()
    judges: Sequence[str] = ("phrases", "likelihood")
    kept: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """One of the runs of a job: a recipe in the job's folder, and the folder of its adapter next to it."""

    key: str
    title: str

    @property
    def recipe(self) -> str:
        """Name of the recipe's file."""
        return f"{self.key}.yaml"


def safety_of(
    key: str, model: Model, given: Mapping[str, Any], files: Mapping[str, OwnFile] | None = None
) -> list[dict[str, Any]]:
    """Return the value of `safety` in a recipe.

    For the embedded model these are the settings and rows that suit it; for any other the method's defaults, the
    user's files, and where a method does without one, what the library brings along.

    Args:
        key (`str`): A key of [`cards`].
        model ([`Model`]): What to fine-tune.
        given (`Mapping[str, Any]`): What the form says of the method's fields.
        files (`Mapping[str, OwnFile]`, *optional*): Own files, by the name of the material.

    Raises:
        ValueError: If the method needs a file that the user has not given.
    """
    if key == PLAIN:
        return []
    entry: dict[str, Any] = {"method": key}
    if key == RECOMMENDED:
        entry["harmful_data"] = _MARKS["harmful_data"]
        protected = {"prompts": "harmful_prompts", "benign_prompts": "benign_prompts"}  # it does well without
        entry |= {name: _MARKS[own] for name, own in protected.items() if own in (files or {})}
    else:
        made: Any = cards()[key].example(materials())
        for one in dataclasses.fields(made):
            value = getattr(made, one.name, None)
            is_material = isinstance(value, str) and value in {*_MARKS.values(), _UNALIGNED, _ALIGNED}
            is_set = model.embedded and isinstance(value, _SETTING) and value != one.default
            if one.init and (is_material or is_set):
                entry[one.name] = {_UNALIGNED: model.unaligned, _ALIGNED: model.path}.get(str(value), value)
    kept = {name: value for name, value in entry.items() if not _is_missing(value, model, files or {})}
    if len(kept) < len(entry) and key != RECOMMENDED:
        try:
            METHODS[key](**{name: value for name, value in kept.items() if name != "method"})
        except ValueError:
            missing = next(m for m, mark in _MARKS.items() if mark in entry.values() and mark not in kept.values())
            what = texts.MATERIALS[missing].lower()
            raise ValueError(texts.NEEDS_FILE.format(title=cards()[key].title, what=what)) from None
    return [kept | {name: value for name, value in given.items() if value is not None}]


def _is_missing(value: Any, model: Model, files: Mapping[str, OwnFile]) -> bool:
    """Return whether a value of a recipe is the path of a file that there will not be."""
    name = next((name for name, mark in _MARKS.items() if mark == value), None)
    return name is not None and not model.embedded and name not in files


def field_default(key: str, name: str, model: Model) -> Any:
    """Return what the form shows for a field of a method at first: the example's value, or the method's default."""
    made: Any = cards()[key].example(materials())
    if model.embedded:
        return getattr(made, name)
    return next(one.default for one in dataclasses.fields(made) if one.name == name)


def write_order(folder: Path, choices: Choices) -> list[Variant]:
    """Write a folder that holds everything of a job: rows, prompts and a recipe for each variant."""
    known = cards()
    if not choices.methods or any(key not in known for key in choices.methods):
        raise ValueError(texts.CHOOSE_METHOD)
    folder.mkdir(parents=True, exist_ok=True)
    safety: dict[str, list[dict[str, Any]]] = {}
    for key in choices.methods:
        if known[key].needs_unaligned and not choices.model.unaligned:
            raise ValueError(texts.NEEDS_UNALIGNED.format(title=known[key].title))
        safety[key] = safety_of(key, choices.model, choices.fields.get(key, {}), choices.files)
        for name in _MATERIALS:
            if any(_MARKS[name] in entry.values() for entry in safety[key]):
                write_material(folder, name, choices.files)
    shutil.copyfile(choices.data, folder / (ROWS + choices.data.suffix.lower()))
    asked = _write_prompts(folder, choices)
    variants = [Variant(key, known[key].title) for key in choices.methods]
    for variant in variants:
        text = _recipe_text(choices, variant, safety[variant.key], asked)
        (folder / variant.recipe).write_text(text, encoding="utf-8")
    return variants


def write_material(folder: Path, name: str, files: Mapping[str, OwnFile]) -> None:
    """Write the rows that a method reads: the user's, or those that suit the embedded model."""
    target = folder / f"{name}.jsonl"
    if name in files:
        shutil.copyfile(files[name].path, target)
    else:
        write_lines(built_in_material(name) or [], target)


def _write_prompts(folder: Path, choices: Choices) -> list[dict[str, str]]:
    """Write what is asked, at most so many prompts of each set as the settings say, and return its entries."""
    own = {one.kind for one in choices.asked}
    built_in = [one for one in built_in_prompts(choices.model, choices.example) if one.kind not in own]
    entries: list[tuple[dict[str, str], list[Any]]] = [
        ({"kind": one.kind, "name": one.kind}, prompt_lines(one)) for one in built_in
    ]
    for one in choices.asked:
        lines = [json.loads(line) for line in one.path.read_text(encoding="utf-8").splitlines()]
        entries.append(({"kind": one.kind, "name": f"{one.kind}: {one.name}", **one.said}, lines))
    for number, (entry, lines) in enumerate(entries, 1):
        chosen = random.Random(0).sample(lines, min(choices.settings.prompts, len(lines)))
        entry["path"] = f"ask-{number}.jsonl"
        write_lines(chosen, folder / entry["path"])
    return sorted((entry for entry, _ in entries), key=lambda entry: KINDS.index(entry["kind"]))


def _recipe_text(choices: Choices, variant: Variant, safety: list[dict[str, Any]], asked: list[Any]) -> str:
    s = choices.settings
    watched = WATCHED if any(entry["kind"] != "task" for entry in asked) else 0
    values: dict[str, Any] = {
        "model": {"path": choices.model.path},
        "data": [{"path": ROWS + choices.data.suffix.lower(), **choices.reading}],
        "peft": {"r": s.lora_rank, "lora_alpha": 2 * s.lora_rank, "target_modules": "all-linear"},
        "safety": safety,
        "training": _training(choices.model, s, choices.kept.get(AT_A_TIME)),
        "evaluation": {"prompts": asked, "max_new_tokens": s.answer_tokens, "judges": list(choices.judges)},
        "monitor": {"every": max(1, s.steps // CHECKS), "prompts": watched},
        "output": variant.key,
    }
    if s.held_out:
        values["eval_share"] = s.held_out / 100
        values["training"] |= {"eval_strategy": "steps", "eval_steps": max(1, s.steps // CHECKS)}
    if s.system_prompt.strip():
        values["evaluation"]["system_prompt"] = s.system_prompt
    _put(values, choices.kept)
    header = texts.RECIPE_HEADER.format(title=variant.title, file=variant.recipe)
    return header + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _put(values: dict[str, Any], kept: Mapping[str, Any]) -> None:
    """Put in what was kept of the user's own recipe, by its places there."""
    for place, value in kept.items():
        part, _, name = place.partition(".")
        if place == AT_A_TIME:
            continue  # it is in `training` already, as far as it fits the form's batch size
        if part == "safety":
            method, _, name = name.partition(".")
            for entry in values["safety"]:
                entry |= {name: value} if entry["method"] == method else {}
        elif name:
            values[part][name] = value
        else:
            values[part] = value


def _training(model: Model, s: Settings, most: int | None) -> dict[str, Any]:
    """Return `training` of a recipe; a batch is split evenly, with at most so many rows at a time as a recipe says."""
    shared = {"max_steps": s.steps, "learning_rate": s.learning_rate, "max_length": s.max_length, "seed": s.seed}
    most = min(s.batch_size, most or (s.batch_size if model.embedded else 4))
    size = next(rows for rows in range(most, 0, -1) if s.batch_size % rows == 0)
    shared |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": s.batch_size // size}
    if model.embedded:
        return shared | {"gradient_checkpointing": False, "logging_steps": 5, "save_strategy": "no"}
    saving = {"save_strategy": "steps", "save_steps": 50, "save_total_limit": 1}
    return shared | {"lr_scheduler_type": "cosine", "warmup_steps": 0.03, "logging_steps": 5} | saving


def differences(first: Path, second: Path) -> list[list[str]]:
    """Return the settings in which two recipes differ, but for protection and output: name and both values."""
    values = [dict(_settings(yaml.safe_load(path.read_text(encoding="utf-8")))) for path in (first, second)]
    names = dict.fromkeys(name for one in values for name in one if not name.startswith(("safety", "output")))
    rows = [[name, *(one.get(name, "") for one in values)] for name in names]
    return [row for row in rows if row[1] != row[2]]


def _settings(values: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{place}{name}.")
        else:
            yield f"{place}{name}", str(value)


def estimate(folder: Path, variants: Sequence[Variant]) -> recipe.Plan:
    """Return what the first variant takes; the others take about the same."""
    checked = [recipe.read_recipe(folder / variant.recipe) for variant in variants]
    loaded = recipe.load_data(checked[0])
    plan = recipe.plan(checked[0], loaded)
    news = loaded.messages()[len(loaded.reports) :]  # of the reports the page has shown what matters
    return dataclasses.replace(plan, messages=(*news, *plan.messages))
