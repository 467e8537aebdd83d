"""What `safe-trainer train --dry-run` prints."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from .shell import console, print_json

if TYPE_CHECKING:
    from ..methods import SafetyMethod
    from ..recipe import Recipe
    from ..recipe.planning import Plan


def tell_plan(recipe: Recipe, made: Plan, as_json: bool) -> None:
    """Print what a run would take."""
    if as_json:
        print_json(vars(made))
        return
    from rich.table import Table

    size = f"{made.parameters:,}, of which {made.trainable / made.parameters:.2%}"
    facts = {
        "model": recipe.parts.model.path,
        "protected by": "\n".join(map(_told, recipe.safety)) or "nothing: plain fine-tuning",
        "rows": f"{made.rows:,}",
        "tokens": f"{made.tokens:,} in an epoch; {made.cut:.1%} of the rows are cut at the maximum length",
        "steps": f"{made.steps:,} by {made.processes} process(es)",
        "weights": f"{size} as many are trained ({made.trainable:,})",
        "memory": f"about {_size(made.memory)} for each process",
        "time": f"about {_duration(made.seconds)} on this machine",
        "output": recipe.parts.output,
    }
    table = Table(show_header=False, box=None)
    for name, fact in facts.items():
        table.add_row(name, fact)
    console.print(table)
    console.print("Nothing was trained. Leave out --dry-run to start.")


def _told(method: SafetyMethod) -> str:
    """Return a method with the settings that are not the defaults, among them where its artefacts come from."""
    fields = [field for field in dataclasses.fields(method) if field.init]  # type: ignore[arg-type]  # each is one
    settings = [f"{f.name}={getattr(method, f.name)!r}" for f in fields if getattr(method, f.name) != f.default]
    return f"{method.name}({', '.join(settings)})"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count > 2**29 else f"{count / 2**20:.0f} MiB"


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
