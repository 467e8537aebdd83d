"""The settings that a recipe hands to classes: TRL's arguments, PEFT's LoRA, our methods.

Names and annotations come from the classes themselves, so every option of the installed versions can be written in a
recipe.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import types
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter

Hints = dict[str, Any]
_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", types.NoneType: "null",
          list: "a list", tuple: "a list", Sequence: "a list", dict: "a mapping", Mapping: "a mapping",
          Path: "a path"}  # fmt: skip
_RECOMMENDED = dict.fromkeys(("harmful_data", "prompts", "benign_prompts"), str | None)


def training_fields() -> Hints:
    """Return the settings of TRL's `SFTConfig` with their annotations."""
    from trl import SFTConfig

    return fields_of(SFTConfig)


def peft_fields() -> Hints:
    """Return the settings of PEFT's `LoraConfig` with their annotations."""
    from peft import LoraConfig

    return fields_of(LoraConfig)


def method_fields() -> dict[str, Hints]:
    """Return the settings of each method by the name that it has in `METHODS`, and those of `recommended`."""
    from ..methods import METHODS

    methods: dict[str, Any] = {**METHODS}
    return {"recommended": _RECOMMENDED} | {name: fields_of(method) for name, method in methods.items()}


@cache
def fields_of(cls: type) -> Hints:
    """Return the annotation of each field that can be written in YAML, without the kinds of value that cannot."""
    hints = get_type_hints(cls)
    return _plain_only({field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init})


def _ranges(text: str, least: float, most: float = math.inf, words: str = "") -> dict[str, tuple[float, float, str]]:
    return dict.fromkeys(text.split(), (least, most, words or f"at least {least:g}"))


# Neither TRL nor PEFT checks these before training has begun, or ever.
RANGES = {
    **_ranges("learning_rate weight_decay warmup_steps adam_epsilon logging_steps save_steps save_total_limit "
              "dataset_num_proc dataloader_num_workers", 0),
    **_ranges("per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps max_length "
              "max_steps r", 1),
    **_ranges("warmup_ratio adam_beta1 adam_beta2 label_smoothing_factor lora_dropout", 0, 1, "a number from 0 to 1"),
    **_ranges("num_train_epochs lora_alpha", sys.float_info.min, words="above 0"),
    **_ranges("seed data_seed", 0, 2**32 - 1, f"a number from 0 to {2**32 - 1:,}"),
}  # fmt: skip
_UNSET = {("max_steps", -1)}  # what TRL takes for not set, where it is not null


def check_field(name: str, value: Any, hint: Any, in_range: bool) -> tuple[Any, str | None]:
    """Return a setting converted to its type, or what is wrong with it; `in_range` also checks `RANGES`."""
    try:
        if isinstance(value, bool) and not {bool, Any} & {*_members(hint)}:
            raise ValueError("pydantic would take it for 0 or 1")
        checked = TypeAdapter(hint).validate_python(value)
    except ValueError:  # pydantic's `ValidationError` is one
        return None, f"expected {_shown(hint)}, got {short(value)}"
    if in_range and name in RANGES and isinstance(checked, int | float) and (name, checked) not in _UNSET:
        least, most, words = RANGES[name]
        if not (least <= checked <= most and abs(checked) <= sys.float_info.max):
            return None, f"must be {words}, got {checked!r:.60}"
    return checked, None


def json_schema(hints: Hints, hidden: Collection[str] = ()) -> dict[str, Any]:
    """Return the JSON schema of settings, for editors."""
    properties = {}
    for name, hint in hints.items():
        if name not in hidden:
            properties[name] = TypeAdapter(hint).json_schema()
            # The order in which Python keeps a union's members depends on what else was imported.
            properties[name].get("anyOf", []).sort(key=lambda member: str(member.get("type")))
    return {"type": "object", "properties": properties, "additionalProperties": False}


def short(value: Any) -> str:
    """Return a value for a message, cut off if it is long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _shown(hint: Any) -> str:
    parts: list[str] = []
    for member in _members(hint):
        origin = get_origin(member) or member
        name = _NAMES.get(origin, getattr(origin, "__name__", str(origin)))
        parts += map(repr, get_args(member)) if origin is Literal else [name]
    return " or ".join(dict.fromkeys(parts))


def _plain_only(hints: Hints) -> Hints:
    """Drop types that YAML cannot express from each annotation, and fields that keep none."""
    found = {}
    for name, hint in hints.items():
        members = tuple(member for member in _members(hint) if _is_plain(member))
        if any(member is not types.NoneType for member in members):
            found[name] = Union[members]  # noqa: UP007, made of a tuple
    return found


def _is_plain(member: Any) -> bool:
    origin = get_origin(member) or member
    return origin in (Any, Literal) or (isinstance(origin, type) and issubclass(origin, tuple(_NAMES)))
