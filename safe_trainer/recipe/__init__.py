"""Recipes: one YAML file says everything about a run, and is validated whole before anything is loaded.

`document` knows the lines of a YAML file; `schema` says what may stand in it; `fields` asks TRL, PEFT and the methods
what they take; `sources` looks for the files; `validation` brings them together; `planning` says what a run would
take, and `running` carries it out.
"""

from .document import RecipeError
from .planning import Plan, plan
from .running import Loaded, load, make_trainer, save_recipe
from .validation import Recipe, read_recipe

__all__ = ["Loaded", "Plan", "Recipe", "RecipeError", "load", "make_trainer", "plan", "read_recipe", "save_recipe"]
