"""What a request may hold: small JSON that names no file but uploaded ones."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

_LARGEST = 2**20  # bytes of a request other than an upload


def only_uploads(body: bytes, uploads: Path) -> bool:
    """Tell whether a request names no file but uploaded ones.

    Gradio opens the files that a request names, and where it is mounted into another app it does not look whether they
    were uploaded.

    Args:
        body (`bytes`): The request's.
        uploads (`Path`): Where uploaded files are.
    """
    if not body:
        return True
    try:
        waiting = [json.loads(body)]
    except (ValueError, RecursionError):
        return False
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()
            path = value.get("path")
            if path is not None and not (isinstance(path, str) and _is_within(path, uploads)):
                return False
    return True


def _is_within(path: str, folder: Path) -> bool:
    try:
        return Path(path).is_absolute() and Path(path).resolve().is_relative_to(folder)
    except (OSError, ValueError):
        return False


async def whole(receive: Receive) -> bytes | None:
    """Return the body of a request, or `None` if it is too large or breaks off."""
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if len(body) > _LARGEST:
            return None
        if not message.get("more_body"):
            return body


def again(body: bytes, receive: Receive) -> Receive:
    """Give a body that has been read once more."""
    waiting: list[MutableMapping[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def given() -> MutableMapping[str, Any]:
        return waiting.pop() if waiting else await receive()

    return given
