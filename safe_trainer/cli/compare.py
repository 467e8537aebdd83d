"""`safe-trainer compare` and `safe-trainer evaluate`: a model before and after, or as it is, on the same prompts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markdown import Markdown

from .console import Json, console, errors, misused, note, pairs, print_json, progress_bar
from .options import Loading, Questions, check_folder, check_model

if TYPE_CHECKING:
    from ..analysis.drift_monitor import DriftFigures
    from ..data import PromptSet
    from ..evaluation import Comparison

_LIMIT = "A gate: exit with 3 if {} by more than this many percentage points."


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What a fine-tune may cost."""

    max_harmful_rise: Annotated[
        float | None, typer.Option(min=0, help=_LIMIT.format("compliance with harmful prompts rises"))
    ] = None
    max_over_refusal_rise: Annotated[
        float | None, typer.Option(min=0, help=_LIMIT.format("refusals of other prompts rise"))
    ] = None
    max_task_drop: Annotated[float | None, typer.Option(min=0, help=_LIMIT.format("accuracy on a task falls"))] = None
    max_help_drop: Annotated[
        float | None, typer.Option(min=0, help=_LIMIT.format("help with other prompts falls"))
    ] = None

    def check(self, comparison: Comparison) -> None:
        """Exit with 3 if it costs more."""
        from ..evaluation import Thresholds, gate

        limits = {name.removeprefix("max_"): limit for name, limit in vars(self).items()}
        missed = gate(comparison, Thresholds(**limits))
        for sentence in missed:
            errors.print(f"Gate not passed: {sentence}", style="bold red", markup=False, soft_wrap=True)
        if missed:
            raise typer.Exit(3)


def compare(  # noqa: PLR0913, each is an option with a name
    model: Annotated[str, typer.Argument(help="The model before fine-tuning: folder or Hub id.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="FOLDER or NAME=FOLDER of an adapter that was trained on it, by any program; may be repeated. One "
            "name given several times is several training runs, which are summed up."
        ),
    ] = None,
    tuned_model: Annotated[
        list[str] | None, typer.Option(help="FOLDER or NAME=FOLDER of a full fine-tuned model; as --adapter.")
    ] = None,
    *,
    loading: Loading,
    asked: Questions,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the report and answers.")] = None,
    direction: Annotated[
        Path | None, typer.Option(help="Alignment direction, to show each adapter's share along it by layer.")
    ] = None,
    basis: Annotated[
        Path | None, typer.Option(help="Safety basis, to show each adapter's share in it by layer.")
    ] = None,
    gate: Gate,
    as_json: Json = False,
) -> None:
    """Ask a model the same prompts before and after fine-tuning, and show what changed.

    Works for any LoRA adapter or model, also one trained elsewhere. Without --prompts, built-in prompts are asked.
    """
    adapters, models = _grouped(adapter, "--adapter"), _grouped(tuned_model, "--tuned-model")
    if not adapters and not models:
        raise misused("--adapter", "name what was fine-tuned, as in --adapter out (or --tuned-model out).")
    if adapters.keys() & models.keys():
        raise misused("--tuned-model", "an adapter and a model have the same name.")
    sets, arguments = asked.check(model)
    for source in sum(adapters.values(), []):
        check_folder("--adapter", source)
    for source in sum(models.values(), []):
        check_model("--tuned-model", source)

    from ..analysis.drift_monitor import DriftFigures

    drift_prompts = sets if direction or basis else []
    drift = DriftFigures(direction, basis, prompt_sets=drift_prompts, system_prompt=asked.system_prompt)
    with progress_bar("Asking all models") as progress:
        comparison = _compared(model, adapters, models, sets, drift, loading.options(), arguments(progress))
    _show(comparison, output, as_json)
    if comparison.interrupted:
        errors.print("Stopped by Ctrl-C: what was answered until then is shown. Run the command again for the rest.")
        raise typer.Exit(130)
    gate.check(comparison)


