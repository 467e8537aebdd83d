"""`safe-trainer train`: shows what `run_recipe` reports."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal
from rich.table import Table

from .console import Json, console, note, print_json, progress_bar, show
from .options import check_file

if TYPE_CHECKING:
    from ..recipe import Plan, Recipe, RunResult

_STAGES = {"preparing": "Loading the model", "training": "Training", "comparing": "Comparing before and after"}
_SHOWN = ("loss", "safety_penalty", "mean_token_accuracy", "learning_rate")


def _show_schema(wanted: bool) -> None:
    if wanted:
        from ..recipe.schema import recipe_schema

        typer.echo(json.dumps(recipe_schema(), indent=1))
        raise typer.Exit


def train(
    recipe: Annotated[Path, typer.Argument(help="The YAML file.")],
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="A change, such as training.learning_rate=1e-4; may be repeated.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and show the plan only.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the last checkpoint in the output.")] = False,
    schema: Annotated[
        bool, typer.Option("--schema", callback=_show_schema, is_eager=True, help="Print the JSON schema of recipes.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Carry out a recipe: load and check everything, train, save an ordinary model or adapter, and compare."""
    check_file("RECIPE", recipe)
    from ..recipe import load_data, plan, read_recipe, run_recipe

    checked = read_recipe(recipe, changes or [])
    if dry_run:
        loaded = load_data(checked)
        made = plan(checked, loaded)
        for text in [*loaded.messages(), *made.messages]:
            note(text)
        _show_plan(checked, made, as_json)
        return
    try:
        with redirect_stdout(sys.stderr), ExitStack() as stack:  # libraries print; standard output is for the result
            result = run_recipe(checked, _show(stack), resume=resume)
    except KeyboardInterrupt:  # the run has reported what is kept
        raise typer.Exit(130) from None
    if as_json and os.environ.get("RANK", "0") == "0":
        _print_result(result)


def _show(stack: ExitStack) -> Any:
    """Return callbacks that show a run on standard error: a bar for each stage, a line for each entry of the log."""
    from ..recipe import RunCallbacks

    class Shown(RunCallbacks):
        _bar: Any = None

        def stage(self, name: str) -> None:
            stack.close()
            self._bar = stack.enter_context(progress_bar(_STAGES[name])) if name in _STAGES else None

        def progress(self, done: int, total: int) -> None:
            if self._bar is not None:
                self._bar(done, total)

        def log(self, entry: Mapping[str, float]) -> None:
            if line := _log_line(entry):
                note(line)

        def message(self, text: str) -> None:
            note(text)

    return Shown()


def _log_line(entry: Mapping[str, float]) -> str:
    """Return one line for an entry that has a loss or what a monitor measured; an empty text for others."""
    from ..evaluation import Rate

    named = _SHOWN if "loss" in entry else ("eval_loss", "eval_mean_token_accuracy")
    shown = [f"{name.replace('_', ' ')} {entry[name]:.4g}" for name in named if name in entry]
    for name, value in entry.items():
        if name == "drift/relative":
            shown.append(f"weights moved by {value:.1%}")
        elif name.endswith("_refused"):
            judged = int(entry[f"{name.removesuffix('_refused')}_judged"])
            shown.append(f"{name.removeprefix('safety/').replace('_', ' ')} {Rate(round(value * judged), judged)}")
    return f"step {entry['step']} of {entry['max_steps']}: {', '.join(shown)}" if shown else ""


def _print_result(result: RunResult) -> None:
    from ..evaluation.storage import summary

    found: dict[str, Any] = {"output": str(result.output), "steps": result.steps, "metrics": result.metrics}
    if result.compare_command is not None:
        found["compare"] = result.compare_command
    if result.comparison is not None:
        found |= {"report": [str(file) for file in result.files], "comparison": summary(result.comparison)}
    print_json(found)


def _show_plan(recipe: Recipe, made: Plan, as_json: bool) -> None:
    if as_json:
        print_json(made.to_dict())
        return
    learned = "an unknown share" if made.learned is None else made.learned.share
    rate = f"{made.learning_rate:g}"
    if "learning_rate" not in (recipe.values.get("training") or {}):
        rate += f" (the default for {'a LoRA' if recipe.peft else 'all weights'})"
    protected = [f"{m.name}({', '.join(f'{k}={v!r}' for k, v in m.settings().items())})" for m in recipe.safety]
    facts = {
        "model": recipe.parts.model.path,
        "protected by": "\n".join(protected) or "nothing: plain fine-tuning",
        "rows": f"{made.rows:,}" + (f", and {made.eval_rows:,} whose loss is taken" if made.eval_rows else ""),
        "tokens": f"{made.tokens:,} per epoch; {learned} of the answers' tokens are learned; "
        f"{made.cut.share} of the rows are cut off at `max_length`",
        "steps": f"{made.steps:,} on {made.processes} process{'es' if made.processes > 1 else ''}",
        "learning rate": rate,
        "weights": f"{made.parameters:,}; {made.trainable:,} trained ({made.trainable / made.parameters:.2%})",
        "memory": f"about {decimal(made.memory)} per process",
        "time": f"about {timedelta(seconds=round(made.seconds))} (h:mm:ss) on this machine",
        "output": recipe.parts.output,
    }
    table = Table(show_header=False, box=None)
    for name, fact in facts.items():
        table.add_row(name, fact)
    console.print(table)
    show("Nothing was trained. Leave out --dry-run to start.")
