"""Answers of the router itself, in the shape that OpenAI clients expect of errors."""

from __future__ import annotations

from http import HTTPStatus

import msgspec

JSON = b"application/json"
TEXT = b"text/plain; charset=utf-8"


def respond(
    status: int, body: bytes, content_type: bytes = JSON, *, added: bytes = b"", close: bool = False
) -> bytes:
    """A whole response. `added`: further header lines."""
    if close:
        added += b"connection: close\r\n"
    return b"HTTP/1.1 %d %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n%b\r\n%b" % (
        status,
        HTTPStatus(status).phrase.encode(),
        content_type,
        len(body),
        added,
        body,
    )


def error_body(status: int, message: str) -> bytes:
    kind = HTTPStatus(status).name.lower()
    return msgspec.json.encode({"error": {"message": message, "type": kind, "code": status}})
