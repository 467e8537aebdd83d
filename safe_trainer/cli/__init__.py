"""The command `safe-trainer`: one function a command, heavy imports inside, so that `--help` answers at once.

Exit codes: 0 done, 1 failed, 2 used wrongly, 3 a gate was not passed, 130 stopped by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

from typing import Annotated

import typer

from .analysis import drift, scan
from .app import app as serve_app
from .artifacts import basis, direction, vectors
from .compare import compare, evaluate
from .console import CommandGroup
from .demo import demo, testbed_app
from .options import with_groups
from .publish import apply_safe_lora, card, export
from .review import review
from .train import train

__all__ = ["app"]

app = typer.Typer(
    cls=CommandGroup,
    name="safe-trainer",
    help="Fine-tune an aligned chat model without fine-tuning its safety away, and see what changed.",
    epilog="Compare any adapter with its base: safe-trainer compare BASE --adapter DIR. Offline: safe-trainer demo",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_show_locals=False,  # locals may hold prompts, paths and tokens
)
_COMMANDS = (
    (compare, "compare Qwen/Qwen2.5-0.5B-Instruct --adapter out"),
    (train, "train recipes/testbed/asft.yaml --set training.max_steps=50"),
    (demo, "demo --quick --methods asft"),
    (evaluate, "evaluate Qwen/Qwen2.5-0.5B-Instruct --prompts harmful=asked.csv"),
    (review, "review report"),
    (direction, "direction Qwen/Qwen2.5-0.5B-Instruct Qwen/Qwen2.5-0.5B -o direction.safetensors"),
    (basis, "basis Qwen/Qwen2.5-0.5B-Instruct refusals.jsonl -o basis.safetensors"),
    (vectors, "vectors Qwen/Qwen2.5-0.5B-Instruct harmful.jsonl -o vectors"),
    (scan, "scan Qwen/Qwen2.5-0.5B-Instruct rows.jsonl --vectors vectors --clean clean.jsonl"),
    (drift, "drift Qwen/Qwen2.5-0.5B-Instruct out --direction direction.safetensors --refusal"),
    (export, "export out --output merged --dtype bfloat16"),
    (apply_safe_lora, "apply-safe-lora out --unaligned Qwen/Qwen2.5-0.5B -o repaired"),
    (card, "card out --push me/my-model --private"),
    (serve_app, "app --model mine=models/mine"),
)
for _command, _example in _COMMANDS:
    app.command(_command.__name__.replace("_", "-"), epilog=f"Example: safe-trainer {_example}")(with_groups(_command))
app.add_typer(testbed_app, name="testbed")


def _show_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"safe-trainer {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of every command; their help says what they do."""
