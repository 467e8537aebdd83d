"""Reads a recipe and validates it: every problem is listed at once, with its line, before anything is loaded."""

from __future__ import annotations

import copy
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from .document import Document, RecipeError, assignment, did_you_mean, short
from .paths import Place, check_artifact, moved
from .schema import (
    NOT_UNDER_PEFT,
    NOT_UNDER_TRAINING,
    PARTS,
    Hints,
    Part,
    RecipePart,
    SourcePart,
    check_field,
    method_fields,
    peft_fields,
    training_fields,
)

if TYPE_CHECKING:
    from peft import LoraConfig

    from ..data import Kind
    from ..methods.base import SafetyMethod

LORA_LEARNING_RATE = 2e-4
"""The learning rate of a LoRA where a recipe gives none: TRL's own, 2e-5, is one for training all weights."""
PEFT_DEFAULT = RecipePart.model_fields["peft"].get_default(call_default_factory=True)
P = TypeVar("P", bound=Part)
Entry = tuple[Place, str, dict[str, Any]]
_SAFETY = "expected `recommended`, `null` or methods with their settings, as in `{method: asft, unaligned_model: …}`"


@dataclass(frozen=True)
class Recipe:
    """A validated run.

    Args:
        path (`Path`): The file.
        values (`dict[str, Any]`): What it says, with the changes of `--set`.
        parts ([`RecipePart`]): The same with the defaults, and absolute paths.
        training (`dict[str, Any]`): Arguments for TRL's `SFTConfig`, except the output folder.
        peft ([`~peft.LoraConfig`], *optional*): The adapter to train; `None` trains all weights.
        safety (`list[SafetyMethod]`): The methods, in order.
        document ([`Document`]): The file, for what is found wrong with it later.
        changes (`tuple[str, ...]`): The changes of `--set`.
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


def read_recipe(path: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe and validate all of it.

    What can be known without torch is checked first, in well under a second: keys, files, artifacts. Then TRL, PEFT
    and the methods check what is theirs.

    Args:
        path (`str` or `Path`): The YAML file. Files that it names are relative to its folder.
        changes (`Sequence[str]`, *optional*): Such as `"training.learning_rate=1e-4"`, in the order in which they are
            made. Files that they name are relative to the working directory.

    Returns:
        [`Recipe`]: Ready to run.

    Raises:
        RecipeError: With all problems of either kind, each with its line.
        OSError: If the file cannot be read.

    Example:

    ```python
    >>> recipe = read_recipe("recipes/testbed/asft.yaml", ["training.max_steps=10"])
    >>> recipe.training["max_steps"]
    10

    ```
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(str(path), [f"is not UTF-8 text: {error}"]) from error
    document, folder = Document(text, str(path)), Path(path).parent
    for change in changes:
        place, value = assignment(change, str(path))
        document.put(place, moved(value, place, Path.cwd(), folder))
    values = {"peft": PEFT_DEFAULT, **moved(document.values, (), folder)}
    parts = _check_part(RecipePart, values, (), document)
    _check_artifacts(values, document)
    if parts is not None:
        _check_watched(parts, document)
    if "torch" not in sys.modules:  # which the classes take seconds to load
        document.raise_problems()
    training, lora, entries = _check_classes(values, document)
    peft = _make_peft(values, lora, document)
    safety = _make_methods(values, entries, peft, document)
    if values.get("safe_lora"):
        _check_repair(peft, document)
    document.raise_problems()
    assert parts is not None  # otherwise there were problems
    if peft is not None:
        training.setdefault("learning_rate", LORA_LEARNING_RATE)
    return Recipe(Path(path), document.values, parts, training, peft, safety, document, tuple(changes))


def _check_part(part: type[P], values: Any, place: Place, document: Document) -> P | None:
    """Return a part of a recipe, or note what is wrong with it."""
    try:
        return part.model_validate(values)
    except ValidationError as error:
        for found in error.errors():
            inner = (*place, *found["loc"])
            around = PARTS.get(tuple(key for key in inner[:-1] if isinstance(key, str)), part)
            if found["type"] == "extra_forbidden":
                message = f"unknown key; {did_you_mean(inner[-1], around.model_fields)}"
            elif found["type"] == "missing":
                message = f"is missing. {around.model_fields[str(inner[-1])].description or ''}".strip()
            elif inner == ("safety",):
                message = f"{_SAFETY}, got {short(found['input'])}; {did_you_mean(found['input'], method_fields())}"
            elif found["type"] == "value_error":
                message = found["msg"].removeprefix("Value error, ")
            else:
                message = f"{found['msg'][0].lower()}{found['msg'][1:]}, got {short(found['input'])}"
            document.problem(inner, message)
    return None


def _check_artifacts(values: dict[str, Any], document: Document) -> None:
    """Note which files that methods are to read are missing, or hold something else."""
    for place, settings in _entries(values):
        for name, value in ((name, value) for name, value in settings.items() if isinstance(value, str)):
            with document.noting((*place, name)):
                check_artifact(name, value)


def _check_watched(parts: RecipePart, document: Document) -> None:
    """Refuse a monitor that would watch no refusals, unless it is told to."""
    asked = parts.evaluation.prompts if parts.evaluation else []
    if parts.monitor is not None and parts.monitor.prompts and all(part.kind == "task" for part in asked):
        reason = "there are no prompts under `evaluation` to watch refusals with; give some, or write `prompts: 0` to "
        document.problem(("monitor",), f"{reason}measure only how far the weights move")


def _entries(values: dict[str, Any]) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Yield place and content of each entry of `safety`; of those that are no mapping the schema has complained."""
    listed = values.get("safety", "recommended") or []
    for position, entry in enumerate(listed if isinstance(listed, list) else [listed]):
        if entry == "recommended" or isinstance(entry, dict):
            settings = {"method": entry} if entry == "recommended" else dict(entry)
            yield ("safety", position) if isinstance(listed, list) else ("safety",), settings


