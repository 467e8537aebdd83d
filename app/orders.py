"""From what a user has chosen to recipes in a folder: what is shown, what is run, and what can be run again."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from safe_trainer import METHODS, recipe

from . import texts
from .catalogue import PROTECTIONS, Example, Model, Strengths, method_file, prompts

ROWS = "rows"
"""The stem of the file of training rows in a job's folder."""

KINDS = ("harmful", "benign", "borderline", "task")


@dataclass(frozen=True)
class Settings:
    """How to train and how to ask; the same for every variant, so that they can be compared."""

    steps: int = 125
    learning_rate: float = 2e-3
    lora_rank: int = 8
    batch_size: int = 16
    max_length: int = 128
    seed: int = 42
    prompts: int = 100
    answer_tokens: int = 40
    strengths: Strengths = field(default_factory=lambda: Strengths(asft_weight=10.0))


def defaults(model: Model, rows: int, example: Example | None) -> Settings:
    """Return settings that suit a model and a number of rows."""
    if model.embedded:
        steps = example.steps if example else min(300, max(30, math.ceil(3 * rows / 16)))
        return Settings(steps=steps)
    steps = max(10, math.ceil(rows / 16))
    return Settings(steps, 1e-4, 16, 16, 1024, prompts=100, answer_tokens=128, strengths=Strengths())


@dataclass(frozen=True)
class Choices:
    """Everything that a user has chosen.

    Args:
        model ([`Model`]): What to fine-tune.
        data (`Path`): The file of training rows, in a folder of ours.
        protections (`Sequence[str]`): Keys of `PROTECTIONS`, in order.
        settings ([`Settings`]): How to train.
        example ([`Example`], *optional*): Where the data comes from, if it is an example.
        skip_bad_rows (`bool`, *optional*, defaults to `False`): Whether rows that cannot be used are left out.
    """

    model: Model
    data: Path
    protections: Sequence[str]
    settings: Settings
    example: Example | None = None
    skip_bad_rows: bool = False


@dataclass(frozen=True)
class Variant:
    """One of the runs of a job: a recipe in the job's folder, and the folder of its adapter beside it."""

    key: str
    title: str

    @property
    def recipe(self) -> str:
        """Name of the recipe's file."""
        return f"{self.key}.yaml"


def write_order(folder: Path, choices: Choices) -> list[Variant]:
    """Write a folder that holds everything of a job: rows, prompts and a recipe for each variant.

    Args:
        folder (`Path`): A new folder of ours.
        choices ([`Choices`]): What was chosen.

    Raises:
        ValueError: If nothing was chosen, or a protection does not go with the model.
    """
    unknown = [key for key in choices.protections if key not in PROTECTIONS]
    if unknown or not choices.protections:
        raise ValueError(texts.CHOOSE_METHOD)
    for key in choices.protections:
        if PROTECTIONS[key].needs_unaligned and not choices.model.unaligned:
            raise ValueError(texts.NEEDS_UNALIGNED.format(title=texts.CARDS[key].title))
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(choices.data, folder / (ROWS + choices.data.suffix.lower()))
    for name in {name for key in choices.protections for name in PROTECTIONS[key].files}:
        write_method_file(folder, name)
    asked = []
    for kind in KINDS:
        found = prompts(kind, choices.settings.prompts, choices.example)
        if found:
            _write_table(folder / f"{found[0]}.csv", found[1])
            asked.append({"kind": kind, "name": kind, "path": f"{found[0]}.csv"})
    variants = [Variant(key, texts.CARDS[key].title) for key in choices.protections]
    for variant in variants:
        (folder / variant.recipe).write_text(recipe_text(choices, variant, asked), encoding="utf-8")
    return variants


