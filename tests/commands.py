"""The command line, called from tests."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from safe_trainer.cli import app


def invoke(*arguments: object, **environment: str) -> Any:
    """Run a command on a terminal so wide that no message is broken within a path, whose length no test can know."""
    wide = {"COLUMNS": "400", "TERM": "dumb", **environment}
    return CliRunner(env=wide).invoke(app, [str(argument) for argument in arguments], prog_name="safe-trainer")
