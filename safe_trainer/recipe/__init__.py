"""Recipes: one YAML file says everything about a run, and is validated before anything is loaded.

```python
from safe_trainer import recipe

result = recipe.run_recipe(recipe.read_recipe("recipes/testbed/asft.yaml", ["training.max_steps=10"]))
```
"""

from .document import RecipeError
from .dry_run import Plan, plan
from .load import Recipe, read_recipe
from .run import RunCallbacks, RunResult, model_options, run_recipe
from .sources import LoadedData, load_data

__all__ = ["LoadedData", "Plan", "Recipe", "RecipeError", "RunCallbacks", "RunResult", "load_data",
           "model_options", "plan", "read_recipe", "run_recipe"]  # fmt: skip
