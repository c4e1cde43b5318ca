"""What stands before every request: who asks, under which name, with which token, and how much he sends."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
from collections.abc import Iterable
from dataclasses import dataclass

from lorafit.infer.server.body import ApiError

OPEN_PATHS = ("/health",)  # says nothing but that the server lives
LOCAL_NAMES = ("localhost",)
TOO_LARGE = 413
BODY_SECONDS = 30.0  # for a body to arrive


@dataclass(frozen=True)
class Guard:
    """token: what requests must bring, None for nothing. local: only names of this machine may be asked by."""

    token: str | None
    local: bool
    max_body_bytes: int

    def check(self, path: str, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Raise ApiError for a request that may not go on. headers: names in lower case."""
        found = dict(headers)
        if self.local:
            _check_host(found.get(b"host", b"").decode("latin-1"))
        if self.token is not None and path not in OPEN_PATHS:
            _check_token(found.get(b"authorization", b""), self.token)
        length = found.get(b"content-length", b"0")
        if not length.isdigit():
            raise ApiError(400, "Content-Length is not a number", code="bad_request")
        if int(length[:20]) > self.max_body_bytes:
            raise self.too_large()

    def too_large(self) -> ApiError:
        """For a body beyond the limit."""
        return ApiError(TOO_LARGE, f"the body is larger than {self.max_body_bytes} bytes", code="body_too_large")


def check_json(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Raise ApiError unless the body is said to be JSON.

    A page in a browser may send a form or plain text anywhere unasked; JSON makes the browser ask first, and it gets no
    permission here.
    """
    kind = dict(headers).get(b"content-type", b"").split(b";")[0].strip().lower()
    if kind != b"application/json":
        raise ApiError(415, "send JSON, with the header Content-Type: application/json", code="not_json")


def _check_host(host: str) -> None:
    """A page of a foreign name that was made to mean this machine (DNS rebinding) still sends that name."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() and not host.endswith("]") else host
    if name.lower() in LOCAL_NAMES or _is_loopback(name.strip("[]")):
        return
    raise ApiError(403, "this server answers under localhost and its loopback address alone", code="wrong_host")


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _check_token(header: bytes, token: str) -> None:
    kind, _, given = header.partition(b" ")
    # Of equal length, and compared in a time that tells nothing.
    same = hmac.compare_digest(hashlib.sha256(given.strip()).digest(), hashlib.sha256(token.encode()).digest())
    if kind.lower() != b"bearer" or not same:
        raise ApiError(401, "a token is needed: Authorization: Bearer TOKEN", "authentication_error", "invalid_api_key")


def as_response(error: ApiError) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """(status, headers, body)."""
    body = json.dumps(error.body, ensure_ascii=False).encode(errors="replace")
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if error.status == 429:
        headers.append((b"retry-after", b"1"))
    if error.status in (408, TOO_LARGE):  # the rest of the body is not read
        headers.append((b"connection", b"close"))
    return error.status, headers, body
