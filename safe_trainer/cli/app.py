"""`safe-trainer app`: the web interface on this machine."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from .console import misused, note, pairs

PASSWORD = "SAFE_TRAINER_PASSWORD"


def app(
    host: Annotated[
        str, typer.Option(help="Address to bind to; any but this machine's own needs a password.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port.")] = 7860,
    password_file: Annotated[
        Path | None, typer.Option(help=f"File with the password; or set {PASSWORD}.", exists=True, dir_okay=False)
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", help="A model on disk, as NAME=FOLDER; may be repeated.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Where to keep files; by default they are deleted at the end.", file_okay=False)
    ] = None,
    browser: Annotated[bool, typer.Option(help="Open the browser.")] = True,
) -> None:
    """Upload data, pick a method, train, and compare refusals before and after, in the browser."""
    models = dict(pairs(model, "--model", "mine=models/mine"))
    for name, path in models.items():
        if not Path(path).is_dir():
            raise misused("--model", f"there is no folder `{path}` for `{name}`.")
    password = password_file.read_text(encoding="utf-8").strip() if password_file else os.environ.get(PASSWORD)
    server = _server()

    def show_address(address: str) -> None:
        note(f"The app runs at {address}. Press Ctrl-C to stop it.")

    server.serve(host, port, password=password, models=models, folder=folder, browser=browser, on_ready=show_address)


def _server() -> ModuleType:
    """Return the app's server: of the app that was installed with this package, or of the checkout it is part of.

    The checkout's app is found by its path, since another package may have its name.
    """
    if find_spec("gradio") is None:
        raise ValueError("The app needs Gradio. In a checkout of safe_trainer, install it with: pip install '.[app]'")
    package = Path(__file__).parents[1]
    if (package / "app" / "server.py").is_file():
        return import_module("safe_trainer.app.server")
    checkout = package.parent
    if not ((checkout / "app" / "server.py").is_file() and (checkout / "pyproject.toml").is_file()):
        raise ValueError("This installation has no app. Install safe_trainer from a checkout or its wheel.")
    init = checkout / "app" / "__init__.py"
    if getattr(sys.modules.get("app"), "__file__", None) != str(init):
        for name in [name for name in sys.modules if name == "app" or name.startswith("app.")]:
            del sys.modules[name]
        spec = spec_from_file_location("app", init, submodule_search_locations=[str(init.parent)])
        assert spec is not None and spec.loader is not None  # the file is there
        sys.modules["app"] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules["app"])
    return import_module("app.server")
