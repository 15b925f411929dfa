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
_NOT_CHUNKED = HOP_BY_HOP | {b"transfer-encoding"}
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
    names: frozenset[bytes] = frozenset()
    for name, value in headers:
        if len(name) == 10 and name.lower() == b"connection":
            names |= {option.strip().lower() for option in value.split(b",")}
    return names and names - {b"close", b"keep-alive"}


def request_head(
    method: bytes, target: bytes, host: bytes, headers: list[Header], body_bytes: int | None
) -> bytes:
    """Up to the blank line, which `for_rank` adds. `body_bytes` None: there was no body at all."""
    parts = [method, b" ", target, b" HTTP/1.1\r\nhost: ", host, b"\r\n"]
    _add_lines(parts, headers, _NOT_TO_ENGINES)
    if body_bytes is not None:
        parts.append(b"content-length: %d\r\n" % body_bytes)
    return b"".join(parts)


def _add_lines(parts: list[bytes], headers: list[Header], left_out: frozenset[bytes]) -> None:
    named = named_by_connection(headers)
    if named:
        left_out |= named
    for name, value in headers:
        if name.lower() not in left_out:
            parts += (name, b": ", value, b"\r\n")


def for_rank(head: bytes, headers: list[Header], rank: int | None) -> bytes:
    """The finished head for one data-parallel rank. Where the replica has none, a client's choice
    of a rank is left alone."""
    if rank is None:
        return head + b"\r\n"
    if any(name.lower() == RANK_HEADER for name, _ in headers):
        lines = head.split(b"\r\n")
        kept = [line for line in lines if not line.lower().startswith(RANK_HEADER + b":")]
        head = b"\r\n".join(kept)
    return b"%b%b: %d\r\n\r\n" % (head, RANK_HEADER, rank)


def response_head(
    status: int, reason: bytes, headers: list[Header], added: bytes, *, keep_chunked: bool
) -> bytes:
    """A replica's head for the client. `added`: whole lines."""
    parts = [b"HTTP/1.1 %d " % status, reason, b"\r\n"]
    _add_lines(parts, headers, HOP_BY_HOP if keep_chunked else _NOT_CHUNKED)
    parts += (added, b"\r\n")
    return b"".join(parts)
