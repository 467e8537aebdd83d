"""A recipe that a user brings: what of it the form shows, what is kept beside it, and what has no place in the app."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from . import texts
from .recipes import AT_A_TIME, GUARD, JUDGES, PLAIN, RECOMMENDED, cards

_FORM = {
    "training.max_steps": "steps",
    "training.learning_rate": "learning_rate",
    "training.max_length": "max_length",
    "training.seed": "seed",
    "peft.r": "lora_rank",
    "evaluation.max_new_tokens": "answer_tokens",
}
_KEPT = {
    "model": "dtype quantization",
    "peft": "lora_alpha lora_dropout target_modules use_rslora use_dora bias",
    "training": "lr_scheduler_type warmup_steps weight_decay max_grad_norm optim adam_beta1 adam_beta2 "
    "adam_epsilon bf16 fp16 gradient_checkpointing packing assistant_only_loss completion_only_loss loss_type "
    "neftune_noise_alpha label_smoothing_factor data_seed logging_steps save_strategy save_steps save_total_limit",
    "evaluation": "batch_size with_training_prompt",
    "monitor": "every prompts",
}
"""What is kept: it reaches nothing outside of its run, neither files nor the network."""
_WORD = re.compile(r"[\w.-]{1,100}")
_LARGEST, _LONGEST, _MOST = 100_000, 200, 1_000  # characters of a recipe, of a value that is told, and values


@dataclass(frozen=True)
class Taken:
    """What was taken from a recipe.

    Args:
        name (`str`): Name of its file.
        form (`Mapping[str, Any]`): Values for the form of step 2.
        model (`str`), unaligned (`str`): The models that it names, or `""`.
        kept (`Mapping[str, Any]`): Settings without a place in the form, which go into the app's recipes as they are.
        left (`tuple[str, ...]`): What is not taken.
    """

    name: str
    form: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""
    unaligned: str = ""
    kept: Mapping[str, Any] = field(default_factory=dict)
    left: tuple[str, ...] = ()


def read_settings(text: str, name: str) -> Taken:
    """Sort what a recipe says into what the form shows, what is kept and what is left out."""
    try:
        values = YAML(typ="safe").load(text) if len(text) <= _LARGEST else None
        found = dict(_leaves(values, "")) if isinstance(values, dict) else {}
    except (YAMLError, ValueError, RecursionError) as error:
        raise ValueError(texts.RECIPE_BROKEN.format(name=name, reason=str(error).partition("\n")[0])) from None
    if not isinstance(values, dict) or not found:
        raise ValueError(texts.RECIPE_BROKEN.format(name=name, reason=texts.RECIPE_NO_KEYS))
    form = {}
    for place, setting in _FORM.items():
        if _is_number(found.get(place)):
            form[setting] = found.pop(place)
    form |= _held_out(found) | _batch(found) | _methods(values, found) | _asking(found)
    rank = form.get("lora_rank")
    if found.get("peft.lora_alpha") == 2 * (rank or 0):
        del found["peft.lora_alpha"]  # as the app has it
    model, unaligned = found.pop("model.path", ""), ""
    for place in [place for place in found if place.endswith("unaligned_model")]:
        unaligned = str(found.pop(place))
    kept = {place: value for place, value in found.items() if _is_kept(place, value)}
    left = [f"{place}: {value}"[:_LONGEST] for place, value in found.items() if place not in kept]
    return Taken(name, form, str(model), unaligned, kept, tuple(left))


def _leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Yield what a recipe says, each with its place."""
    waiting, count = [(place, value)], 0
    while waiting:
        place, value = waiting.pop(0)
        count += 1
        if count > _MOST:
            raise ValueError(texts.RECIPE_LARGE)
        inner: list[tuple[Any, Any]] = []
        if isinstance(value, dict):
            inner = list(value.items())
        elif isinstance(value, list) and any(isinstance(one, dict | list) for one in value):
            inner = list(enumerate(value))
        if inner:
            waiting += [(f"{place}.{key}".removeprefix("."), one) for key, one in inner]
        else:
            yield place, value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _held_out(found: dict[str, Any]) -> dict[str, Any]:
    share = found.get("eval_share", 0)
    percent = round(100 * share, 9) if _is_number(share) else 0
    if not 0 < percent <= 50 or percent != int(percent):  # the form has whole numbers only
        return {}
    for place in ("eval_share", "training.eval_strategy", "training.eval_steps"):
        found.pop(place, None)
    return {"held_out": int(percent)}


def _batch(found: dict[str, Any]) -> dict[str, Any]:
    """Return the size of a batch; how many of its rows are in memory at a time stays to be kept."""
    size, steps = found.get(AT_A_TIME), found.get("training.gradient_accumulation_steps", 1)
    if not _is_count(size) or not _is_count(steps):
        return {}
    found.pop("training.gradient_accumulation_steps", None)
    return {"batch_size": size * steps}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _methods(values: Mapping[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Choose the method of a recipe, with its settings; the app trains one in each run."""
    given = values.get("safety", RECOMMENDED) or []
    listed = given if isinstance(given, list) else [given]
    entries = [one if isinstance(one, dict) else {"method": one} for one in listed] or [{"method": PLAIN}]
    key, known = entries[0].get("method"), cards()
    if len(entries) > 1 or not isinstance(key, str) or key not in known:
        return {}
    form: dict[str, Any] = {f"use.{other}": other == key for other in known}
    fields = {one.name: one for one in known[key].fields}
    for place in [place for place in found if place.partition(".")[0] == "safety"]:
        name, value = re.sub(r"^safety\.?(\d+\.)?", "", place), found.pop(place)
        if name in fields and (value in fields[name].choices if fields[name].choices else _is_number(value)):
            form[f"{key}.{name}"] = value
        elif name not in ("", "method") and value is not None:
            found[f"safety.{key}.{name}"] = value
    return form


def _asking(found: dict[str, Any]) -> dict[str, Any]:
    """Take system prompt and judges."""
    form = {}
    if isinstance(found.get("evaluation.system_prompt"), str):
        form["system_prompt"] = found.pop("evaluation.system_prompt")
    judges = found.get("evaluation.judges")
    joined = ",".join(map(str, judges)) if isinstance(judges, list) else ""
    if joined in JUDGES:
        form["judge"] = joined
    elif isinstance(judges, list) and len(judges) == 2 and judges[1] == "phrases" and ":" in str(judges[0]):
        form |= {"judge": GUARD, "guard": str(judges[0])}
    if "judge" in form:
        del found["evaluation.judges"]
    return form


def _is_kept(place: str, value: Any) -> bool:
    if place == AT_A_TIME:
        return _is_count(value)
    part, _, name = place.partition(".")
    words = value if isinstance(value, list) else [value]
    if not all(
        isinstance(one, bool | int | float) or (isinstance(one, str) and _WORD.fullmatch(one)) for one in words
    ):
        return False
    if part == "safety":  # numbers and switches; what may be the name of a file is left
        method, _, inner = name.partition(".")
        return method in cards() and "." not in inner and not any(isinstance(one, str) for one in words)
    return place == "ema" or name in _KEPT.get(part, "").split()
