"""The JSON schema of recipes, from which editors complete keys and mark mistakes while one is written."""

from __future__ import annotations

from typing import Any

from .fields import json_schema
from .protection import Recommended
from .schema import RecipePart
from .validation import NOT_UNDER_PEFT, NOT_UNDER_TRAINING


def recipe_schema() -> dict[str, Any]:
    """Return the schema for the installed versions of TRL and PEFT and for all methods.

    Write it to a file with `safe-trainer train --schema > recipe.schema.json`, and name that file in the first line of
    a recipe: `# yaml-language-server: $schema=recipe.schema.json`.
    """
    from peft import LoraConfig
    from trl import SFTConfig

    from ..methods import METHODS

    schema = RecipePart.model_json_schema()
    methods = []
    kinds: dict[str, type] = {"recommended": Recommended, **METHODS}
    for name, cls in kinds.items():
        method = json_schema(cls)
        method["properties"] = {"method": {"const": name}, **method["properties"]}
        methods.append({**method, "title": getattr(cls, "name", name), "required": ["method"]})
    one = {"anyOf": methods}
    properties = schema["properties"]
    properties["training"] |= json_schema(SFTConfig, NOT_UNDER_TRAINING)
    peft = {"anyOf": [json_schema(LoraConfig, NOT_UNDER_PEFT), {"type": "null"}]}
    properties["peft"] = {"description": properties["peft"]["description"], **peft}
    safety = {"anyOf": [one, {"type": "array", "items": one}, {"const": "recommended"}, {"type": "null"}]}
    properties["safety"] = {"description": properties["safety"]["description"], **safety}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "safe_trainer recipe", **schema}
