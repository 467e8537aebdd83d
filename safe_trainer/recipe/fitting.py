"""Whether a recipe fits its model, as far as the model's configuration tells: no weights are loaded for it."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

from .document import Place, Problem

if TYPE_CHECKING:
    from .validation import Recipe


def skeleton(recipe: Recipe) -> Any:
    """Return the model of a recipe without weights: on the meta device they take no memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(recipe.parts.model.path, revision=recipe.parts.model.revision)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def adapted(recipe: Recipe, model: Any) -> Any:
    """Return a model without weights with the adapter of a recipe, after all methods have looked at it.

    Args:
        recipe ([`Recipe`]): The recipe.
        model (`PreTrainedModel`): Its model, as [`skeleton`] returns it.

    Raises:
        RecipeError: If the adapter or a method does not fit the model; names the setting.
    """
    import torch
    from peft import get_peft_model

    if recipe.peft is not None:
        try:
            with torch.device("meta"):
                model = get_peft_model(model, copy.deepcopy(recipe.peft))
        except (ValueError, TypeError) as error:
            told = f"{str(error).rstrip('.')}. {_known(model)}"
            recipe.document.complain([Problem(_place(("peft",), recipe.values.get("peft"), str(error)), told)])
    problems = _unmatched(recipe, model)
    listed = recipe.values.get("safety")
    for position, method in enumerate(recipe.safety):
        try:
            method.check_model(model)
        except ValueError as error:
            place: Place = ("safety",)
            entry = listed
            if isinstance(listed, list) and len(listed) == len(recipe.safety):  # none stands for several
                place, entry = (*place, position), listed[position]
            problems.append(Problem(_place(place, entry, str(error)), str(error)))
    recipe.document.complain(problems)
    return model


def _place(place: Place, settings: Any, message: str) -> Place:
    """Return the place of the setting that a message is about."""
    words = re.findall(r"\w+", message.replace("Target modules", "target_modules"))
    names: dict[str, Place] = {}
    for name, value in settings.items() if isinstance(settings, dict) else ():
        names |= {inner: (name, inner) for inner in value} if isinstance(value, dict) else {name: (name,)}
    return next(((*place, *names[word]) for word in words if word in names), place)


def _unmatched(recipe: Recipe, model: Any) -> list[Problem]:
    """Return a problem if the adapter is to be where no layer is; PEFT finds that only if there is no layer at all."""
    targets = recipe.peft.target_modules if recipe.peft is not None else None
    if not isinstance(targets, list | set):
        return []
    names = [f".{name}" for name, _ in model.named_modules()]
    missing = sorted(target for target in targets if not any(name.endswith(f".{target}") for name in names))
    told = f"the model has no layer {', '.join(f'`{name}`' for name in missing)}. {_known(model)}"
    return [Problem(("peft", "target_modules"), told)] if missing else []


def _known(model: Any) -> str:
    from safe_trainer.adapters import linear_layers

    return f"Its linear layers are {', '.join(sorted({name.rpartition('.')[2] for name in linear_layers(model)}))}."