def recipe_text(choices: Choices, variant: Variant, asked: list[dict[str, str]]) -> str:
    """Return the YAML of one variant."""
    s = choices.settings
    data: dict[str, Any] = {"path": ROWS + choices.data.suffix.lower()}
    if choices.skip_bad_rows:
        data["on_bad_row"] = "skip"
    values = {
        "model": {"path": choices.model.path},
        "data": [data],
        "peft": {"r": s.lora_rank, "lora_alpha": 2 * s.lora_rank, "target_modules": "all-linear"},
        "safety": PROTECTIONS[variant.key].safety(choices.model, s.strengths),
        "training": _training(choices.model, s),
        "evaluation": {"prompts": asked, "max_new_tokens": s.answer_tokens},
        "monitor": {"every": max(1, s.steps // 8), "prompts": 40},
        "output": variant.key,
    }
    header = texts.RECIPE_HEADER.format(title=variant.title, file=variant.recipe)
    return header + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _training(model: Model, s: Settings) -> dict[str, Any]:
    shared = {"max_steps": s.steps, "learning_rate": s.learning_rate, "max_length": s.max_length, "seed": s.seed}
    if model.embedded:
        batch = {"per_device_train_batch_size": s.batch_size, "gradient_checkpointing": False}
        return shared | batch | {"logging_steps": 5, "save_strategy": "no"}
    size = min(4, s.batch_size)
    batch = {"per_device_train_batch_size": size, "gradient_accumulation_steps": max(1, s.batch_size // size)}
    saving = {"save_strategy": "steps", "save_steps": 50, "save_total_limit": 1}
    return shared | batch | {"lr_scheduler_type": "cosine", "warmup_steps": 0.03, "logging_steps": 5} | saving


def python_code(folder: Path, variant: Variant) -> str:
    """Return Python code that does what a variant's recipe does."""
    import torch

    values = yaml.safe_load((folder / variant.recipe).read_text(encoding="utf-8"))
    safety, imports = _safety_code(values["safety"])
    reading = ', ReadOptions(on_bad_row="skip")' if "on_bad_row" in values["data"][0] else ""
    names = sorted({"SafeSFTTrainer", "load_rows", *imports, *(["ReadOptions"] if reading else [])})
    training = {"output_dir": values["output"], **values["training"], "report_to": "none"}
    if not torch.accelerator.is_available():
        training |= {"use_cpu": True, "bf16": False}
    return texts.CODE.format(
        names=", ".join(names),
        data=values["data"][0]["path"],
        reading=reading,
        model=values["model"]["path"],
        training=_arguments(training, 8),
        peft=_arguments({**values["peft"], "task_type": "CAUSAL_LM"}, 0, ", "),
        safety=safety,
    )


def _safety_code(safety: list[dict[str, Any]]) -> tuple[str, list[str]]:
    if not safety:
        return "None", []
    calls, imports = [], []
    for entry in safety:
        recommended = entry["method"] == "recommended"
        name = "recommended" if recommended else METHODS[entry["method"]].__name__
        settings = {key: value for key, value in entry.items() if key != "method"}
        calls.append(f"{'*' * recommended}{name}({_arguments(settings, 0, ', ')})")
        imports.append(name)
    inner = "".join(f"        {call},\n" for call in calls)
    return f"[\n{inner}    ]", imports


def _arguments(values: dict[str, Any], indent: int, between: str = "\n") -> str:
    parts = [f"{name}={json.dumps(v) if isinstance(v, str) else repr(v)}" for name, v in values.items()]
    if between != "\n":
        return between.join(parts)
    return "\n".join(f"{' ' * indent}{part}," for part in parts)


def estimate(folder: Path, variants: Sequence[Variant]) -> recipe.Plan:
    """Return what the first variant takes; the others take about the same.

    Raises:
        RecipeError: If a recipe cannot be run.
    """
    checked = [recipe.read_recipe(folder / variant.recipe) for variant in variants]
    return recipe.plan(checked[0], recipe.load_data(checked[0]))


def write_method_file(folder: Path, name: str) -> None:
    """Write the rows that methods need: `"harmful"` or `"refusals"`."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in method_file(name))
    (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _write_table(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
