"""A recipe's model and arguments: whether the model is there, and whether the recipe fits it and this machine."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .paths import Place

if TYPE_CHECKING:
    from .load import Recipe


def check_model(recipe: Recipe) -> None:
    """Check that the model is there and that the recipe fits it, before any data is read."""
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
    except Exception:  # not the recipe's fault: it is reported when the model itself is loaded
        return
    adapted(recipe, empty)


def skeleton(recipe: Recipe) -> Any:
    """Return the model of a recipe without weights: on the meta device they take no memory."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(recipe.parts.model.path, revision=recipe.parts.model.revision)
    named = getattr(transformers, (config.architectures or [""])[0], None)  # as TRL chooses it
    with torch.device("meta"):
        return named._from_config(config) if named else transformers.AutoModelForCausalLM.from_config(config)


def adapted(recipe: Recipe, model: Any) -> Any:
    """Return a [`skeleton`] with the recipe's adapter, after all methods have checked it."""
    import torch
    from peft import get_peft_model

    from ..lora.updates import linear_layers

    document = recipe.document
    if recipe.peft is not None:
        try:
            with torch.device("meta"):
                model = get_peft_model(model, copy.deepcopy(recipe.peft))
        except Exception as error:  # PEFT raises exceptions of any kind, those of patterns and dictionaries too
            reason = f"{type(error).__name__ if isinstance(error, KeyError) else ''} {error}".strip().rstrip(".")
            place = _setting(("peft",), recipe.values.get("peft"), str(error))
            named = ", ".join(sorted({name.rpartition(".")[2] for name in linear_layers(model)}))
            document.problem(place, f"{reason}. Its linear layers are {named}.")
            document.raise_problems()
        for name, key in _ineffective(recipe.peft, model):
            document.problem(("peft", name), f"`{key}` is not a module of the model, so it would do nothing")
    listed = recipe.values.get("safety")
    for position, method in enumerate(recipe.safety):
        try:
            method.check_model(model)
        except ValueError as error:
            place, entry = ("safety",), listed
            if isinstance(listed, list) and len(listed) == len(recipe.safety):  # none stands for several
                place, entry = ("safety", position), listed[position]
            document.problem(_setting(place, entry, str(error)), str(error))
    document.raise_problems()
    return model


def _ineffective(config: Any, model: Any) -> Iterator[tuple[str, str]]:
    """Yield what an adapter's settings name that the model does not have, which PEFT passes over."""
    modules = [name.replace(".base_layer", "") for name, _ in model.named_modules()]
    for setting in ("target_modules", "modules_to_save", "rank_pattern", "alpha_pattern"):
        named = getattr(config, setting, None)
        for key in () if not named or isinstance(named, str) else named:
            pattern = key if setting.endswith("pattern") else re.escape(key)
            if not any(re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module) for module in modules):
                yield setting, key


def _setting(place: Place, settings: Any, message: str) -> Place:
    """Return the place of the setting that a message is about."""
    names: dict[str, Place] = {}
    for name, value in settings.items() if isinstance(settings, dict) else ():
        names |= {inner: (name, inner) for inner in value} if isinstance(value, dict) else {name: (name,)}
    words = re.findall(r"\w+", message.replace("Target modules", "target_modules"))
    return next(((*place, *names[word]) for word in words if word in names), place)


def arguments(recipe: Recipe) -> Any:
    """Return TRL's arguments for a recipe; refused if they contradict each other or do not fit this machine."""
    from trl import SFTConfig

    from ..trainer import machine_defaults

    settings = {"report_to": "none", **machine_defaults(), **recipe.training}
    try:
        return SFTConfig(output_dir=recipe.parts.output, **settings)
    except ValueError as error:
        # The libraries name the value that they do not know, but not the setting.
        texts = [name for name, value in recipe.training.items() if isinstance(value, str) and value]
        names = [name for name in texts if str(error).startswith(f"{recipe.training[name]} ")]
        recipe.document.problem(("training", *names[:1]), str(error))
        recipe.document.raise_problems()
        raise
