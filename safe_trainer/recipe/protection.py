"""The `safety` of a recipe: methods made from their settings, each of which looks at the adapter it is to protect."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .document import Place, Problem, did_you_mean, told
from .fields import check_fields

if TYPE_CHECKING:
    from peft import LoraConfig

    from ..methods import SafetyMethod


@dataclass(frozen=True)
class Recommended:
    """The settings of `recommended` in a recipe.

    Args:
        harmful_data (`str`, *optional*): File of harmful prompts with answers that comply. Left out, the model's own.
    """

    harmful_data: str | None = None


def check_safety(values: dict[str, Any], peft: LoraConfig | None, problems: list[Problem]) -> list[SafetyMethod]:
    """Return the methods of a recipe, those that are recommended where it does not speak of any.

    Args:
        values (`dict[str, Any]`): What stands in the recipe.
        peft ([`~peft.LoraConfig`], *optional*): The adapter; `None` if all weights are trained.
        problems (`list[Problem]`): Takes what is wrong.
    """
    from ..methods import METHODS

    listed = values.get("safety", "recommended") or []
    methods: list[SafetyMethod] = []
    for position, entry in enumerate(listed if isinstance(listed, list) else [listed]):
        place: Place = ("safety", position) if isinstance(listed, list) else ("safety",)
        for method in _made(entry, values, place, problems):
            try:
                peft = method.adapt_peft_config(copy.deepcopy(peft))
            except (ValueError, TypeError) as error:
                problems.append(Problem(place, str(error)))
                continue
            if any(type(other) is type(method) for other in methods):
                name = next(name for name, kind in METHODS.items() if kind is type(method))
                problems.append(Problem((*place, "method"), f"`{name}` stands here a second time"))
            methods.append(method)
    return methods


def _made(entry: Any, values: dict[str, Any], place: Place, problems: list[Problem]) -> list[SafetyMethod]:
    """Return the method of one entry, or the several that `recommended` stands for."""
    from ..methods import METHODS

    if entry == "recommended":
        entry = {"method": entry}
    if not isinstance(entry, dict):
        return []  # the schema has complained
    settings = dict(entry)
    kinds: dict[str, type] = {"recommended": Recommended, **METHODS}
    name = settings.pop("method", None)
    if not isinstance(name, str) or name not in kinds:
        hint = f"got {told(name)}; {did_you_mean(name, kinds)}" if name else f"is missing; {did_you_mean('', kinds)}"
        problems.append(Problem((*place, "method"), hint))
        return []
    checked, found = check_fields(kinds[name], settings, place)
    problems += found
    if found:
        return []
    try:
        return _recommended(values, **checked) if name == "recommended" else [kinds[name](**checked)]
    except (ValueError, TypeError, OSError) as error:
        hint = "" if "safety" in values else " Or write `safety: null` to train without protection."
        problems.append(Problem(place, f"{error}{hint}"))
        return []


def _recommended(values: dict[str, Any], harmful_data: str | None = None) -> list[SafetyMethod]:
    from ..methods.recommended import recommended, recommended_for

    if harmful_data is not None:
        return recommended(harmful_data)
    model = values.get("model")
    path = model.get("path") if isinstance(model, dict) else model
    return recommended_for(str(path)) if path else []
