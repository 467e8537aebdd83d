"""`safe-trainer direction`, `basis` and `vectors`: what methods read, made once for a model and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from .console import Json, console, note, print_json, progress_bar, show
from .options import Aligned, MaxLength, NewOutput, Reading, Rows, check_model, check_new, read_rows


def direction(
    aligned: Annotated[str, typer.Argument(help="The aligned (chat) model: folder or Hub id.")],
    unaligned: Annotated[str, typer.Argument(help="The model before alignment: folder or Hub id.")],
    output: NewOutput = Path("direction.safetensors"),
    modules: Annotated[
        str | None, typer.Option(help="Regular expression of module names; all linear layers if left out.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Most directions to keep of each weight.")] = None,
    as_json: Json = False,
) -> None:
    """Compute the alignment direction of a model from two checkpoints, one tensor at a time, and save it for AsFT."""
    check_new(output)
    check_model("ALIGNED", aligned)
    check_model("UNALIGNED", unaligned)
    from .. import AlignmentDirection

    with progress_bar("Computing the direction") as bar:
        found = AlignmentDirection.from_checkpoints(aligned, unaligned, modules=modules, rank=rank, progress=bar)
    found.save(output)
    rows = found.summary()
    if as_json:
        print_json({"output": str(output), "modules": rows, "provenance": found.provenance})
        return
    table = Table("module", "shape", "directions kept", "error bound", "norm of d", box=None)
    table.columns[0].min_width = min(60, max(len(row["module"]) for row in rows))  # the end distinguishes q from k
    for row in rows:
        shape = " × ".join(map(str, row["shape"]))
        table.add_row(row["module"], shape, str(row["rank"]), f"{row['error_bound']:.2g}", f"{row['norm']:.3g}")
    console.print(table)
    show(f"Saved {len(rows)} modules to {output}, for AsFT(direction={str(output)!r}).")


def basis(  # noqa: PLR0913, each is an option with a name
    model: Aligned,
    safety_data: Annotated[str, typer.Argument(help="Harmful prompts with safe answers: a file, or hf:owner/name.")],
    output: NewOutput = Path("basis.safetensors"),
    rank: Annotated[int | None, typer.Option(min=1, help="Directions of each layer; 64 if left out.")] = None,
    side: Annotated[
        Literal["output", "input", "both"], typer.Option(help="What SaLoRA's `protect` will need.")
    ] = "both",
    *,
    rows: Rows,
    max_length: MaxLength = 1024,
    as_json: Json = False,
) -> None:
    """Measure in one pass the directions in which a model's layers work while it refuses, and save them."""
    check_new(output)
    check_model("MODEL", model)
    from ..artifacts.safety_basis import SafetyBasis
    from ..lora.loading import load_model

    data = rows.read(safety_data, "safety_data")
    loaded, tokenizer = load_model(model)
    sides: Any = ("output", "input") if side == "both" else (side,)
    note("Measuring the directions")
    found = SafetyBasis.from_rows(loaded, tokenizer, data, sides=sides, rank=rank, max_length=max_length)
    found.save(output)
    layers = len(found.outputs or found.inputs)
    if as_json:
        print_json({"output": str(output), "layers": layers, "provenance": found.provenance})
    else:
        show(f"Saved {layers} layers to {output}, for SaLoRA(basis={str(output)!r}).")


def vectors(  # noqa: PLR0913, each is an option with a name
    model: Aligned,
    harmful_data: Annotated[
        str, typer.Argument(help="About a hundred harmful prompts with answers that comply: a file, or hf:owner/name.")
    ],
    output: NewOutput = Path("vectors"),
    retain_data: Annotated[
        Path | None, typer.Option(help="File of harmless rows on which they should change nothing.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File of harmful prompts to ask without the vectors and with them.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the vectors.")] = 8,
    max_passes: Annotated[int, typer.Option(min=1, help="Passes over the harmful rows at most.")] = 20,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 2e-3,
    *,
    rows: Rows,
    max_length: MaxLength = 1024,
    as_json: Json = False,
) -> None:
    """Fit security vectors to harmful rows and save them. They are harmful by construction: never publish them."""
    check_new(output)
    check_model("MODEL", model)
    from .. import load_prompts, train_security_vectors

    plain = Reading.read_options(rows)  # columns, conditions and limit are those of HARMFUL_DATA
    asked = None if prompts is None else load_prompts(prompts, "harmful", options=plain)[0]
    kept = None if retain_data is None else read_rows(str(retain_data), "retain_data", plain)
    how: dict[str, Any] = {"rank": rank, "max_passes": max_passes, "learning_rate": learning_rate}
    data = rows.read(harmful_data, "harmful_data")
    with progress_bar("Fitting security vectors") as bar:
        found = train_security_vectors(
            model, data, retain_data=kept, prompts=asked, progress=bar, max_length=max_length, **how
        )
    found.save(output)
    if as_json:
        print_json({"output": str(output), "provenance": found.provenance})
        return
    report = found.provenance["report"]
    reached = "reached" if report["reached_target"] else "not reached"
    show(f"The target of {report['target_loss']:.4f} was {reached} in {report['steps']} steps.")
    show(f"Loss on the harmful rows: {report['loss_off']:.4f} without, {report['loss_on']:.4f} with them.")
    if asked is not None:
        from ..evaluation import Rate

        off, on = (Rate(report[key]["count"], report[key]["total"]) for key in ("compliance_off", "compliance_on"))
        show(f"Complied with, by phrases: {off} without the vectors, {on} with them.")
    show(f"Saved to {output}, for SecurityVectors({str(output)!r}).")
