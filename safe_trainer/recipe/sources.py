"""The data of a recipe: training rows of all sources, the methods' rows, and the prompts that the model is asked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..data import (
    DataReport,
    PromptSet,
    as_rows,
    general_prompts,
    leaked_rows,
    load_prompts,
    load_rows,
    load_suite,
)
from .fitting import adapted, skeleton
from .load import Recipe

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
    reports += _method_reports(recipe)
    sets = []
    for part in recipe.parts.evaluation.prompts if recipe.parts.evaluation else ():
        if part.built_in is not None:
            found = general_prompts(part.kind)
        elif part.suite is not None:
            found = load_suite(part.suite, part.path, kinds=(part.kind,), limit=part.limit)[0]
        else:
            found, report = load_prompts(part.source(), part.kind, part.name, part.options())
            reports.append(report)
        framed = {key: v for key in ("name", "system_prompt", "template") if (v := getattr(part, key)) is not None}
        sets.append(replace(found, **framed))
    leaked = {prompts.name: len(leaked_rows(rows, prompts)) for prompts in sets}
    return LoadedData(rows, sets, reports, {name: count for name, count in leaked.items() if count})


def _method_reports(recipe: Recipe) -> list[DataReport]:
    """Read the rows that methods are given by file, so that a fault in them is known before a model is loaded."""
    reports = {}
    for method in recipe.safety:
        for name, value in vars(method).items():
            if isinstance(value, str | Path) and str(value) not in reports:
                if name.endswith("_data"):
                    reports[str(value)] = as_rows(value, argument=name)[1]
                elif name.endswith("prompts"):
                    reports[str(value)] = load_prompts(value, "harmful")[1]
    return list(reports.values())


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
        rows, report = load_rows(source.source(), source.options())
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
