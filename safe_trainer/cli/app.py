"""`safe-trainer app`: the web interface on this machine."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from .shell import errors, pairs

PASSWORD = "SAFE_TRAINER_PASSWORD"  # noqa: S105, the name of a variable


def app(
    host: Annotated[str, typer.Option(help="Address to bind to; any but this machine's own needs a password.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port.")] = 7860,
    password_file: Annotated[
        Path | None,
        typer.Option(help=f"File with the password; or set {PASSWORD}.", exists=True, dir_okay=False),
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", help="A model on disk, as NAME=FOLDER; may be repeated.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Where to keep files; by default they go when the app ends.", file_okay=False)
    ] = None,
    browser: Annotated[bool, typer.Option(help="Open the browser.")] = True,
) -> None:
    """Upload data, pick a method, train, and compare refusals before and after, in the browser."""
    models = dict(pairs(model or [], "--model", "mine=models/mine"))
    for name, path in models.items():
        if not Path(path).is_dir():
            raise typer.BadParameter(f"there is no folder `{path}` for `{name}`.", param_hint="'--model'")
    password = password_file.read_text(encoding="utf-8").strip() if password_file else os.environ.get(PASSWORD)
    server = _server()

    def say(address: str) -> None:
        errors.print(f"The app is at {address} until Ctrl-C.", soft_wrap=True)

    server.serve(host, port, password=password, models=models, folder=folder, browser=browser, on_ready=say)


def _server() -> ModuleType:
    """Find the app: in the installed package, or beside it in a checkout."""
    if find_spec("gradio") is None:
        raise ValueError("The app needs Gradio. Install it with: pip install 'safe-trainer[app]'")
    for name in ("safe_trainer.app", "app"):
        if find_spec(name) is not None:
            return import_module(f"{name}.server")
    raise ValueError("The app is not part of this installation. Install safe-trainer from its wheel or a checkout.")
