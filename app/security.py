"""Requests are checked first: who may connect, what they may send, and which headers are returned.

Gradio mounted into another app sends no such headers, opens files that were never uploaded, shows an upload to whoever
knows its path, and its login covers its own routes only and takes as many guesses as come.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import ipaddress
import json
import logging
import secrets
import shutil
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request
from fastapi.responses import PlainTextResponse
from starlette.datastructures import MutableHeaders

from .actions import Services
from .sessions import COOKIE, Session

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
}
UPLOAD = "/gradio_api/upload"
_SHOWN = ("/gradio_api/file=", "/gradio_api/file/")
_LOCAL = ("127.0.0.1", "localhost", "[::1]")
_READING = ("GET", "HEAD")
_LARGEST = 2**20  # bytes of a request other than an upload
_GUESSES = 5  # wrong passwords before an address has to wait
_LONGEST_WAIT = 60.0  # seconds


def policy(nonce: str, frame_ancestors: str) -> str:
    """Return the Content-Security-Policy of a page.

    Only scripts that bear the page's nonce run, and those of our own server: what users or models say cannot. Nothing
    is loaded from or sent to elsewhere, no pictures either. `unsafe-eval` is what Gradio compiles its templates with.
    """
    return "; ".join(
        (
            "default-src 'self'",
            f"script-src 'self' 'nonce-{nonce}' 'unsafe-eval'",
            "style-src 'self' 'unsafe-inline'",
            "img-src 'self' data: blob:",
            "font-src 'self' data:",
            "connect-src 'self'",
            "worker-src 'self' blob:",
            "object-src 'none'",
            "base-uri 'self'",
            "form-action 'self'",
            f"frame-ancestors {frame_ancestors}",
        )
    )


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    """ASGI middleware around the whole app.

    Args:
        app (`Callable`): The app.
        services ([`Services`]): Whose sessions, folder of uploads and limits count; all unused uploads together may
            take 20 times the largest. On a Space it is shown in a frame of huggingface.co.
        password (`str`, *optional*): Asked for by HTTP Basic, with any user name, for every address.
        hosts (`Iterable[str]`, *optional*): Names under which the app is reached; others are refused, so that a
            foreign page cannot reach it under a name of its own. All are allowed if `None`.
    """

    def __init__(
        self,
        app: App,
        services: Services,
        password: str | None = None,
        hosts: Iterable[str] | None = (),
    ) -> None:
        self.app, self.sessions, self.uploads = app, services.sessions, services.uploads
        self.space = services.setup.space
        self._largest = services.setup.limits.megabytes * 2**20
        self._door = _Door(password) if password else None
        self._hosts = None if hosts is None else {*hosts, *_LOCAL}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or let it through."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no web sockets here
        request = Request(scope, receive)
        session = self.sessions.get(request.cookies.get(COOKIE))
        reply = _Reply(send, self.space)
        refusal = self._refusal(request)
        if self._door is not None and refusal is None:
            refusal = await self._door.refusal(request)
        refusal = refusal or self._refused_file(request, session)
        if refusal is None and request.method not in _READING and scope["path"] != UPLOAD:
            body = await request.body()
            receive = _again(body, receive)
            if not _names_own_files(body, session):
                refusal = 400, "This request was refused."
        if refusal is not None:
            asked = {"www-authenticate": 'Basic realm="safe_trainer", charset="UTF-8"'} if refusal[0] == 401 else None
            await PlainTextResponse(refusal[1], refusal[0], asked)(scope, receive, reply.send)
            return
        if session is None:
            reply.cookie = self.sessions.new_cookie() + self.sessions.cookie_age
        if scope["path"] == "/":
            reply.change = reply.with_nonce
        if scope["path"] == UPLOAD and session is not None:
            _forget_uploads(session)
            reply.change = partial(_noted, session)
        await self.app(scope, receive, reply.send)

    def _refusal(self, request: Request) -> tuple[int, str] | None:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if self._hosts is not None and _name(host) not in self._hosts:
            return 421, "This app is not known under that name."
        if origin and request.method not in _READING and urlsplit(origin).netloc != host:
            return 403, "Requests from other sites are refused."
        return None

    def _refused_file(self, request: Request, session: Session | None) -> tuple[int, str] | None:
        """Return status and reason if a file is not the session's own, or what is sent is too much."""
        path, length = request.scope["path"], request.headers.get("content-length", "")
        shown = next((path.removeprefix(start) for start in _SHOWN if path.startswith(start)), None)
        if shown is not None and (session is None or shown not in session.uploads):
            return 404, "There is no such file."
        if request.method in _READING:
            return None
        if path == UPLOAD and session is None:
            return 403, "Open the page first."
        if not length.isdecimal():
            return 411, "Say how long it is."
        if path != UPLOAD:
            return (400, "This request was refused.") if int(length) > _LARGEST else None
        if int(length) > self._largest + 2**16:
            return 413, "The file is too large."
        taken = sum(file.stat().st_size for file in self.uploads.rglob("*") if file.is_file())
        return (507, "Too many uploads are waiting. Try again later.") if taken > 20 * self._largest else None


