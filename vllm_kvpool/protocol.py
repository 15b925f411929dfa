"""The wire: one tagged MessagePack map per message, over ZeroMQ DEALER (client) and ROUTER
(daemon).

A request carries `id`, which its reply repeats, and `deadline_ms` on the *client's* monotonic clock
(the daemon learns the difference of the clocks from `Hello.now_ms`): past it the daemon answers
`Error(code="deadline")` and does nothing. The first message of a connection is `Hello`; everything
else before it gets `Error(code="hello")`, as does everything after a restart of the daemon.
`docs/protocol.md` describes each message for other languages.
"""

from __future__ import annotations

import msgspec

PROTOCOL_VERSION = 1
ACCEPTED_VERSIONS = (1,)
"""N and N-1; there is no version before the first."""

MAX_MESSAGE_BYTES = 4 << 20
MAX_KEYS = 65_536
MAX_TTL_S = 10 * 365 * 24 * 3600
MAX_DESCRIPTION_BYTES = 2_048
NO_CLIENT = -1


class Message(msgspec.Struct, tag_field="type", frozen=True, kw_only=True, omit_defaults=True):
    id: int = 0


class Request(Message, frozen=True, kw_only=True):
    deadline_ms: int = 0
    """0: no deadline."""


class Namespace(msgspec.Struct, frozen=True, kw_only=True):
    """Who may share blocks with whom: engines with the same `digest`."""

    digest: bytes
    slot_bytes: int
    fields: dict[str, str]
    """What went into the digest, for people: `doctor` and the log say which field differed."""


# requests -----------------------------------------------------------------------------------------


class Hello(Request, tag="hello", frozen=True, kw_only=True):
    """First message. An admin client (`stats`, `clear`) leaves `client_id` and `namespace` out."""

    version: int
    now_ms: int
    pid: int
    client_id: str = ""
    """32 lowercase hex digits, drawn once per engine. Leases and WRITING slots are its own as long
    as any process holds a shared flock on `clients/<client_id>.lock` in the pool's folder."""
    namespace: Namespace | None = None
    writing: bytes = b""
    """Slot references of stores in flight; the daemon frees all other WRITING slots of this
    client."""


class PrepareStore(Request, tag="prepare_store", frozen=True, kw_only=True):
    """Ask for slots for a chain of blocks (head first)."""

    keys: bytes
    parent: bytes = b""
    """Key of the block before the first; empty at the start of a chain."""
    ttl_s: int = 0
    pin: bool = False


class CompleteStore(Request, tag="complete_store", frozen=True, kw_only=True):
    """The bytes are there: make the blocks visible."""

    refs: bytes
    aborted: bytes = b""
    """Slots whose copy failed: give them back."""


class Touch(Request, tag="touch", frozen=True, kw_only=True):
    """A chain (head first) was used. No reply."""

    refs: bytes


class Drop(Request, tag="drop", frozen=True, kw_only=True):
    """These blocks hold wrong bytes: forget them. No reply."""

    refs: bytes


class Clear(Request, tag="clear", frozen=True, kw_only=True):
    """Forget all blocks that nobody leases."""

    namespace: bytes = b""
    """Digest; empty for all namespaces."""


class Stats(Request, tag="stats", frozen=True, kw_only=True):
    pass


# replies ------------------------------------------------------------------------------------------


class Welcome(Message, tag="welcome", frozen=True, kw_only=True):
    version: int
    pool_id: str
    epoch: int
    client: int = NO_CLIENT
    """Index of the client's lease bitmap; NO_CLIENT for an admin client."""


class Prepared(Message, tag="prepared", frozen=True, kw_only=True):
    """One slot reference a key: 0 = nothing to store (present already, or no room)."""

    refs: bytes


class Completed(Message, tag="completed", frozen=True, kw_only=True):
    ready: int


class Cleared(Message, tag="cleared", frozen=True, kw_only=True):
    blocks: int


class StatsReply(Message, tag="stats_reply", frozen=True, kw_only=True):
    pool: dict[str, int | str]
    counters: dict[str, int]
    namespaces: list[dict[str, int | str]]
    clients: list[dict[str, int | str]]


class Error(Message, tag="error", frozen=True, kw_only=True):
    """Codes: hello, version, malformed, too_large, deadline, lock, namespace, clients_full,
    internal."""

    code: str
    message: str


AnyRequest = Hello | PrepareStore | CompleteStore | Touch | Drop | Clear | Stats
AnyReply = Welcome | Prepared | Completed | Cleared | StatsReply | Error

encode = msgspec.msgpack.Encoder().encode
decode_request = msgspec.msgpack.Decoder(AnyRequest).decode
decode_reply = msgspec.msgpack.Decoder(AnyReply).decode
DECODE_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding raises for bytes that are no message of ours."""
