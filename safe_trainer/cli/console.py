"""What all commands share: how they end, and how they show progress and results."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

console = Console()
errors = Console(stderr=True)

_OWN_ERRORS: type[Exception] = typer.BadParameter.__mro__[-4]
"""The base of typer's own errors: `typer.TyperException` from 0.28 on, click's `ClickException` before."""
_TOKEN = re.compile(r"hf_\w{8,}")  # of the Hub; no message, a library's included, may show one

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for other programs.")]


class CommandGroup(TyperGroup):
    """Ends every command in order: one sentence and an exit code for what went wrong, the traceback with `--debug`."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        _quiet_libraries()
        try:
            return super().invoke(ctx)
        except (_OWN_ERRORS, typer.Exit, typer.Abort, BrokenPipeError):
            raise  # typer's own ways to end, with their own messages and exit codes
        except KeyboardInterrupt:
            errors.print("\nStopped by Ctrl-C. What was finished before is intact; run the command again to redo it.")
            raise typer.Exit(130) from None
        except Exception as error:
            if ctx.params.get("debug"):
                raise
            kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
            # As `Text`, since a message may hold square brackets, which rich would take for markup.
            text = _with_options(_TOKEN.sub("hf_…", f"{kind}{error}"), self.get_command(ctx, ctx.invoked_subcommand))
            errors.print(Text("Error: ", "bold red") + Text(text), soft_wrap=True)
            errors.print(f"For the traceback: safe-trainer --debug {ctx.invoked_subcommand} …", style="dim")
            raise typer.Exit(1) from error


def _with_options(text: str, command: Any) -> str:
    """Replace arguments of the library's functions in a message by the command's options."""
    for option in command.params if command is not None else ():
        if option.opts and option.opts[0].startswith("--"):
            text = text.replace(f"`{option.name}`", f"`{option.opts[0]}`")
            if option.name == "skip_bad":
                text = text.replace("`on_bad_row='skip'`", f"`{option.opts[0]}`")
    return text


def show(text: object) -> None:
    """Print a text on standard output as it is."""
    console.print(str(text), markup=False, soft_wrap=True)


def note(text: object) -> None:
    """Print a text on standard error as it is, next to the result."""
    errors.print(str(text), markup=False, highlight=False, soft_wrap=True)


def print_json(result: Any) -> None:
    """Print a result on one line of standard output, and nothing else."""
    typer.echo(json.dumps(result, ensure_ascii=False))


def misused(option: str, problem: str) -> typer.BadParameter:
    """Return the error, with exit code 2, for an option that was given something wrong."""
    return typer.BadParameter(problem, param_hint=f"'{option}'")


def pairs(listed: list[str] | None, option: str, example: str) -> list[tuple[str, str]]:
    """Read options of the form `NAME=VALUE`."""
    found = [item.partition("=") for item in listed or ()]
    for name, sign, value in found:
        if not (name and sign and value):
            raise misused(option, f"got {name + sign + value!r}, expected a form such as {example}.")
    return [(name, value) for name, _, value in found]


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[..., None]]:
    """Show a bar on a terminal while something runs, on standard error; in a log only the title."""
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), *Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    if not errors.is_terminal:
        errors.print(title)
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total, *_: bar.update(task, completed=done, total=total)


def _quiet_libraries() -> None:
    """Silence what users can do nothing about: progress bars in a log, and warnings meant for developers."""
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # that they lack kernels which are not needed here
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    if not errors.is_terminal:  # by variables, which need no library to be loaded, or where they are loaded already
        os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        if "datasets" in sys.modules:
            sys.modules["datasets"].disable_progress_bars()
        if "transformers.utils.logging" in sys.modules:
            sys.modules["transformers.utils.logging"].disable_progress_bar()
