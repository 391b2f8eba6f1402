"""Who may ask: requests are refused before anything reads them where host, origin, token or size are not right.

A page of another site that a person has open can send requests to this machine's own addresses; what it cannot do is
lie about its origin, or know the token.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "simdetr_token"
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_JSON_MB = 32
_POLICY = (
    b"default-src 'self'; img-src 'self' blob: data:; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'; "
    b"base-uri 'none'; form-action 'self'"
)
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"content-security-policy", _POLICY),
)


class TooLargeError(Exception):
    """A request's body goes over its limit."""


class Guard:
    """Middleware around the app.

    Args:
        app: What is guarded.
        token: What requests have to know, None if nothing.
        loopback: The app is to be reached under this machine's own names alone, so that a foreign name that somebody
            has let lead here is refused.
        max_upload_mb: Largest body of an upload.
    """

    def __init__(self, app: ASGIApp, token: str | None, loopback: bool, max_upload_mb: int) -> None:
        self.app, self.token, self.loopback = app, token, loopback
        self.max_upload_bytes = max_upload_mb << 20

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that is refused, or hand it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._host_or_origin(scope["method"], headers)
        if refusal is None and self.token is not None:
            query = scope["query_string"].decode("latin-1")
            given = dict(parse_qsl(query)).get("token")
            if scope["path"] == "/" and given is not None and self._knows([given]):
                await _remember(send, self.token, query, secure=scope["scheme"] == "https")
                return
            if not self._knows(_tokens(headers)):
                refusal = (
                    401,
                    "this address needs the token that `simdetr label` printed; open the address it printed",
                )
        limit = self._limit(headers)
        if refusal is None and _length(headers) > limit:
            refusal = (413, f"expected at most {limit >> 20} MB at once; send fewer files")
        if refusal is not None:
            await _answer(send, *refusal)
            return
        await self._hand_on(scope, receive, send, limit)

    def _host_or_origin(self, method: str, headers: dict[str, str]) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if self.loopback and _name(host) not in LOOPBACK_NAMES:
            return 403, f"host: expected a name of this machine such as 127.0.0.1, got {host!r}"
        if method in _SAFE:
            return None
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return 403, "origin: another site may not change anything here"
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return 403, "origin: another site may not change anything here"
        return None

    def _knows(self, given: Iterable[str]) -> bool:
        assert self.token is not None
        own = self.token.encode()
        return any(secrets.compare_digest(one.encode("utf-8", "replace"), own) for one in given)

    def _limit(self, headers: dict[str, str]) -> int:
        if headers.get("content-type", "").startswith("multipart/"):
            return self.max_upload_bytes
        return _JSON_MB << 20

    async def _hand_on(self, scope: Scope, receive: Receive, send: Send, limit: int) -> None:
        taken, begun, over = 0, False, False

        async def counted() -> Message:
            nonlocal taken, over
            message = await receive()
            taken += len(message.get("body", b""))
            over = taken > limit
            if over:
                raise TooLargeError
            return message

        async def with_headers(message: Message) -> None:
            nonlocal begun
            if over and not begun:  # what the app makes of half a body is nobody's concern
                return
            if message["type"] == "http.response.start":
                begun = True
                there = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(pair for pair in _HEADERS if pair[0] not in there)]
            await send(message)

        try:
            await self.app(scope, counted, with_headers)
        except TooLargeError:
            pass
        if over and not begun:
            await _answer(send, 413, f"expected at most {limit >> 20} MB at once; send fewer files")


def _name(host: str) -> str:
    """The name in a Host header, without the port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _length(headers: dict[str, str]) -> int:
    text = headers.get("content-length", "0")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0


def _tokens(headers: dict[str, str]) -> list[str]:
    found = []
    kind, _, value = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        found.append(value.strip())
    try:
        cookies = SimpleCookie(headers.get("cookie", ""))
    except CookieError:
        return found
    return [*found, *([cookies[COOKIE].value] if COOKIE in cookies else [])]


async def _remember(send: Send, token: str, query: str, *, secure: bool) -> None:
    """Set the cookie, and send the browser to the same page without the token in its address."""
    rest = urlencode([(name, value) for name, value in parse_qsl(query) if name != "token"])
    place = f"/?{rest}" if rest else "/"
    cookie = f"{COOKIE}={token}; Path=/; HttpOnly; SameSite=Strict{'; Secure' if secure else ''}"
    headers = [(b"location", place.encode()), (b"set-cookie", cookie.encode()), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": 303, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


async def _answer(send: Send, status: int, detail: str) -> None:
    body = json.dumps({"detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
