"""`safe-trainer scan` and `drift`: which rows teach harm before training, and what a fine-tune moved after it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from .console import Json, console, misused, note, print_json, progress_bar, show
from .options import Columns, MaxLength, Questions, Reading, check_folder, check_model

if TYPE_CHECKING:
    from ..analysis.drift import Drift
    from ..analysis.scan import ScanResult
    from ..evaluation.prompting import Prompt

_WIDTH = 60  # characters of a prompt and of an answer that the table shows
_SHARES = {"alignment": "along alignment", "outputs": "safety outputs", "inputs": "safety inputs"}


def scan(  # noqa: PLR0913, each is an option with a name
    model: Annotated[str, typer.Argument(help="The model that would be trained on the rows: folder or Hub id.")],
    data: Annotated[str, typer.Argument(help="Training rows: a file in any format, or hf:owner/name:split.")],
    vectors: Annotated[str, typer.Option(help="Security vectors made for the model: folder or Hub id.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File for all rows by rank: .csv, .jsonl or .parquet.")
    ] = None,
    clean: Annotated[
        Path | None, typer.Option(help="File for the rows that are not above the threshold, of the same kind as DATA.")
    ] = None,
    drop_above: Annotated[
        float | None,
        typer.Option(
            help="Share of its loss that the vectors take away, above which a row looks harmful. Left out, the best "
            "on the labels (--label), otherwise 0.5."
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="How many rows to show.")] = 20,
    label: Annotated[
        str | None, typer.Option(help="Column that says which rows are harmful, to see how good the ranking is.")
    ] = None,
    *,
    columns: Columns,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that are scored at once.")] = 16,
    max_length: MaxLength = 1024,
    as_json: Json = False,
) -> None:
    """Rank rows by the share of their loss that security vectors take away, and drop those that look harmful.

    With --output or --clean, the same command continues a scan that was stopped.
    """
    if drop_above is not None and math.isnan(drop_above):  # than which no share is more: every row would be kept
        raise misused("--drop-above", "nan is no number.")
    reading = columns.read_options()
    from ..analysis.scan import scan_file

    with progress_bar("Scoring rows") as bar:
        result = scan_file(
            data,
            model,
            vectors,
            output=output,
            clean=clean,
            drop_above=drop_above,
            reading=reading,
            label=label,
            top=top,
            batch_size=batch_size,
            max_length=max_length,
            progress=bar,
        )
    _report_scan(result, output, clean, as_json=as_json)


def _report_scan(result: ScanResult, output: Path | None, clean: Path | None, *, as_json: bool) -> None:
    note(result.report)
    if as_json:
        print_json(_as_json(result))
    else:
        _show_scan(result)
    written = [str(path) for path in (output, None if result.interrupted else clean) if path is not None]
    if written:
        note(f"Written: {', '.join(written)}")
    if result.interrupted:
        note(f"Stopped by Ctrl-C after {result.scored:,} rows, which are kept.")
        if output or clean:
            note("Run the same command again to continue.")
        raise typer.Exit(130)


def _as_json(result: ScanResult) -> dict[str, Any]:
    rates = {name: getattr(result, name) for name in ("above", "precision", "recall")}
    return {
        "scored": result.scored,
        "threshold": result.threshold,
        "threshold_source": result.threshold_source,
        **{name: rate and rate.to_dict() for name, rate in rates.items()},
        "average_precision": result.average_precision,
        "curve": [
            {"precision": precision.to_dict(), "recall": recall.to_dict(), "threshold": threshold}
            for precision, recall, threshold in result.curve
        ],
        "interrupted": result.interrupted,
        "top": result.top,
    }


def _show_scan(result: ScanResult) -> None:
    table = Table("rank", "line", "share of loss", "prompt", "answer", box=None)
    for entry in result.top:
        shown = [Text(str(entry[side] or "").replace("\n", " ")[:_WIDTH]) for side in ("prompt", "answer")]
        table.add_row(str(entry["rank"]), str(entry["line"]), f"{entry['share']:.3f}", *shown)
    console.print(table)
    show(result)
    if result.average_precision is not None:
        show(f"Average precision {result.average_precision:.3f}")


def drift(  # noqa: PLR0913, each is an option with a name
    base: Annotated[str, typer.Argument(help="The model before fine-tuning: folder or Hub id.")],
    tuned: Annotated[str, typer.Argument(help="An adapter on it, or the fine-tuned model: folder or Hub id.")],
    direction: Annotated[
        Path | None, typer.Option(help="Its alignment direction, from `safe-trainer direction`.")
    ] = None,
    basis: Annotated[Path | None, typer.Option(help="Its safety basis, from `safe-trainer basis`.")] = None,
    rank: Annotated[int, typer.Option(min=1, help="How many directions of --direction or --basis to use.")] = 16,
    refusal: Annotated[
        bool,
        typer.Option(
            "--refusal",
            help="Also measure the change of the refusal direction: loads both models, and asks --prompts.",
        ),
    ] = False,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="For --refusal: harmful=SOURCE and benign=SOURCE, as in `compare`. Left out, built-in ones."
        ),
    ] = None,
    *,
    reading: Reading,
    as_json: Json = False,
) -> None:
    """Measure what a fine-tune changed, layer by layer: any adapter or fully fine-tuned model against its base.

    A layer's drift is ‖ΔW‖/‖W‖, the size of its change relative to that of its weight.
    Linear layers are counted; embeddings, norms and the output head are not.
    """
    check_model("BASE", base)
    check_folder("TUNED", tuned, "model")
    from ..analysis.drift import measure_drift

    asked = _asked(prompts, base, reading) if refusal or prompts else None
    with progress_bar("Measuring the drift") as bar:
        found = measure_drift(base, tuned, direction=direction, basis=basis, rank=rank, prompts=asked, progress=bar)
    if as_json:
        print_json(found.to_dict())
    else:
        _show_drift(found)


def _asked(prompts: list[str] | None, base: str, reading: Reading) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    sets = Questions(prompts=prompts, **vars(reading)).prompt_sets(base)
    found = {asked.kind: asked.conversations() for asked in reversed(sets)}  # the first of each
    if not {"harmful", "benign"} <= found.keys():
        raise misused("--prompts", "the refusal direction needs harmful and benign prompts: give both.")
    return found["harmful"], found["benign"]


def _show_drift(found: Drift) -> None:
    if not found.figure("relative"):
        console.print("No change in any linear layer. Embeddings, norms and the output head are not looked at.")
        return
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
    if kind := found.provenance.get("tuned_is"):
        show(f"The adapter is {kind}.")
    for name in shares:
        share, random = found.share(name) or (0.0, 0.0)
        show(f"{_SHARES[name]}: {share:.1%} of the update (random: {random:.1%})")
