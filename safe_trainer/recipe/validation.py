"""A recipe, read and validated whole: every problem is listed at once, before anything is loaded."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from .document import Document, Place, Problem, RecipeError, assignment, did_you_mean, told
from .fields import check_fields
from .protection import check_safety
from .ranges import PEFT, TRAINING, check_ranges
from .schema import DataPart, EvaluationPart, ModelPart, MonitorPart, Part, PromptsPart, RecipePart
from .sources import check_sources, moved

if TYPE_CHECKING:
    from peft import LoraConfig

    from ..methods import SafetyMethod

# What a recipe has another place for, or must not hold.
NOT_UNDER_TRAINING = {
    "output_dir": "is `output` in a recipe",
    "model_init_kwargs": "is `model` in a recipe",
    "resume_from_checkpoint": "is `safe-trainer train --resume`",
    "trust_remote_code": "must not stand in a file, since it runs what others have written; in Python, load the model "
    "yourself and give it to `SafeSFTTrainer`",
    "hub_token": "must not stand in a file; log in with `hf auth login`",
}
NOT_UNDER_PEFT = {
    "task_type": "is always CAUSAL_LM here",
    "base_model_name_or_path": "is `model` in a recipe",
    "inference_mode": "is not for training",
}
_SAFETY = "expected `recommended`, `null` or methods with their settings, as in `{method: asft, unaligned_model: …}`"
_PARTS: dict[Place, type[Part]] = {
    (): RecipePart,
    ("model",): ModelPart,
    ("data",): DataPart,
    ("evaluation",): EvaluationPart,
    ("monitor",): MonitorPart,
    ("evaluation", "prompts"): PromptsPart,
}


@dataclass(frozen=True)
class Recipe:
    """A run that has been found valid.

    Args:
        path (`Path`): The file that it stands in.
        values (`dict[str, Any]`): What stands in it, with the changes of the command line.
        parts ([`RecipePart`]): The same with the defaults, and absolute paths.
        training (`dict[str, Any]`): Arguments for TRL's `SFTConfig`, but for the output folder.
        peft ([`~peft.LoraConfig`], *optional*): The adapter to train; `None` trains all weights.
        safety (`list[SafetyMethod]`): The methods, in order.
        document ([`Document`]): The file, for what is found wrong with it later.
    """

    path: Path
    values: dict[str, Any]
    parts: RecipePart
    training: dict[str, Any]
    peft: LoraConfig | None
    safety: list[SafetyMethod]
    document: Document = field(repr=False, compare=False)
    changes: tuple[str, ...] = ()

    def command(self, *options: str) -> str:
        """Return the command that runs this recipe with these changes."""
        changes = [part for change in self.changes for part in ("--set", change)]
        return shlex.join(["safe-trainer", "train", str(self.path), *changes, *options])


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and validate all of it.

    Args:
        path (`str` or `Path`): The YAML file. Files that it names are looked for beside it: those of data and prompts
            always, models and others if they begin with `./` or `../`.
        overrides (`Sequence[str]`, *optional*): Changes such as `"training.learning_rate=1e-4"`; paths in them are
            seen from the working directory.

    Raises:
        FileNotFoundError: If there is no such file.
        RecipeError: If anything is wrong with it; lists every problem with its line.

    Example:

    ```python
    from safe_trainer.recipe import read_recipe

    recipe = read_recipe("recipes/testbed/asft.yaml", ["training.max_steps=10"])
    ```
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(str(path), [f"is not UTF-8 text: {error}"]) from error
    document = Document(text, str(path))
    folder = Path(path).parent
    for override in overrides:
        try:
            place, value = assignment(override)
        except ValueError as error:
            raise RecipeError(str(path), [str(error)]) from error
        # Paths on a command line are seen from where it is given, those in the file from the file.
        document.put(place, moved(value, place, Path.cwd(), folder))
    values = moved(document.values, (), folder)
    problems: list[Problem] = []
    parts = _check_parts(values, problems)
    check_sources(values, problems)
    training = _check_training(values, problems)
    peft = _check_peft(values, problems)
    safety = check_safety(values, peft, problems)
    document.complain(problems)
    assert parts is not None  # otherwise there were problems
    return Recipe(Path(path), document.values, parts, training, peft, safety, document, tuple(overrides))


def _check_parts(values: dict[str, Any], problems: list[Problem]) -> RecipePart | None:
    from ..methods import METHODS

    try:
        return RecipePart.model_validate(values)
    except ValidationError as error:
        for found in error.errors():
            place = tuple(found["loc"])
            part = _PARTS.get(tuple(key for key in place[:-1] if isinstance(key, str)))
            if found["type"] == "extra_forbidden" and part:
                message = f"unknown key; {did_you_mean(str(place[-1]), part.model_fields)}"
            elif found["type"] == "missing" and part:
                message = f"is missing. {part.model_fields[str(place[-1])].description or ''}".strip()
            elif place == ("safety",):
                message = f"{_SAFETY}, got {told(found['input'])}; {did_you_mean(str(found['input']), METHODS)}"
            elif found["type"] == "value_error":
                message = found["msg"].removeprefix("Value error, ")
            else:
                message = f"{found['msg'][0].lower()}{found['msg'][1:]}, got {told(found['input'])}"
            problems.append(Problem(place, message))
    return None


def _check_training(values: dict[str, Any], problems: list[Problem]) -> dict[str, Any]:
    settings = values.get("training")
    if not isinstance(settings, dict):
        return {}
    from trl import SFTConfig

    checked, found = check_fields(SFTConfig, settings, ("training",), NOT_UNDER_TRAINING)
    problems += [*found, *check_ranges(checked, TRAINING, ("training",))]
    if str(checked.get("eval_strategy", "no")) != "no":
        reason = "a recipe has no rows to take a loss on; ask prompts instead, with `evaluation` and `monitor`"
        problems.append(Problem(("training", "eval_strategy"), reason))
    return checked


def _check_peft(values: dict[str, Any], problems: list[Problem]) -> LoraConfig | None:
    settings = values.get("peft", RecipePart.model_fields["peft"].get_default(call_default_factory=True))
    if not isinstance(settings, dict):
        return None
    from peft import LoraConfig

    checked, found = check_fields(LoraConfig, settings, ("peft",), NOT_UNDER_PEFT)
    problems += [*found, *check_ranges(checked, PEFT, ("peft",))]
    try:
        return LoraConfig(**checked, task_type="CAUSAL_LM")
    except (ValueError, TypeError) as error:
        problems.append(Problem(("peft",), str(error)))
        return None
