"""`safe-trainer scan`: which rows of a file teach harm, before anything is trained on them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import Json, console, note, print_json, progress_bar, show
from .options import Columns, read_options

if TYPE_CHECKING:
    from ..analysis.scan import ScanResult

_WIDTH = 60  # characters of a prompt and of an answer that the table shows


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
    column: Columns = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Go on without rows that cannot be used.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that are scored at once.")] = 16,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a row that are read.")] = 1024,
    as_json: Json = False,
) -> None:
    """Rank rows by the share of their loss that security vectors take away, and drop those that look harmful.

    With --output or --clean, the same command continues a scan that was stopped.
    """
    reading = read_options(column, skip_bad=skip_bad)
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
    note(result.report)
    if as_json:
        print_json(_as_json(result))
    else:
        _show(result)
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
        "curve": [dict(zip(("precision", "recall", "threshold"), point, strict=True)) for point in result.curve],
        "interrupted": result.interrupted,
        "top": result.top,
    }


def _show(result: ScanResult) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("rank", "line", "share of loss", "prompt", "answer", box=None)
    for entry in result.top:
        shown = [Text(str(entry[side] or "").replace("\n", " ")[:_WIDTH]) for side in ("prompt", "answer")]
        table.add_row(str(entry["rank"]), str(entry["line"]), f"{entry['share']:.3f}", *shown)
    console.print(table)
    show(result)
    if result.average_precision is not None:
        show(f"Average precision {result.average_precision:.3f}")
