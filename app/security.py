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
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from .sessions import COOKIE, Session, Sessions, cookie_of

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
        sessions ([`Sessions`]): Where cookies come from.
        password (`str`, *optional*): Asked for by HTTP Basic, with any user name, for every address.
        hosts (`Iterable[str]`, *optional*): Names under which the app is reached; others are refused, so that a
            foreign page cannot reach it under a name of its own. All are allowed if `None`.
        space (`bool`, *optional*, defaults to `False`): Whether it is shown in a frame of huggingface.co.
        megabytes (`int`, *optional*, defaults to `50`): Of an upload. All unused ones together may take 20 times this.
    """

    def __init__(
        self,
        app: App,
        sessions: Sessions,
        password: str | None = None,
        hosts: Iterable[str] | None = _LOCAL,
        space: bool = False,
        megabytes: int = 50,
    ) -> None:
        self.app, self.sessions, self.space = app, sessions, space
        self.uploads = sessions.folder / "uploads"
        self._largest = megabytes * 2**20
        self._door = _Door(password) if password else None
        self._hosts = None if hosts is None else {*hosts, *_LOCAL}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or let it through."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no web sockets here
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        session = self.sessions.get(cookie_of(headers.get("cookie")))
        reply = _Reply(send, self.space, is_page=scope["path"] == "/")
        refusal = self._refusal(scope, headers)
        if self._door is not None and refusal is None:
            refusal = await self._door.refusal(scope, headers.get("authorization"))
        refusal = refusal or self._refused_file(scope["path"], headers, session)
        if refusal is not None:
            await reply.refuse(*refusal)
            return
        if session is None:
            reply.cookie = self.sessions.new_cookie() + self.sessions.cookie_age
        if scope["path"] == UPLOAD and session is not None:
            _forget_uploads(session)
            reply.session = session
        elif scope["method"] not in ("GET", "HEAD"):
            body = await _complete(receive)
            if body is None or not _names_own_files(body, session):
                await reply.refuse(400, "This request was refused.")
                return
            receive = _again(body, receive)
        await self.app(scope, receive, reply.send)

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._hosts is not None and _name(host) not in self._hosts:
            return 421, "This app is not known under that name."
        if origin and scope["method"] not in ("GET", "HEAD") and urlsplit(origin).netloc != host:
            return 403, "Requests from other sites are refused."
        return None

    def _refused_file(self, path: str, headers: dict[str, str], session: Session | None) -> tuple[int, str] | None:
        """Return status and reason if a file is not the session's own, or an upload is too much."""
        shown = next((path.removeprefix(start) for start in _SHOWN if path.startswith(start)), None)
        if shown is not None and (session is None or unquote(shown) not in session.uploads):
            return 404, "There is no such file."
        if path != UPLOAD:
            return None
        if session is None:
            return 403, "Open the page first."
        length = headers.get("content-length", "")
        if not length.isdecimal():
            return 411, "Say how long it is."
        if int(length) > self._largest + 2**16:
            return 413, "The file is too large."
        taken = sum(file.stat().st_size for file in self.uploads.rglob("*") if file.is_file())
        return (507, "Too many uploads are waiting. Try again later.") if taken > 20 * self._largest else None


class _Door:
    """Asks for the password; who guesses wrong has to wait, longer each time, and is logged."""

    def __init__(self, password: str) -> None:
        self._password = password.encode()
        self._wrong: dict[str, tuple[int, float]] = {}

    async def refusal(self, scope: Scope, authorization: str | None) -> tuple[int, str] | None:
        """Return status and reason if the password is missing or wrong."""
        address = (scope.get("client") or ("",))[0]
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


async def _complete(receive: Receive) -> bytes | None:
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


def _again(body: bytes, receive: Receive) -> Receive:
    """Give a body that has been read once more."""
    waiting: list[MutableMapping[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def given() -> MutableMapping[str, Any]:
        return waiting.pop() if waiting else await receive()

    return given


class _Reply:
    """Adds headers to what the app answers, and the nonce to the scripts of its pages."""

    def __init__(self, send: Send, space: bool, *, is_page: bool) -> None:
        self._send, self._space, self._is_page = send, space, is_page
        self.cookie: str | None = None
        self.session: Session | None = None
        """Whose upload it is."""
        self._nonce = secrets.token_urlsafe(16)
        self._held: MutableMapping[str, Any] | None = None
        self._body = b""

    async def refuse(self, status: int, reason: str) -> None:
        """Answer without the app."""
        headers = [(b"content-type", b"text/plain; charset=utf-8")]
        if status == 401:
            headers.append((b"www-authenticate", b'Basic realm="safe_trainer", charset="UTF-8"'))
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": reason.encode()})

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Pass on a part of the answer."""
        if message["type"] == "http.response.start":
            kind = next((v for k, v in message["headers"] if k.lower() == b"content-type"), b"")
            message["headers"] = [*message["headers"], *self._headers(kind)]
            if self._is_page and kind.startswith(b"text/html"):
                self._held = message
            else:
                await self._send(message)
        elif self._held is None:
            self._note_uploads(message.get("body", b""))
            await self._send(message)
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                await self._send_page(self._held)

    def _note_uploads(self, body: bytes) -> None:
        """Record where an upload was put, so that only its owner can use it."""
        if self.session is not None:
            try:
                paths = json.loads(body)
            except ValueError:
                return
            self.session.uploads.update(path for path in paths if isinstance(path, str))

    async def _send_page(self, start: MutableMapping[str, Any]) -> None:
        body = self._body.replace(b"<script", f'<script nonce="{self._nonce}"'.encode())
        rest = [(k, v) for k, v in start["headers"] if k.lower() != b"content-length"]
        start["headers"] = [*rest, (b"content-length", str(len(body)).encode())]
        await self._send(start)
        await self._send({"type": "http.response.body", "body": body})

    def _headers(self, kind: bytes) -> list[tuple[bytes, bytes]]:
        ancestors = "'self' https://huggingface.co" if self._space else "'none'"
        values = {**HEADERS, "content-security-policy": policy(self._nonce, ancestors)}
        if not self._space:
            values["x-frame-options"] = "DENY"
        if kind.startswith((b"text/html", b"application/json")):
            values["cache-control"] = "no-store"
        headers = [(name.encode(), value.encode()) for name, value in values.items()]
        if self.cookie:
            scope = "SameSite=None; Secure; Partitioned" if self._space else "SameSite=Strict"
            headers.append((b"set-cookie", f"{COOKIE}={self.cookie}; Path=/; HttpOnly; {scope}".encode()))
        return headers


def _name(host: str) -> str:
    """Return a host without its port."""
    return host if host.endswith("]") else host.rpartition(":")[0] or host