def _check_classes(values: dict[str, Any], document: Document) -> tuple[dict[str, Any], dict[str, Any], list[Entry]]:
    """Check the settings of TRL's, PEFT's and the methods' classes, as far as these are known."""
    training = _check_settings(values.get("training"), training_fields(), ("training",), document, NOT_UNDER_TRAINING)
    _check_eval_rows(values, training, document)
    lora = _check_settings(values["peft"], peft_fields(), ("peft",), document, NOT_UNDER_PEFT)
    return training, lora, _check_entries(values, document)


def _check_eval_rows(values: dict[str, Any], training: dict[str, Any], document: Document) -> None:
    """Set when the loss of evaluation rows is taken; note settings that need such rows, or leave them unused."""
    if values.get("eval_data") or values.get("eval_share"):
        training.setdefault("eval_strategy", "epoch")
        if str(training["eval_strategy"]) == "no":
            reason = "with `no` the rows of `eval_data` or `eval_share` are never used; leave it out, or those rows"
            document.problem(("training", "eval_strategy"), reason)
        return
    for name in ("eval_strategy", "load_best_model_at_end"):
        if str(training.get(name) or "no") != "no":
            reason = "there are no rows to take a loss on; give some, with `eval_data` or `eval_share`"
            document.problem(("training", name), reason)


def _check_settings(
    settings: Any, known: Hints, place: Place, document: Document, elsewhere: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return settings with their types put right; those that have `elsewhere` a place, or no meaning, are refused."""
    elsewhere, checked = elsewhere or {}, {}
    known = {name: hint for name, hint in known.items() if name not in elsewhere}
    of_method = place[0] == "safety"
    for name, value in settings.items() if isinstance(settings, dict) else ():
        right, message = None, None
        if name not in known:
            message = elsewhere.get(name) or f"unknown setting; {did_you_mean(name, known)}"
        elif of_method and isinstance(value, dict) and name.endswith(("_data", "prompts")):
            if (right := _check_part(SourcePart, value, (*place, name), document)) is None:
                continue  # rows, with what is said under `data` of how they are read
        else:
            right, message = check_field(name, value, known[name], in_range=not of_method)
        if message is None:
            checked[name] = right
        else:
            document.problem((*place, name), message)
    return checked


def _check_entries(values: dict[str, Any], document: Document) -> list[Entry]:
    """Return place, method and settings of each entry of `safety`, as far as they are right."""
    known = method_fields()
    found: list[Entry] = []
    for place, settings in _entries(values):
        name = settings.pop("method", None)
        if not isinstance(name, str) or name not in known:
            hint = did_you_mean(name or "", known)
            document.problem((*place, "method"), f"got {short(name)}; {hint}" if name else f"is missing; {hint}")
            continue
        checked = _check_settings(settings, known[name], place, document)
        if len(checked) == len(settings):
            found.append((place, name, checked))
    return found


def _make_peft(values: dict[str, Any], checked: dict[str, Any], document: Document) -> LoraConfig | None:
    if not isinstance(values["peft"], dict):
        return None
    from peft import LoraConfig

    with document.noting(("peft",)):
        return LoraConfig(**checked, task_type="CAUSAL_LM")
    return None


def _check_repair(peft: LoraConfig | None, document: Document) -> None:
    """Refuse a repair of what Safe LoRA cannot project, before anything is trained."""
    from ..lora.updates import check_peft_config

    if peft is None:
        document.problem(("safe_lora",), "it repairs an adapter, and `peft` is null: all weights are trained")
        return
    with document.noting(("safe_lora",)):
        check_peft_config(peft, "Safe LoRA")


def _make_methods(
    values: dict[str, Any], entries: list[Entry], peft: LoraConfig | None, document: Document
) -> list[SafetyMethod]:
    """Return the methods, each of which has checked the adapter it is to protect."""
    from ..methods import METHODS

    methods: list[SafetyMethod] = []
    for place, name, settings in entries:
        try:
            made = _made(name, {key: _rows_of(value, key) for key, value in settings.items()}, values)
        except (ValueError, TypeError, OSError) as error:
            hint = "" if "safety" in values else " Or write `safety: null` to train without protection."
            document.problem(place, f"{error}{hint}")
            continue
        for method in made:
            with document.noting(place):
                peft = method.adapt_peft_config(copy.deepcopy(peft))
                if any(type(other) is type(method) for other in methods):
                    twice = next(name for name, cls in METHODS.items() if cls is type(method))
                    document.problem((*place, "method"), f"`{twice}` is listed a second time")
                methods.append(method)
    return methods


def _made(name: str, settings: dict[str, Any], values: dict[str, Any]) -> list[SafetyMethod]:
    """Return the method of an entry, or those that are recommended for the model."""
    from ..methods import METHODS
    from ..methods.recommended import recommended_for

    if name != "recommended":
        return [METHODS[name](**settings)]
    model = values.get("model")
    named = model if isinstance(model, dict) else {}
    return recommended_for(str(named.get("path") or ""), revision=named.get("revision"), **settings)


def _rows_of(value: Any, name: str) -> Any:
    """Return the rows or prompts of a source that says how it is read; other settings as they are."""
    if not isinstance(value, SourcePart):
        return value
    from ..data import as_prompts, as_rows

    if name.endswith("prompts"):
        return as_prompts(value.source(), prompts_kind(name), argument=name, options=value.options())
    return as_rows(value.source(), argument=name, options=value.options())[0]


def prompts_kind(name: str) -> Kind:
    """Return the kind of the prompts that a method takes as its setting of this name."""
    return "benign" if name.startswith("benign") else "harmful"
