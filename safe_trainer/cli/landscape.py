"""`safe-trainer landscape`: how far a model can be moved before it stops refusing, and where a fine-tune took it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .asking import (
    BatchSize,
    MaxNewTokens,
    SystemPrompt,
    check_folder,
    check_judges,
    load_judges,
    load_model,
    prompt_sets,
)
from .shell import Json, console, errors, print_json, progress_bar, quiet_libraries

if TYPE_CHECKING:
    from ..analysis.landscape import Landscape
    from ..data import PromptSet


def landscape(  # noqa: PLR0913, each is an option with a name
    model: Annotated[str, typer.Option(help="The aligned model: folder or Hub id.")],
    direction: Annotated[
        Path | None,
        typer.Option(help="Its alignment direction, from `safe-trainer direction`. This or --unaligned is required."),
    ] = None,
    unaligned: Annotated[
        str | None,
        typer.Option(help="The unaligned model: folder or Hub id. Left out, the one that --direction names."),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(help="A training run on the model, with its checkpoints: folder, or an adapter's Hub id."),
    ] = None,
    across: Annotated[
        str | None,
        typer.Option(help="The second direction: random, or an adapter. Left out, the run's end if there is a run."),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Folder for what is measured (landscape.csv, landscape.json) and the picture (landscape.html, .png "
            "and .svg, light and dark).",
        ),
    ] = Path("landscape"),
    points: Annotated[int, typer.Option(min=3, help="Places along each side of the plane; an odd number.")] = 11,
    span: Annotated[
        float | None,
        typer.Option(help="How far to go along the direction, in norms of the weights; 0.5 if left out."),
    ] = None,
    span_across: Annotated[
        float | None, typer.Option(help="How far across; 0.5 if left out, or 2.5 times as far as the run went.")
    ] = None,
    normalize: Annotated[
        Literal["layer", "filter", "none"],
        typer.Option(
            help="How long a direction is made: layer, in each layer as long as its weight; filter, each row as long "
            "as the weight's; none, left as it is, so that -1 is the unaligned model."
        ),
    ] = "layer",
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="harmful=SOURCE, the prompts to be refused, and task=SOURCE or benign=SOURCE with answers, on which "
            "the loss is taken; sources as in `compare`. Left out, built-in ones; without answers there is no loss."
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Prompts of each kind to use, the first ones.")] = 40,
    judge: Annotated[
        str, typer.Option(help="Who judges: likelihood needs no answers; phrases and guards have them generated.")
    ] = "likelihood",
    seed: Annotated[int, typer.Option(help="Seed of a random direction.")] = 0,
    max_new_tokens: MaxNewTokens = 64,
    batch_size: BatchSize = 32,
    system_prompt: SystemPrompt = None,
    picture: Annotated[bool, typer.Option(help="Draw the picture; needs plotly and kaleido.")] = True,
    as_json: Json = False,
) -> None:
    """Move a model's weights along and across its alignment direction, and draw where it stops refusing.

    --direction or --unaligned is required; --adapter shows where a training run went.
    What was measured is kept: stopped, the same command goes on, and more points measure only what is new.
    """
    if direction is None and unaligned is None:
        raise typer.BadParameter("give --direction, --unaligned, or both.", param_hint="'--direction'")
    for option, source in (("--adapter", adapter), ("--across", across if across != "random" else None)):
        if source is not None:
            check_folder(option, source)
    judges = check_judges([judge])
    harmful, task = _asked(prompt_sets(prompts, model), count)
    quiet_libraries()
    from ..analysis.landscape import measure_landscape, write_landscape

    loaded, tokenizer = load_model(model)
    with progress_bar("Measuring the landscape") as show:
        try:
            found = measure_landscape(
                loaded,
                tokenizer,
                harmful,
                direction=direction,
                unaligned=unaligned,
                task=task,
                run=adapter,
                across=across,
                span=span,
                span_across=span_across,
                points=points,
                normalize=normalize,
                judge=load_judges(judges)[0],
                seed=seed,
                output=output,
                progress=show,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                system_prompt=system_prompt,
            )
        except (ValueError, OSError) as error:  # which calls both of them so, whatever they are for
            raise ValueError(str(error).replace("`tuned`", "`--adapter` or `--across`")) from error
    if picture:
        files = write_landscape(found, output, f"Safety around {Path(model).name}")
        errors.print(f"Written: {', '.join(map(str, files))}", markup=False, soft_wrap=True)
    if as_json:
        print_json(found.to_dict())
        return
    _show(found)


def _asked(sets: list[PromptSet], count: int) -> tuple[PromptSet, PromptSet | None]:
    """Choose the harmful prompts, and those with answers on which the loss is taken."""
    harmful = next((found for found in sets if found.kind == "harmful"), None)
    if harmful is None:
        raise typer.BadParameter("name harmful prompts too: harmful=asked.csv.", param_hint="'--prompts'")
    others = sorted((found for found in sets if found.kind != "harmful"), key=lambda found: found.kind != "task")
    task = next((found for found in others if found.references is not None), None)
    return harmful.first(count), None if task is None else task.first(count)


def _show(found: Landscape) -> None:
    for name, words in (("alpha", "Along the alignment direction"), ("beta", "Across it")):
        line = found.axis(name)  # type: ignore[arg-type]
        low, high = found.basin(name)  # type: ignore[arg-type]
        ends = (getattr(line[0], name), getattr(line[-1], name))
        if low != low:
            console.print(f"{words}: the model itself refuses less than half of the harmful prompts.")
            continue
        told = [f"{value:+.3g}{' (the end of what was measured)' if value in ends else ''}" for value in (low, high)]
        console.print(f"{words} at least half is refused from {told[0]} to {told[1]}.", markup=False)
    if not found.checkpoints[1:]:
        return
    from rich.table import Table

    table = Table("checkpoint", "α", "β", "in plane", "harmful answered", "loss", box=None)
    for place in found.checkpoints[1:]:
        table.add_row(place.name, f"{place.alpha:+.4f}", f"{place.beta:+.4f}", f"{place.share:.0%}",
                      str(place.harmful_score), f"{place.loss:.3f}")  # fmt: skip
    console.print(table)
