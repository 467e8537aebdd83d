"""Whether a recipe fits its model, as far as the model's configuration tells: no weights are loaded for it."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

from .paths import Place

if TYPE_CHECKING:
    from .load import Recipe


def skeleton(recipe: Recipe) -> Any:
    """Return the model of a recipe without weights: on the meta device they take no memory."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(recipe.parts.model.path, revision=recipe.parts.model.revision)
    named = getattr(transformers, (config.architectures or [""])[0], None)  # as TRL chooses it
    with torch.device("meta"):
        return named._from_config(config) if named else transformers.AutoModelForCausalLM.from_config(config)


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
        except Exception as error:  # PEFT tells in exceptions of any kind, patterns' and dictionaries' among them
            told = f"{type(error).__name__ if isinstance(error, KeyError) else ''} {error}".strip().rstrip(".")
            setting = _place(("peft",), recipe.values.get("peft"), str(error))
            recipe.document.problem(setting, f"{told}. {_known(model)}")
            recipe.document.raise_problems()
    listed = recipe.values.get("safety")
    for position, method in enumerate(recipe.safety):
        try:
            method.check_model(model)
        except ValueError as error:
            place: Place = ("safety",)
            entry = listed
            if isinstance(listed, list) and len(listed) == len(recipe.safety):  # none stands for several
                place, entry = (*place, position), listed[position]
            recipe.document.problem(_place(place, entry, str(error)), str(error))
    recipe.document.raise_problems()
    return model


def _place(place: Place, settings: Any, message: str) -> Place:
    """Return the place of the setting that a message is about."""
    words = re.findall(r"\w+", message.replace("Target modules", "target_modules"))
    names: dict[str, Place] = {}
    for name, value in settings.items() if isinstance(settings, dict) else ():
        names |= {inner: (name, inner) for inner in value} if isinstance(value, dict) else {name: (name,)}
    return next(((*place, *names[word]) for word in words if word in names), place)


def _known(model: Any) -> str:
    from ..lora.updates import linear_layers

    return f"Its linear layers are {', '.join(sorted({name.rpartition('.')[2] for name in linear_layers(model)}))}."
