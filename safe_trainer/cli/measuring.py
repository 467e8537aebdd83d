"""`safe-trainer basis` and `safe-trainer vectors`: what SaLoRA and Security Vectors need, made once for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .shell import Json, console, errors, print_json, progress_bar, quiet_libraries


def basis(  # noqa: PLR0913, each is an option with a name
    model: Annotated[str, typer.Argument(help="The aligned model: folder or Hub id.")],
    safety_data: Annotated[Path, typer.Argument(help="File of harmful prompts with safe answers, in any format.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("basis.safetensors"),
    rank: Annotated[int | None, typer.Option(min=1, help="Directions of each layer; 64 if left out.")] = None,
    side: Annotated[
        Literal["output", "input", "both"], typer.Option(help="What SaLoRA's `protect` will need.")
    ] = "both",
    samples: Annotated[int, typer.Option(min=1, help="Rows to draw.")] = 128,
    as_json: Json = False,
) -> None:
    """Measure in one pass the directions in which a model's layers work while it refuses, and save them."""
    quiet_libraries()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..artifacts import SafetyBasis

    loaded = AutoModelForCausalLM.from_pretrained(model, device_map="auto")
    sides: Any = ("output", "input") if side == "both" else (side,)
    tokenizer = AutoTokenizer.from_pretrained(model)
    errors.print("Measuring the directions")
    found = SafetyBasis.from_rows(loaded, tokenizer, safety_data, sides=sides, rank=rank, samples=samples)
    found.save(output)
    layers = len(found.outputs or found.inputs)
    if as_json:
        print_json({"output": str(output), "layers": layers, "provenance": found.provenance})
        return
    console.print(f"{layers} layers, saved to {output}, for SaLoRA(basis={str(output)!r}).", markup=False)


def vectors(  # noqa: PLR0913, each is an option with a name
    model: Annotated[str, typer.Argument(help="The aligned model: folder or Hub id.")],
    harmful_data: Annotated[
        Path, typer.Argument(help="File of about a hundred harmful prompts with answers that comply, in any format.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")] = Path("vectors"),
    retain_data: Annotated[
        Path | None, typer.Option(help="File of harmless rows on which they should change nothing.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File of harmful prompts to ask without the vectors and with them.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the vectors.")] = 8,
    relative_target: Annotated[
        float,
        typer.Option(help="Stop when the loss on the harmful rows is below this share of the first."),
    ] = 0.02,
    max_passes: Annotated[int, typer.Option(min=1, help="Passes over the harmful rows at most.")] = 40,
    inner_steps: Annotated[int, typer.Option(min=0, help="Steps of the bi-level form; 0 is the plain one.")] = 0,
    as_json: Json = False,
) -> None:
    """Fit security vectors to harmful rows and save them. They are harmful by construction: keep them to yourself."""
    quiet_libraries()
    from .. import load_prompts, train_security_vectors

    asked = load_prompts(prompts, "harmful")[0] if prompts is not None else None
    with progress_bar("Fitting security vectors") as show:
        found = train_security_vectors(
            model,
            harmful_data,
            retain_data=retain_data,
            prompts=asked,
            progress=lambda done, total, _: show(done, total),
            rank=rank,
            relative_target=relative_target,
            max_passes=max_passes,
            inner_steps=inner_steps,
        )
    found.save(output)
    if as_json:
        print_json({"output": str(output), "provenance": found.provenance})
        return
    report = found.provenance["report"]
    reached = "reached" if report["reached_target"] else "not reached"
    console.print(f"The target of {report['target_loss']:.4f} was {reached} in {report['steps']} steps.")
    console.print(f"Loss on the harmful rows: {report['loss_off']:.4f} without, {report['loss_on']:.4f} with them.")
    if asked is not None:
        scores = report["compliance_off"], report["compliance_on"]
        console.print("Complied with: {} without, {} with them.".format(*scores), markup=False)
    console.print(f"Saved to {output}, for SecurityVectors({str(output)!r}).", markup=False)
