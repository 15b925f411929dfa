"""HTTP/1.1 heads: what is passed on, what concerns one connection only, and how heads are written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

Header = tuple[bytes, bytes]

HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"upgrade",
    )
)
"""RFC 9110, 7.6.1. `transfer-encoding` is not here: response bodies are passed on as they are framed."""
RANK_HEADER = b"x-data-parallel-rank"
_NOT_TO_ENGINES = HOP_BY_HOP | {b"host", b"content-length", b"transfer-encoding", b"expect"}


class RequestHeaders(Mapping[str, str]):
    """A request's headers by name in any case; of equal names the first."""

    def __init__(self, headers: list[Header]) -> None:
        self._headers = headers

    def __getitem__(self, name: str) -> str:
        wanted = name.lower().encode("latin-1")
        for key, value in self._headers:
            if len(key) == len(wanted) and key.lower() == wanted:
                return value.decode("latin-1")
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (name.decode("latin-1") for name, _ in self._headers)

    def __len__(self) -> int:
        return len(self._headers)


def named_by_connection(headers: Iterable[Header]) -> frozenset[bytes]:
    """What `Connection:` names beside its own words is for one connection as well."""
    names: set[bytes] = set()
    for name, value in headers:
        if len(name) == 10 and name.lower() == b"connection":
            names |= {option.strip().lower() for option in value.split(b",")}
    return frozenset(names - {b"close", b"keep-alive"})


def request_head(
    method: bytes, target: bytes, host: bytes, headers: list[Header], body_bytes: int | None
) -> bytearray:
    """Up to the blank line, which `finish` adds. `body_bytes` None: the request had no body at all."""
    head = bytearray(b"%b %b HTTP/1.1\r\nhost: %b\r\n" % (method, target, host))
    left_out = _NOT_TO_ENGINES | named_by_connection(headers)
    for name, value in headers:
        if name.lower() not in left_out:
            head += b"%b: %b\r\n" % (name, value)
    if body_bytes is not None:
        head += b"content-length: %d\r\n" % body_bytes
    return head


def for_rank(head: bytearray, headers: list[Header], rank: int | None) -> bytes:
    """The finished head for one data-parallel rank. Where the replica has none, a client's choice
    of a rank is left alone."""
    if rank is None:
        return bytes(head) + b"\r\n"
    if any(name.lower() == RANK_HEADER for name, _ in headers):
        lines = bytes(head).split(b"\r\n")
        kept = [line for line in lines if not line.lower().startswith(RANK_HEADER + b":")]
        head = bytearray(b"\r\n".join(kept))
    return b"%b%b: %d\r\n\r\n" % (bytes(head), RANK_HEADER, rank)


def response_head(
    status: int, reason: bytes, headers: list[Header], added: bytes, *, keep_chunked: bool
) -> bytes:
    """A replica's head for the client. `added`: whole lines."""
    head = bytearray(b"HTTP/1.1 %d %b\r\n" % (status, reason))
    left_out = HOP_BY_HOP | named_by_connection(headers)
    if not keep_chunked:
        left_out |= {b"transfer-encoding"}
    for name, value in headers:
        if name.lower() not in left_out:
            head += b"%b: %b\r\n" % (name, value)
    return bytes(head) + added + b"\r\n"
