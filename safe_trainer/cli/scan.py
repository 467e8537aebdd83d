"""`safe-trainer scan`: which rows of a file teach harm, before anything is trained on them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .shell import Json, console, errors, pairs, print_json, progress_bar, quiet_libraries

if TYPE_CHECKING:
    from ..analysis.scan import ScanResult

_WIDTH = 60  # characters of a prompt and of an answer that the table shows


def scan(  # noqa: PLR0913, each is an option with a name
    data: Annotated[Path, typer.Argument(help="File of training rows, in any format.")],
    model: Annotated[str, typer.Option(help="The model that would be trained on them: folder or Hub id.")],
    vectors: Annotated[str, typer.Option(help="Security vectors made for it: folder or Hub id.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File for all rows by rank: .csv, .jsonl or .parquet.")
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="How many rows to show.")] = 20,
    threshold: Annotated[
        float, typer.Option(help="Share of its loss that the vectors take away, above which a row looks harmful.")
    ] = 0.5,
    label: Annotated[
        str | None, typer.Option(help="Column that says which rows are harmful, to see how good the ranking is.")
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(help="prompt=NAME or answer=NAME of a column, where the format cannot be told from the columns."),
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Go on without rows that cannot be used.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that are scored at once.")] = 16,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a row that are read.")] = 1024,
    as_json: Json = False,
) -> None:
    """Rank the rows of a file by the share of their loss that security vectors take away: most of it for harm."""
    columns = dict(pairs(column or [], "--column", "prompt=question"))
    quiet_libraries()
    from ..analysis.scan import scan_file
    from ..data import ReadOptions

    with progress_bar("Scoring rows") as show:
        result = scan_file(
            data,
            model,
            vectors,
            output=output,
            reading=ReadOptions(columns=columns or None, on_bad_row="skip" if skip_bad else "raise"),
            label=label,
            threshold=threshold,
            top=top,
            batch_size=batch_size,
            max_length=max_length,
            progress=show,
        )
    errors.print(str(result.report), markup=False, soft_wrap=True)
    if as_json:
        print_json(_told(result))
    else:
        _show(result)
    if output is not None:
        errors.print(f"Written: {output}", markup=False, soft_wrap=True)
    if result.interrupted:
        errors.print(f"Stopped by Ctrl-C after {result.scored:,} rows, which are kept.")
        raise typer.Exit(130)


def _told(result: ScanResult) -> dict[str, Any]:
    return {
        "scored": result.scored,
        "threshold": result.threshold,
        "above": vars(result.above) if result.above else None,
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
    if result.above is not None:
        console.print(f"Losing more than {result.threshold:g} of their loss: {result.above}", markup=False)
    if result.average_precision is not None:
        console.print(f"Average precision {result.average_precision:.3f}")
