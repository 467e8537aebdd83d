"""`safe-trainer direction`: what alignment did to each weight, for AsFT."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .shell import Json, console, print_json, progress_bar, quiet_libraries


def direction(  # noqa: PLR0913, each is an option with a name
    aligned: Annotated[str, typer.Argument(help="The aligned (chat) model: folder or Hub id.")],
    unaligned: Annotated[str, typer.Argument(help="The model before alignment: folder or Hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("direction.safetensors"),
    modules: Annotated[
        str | None, typer.Option(help="Regular expression of module names; all linear layers if left out.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Keep at most so many directions of each weight.")] = None,
    max_error: Annotated[float, typer.Option(help="Upper bound of the error, relative to an update.")] = 0.01,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read .bin weights too; they can run code.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compute the alignment direction of a model from two checkpoints, one tensor at a time, and save it."""
    quiet_libraries()
    from .. import AlignmentDirection

    with progress_bar("Computing the direction") as show:
        found = AlignmentDirection.from_checkpoints(
            aligned,
            unaligned,
            modules=modules,
            rank=rank,
            max_error=max_error,
            allow_pickle=allow_pickle,
            progress=lambda done, total, _: show(done, total),
        )
    found.save(output)
    rows = found.summary()
    if as_json:
        print_json({"output": str(output), "modules": rows, "provenance": found.provenance})
        return
    from rich.table import Table

    table = Table("module", "shape", "directions kept", "error bound", "norm of d", box=None)
    for row in rows:
        shape = " × ".join(map(str, row["shape"]))
        table.add_row(row["module"], shape, str(row["rank"]), f"{row['error_bound']:.2g}", f"{row['norm']:.3g}")
    console.print(table)
    console.print(f"{len(rows)} modules, saved to {output}, for AsFT(direction={str(output)!r}).", markup=False)
