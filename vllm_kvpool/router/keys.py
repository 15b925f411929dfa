"""From a request's body and headers to what a policy knows of it. Pure, and never raises on odd shapes.

The prompt becomes one *canonical text* that grows at its end as a conversation does:

    model, cache salt | tools | messages, each as role and content

The *stable prefix* is its part up to the end of the leading system messages: the same for all
sessions of a task. Text blocks are cut and hashed along it. It need not be what the engine's chat
template makes of the body, only be equal where that is equal. A prompt given as token ids is taken
by its ids, four bytes each.

Which shape a body has is told by its fields, not by the path: `messages` (chat, tokenize), `prompt`
(completions, tokenize), `input` and `instructions` (responses, embeddings).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import Any

import msgspec

from vllm_kvpool.router.types import RouteRequest

TEXT_BLOCK_BYTES = 512
"""`TEXT_BLOCK_TOKENS` tokens or so. Half of it would cost twice the time and memory."""
BYTES_PER_TOKEN = 4
"""English text and code, by most tokenizers. The ledger learns the true ratio afterwards."""
TEXT_BLOCK_TOKENS = TEXT_BLOCK_BYTES // BYTES_PER_TOKEN
OPENING_BYTES = 1_024
"""What names the session of a prompt that has no messages."""
SESSION_HEADER = "X-Session-ID"
SESSION_COOKIE = "kvpool-session"
SESSION_FIELDS = ("prompt_cache_key", "conversation", "conversation_id", "session_id", "user")
"""Body fields that name a session, the most telling first: `user` may have several."""
SYSTEM_ROLES = ("system", "developer")

_encode = msgspec.json.Encoder(order="sorted").encode


def route_request(body: object, headers: Mapping[str, str]) -> RouteRequest:
    """`body` is parsed JSON of any shape; `headers` finds names in any case, as aiohttp's do.
    6 KB of chat cost about 40 us."""
    fields: Mapping[str, Any] = body if isinstance(body, dict) else {}
    model = _text(fields.get("model"))
    salt = b"%b\x00%b\x00" % (model, _text(fields.get("cache_salt")))
    tokens = _token_ids(fields)
    stable, rest, opening = _of_tokens(tokens) if tokens else _canonical(fields)
    session, source = _session(fields, headers, salt, stable + opening)
    text = b"".join((salt, stable, rest))
    stable_bytes = len(salt) + len(stable) if stable else 0
    return RouteRequest(
        model=model.decode("utf-8", "replace"),
        stable=_hash(b"stable\x00", salt, stable),
        session=session,
        session_source=source,
        blocks=tuple(_chain(text)),
        stable_tokens=stable_bytes // BYTES_PER_TOKEN,
        prompt_tokens=len(tokens) if tokens else len(text) // BYTES_PER_TOKEN,
        tokens=tokens,
    )


# canonical text -----------------------------------------------------------------------------------


def _canonical(fields: Mapping[str, Any]) -> tuple[bytes, bytes, bytes]:
    """Stable prefix, what follows it, and the opening: what of the latter names the session."""
    messages = fields.get("messages")
    if messages is None:
        messages = fields.get("input", fields.get("prompt"))
    tools = _json(fields["tools"]) if fields.get("tools") else b""
    if not isinstance(messages, list) or not any(isinstance(m, dict) for m in messages):
        stable = b"".join((tools, _text(fields.get("instructions"))))
        text = _text(messages)
        return stable, text, text[:OPENING_BYTES]
    leading = list(takewhile(_is_system, messages))
    turns = [_message(message) for message in messages[len(leading) :]]
    system = [_message(message) for message in leading]
    stable = b"".join((tools, _text(fields.get("instructions")), *system))
    return stable, b"".join(turns), turns[0] if turns else b""


def _is_system(message: object) -> bool:
    return isinstance(message, dict) and message.get("role") in SYSTEM_ROLES


def _message(message: object) -> bytes:
    if not isinstance(message, dict) or "role" not in message:
        return b"\x00" + _json(message)
    parts = [b"\x00", _text(message["role"]), b"\x00", *_contents(message.get("content"))]
    if message.get("tool_calls"):
        parts.append(_json(message["tool_calls"]))
    return b"".join(parts)


def _contents(content: object) -> Iterator[bytes]:
    """Text as it is. Of anything else its hash: an image's bytes are no measure of its tokens."""
    if not isinstance(content, list):
        yield _text(content)
        return
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if isinstance(text, str):
            yield _text(text)
        else:
            yield hashlib.blake2b(_json(part), digest_size=16).digest()


def _text(value: object) -> bytes:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    return b"" if value is None else _json(value)


def _json(value: object) -> bytes:
    """msgspec refuses lone surrogates, which JSON has room for; both give up on nesting without end."""
    for encode in (_encode, _repr):
        try:
            return encode(value)
        except (TypeError, ValueError, RecursionError):
            continue
    return b"unreadable"


def _repr(value: object) -> bytes:
    return repr(value).encode("utf-8", "backslashreplace")


def _token_ids(fields: Mapping[str, Any]) -> tuple[int, ...] | None:
    prompt = fields.get("prompt")
    if not isinstance(prompt, list) or not prompt or "messages" in fields:
        return None
    if all(type(token) is int and 0 <= token < 1 << 32 for token in prompt):
        return tuple(prompt)
    return None


def _of_tokens(tokens: tuple[int, ...]) -> tuple[bytes, bytes, bytes]:
    text = array("I", tokens).tobytes()
    return b"", text, text[:OPENING_BYTES]


# hashes -------------------------------------------------------------------------------------------


def _chain(text: bytes) -> Iterator[int]:
    hasher = hashlib.blake2b(digest_size=8)
    view = memoryview(text)
    from_bytes = int.from_bytes
    for end in range(TEXT_BLOCK_BYTES, len(text) + 1, TEXT_BLOCK_BYTES):
        hasher.update(view[end - TEXT_BLOCK_BYTES : end])
        yield from_bytes(hasher.digest(), "little")


def _hash(*parts: bytes) -> int:
    hasher = hashlib.blake2b(digest_size=8)
    for part in parts:
        hasher.update(part)
    return int.from_bytes(hasher.digest(), "little")


# session ------------------------------------------------------------------------------------------


def _session(
    fields: Mapping[str, Any], headers: Mapping[str, str], salt: bytes, opening: bytes
) -> tuple[int, str]:
    """The hash, and where it comes from. Named sessions of two models are two sessions."""
    name = headers.get(SESSION_HEADER)
    if name:
        return _hash(b"session\x00", salt, _text(name)), "header"
    name = _cookie(headers.get("Cookie", ""))
    if name:
        return _hash(b"session\x00", salt, _text(name)), "cookie"
    for field in SESSION_FIELDS:
        value = fields.get(field)
        if isinstance(value, dict):  # the responses API has {"conversation": {"id": ...}}
            value = value.get("id")
        if isinstance(value, str) and value:
            return _hash(b"session\x00", salt, _text(value)), field
    return _hash(b"opening\x00", salt, opening), "fingerprint"


def _cookie(header: str) -> str:
    for pair in header.split(";"):
        name, _, value = pair.strip().partition("=")
        if name == SESSION_COOKIE:
            return value
    return ""