class _Door:
    """Asks for the password; who guesses wrong has to wait, longer each time, and is logged."""

    def __init__(self, password: str) -> None:
        self._password = password.encode()
        self._wrong: dict[str, tuple[int, float]] = {}

    async def refusal(self, request: Request) -> tuple[int, str] | None:
        """Return status and reason if the password is missing or wrong."""
        address, authorization = request.client.host if request.client else "", request.headers.get("authorization")
        count, until = self._wrong.get(address, (0, 0.0))
        if time.monotonic() < until:
            return 429, "Too many wrong passwords. Wait a minute and try again."
        if authorization is None:
            return 401, "A password is needed."
        if self._is_known(authorization):
            self._wrong.pop(address, None)
            return None
        count += 1
        wait = min(_LONGEST_WAIT, 2.0 ** (count - _GUESSES)) if count >= _GUESSES else 0.0
        self._wrong[address] = (count, time.monotonic() + wait)
        while len(self._wrong) > 10_000:
            self._wrong.pop(next(iter(self._wrong)))
        logger.warning("Wrong password from %s (%d in a row).", address, count)
        await asyncio.sleep(0.5)
        return 401, "The password is wrong."

    def _is_known(self, authorization: str) -> bool:
        kind, _, value = authorization.partition(" ")
        try:
            given = base64.b64decode(value, validate=True).partition(b":")[2]
        except ValueError:
            return False
        return kind.lower() == "basic" and hmac.compare_digest(given, self._password)


def _names_own_files(body: bytes, session: Session | None) -> bool:
    """Return whether a request is JSON that names no file but unused uploads of its own session."""
    try:
        waiting = [json.loads(body)] if body else []
    except (ValueError, RecursionError):
        return False
    own = session.uploads if session is not None else set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()
            path = value.get("path")
            if path is not None and not (isinstance(path, str) and path in own):
                return False
    return True


def _forget_uploads(session: Session) -> None:
    """Remove what a session has uploaded and not used: it holds one upload at a time."""
    for path in session.uploads:
        shutil.rmtree(Path(path).parent, ignore_errors=True)
    session.uploads.clear()


def _noted(session: Session, body: bytes) -> bytes:
    """Record where an upload was put, so that only its owner can use it."""
    with suppress(ValueError):
        session.uploads.update(path for path in json.loads(body) if isinstance(path, str))
    return body


def _again(body: bytes, receive: Receive) -> Receive:
    """Give a body that has been read once more."""
    waiting: list[MutableMapping[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def given() -> MutableMapping[str, Any]:
        return waiting.pop() if waiting else await receive()

    return given


class _Reply:
    """Adds headers to what the app answers, and the nonce to the scripts of its pages."""

    def __init__(self, send: Send, space: bool) -> None:
        self._send, self._space = send, space
        self.cookie: str | None = None
        self.change: Callable[[bytes], bytes] | None = None
        """What the whole body goes through before it is sent."""
        self._nonce = secrets.token_urlsafe(16)
        self._held: MutableMapping[str, Any] = {}
        self._body = b""

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Pass on a part of the answer."""
        if message["type"] == "http.response.start":
            self._add_headers(MutableHeaders(scope=message))
            self._held = message
        if self.change is None:
            await self._send(message)
        elif message["type"] == "http.response.body":
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                body = self.change(self._body)
                MutableHeaders(scope=self._held)["content-length"] = str(len(body))
                await self._send(self._held)
                await self._send({"type": "http.response.body", "body": body})

    def with_nonce(self, page: bytes) -> bytes:
        """Let the scripts of a page run."""
        return page.replace(b"<script", f'<script nonce="{self._nonce}"'.encode())

    def _add_headers(self, headers: MutableHeaders) -> None:
        ancestors = "'self' https://huggingface.co" if self._space else "'none'"
        headers.update({**HEADERS, "content-security-policy": policy(self._nonce, ancestors)})
        if not self._space:
            headers["x-frame-options"] = "DENY"
        if headers.get("content-type", "").startswith(("text/html", "application/json")):
            headers["cache-control"] = "no-store"
        if self.cookie:
            scope = "SameSite=None; Secure; Partitioned" if self._space else "SameSite=Strict"
            headers.append("set-cookie", f"{COOKIE}={self.cookie}; Path=/; HttpOnly; {scope}")


def _name(host: str) -> str:
    """Return a host without its port."""
    return host if host.endswith("]") else host.rpartition(":")[0] or host
