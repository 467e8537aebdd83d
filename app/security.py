"""What stands before everything: who may come in, which headers go out, and the session's cookie."""

from __future__ import annotations

import base64
import hmac
import ipaddress
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import urlsplit

from .bodies import Receive, again, only_uploads, whole
from .sessions import COOKIE, Sessions

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
}
UPLOAD = "/gradio_api/upload"
_LOCAL = ("127.0.0.1", "localhost", "[::1]")


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
    """

    def __init__(
        self,
        app: App,
        sessions: Sessions,
        password: str | None = None,
        hosts: Iterable[str] | None = _LOCAL,
        space: bool = False,
    ) -> None:
        self.app, self.sessions, self.space = app, sessions, space
        self.uploads = sessions.folder / "uploads"
        self._password = password.encode() if password else None
        self._hosts = None if hosts is None else {*hosts, *_LOCAL}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or let it through."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no web sockets here
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        reply = _Reply(send, self.space, is_page=scope["path"] == "/")
        refusal = self._refusal(scope, headers)
        if refusal:
            await reply.refuse(*refusal)
            return
        if not self.sessions.is_ours(cookie_of(headers.get("cookie"))):
            reply.cookie = self.sessions.new_cookie()
        if scope["method"] not in ("GET", "HEAD") and scope["path"] != UPLOAD:
            body = await whole(receive)
            if body is None or not only_uploads(body, self.uploads):
                await reply.refuse(400, "This request is not taken.")
                return
            receive = again(body, receive)
        await self.app(scope, receive, reply.send)

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if self._hosts is not None and _name(host) not in self._hosts:
            return 421, "This app is not known under that name."
        origin = headers.get("origin")
        if origin and scope["method"] not in ("GET", "HEAD") and urlsplit(origin).netloc != host:
            return 403, "Requests from other sites are not taken."
        if self._password is not None and not self._is_known(headers.get("authorization", "")):
            return 401, "A password is needed."
        return None

    def _is_known(self, authorization: str) -> bool:
        kind, _, value = authorization.partition(" ")
        try:
            given = base64.b64decode(value, validate=True).partition(b":")[2]
        except ValueError:
            return False
        assert self._password is not None  # otherwise nobody asks
        return kind.lower() == "basic" and hmac.compare_digest(given, self._password)


class _Reply:
    """Adds headers to what the app answers, and the nonce to the scripts of its pages."""

    def __init__(self, send: Send, space: bool, *, is_page: bool) -> None:
        self._send, self._space, self._is_page = send, space, is_page
        self.cookie: str | None = None
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
            await self._send(message)
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                await self._send_page(self._held)

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


def cookie_of(header: str | None) -> str | None:
    """Return the session's cookie of a request, if it has one."""
    try:
        found = SimpleCookie(header or "").get(COOKIE)
    except CookieError:
        return None
    return found.value if found else None


def _name(host: str) -> str:
    """Return a host without its port."""
    return host if host.endswith("]") else host.rpartition(":")[0] or host
