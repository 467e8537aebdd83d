"""Checks settings against the dataclass that they are for: TRL's arguments, PEFT's LoRA, our methods.

Their fields and annotations are read from the classes themselves, so that every option of the installed versions can
stand in a recipe without being listed here.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter

from .document import Place, Problem, did_you_mean, told

_PLAIN = (str, int, float, bool, list, dict, tuple, Mapping, Path, types.NoneType)


def check_fields(
    cls: type, values: Mapping[str, Any], place: Place, hidden: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], list[Problem]]:
    """Return the settings with their types put right, and what is wrong with them.

    Args:
        cls (`type`): The dataclass.
        values (`Mapping[str, Any]`): The settings by name.
        place (`Place`): Where they stand.
        hidden (`Mapping[str, str]`, *optional*): Fields that a recipe may not set here, each with the reason.
    """
    hidden = hidden or {}
    known = {name: hint for name, hint in plain_fields(cls).items() if name not in hidden}
    checked: dict[str, Any] = {}
    problems: list[Problem] = []
    for name, value in values.items():
        if name not in known:
            reason = hidden.get(name) or f"unknown setting of {cls.__name__}; {did_you_mean(name, known)}"
            problems.append(Problem((*place, name), reason))
            continue
        try:
            if isinstance(value, bool) and bool not in _members(known[name]):
                raise ValueError("pydantic would take it for 0 or 1")
            checked[name] = TypeAdapter(known[name]).validate_python(value)
        except ValueError:  # pydantic's `ValidationError` is one
            quoted = "; YAML takes on, off, yes and no for these: put it in quotes" if isinstance(value, bool) else ""
            problems.append(Problem((*place, name), f"expected {shown(known[name])}, got {told(value)}{quoted}"))
    return checked, problems


@cache
def plain_fields(cls: type) -> dict[str, Any]:
    """Return the annotation of each field that can be written in YAML, without the kinds of value that cannot."""
    hints = get_type_hints(cls)
    fields = {field.name: _plain(hints[field.name]) for field in dataclasses.fields(cls) if field.init}
    return {name: hint for name, hint in fields.items() if hint is not None}


def shown(hint: Any) -> str:
    """Return an annotation as a message shows it."""
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", types.NoneType: "null"}
    parts = []
    for member in _members(hint):
        choices = get_args(member) if get_origin(member) is Literal else ()
        parts += [repr(c) for c in choices] or [names.get(member, _collection_name(member))]
    return " or ".join(dict.fromkeys(parts))


def json_schema(cls: type, hidden: Collection[str] = ()) -> dict[str, Any]:
    """Return the JSON schema of a dataclass's settings, for editors."""
    properties = {}
    for name, hint in plain_fields(cls).items():
        if name not in hidden:
            properties[name] = TypeAdapter(hint).json_schema()
            # The order in which Python keeps a union's members depends on what else was imported.
            properties[name].get("anyOf", []).sort(key=lambda member: str(member.get("type")))
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _collection_name(member: Any) -> str:
    origin = get_origin(member) or member
    return {list: "a list", tuple: "a list", dict: "a mapping", Mapping: "a mapping", Path: "a path"}.get(
        origin, getattr(origin, "__name__", str(origin))
    )


def _plain(hint: Any) -> Any:
    """Leave of a union what YAML can express; `None` if nothing is left."""
    members = [m for m in _members(hint) if _is_plain(m)]
    return Union[tuple(members)] if any(m is not types.NoneType for m in members) else None  # noqa: UP007, made of a list


def _is_plain(member: Any) -> bool:
    origin = get_origin(member) or member
    if origin in (Any, Literal):
        return True
    return isinstance(origin, type) and issubclass(origin, _PLAIN)
