"""`safe-trainer export`: an adapter merged into its model, or cut to the smallest rank."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .shell import Json, console, print_json, quiet_libraries


def export(
    adapter: Annotated[str, typer.Argument(help="The adapter: folder or Hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; it must not exist yet.")],
    compact: Annotated[
        bool, typer.Option("--compact", help="Write an adapter again, with the smallest rank that is exact.")
    ] = False,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="In which a merged model is saved.")
    ] = "auto",
    model: Annotated[
        str | None, typer.Option(help="The base model, if it is not where the adapter says: folder or Hub id.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Merge an adapter into its base model, for programs that do not know adapters; or make it smaller."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise typer.BadParameter(f"{output} exists already; name a new folder.", param_hint="'--output'")
    if compact and (dtype != "auto" or model is not None):
        raise typer.BadParameter("a compact adapter keeps its type and needs no model.", param_hint="'--compact'")
    quiet_libraries()
    if compact:
        from ..lora.io import compact_adapter

        rank = max(compact_adapter(adapter, output).values())
        if as_json:
            print_json({"output": str(output), "rank": rank})
        else:
            console.print(f"Saved a compacted adapter (rank ≤ {rank}) to {output}.", markup=False)
        return
    from ..lora.io import merge_adapter

    merged = merge_adapter(adapter, output, model, dtype=dtype)
    if as_json:
        print_json({"output": str(output), "dtype": str(merged.dtype).removeprefix("torch.")})
    else:
        console.print(f"Saved the merged model to {output}; it loads like any other.", markup=False)