def _grouped(listed: list[str] | None, option: str) -> dict[str, list[str]]:
    """Collect the folders that are given under each name; a folder without a name is named after itself."""
    found: dict[str, list[str]] = {}
    for item in listed or []:
        has_name = "=" in item
        [(name, folder)] = pairs([item if has_name else f"{Path(item).resolve().name}={item}"], option, "tuned=out")
        seen = found.setdefault(name, [])
        if folder in seen or seen and not has_name:
            what = f"{folder} is given twice" if folder in seen else f"{seen[0]} and {folder} are both called {name}"
            raise misused(option, f"{what}. Write NAME=FOLDER, with one name only for runs of the same training.")
        seen.append(folder)
    return found


def _compared(  # noqa: PLR0913, what the command has by then
    model: str,
    adapters: dict[str, list[str]],
    models: dict[str, list[str]],
    sets: list[PromptSet],
    drift: DriftFigures,
    loading: dict[str, Any],
    settings: dict[str, Any],
) -> Comparison:
    """Examine the base with each adapter, then what has its own tokenizer and each complete model, one at a time."""
    from .. import evaluation
    from ..evaluation.compare import with_adapter
    from ..lora.loading import load_model

    base, tokenizer = load_model(model, **loading)
    alone = {n: paths for n, paths in adapters.items() if any(_brings_tokenizer(path, tokenizer) for path in paths)}
    together: Any = {n: paths if len(paths) > 1 else paths[0] for n, paths in adapters.items() if n not in alone}
    comparison = evaluation.compare(base, tokenizer, sets, together, drift=drift, **settings)
    del base
    evaluations, runs = list(comparison.evaluations), dict(comparison.runs)
    for name, paths in [] if comparison.interrupted else [*alone.items(), *models.items()]:
        names = [name]
        if len(paths) > 1:
            names = [f"{name}, run {number}" for number in range(1, len(paths) + 1)]
            runs[name] = tuple(names)
        for run, path in zip(names, paths, strict=True):
            source = (model, path) if name in alone else (path,)
            tuned, its_tokenizer = load_model(*source, **loading)
            found = evaluation.evaluate(tuned, its_tokenizer, sets, name=run, **settings)
            if name in alone:
                found = with_adapter(found, path, drift(tuned, its_tokenizer, path))
            evaluations.append(found)
    return dataclasses.replace(comparison, evaluations=tuple(evaluations), runs=runs)


def _brings_tokenizer(adapter: str, tokenizer: Any) -> bool:
    """Return whether a tokenizer with another vocabulary or chat template is saved next to an adapter."""
    from ..lora.io import local_folder

    folder = local_folder(adapter)
    if not (folder / "tokenizer_config.json").is_file():
        return False
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(folder)
    return len(own) != len(tokenizer) or own.chat_template not in (None, tokenizer.chat_template)


def _show(comparison: Comparison, output: Path | None, as_json: bool) -> None:
    from ..evaluation import to_markdown, write_report
    from ..evaluation.storage import summary

    if output is not None:
        note(f"Wrote {', '.join(map(str, write_report(comparison, output)))}")
    if as_json:
        print_json(summary(comparison))
        return
    console.print(Markdown(to_markdown(comparison)))


def evaluate(
    model: Annotated[str, typer.Argument(help="The model: folder or Hub id.")],
    adapter: Annotated[str | None, typer.Option(help="Folder of an adapter to put on it.")] = None,
    *,
    loading: Loading,
    asked: Questions,
    as_json: Json = False,
) -> None:
    """Ask one model, and show how often it refuses and how often it is right."""
    sets, arguments = asked.check(model)
    if adapter is not None:
        check_folder("--adapter", adapter)

    from .. import evaluation
    from ..evaluation.storage import summary
    from ..lora.loading import load_model

    examined, tokenizer = load_model(model, adapter, **loading.options())
    with progress_bar("Asking the model") as progress:
        found = evaluation.evaluate(examined, tokenizer, sets, **arguments(progress))
    alone = evaluation.Comparison((found,))
    if as_json:
        print_json(summary(alone)[found.name])
        for text in found.notes:
            note(text)
        return
    console.print(Markdown(evaluation.to_markdown(alone)))
