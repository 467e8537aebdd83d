"""`safe-trainer train`: one recipe, from validation to the report."""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from safetensors import SafetensorError

from .planned import tell_plan
from .shell import Json, errors, print_json, progress_bar, quiet_libraries

if TYPE_CHECKING:
    from ..recipe import Recipe
    from ..recipe.running import Loaded


def _show_schema(wanted: bool) -> None:
    if wanted:
        from ..recipe.editors import recipe_schema

        typer.echo(json.dumps(recipe_schema(), indent=1))
        raise typer.Exit


def train(  # noqa: PLR0913, each is an option with a name
    recipe: Annotated[Path, typer.Argument(help="The YAML file.", exists=True, dir_okay=False)],
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="A change, such as training.learning_rate=1e-4; may be repeated.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would happen.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the output.")] = False,
    schema: Annotated[
        bool,
        typer.Option("--schema", callback=_show_schema, is_eager=True, help="Print the JSON schema of recipes."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Carry out a recipe: load and check everything, train, save an ordinary model or adapter, and compare."""
    quiet_libraries()
    from ..recipe import read_recipe
    from ..recipe.running import load

    checked = read_recipe(recipe, changes or [])
    if not dry_run:
        _check_place(checked.parts.output)
        if _is_first_process():
            _check_run(checked.parts.output, resume)
    loaded = load(checked)
    if _is_first_process():
        _tell_data(loaded)
    if dry_run:
        from ..recipe.planning import plan

        tell_plan(checked, plan(checked, loaded), as_json)
        return
    with redirect_stdout(sys.stderr):  # whatever libraries print: standard output is for the result
        result = _run(checked, loaded, resume)
    if as_json and _is_first_process():
        print_json(result)


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _check_place(output: str) -> None:
    """Hear before training, not behind it, that what comes of it has no place."""
    if Path(output).exists() and not Path(output).is_dir():
        raise ValueError(f"`{output}` is a file. Choose a folder for the run with --set output=FOLDER.")
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        raise OSError(
            error.errno,
            f"`{output}` cannot be written ({error.strerror}). Choose another folder with --set output=FOLDER.",
        ) from error


def _check_run(output: str, resume: bool) -> None:
    """Refuse to go on from nothing, and to write a second run over a first.

    Which checkpoint is whole is looked at by the trainer, since all processes are to go on from the same.
    """
    from ..checkpoints import checkpoints_of

    found = checkpoints_of(Path(output))
    if resume and not found:
        raise ValueError(f"There is no checkpoint in `{output}` to go on from. Leave out --resume, or check `output`.")
    if found and not resume:
        raise ValueError(
            f"`{output}` holds a run, up to `{found[-1]}`. Go on with --resume, or choose another `output`."
        )
    if not resume and Path(output, "recipe.yaml").is_file():
        raise ValueError(f"`{output}` holds a finished run. Choose another with --set output=FOLDER, or remove it.")


def _trained(recipe: Recipe, trainer: Any, resume: bool) -> Any:
    """Train; on Ctrl-C or SIGTERM the trainer saves a checkpoint and says how to go on."""
    from ..recipe.telling import tell

    trainer.resume_command = _again()
    try:
        with progress_bar("Training") as show:
            tell(trainer, show, lambda line: errors.print(line, markup=False, highlight=False))
            return trainer.train(resume_from_checkpoint=resume)
    except KeyboardInterrupt as error:
        if not error.args:  # nothing was saved for it and nothing told: it was the second, or came behind training
            step, output = trainer.state.global_step, recipe.parts.output
            errors.print(f"\nStopped behind step {step}. If `{output}` holds a checkpoint, --resume goes on from it.")
        raise typer.Exit(130) from None


def _again() -> str:
    """Return the command that goes on with this run."""
    return shlex.join(["safe-trainer", *sys.argv[1:], *([] if "--resume" in sys.argv else ["--resume"])])


def _left(output: str) -> tuple[str, str]:
    """Return what is left of a training whose end was not saved, and how to have it."""
    from ..checkpoints import checkpoints_of, is_whole

    whole = next(filter(is_whole, reversed(checkpoints_of(Path(output)))), None)  # each look reads a checkpoint
    if whole is not None:
        return f"The last checkpoint, `{whole}`, is intact", f"go on with: {_again()}"
    return f"There is no checkpoint in `{output}`", "train again, with a `training.save_strategy`."


@contextmanager
def _saving(output: str) -> Iterator[None]:
    """Explain a disk that is full, or a folder that cannot be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        kept, go_on = _left(output)
        raise OSError(
            f"What was trained could not be saved in `{output}` ({error}). {kept}. Free some space or make the "
            f"folder writable, and {go_on}"
        ) from error


def _run(recipe: Recipe, loaded: Loaded, resume: bool) -> dict[str, Any]:
    from ..recipe.running import make_trainer, watch

    trainer = make_trainer(recipe, loaded.rows, show_bars=errors.is_terminal)
    watch(recipe, trainer, loaded.prompt_sets)
    trained = _trained(recipe, trainer, resume)
    try:
        return _finished(recipe, loaded, trainer, trained.metrics)
    except KeyboardInterrupt:
        kept, go_on = _left(recipe.parts.output)
        errors.print(f"\nStopped by Ctrl-C behind training. {kept}; {go_on}", markup=False, soft_wrap=True)
        raise typer.Exit(130) from None


def _finished(recipe: Recipe, loaded: Loaded, trainer: Any, metrics: Any) -> dict[str, Any]:
    """Save what was trained, and compare the model before and after."""
    from ..recipe.running import examine, save_recipe

    output = recipe.parts.output
    with _saving(output):
        trainer.save_model(output)
    result: dict[str, Any] = {"output": output, "steps": trainer.state.global_step, "metrics": metrics}
    if not trainer.is_world_process_zero():
        return result
    with _saving(output):
        saved = save_recipe(recipe, loaded)
    errors.print(f"Saved to {output}; {saved} runs it again.", markup=False, soft_wrap=True)
    if loaded.prompt_sets and _is_split(trainer):
        again = _comparing(recipe, loaded)
        errors.print("Each process has a part of the model only, so it is asked afterwards, by one:", soft_wrap=True)
        errors.print(again, markup=False, highlight=False, soft_wrap=True)
        result["compare"] = again
    elif loaded.prompt_sets:
        from ..evaluation import write_report
        from ..evaluation.storage import summary
        from ..recipe.model_card import publish, write_card

        with progress_bar("Asking the model before and after") as show:
            comparison = examine(recipe, trainer, loaded.prompt_sets, show)
        with _saving(output):
            files = [*write_report(comparison, output), write_card(output, comparison)]
        result |= {"report": [str(file) for file in files], "comparison": summary(comparison)}
        for sentence in comparison.sentences(comparison.evaluations[-1].name):
            errors.print(sentence, markup=False, soft_wrap=True)
        errors.print(f"Written: {', '.join(map(str, files))}", markup=False, soft_wrap=True)
        if trainer.args.push_to_hub:  # the trainer has pushed before there was a report
            publish(output, trainer.hub_model_id)
    return result


def _is_split(trainer: Any) -> bool:
    from ..distributed import strategy_of

    return strategy_of(trainer.accelerator, trainer.model).is_sharded


def _comparing(recipe: Recipe, loaded: Loaded) -> str:
    """Return the command that compares the model before and after."""
    output = recipe.parts.output
    asked = [("--prompts", f"{prompts.kind}={prompts.source}") for prompts in loaded.prompt_sets if prompts.source]
    tuned = ["--adapter", f"fine-tuned={output}"] if recipe.peft is not None else []
    options = [*tuned, *(part for pair in asked for part in pair), "--output", output]
    return shlex.join(["safe-trainer", "compare", recipe.parts.model.path, *options])


def _tell_data(loaded: Loaded) -> None:
    for report in loaded.reports:
        errors.print(str(report), markup=False, soft_wrap=True)
    for name, count in loaded.leaked.items():
        errors.print(
            f"{count:,} training rows ask a prompt of `{name}`: its rates will show memory, not behaviour. Remove "
            "them from the one or the other.",
            style="bold yellow",
            soft_wrap=True,
        )
