"""`safe-trainer card`: a model card with what was measured, and the way to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .shell import Json, console, print_json, quiet_libraries


def card(  # noqa: PLR0913, each is an option with a name
    folder: Annotated[Path, typer.Argument(help="Folder of a fine-tuned adapter or model.", exists=True)],
    comparison: Annotated[
        Path | None,
        typer.Option(help="comparison.json of a report about it; left out, the one in the folder.", exists=True),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What the comparison calls it; left out, the last model in it.")
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
    """Write a model card with rates before and after, recipe and citations. Text of your own in it stays."""
    quiet_libraries()
    from ..evaluation import from_json
    from ..recipe.model_card import publish, write_model_card

    compared = from_json(comparison.read_text(encoding="utf-8")) if comparison is not None else None
    written = write_model_card(folder, compared, name=name, base_model=base_model, repository=push)
    address = publish(folder, push, private=private) if push is not None else None
    if as_json:
        print_json({"card": str(written), "uploaded": address})
        return
    console.print(f"The card is {written}.", markup=False, soft_wrap=True)
    if compared is None and not (folder / "comparison.json").is_file():
        console.print(
            "It has no rates, since no comparison was found. Make one with `safe-trainer compare … --output DIR` and "
            "name its comparison.json with --comparison.",
            markup=False,
        )
    if address is not None:
        console.print(f"Uploaded to {address}.", markup=False, soft_wrap=True)
