"""The data of a recipe: training rows of all sources, and the prompts that the model is asked."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..data import (
    DataReport,
    HubDataset,
    PromptSet,
    ReadOptions,
    general_prompts,
    leaked_rows,
    load_prompts,
    load_rows,
    load_suite,
)
from .fitting import adapted, skeleton
from .load import Recipe
from .schema import ReadingPart, SourcePart

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class LoadedData:
    """The data of a recipe.

    Args:
        rows (`Dataset`): What is trained on, all sources together, as often as their weights say.
        prompt_sets (`list[PromptSet]`): What the model is examined with; empty without an evaluation.
        reports (`list[DataReport]`): What was found in each source.
        leaked (`dict[str, int]`): How many training rows ask what a prompt set will ask, by the set's name.
    """

    rows: Dataset
    prompt_sets: list[PromptSet]
    reports: list[DataReport]
    leaked: dict[str, int]

    def messages(self) -> list[str]:
        """Return what a user should read about the data before training."""
        leaks = [
            f"{count:,} training rows ask a prompt of `{name}`: its rates will show memory, not behavior. Remove them "
            "from one or the other."
            for name, count in self.leaked.items()
        ]
        return [*map(str, self.reports), *leaks]


def load_data(recipe: Recipe) -> LoadedData:
    """Load the training rows and the prompts of a recipe.

    Raises:
        ValueError: If one of its sources cannot be read, or they do not go together.
    """
    _check_model(recipe)
    reports: list[DataReport] = []
    rows = _training_rows(recipe, reports)
    sets = []
    for part in recipe.parts.evaluation.prompts if recipe.parts.evaluation else ():
        if part.built_in is not None:
            found = general_prompts(part.kind)
        elif part.suite is not None:
            found = load_suite(part.suite, part.path, kinds=(part.kind,), limit=part.limit)[0]
        else:
            found, report = load_prompts(source_of(part), part.kind, part.name, reading_of(part))
            reports.append(report)
        said = {name: getattr(part, name) for name in ("name", "system_prompt", "template")}
        sets.append(replace(found, **{name: value for name, value in said.items() if value is not None}))
    leaked = {prompts.name: len(leaked_rows(rows, prompts)) for prompts in sets}
    return LoadedData(rows, sets, reports, {name: count for name, count in leaked.items() if count})


def _check_model(recipe: Recipe) -> None:
    """See that the model is there, and that the recipe fits it, before data is read, which may take long."""
    from transformers import AutoConfig

    model = recipe.parts.model
    try:
        AutoConfig.from_pretrained(model.path, revision=model.revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The model `{model.path}` could not be loaded: {str(error).strip()} Give a Hub id, or a folder that "
            "begins with ./, ../ or /; for a private or gated model, log in with `hf auth login`."
        ) from error
    try:
        empty = skeleton(recipe)
    except Exception:  # says nothing of the recipe: what is wrong is told when the model itself is loaded
        return
    adapted(recipe, empty)


def _training_rows(recipe: Recipe, reports: list[DataReport]) -> Dataset:
    from datasets import concatenate_datasets

    seed = recipe.training.get("seed", 42)
    parts: list[Dataset] = []
    for source in recipe.parts.data:
        rows, report = load_rows(source_of(source), reading_of(source))
        reports.append(report)
        whole, rest = divmod(source.weight, 1)
        parts += [rows] * int(whole)
        if rest:
            parts.append(rows.shuffle(seed=seed).select(range(max(1, round(rest * len(rows))))))
    kinds = {tuple(part.column_names) for part in parts}
    if len(kinds) > 1:
        formats = ", ".join(f"{report.source} ({report.format})" for report in reports)
        raise ValueError(f"Texts and conversations cannot be mixed in one run: {formats}. Bring them into one form.")
    return concatenate_datasets(parts)


def source_of(part: SourcePart) -> str | HubDataset:
    """Return the file or dataset that a part of a recipe names."""
    if part.path is not None:
        return part.path
    assert part.hub is not None  # the schema has seen to it that there is one
    return HubDataset(part.hub, part.subset, part.split)


def reading_of(part: ReadingPart) -> ReadOptions:
    """Return how a source of a recipe is to be read."""
    fields = (field.name for field in dataclasses.fields(ReadOptions))
    settings: dict[str, Any] = {name: getattr(part, name) for name in fields if hasattr(part, name)}
    return ReadOptions(**settings)
