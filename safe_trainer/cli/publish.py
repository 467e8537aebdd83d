"""`safe-trainer export`, `apply-safe-lora` and `card`: an adapter merged, made smaller or repaired; its model card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from .console import Json, console, misused, print_json, progress_bar, show
from .options import check_file, check_folder, check_model, check_new


def export(
    adapter: Annotated[str, typer.Argument(help="The adapter: folder or Hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; it must be new or empty.")],
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
    """Merge an adapter into its base model, for programs that do not know adapters; or make it smaller.

    The tokenizer next to the adapter, with added tokens and chat template, goes with it.
    """
    check_new(output)
    if compact and (dtype != "auto" or model is not None):
        raise misused("--compact", "a compact adapter keeps its type and needs no model.")
    check_folder("ADAPTER", adapter)
    if model is not None:
        check_model("--model", model)
    from ..lora.io import compact_adapter, merge_adapter

    if compact:
        rank = max(compact_adapter(adapter, output).values())
        facts: dict[str, Any] = {"rank": rank}
        saved = f"a compacted adapter (rank ≤ {rank}) to {output}."
    else:
        merged = merge_adapter(adapter, output, model, dtype=dtype)
        kept = str(merged.dtype).removeprefix("torch.")
        facts, saved = {"dtype": kept}, f"the merged model to {output}; it loads like any other."
    if as_json:
        print_json({"output": str(output), **facts})
    else:
        show(f"Saved {saved}")


def apply_safe_lora(  # noqa: PLR0913, each is an option with a name
    adapter: Annotated[str, typer.Argument(help="The adapter to repair: folder or Hub id.")],
    unaligned: Annotated[str, typer.Option(help="The model before alignment: folder or Hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; it must be new or empty.")],
    aligned: Annotated[
        str | None, typer.Option(help="The aligned model; left out, the one that the adapter belongs to.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Layers whose similarity is below it are projected. [0.5]")
    ] = None,
    number_of_layers: Annotated[
        int | None,
        typer.Option("--layers", min=1, help="Instead, how many layers to project, the least similar first."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Repair a finished adapter by Safe LoRA: project layers whose update points away from alignment.

    Needs no data and no training. Compare both: safe-trainer compare BASE --adapter ADAPTER --adapter repaired=OUT.
    """
    check_new(output)
    check_folder("ADAPTER", adapter)
    check_model("--unaligned", unaligned)
    if aligned is not None:
        check_model("--aligned", aligned)
    from .. import apply_safe_lora as repair
    from ..methods.safe_lora import summary
    from ..recipe.model_card import write_model_card

    chosen: dict[str, Any] = {"threshold": threshold, "number_of_layers": number_of_layers}
    with progress_bar("Projecting") as bar:
        report = repair(adapter, output, unaligned=unaligned, aligned=aligned, progress=bar, **chosen)
    write_model_card(output)
    if as_json:
        print_json({"output": str(output), **report})
        return
    table = Table("layer", "similarity", "norm left if projected", "projected", box=None)
    for name, layer in report["layers"].items():
        figures = ["-" if layer[key] is None else f"{layer[key]:.3f}" for key in ("similarity", "norm")]
        table.add_row(name, *figures, "yes" if layer["projected"] else "no")
    console.print(table)
    show(f"Saved the repaired adapter to {output}: {summary(report)}.")


def card(  # noqa: PLR0913, each is an option with a name
    folder: Annotated[Path, typer.Argument(help="Folder of a fine-tuned adapter or model.", exists=True)],
    comparison: Annotated[
        Path | None,
        typer.Option(help="comparison.json of a report about it; left out, the one in the folder."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What the comparison calls it; left out, the one with the same weights.")
    ] = None,
    push: Annotated[
        str | None, typer.Option(help="Upload weights, tokenizer and card to this repository, such as me/my-model.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the base model, where it was trained on a local copy.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    as_json: Json = False,
) -> None:
    """Write a model card with rates before and after, recipe and citations. What you have written in it stays."""
    if comparison is not None:
        check_file("--comparison", comparison)
    from ..evaluation import from_json
    from ..recipe.model_card import publish, write_model_card

    compared = from_json(comparison.read_text(encoding="utf-8")) if comparison is not None else None
    written = write_model_card(folder, compared, name=name, base_model=base_model, repository=push)
    address = publish(folder, push, private=private) if push is not None else None
    if as_json:
        print_json({"card": str(written), "uploaded": address})
        return
    show(f"Wrote {written}.")
    if compared is None and not (folder / "comparison.json").is_file():
        show(
            "It has no rates, since no comparison was found. Make one with `safe-trainer compare … --output DIR` and "
            "name its comparison.json with --comparison."
        )
    if address is not None:
        show(f"Uploaded to {address}.")
