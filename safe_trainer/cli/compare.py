"""`safe-trainer compare` and `safe-trainer evaluate`: a model before and after, or as it is, on the same prompts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .asking import (
    BatchSize,
    Judges,
    MaxNewTokens,
    Prompts,
    Suites,
    SystemPrompt,
    check_folder,
    check_judges,
    load_judges,
    load_model,
    prompt_sets,
)
from .shell import Json, console, errors, pairs, print_json, progress_bar, quiet_libraries

if TYPE_CHECKING:
    from ..analysis.drift_monitor import DriftFigures
    from ..evaluation import Comparison, Thresholds

_LIMIT = "A gate: exit with 3 if {} by more than so many percentage points."


def compare(  # noqa: PLR0913, each is an option with a name
    model: Annotated[str, typer.Argument(help="The model before fine-tuning: folder or Hub id.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=FOLDER of an adapter that was trained on it; may be given several times. One name given "
            "several times is several training runs, which are summed up."
        ),
    ] = None,
    tuned_model: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER of a whole model that was made from it; as --adapter.")
    ] = None,
    prompts: Prompts = None,
    suite: Suites = None,
    judge: Judges = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the report and answers.")] = None,
    direction: Annotated[
        Path | None, typer.Option(help="Alignment direction, to show each adapter's share along it by layer.")
    ] = None,
    basis: Annotated[
        Path | None, typer.Option(help="Safety basis, to show each adapter's share in it by layer.")
    ] = None,
    max_new_tokens: MaxNewTokens = 64,
    batch_size: BatchSize = 32,
    system_prompt: SystemPrompt = None,
    max_harmful_rise: Annotated[
        float | None, typer.Option(min=0, help=_LIMIT.format("compliance with harmful prompts rises"))
    ] = None,
    max_over_refusal_rise: Annotated[
        float | None, typer.Option(min=0, help=_LIMIT.format("refusals of other prompts rise"))
    ] = None,
    max_task_drop: Annotated[float | None, typer.Option(min=0, help=_LIMIT.format("accuracy on a task falls"))] = None,
    max_help_drop: Annotated[
        float | None, typer.Option(min=0, help=_LIMIT.format("help with other prompts falls"))
    ] = None,
    as_json: Json = False,
) -> None:
    """Ask a model the same prompts before and after fine-tuning, and show what changed."""
    adapters, models = _grouped(adapter, "--adapter"), _grouped(tuned_model, "--tuned-model")
    _check_names([*adapters, *models])
    judges = check_judges(judge)
    sets = prompt_sets(prompts, model, suite)
    for option, given, what in (("--adapter", adapters, "adapter"), ("--tuned-model", models, "model")):
        for source in (source for sources in given.values() for source in sources):
            check_folder(option, source, what)

    quiet_libraries()
    from ..analysis.drift_monitor import DriftFigures
    from ..evaluation import Thresholds

    drift_prompts = sets if direction or basis else []
    drift = DriftFigures(direction, basis, prompt_sets=drift_prompts, system_prompt=system_prompt)
    thresholds = Thresholds(max_harmful_rise, max_over_refusal_rise, max_task_drop, max_help_drop)
    decoding = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "system_prompt": system_prompt}
    with progress_bar("Asking all models") as show:
        asked = {"prompt_sets": sets, "progress": show, **decoding}
        comparison = _compared(model, adapters, models, asked, judges, drift)
    _tell(comparison, output, as_json)
    if comparison.interrupted:
        errors.print("Stopped by Ctrl-C: what was answered until then is shown. Run the command again for the rest.")
        raise typer.Exit(130)
    _close(comparison, thresholds)


def _grouped(listed: list[str] | None, option: str) -> dict[str, list[str]]:
    """Collect the folders that are given under each name."""
    found: dict[str, list[str]] = {}
    for name, folder in pairs(listed or [], option, "tuned=out/adapter"):
        found.setdefault(name, []).append(folder)
    return found


def _check_names(names: list[str]) -> None:
    if not names:
        problem = "name what was fine-tuned, as in --adapter tuned=out (or --tuned-model tuned=out)."
        raise typer.BadParameter(problem, param_hint="'--adapter'")
    if len(set(names)) < len(names):
        raise typer.BadParameter("an adapter and a model have the same name.", param_hint="'--tuned-model'")


def _compared(
    model: str,
    adapters: dict[str, list[str]],
    models: dict[str, list[str]],
    asked: dict[str, Any],
    judges: list[tuple[str, str]],
    drift: DriftFigures,
) -> Comparison:
    """Examine the base with each adapter, then each whole model, which takes the place of the one before it."""
    from ..evaluation import compare as compare_adapters
    from ..evaluation import evaluate as evaluate_model

    loaded_judges = load_judges(judges)
    base, tokenizer = load_model(model)
    sources: dict[str, Any] = {name: paths if len(paths) > 1 else paths[0] for name, paths in adapters.items()}
    settings = {key: value for key, value in asked.items() if key != "prompt_sets"}
    comparison = compare_adapters(
        base, tokenizer, asked["prompt_sets"], sources, judges=loaded_judges, drift=drift, **settings
    )
    if comparison.interrupted:
        return comparison
    del base
    evaluations, runs = list(comparison.evaluations), dict(comparison.runs)
    for name, paths in models.items():
        names = [f"{name}, run {number}" for number in range(1, len(paths) + 1)] if len(paths) > 1 else [name]
        if len(paths) > 1:
            runs[name] = tuple(names)
        for run, path in zip(names, paths, strict=True):
            whole, tokenizer = load_model(path)
            evaluations.append(
                evaluate_model(whole, tokenizer, asked["prompt_sets"], name=run, judges=loaded_judges, **settings)
            )
    return dataclasses.replace(comparison, evaluations=tuple(evaluations), runs=runs)


def _tell(comparison: Comparison, output: Path | None, as_json: bool) -> None:
    from ..evaluation import to_markdown, write_report
    from ..evaluation.storage import summary

    if output is not None:
        files = write_report(comparison, output)
        errors.print(f"Written: {', '.join(map(str, files))}", markup=False, soft_wrap=True)
    if as_json:
        print_json(summary(comparison))
        return
    from rich.markdown import Markdown

    console.print(Markdown(to_markdown(comparison)))


def _close(comparison: Comparison, thresholds: Thresholds) -> None:
    """Exit with 3 if a limit is exceeded."""
    from ..evaluation import gate

    missed = gate(comparison, thresholds)
    for sentence in missed:
        errors.print(f"Gate not passed: {sentence}", style="bold red", markup=False, soft_wrap=True)
    if missed:
        raise typer.Exit(3)


def evaluate(  # noqa: PLR0913, each is an option with a name
    model: Annotated[str, typer.Argument(help="The model: folder or Hub id.")],
    adapter: Annotated[str | None, typer.Option(help="Folder of an adapter to put on it.")] = None,
    prompts: Prompts = None,
    suite: Suites = None,
    judge: Judges = None,
    max_new_tokens: MaxNewTokens = 64,
    batch_size: BatchSize = 32,
    system_prompt: SystemPrompt = None,
    as_json: Json = False,
) -> None:
    """Ask one model, and show how often it refuses and how often it is right."""
    judges = check_judges(judge)
    sets = prompt_sets(prompts, model, suite)

    quiet_libraries()
    from ..evaluation import agreements
    from ..evaluation import evaluate as evaluate_model

    examined, tokenizer = load_model(model)
    if adapter is not None:
        examined.load_adapter(adapter)
    with progress_bar("Asking the model") as show:
        found = evaluate_model(
            examined,
            tokenizer,
            sets,
            judges=load_judges(judges),
            progress=show,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            system_prompt=system_prompt,
        )
    rates = {result.prompt_set.name: result.rates() for result in found.results}
    if as_json:
        print_json({name: {key: rate.to_dict() for key, rate in row.items()} for name, row in rates.items()})
        return
    from rich.table import Table

    table = Table("prompts", "outcome", "% (count/total) [95 % interval]", box=None)
    for name, row in rates.items():
        for outcome, rate in row.items():
            table.add_row(name, outcome, str(rate))
    console.print(table)
    for line in [*map(str, agreements(found)), *found.notes]:
        console.print(line, markup=False)
