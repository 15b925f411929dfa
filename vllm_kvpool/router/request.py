"""One request as it came in, whole."""

from __future__ import annotations

from vllm_kvpool.router.headers import Header


class Request:
    __slots__ = (
        "body",
        "chunks",
        "has_body",
        "headers",
        "http10",
        "keep_alive",
        "method",
        "target",
    )

    def __init__(self) -> None:
        self.method = b""
        self.target = b""
        """As sent: path and query, undecoded."""
        self.headers: list[Header] = []
        self.chunks: list[bytes] = []
        self.body = b""
        """Of `chunks`, when the last has come."""
        self.has_body = False
        """A length or chunks were announced, if of no bytes."""
        self.keep_alive = True
        self.http10 = False

    @property
    def path(self) -> bytes:
        return self.target.partition(b"?")[0]
