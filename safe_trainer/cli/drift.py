"""`safe-trainer drift`: how far a fine-tune moved each layer, and what of it touches safety."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import Json, console, misused, note, print_json, progress_bar, show
from .options import check_folder, check_model, prompt_sets

if TYPE_CHECKING:
    from ..analysis.drift import Drift

_SHARES = {"alignment": "along alignment", "outputs": "safety outputs", "inputs": "safety inputs"}


def drift(  # noqa: PLR0913, each is an option with a name
    base: Annotated[str, typer.Argument(help="The model before fine-tuning: folder or Hub id.")],
    tuned: Annotated[str, typer.Argument(help="An adapter on it, or the whole model afterwards: folder or Hub id.")],
    direction: Annotated[
        Path | None, typer.Option(help="Its alignment direction, from `safe-trainer direction`.")
    ] = None,
    basis: Annotated[Path | None, typer.Option(help="Its safety basis, from `safe-trainer basis`.")] = None,
    rank: Annotated[
        int, typer.Option(min=1, help="With --direction or --basis: their first so many directions.")
    ] = 16,
    refusal: Annotated[
        bool,
        typer.Option(
            "--refusal", help="Also what became of the refusal direction: loads both models, and asks --prompts."
        ),
    ] = False,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="For --refusal: harmful=SOURCE and benign=SOURCE, as in `compare`. Left out, built-in ones."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for drift.json.")] = None,
    as_json: Json = False,
) -> None:
    """Measure what a fine-tune changed, layer by layer: any adapter or whole model against its base.

    A layer's drift is ‖ΔW‖/‖W‖, the size of its change beside that of its weight.
    Linear layers are counted; embeddings, norms and the output head are not.
    """
    check_model("BASE", base)
    check_folder("TUNED", tuned, "model")
    from ..analysis.drift import measure_drift

    asked = _asked(prompts, base) if refusal or prompts else None
    with progress_bar("Measuring the drift") as bar:
        found = measure_drift(base, tuned, direction=direction, basis=basis, rank=rank, prompts=asked, progress=bar)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        path = output / "drift.json"
        path.write_text(json.dumps(found.to_dict(), indent=1), encoding="utf-8")
        note(f"Written: {path}")
    if as_json:
        print_json(found.to_dict())
    else:
        _show(found)


def _asked(prompts: list[str] | None, base: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    found = {asked.kind: asked.prompts for asked in reversed(prompt_sets(prompts, base))}  # the first of each
    if not {"harmful", "benign"} <= found.keys():
        raise misused("--prompts", "the refusal direction needs harmful and benign prompts: give both.")
    return found["harmful"], found["benign"]


def _show(found: Drift) -> None:
    if not found.figure("relative"):
        console.print("No change in any linear layer. Embeddings, norms and the output head are not looked at.")
        return
    from rich.table import Table

    from ..evaluation.report import place

    shares = [name for name in _SHARES if found.share(name) is not None]
    refusals = found.figure("refusal")
    columns = ["‖ΔW‖/‖W‖", *(_SHARES[name] for name in shares), *(["refusal kept", "cosine"] if refusals else [])]
    table = Table("layer", "weight", *columns, box=None)
    for column in table.columns[:2]:
        column.no_wrap = True
    for name, layer in sorted(found.layers.items(), key=lambda item: place(item[0])[0]):
        number, weight = place(name)
        row = [str(number) if number >= 0 else "", weight, f"{layer.relative:.2%}" if layer.size > 0 else ""]
        row += [f"{layer.shares[s]:.1%}" if s in layer.shares else "" for s in shares]
        if layer.refusal is not None:
            row += [f"{layer.refusal.kept:.0%}", f"{layer.refusal.cosine:.2f}"]
        table.add_row(*row)
    console.print(table)
    show(f"All together {found.relative:.2%} of the weights' size.")
    for name in shares:
        share, random = found.share(name) or (0.0, 0.0)
        show(f"{_SHARES[name]}: {share:.1%} of the update (random: {random:.1%})")
