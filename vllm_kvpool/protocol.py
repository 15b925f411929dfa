"""The wire: one tagged MessagePack map per message, over ZeroMQ DEALER (client) and ROUTER
(daemon).

A request carries `id`, which its reply repeats, and `deadline_ms` on the *client's* monotonic clock
(the daemon learns the difference of the clocks from `Hello.now_ms`): past it the daemon answers
`Error(code="deadline")` and does nothing. The first message of a connection is `Hello`; everything
else before it gets `Error(code="hello")`, as does everything after a restart of the daemon.
`docs/protocol.md` describes each message for other languages.

Two doors: engines of the host say what `AnyRequest` lists, other hosts say what `AnyPeerRequest`
lists. Only `Blocks` has frames behind it: the bytes themselves, in either direction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

PROTOCOL_VERSION = 1
ACCEPTED_VERSIONS = (1,)
"""N and N-1; there is no version before the first."""

MAX_MESSAGE_BYTES = 4 << 20
MAX_KEYS = 65_536
MAX_FRAME_BYTES = 1 << 20
"""Of block bytes; a block larger than that travels in several frames."""
MAX_FRAMES = 256
"""In one message."""
POOL_ID_BYTES = 16
MAX_TTL_S = 10 * 365 * 24 * 3600
MAX_PULL_MS = 60_000
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
    source: bytes = b""
    """Id of the host that they come from and that has them too, which makes them its copies; empty:
    made here."""


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


class Pull(Request, tag="pull", frozen=True, kw_only=True):
    """Bring a chain's missing tail here from another host, if that is done `within_ms`."""

    keys: bytes
    parent: bytes = b""
    """Key of the block before the first; empty at the start of a chain."""
    within_ms: int


class CancelPull(Request, tag="cancel_pull", frozen=True, kw_only=True):
    """Nobody waits for the pull with this id any more. No reply."""


class Prefetch(Request, tag="prefetch", frozen=True, kw_only=True):
    """Bring a chain here from another host before anybody asks for it. From admin clients, too."""

    namespace: bytes
    """Digest."""
    keys: bytes
    within_ms: int


class Clear(Request, tag="clear", frozen=True, kw_only=True):
    """Forget all blocks that nobody leases."""

    namespace: bytes = b""
    """Digest; empty for all namespaces."""


class Stats(Request, tag="stats", frozen=True, kw_only=True):
    pass


# requests of other hosts --------------------------------------------------------------------------


class MatchBlocks(Request, tag="match_blocks", frozen=True, kw_only=True):
    """How many leading blocks of a chain are READY?"""

    namespace: bytes
    """Digest."""
    keys: bytes


class ReadBlocks(Request, tag="read_blocks", frozen=True, kw_only=True):
    """Send these blocks: several `Blocks`, up to the first that is not there."""

    namespace: bytes
    """Digest."""
    keys: bytes


class CancelRead(Request, tag="cancel_read", frozen=True, kw_only=True):
    """Nobody waits for the `ReadBlocks` with this id any more: end it now, if it has not ended. No
    reply of its own."""


class WriteBlocks(Request, tag="write_blocks", frozen=True, kw_only=True):
    """Store these blocks of a chain, of at most 16 MiB: `Wanted` says which to send, as `Blocks` with
    the same id; `Written` is the end of it."""

    namespace: Namespace
    keys: bytes
    parent: bytes = b""
    """Key of the block before the first; empty at the start of a chain."""


# replies ------------------------------------------------------------------------------------------


class Welcome(Message, tag="welcome", frozen=True, kw_only=True):
    version: int
    pool_id: str
    epoch: int
    client: int = NO_CLIENT
    """Index of the client's lease bitmap; NO_CLIENT for an admin client."""
    pulls: bool = False
    """Whether `Pull` can find anything: there is a directory of other hosts, or an upstream."""
    writes: bool = False
    """To other hosts: whether `WriteBlocks` is known here."""


class Prepared(Message, tag="prepared", frozen=True, kw_only=True):
    """One slot reference a key: 0 = nothing to store (present already, or no room)."""

    refs: bytes


class Completed(Message, tag="completed", frozen=True, kw_only=True):
    ready: int


class Pulled(Message, tag="pulled", frozen=True, kw_only=True):
    """The end of a pull."""

    blocks: int = 0
    """Leading blocks of its keys that are READY here now."""
    reason: str = ""
    """Why not all: absent, slow, deadline, no_room, lost, checksum, busy, off."""


class Matched(Message, tag="matched", frozen=True, kw_only=True):
    blocks: int = 0
    slot_bytes: int = 0
    """Bytes of one block; 0: the namespace is not known here."""


class Blocks(Message, tag="blocks", frozen=True, kw_only=True):
    """Whole blocks in chain order, one frame each, or one piece of a block larger than a frame."""

    first: int = 0
    """Place of the first block in the request's keys."""
    offset: int = 0
    """Of the piece in its block, in bytes."""
    sums: bytes = b""
    """CRC-32C of each frame behind this one, n x 4 bytes, little-endian."""
    last: bool = False
    """Nothing follows: what has not come is not there."""


class Wanted(Message, tag="wanted", frozen=True, kw_only=True):
    """There are slots for these blocks of a `WriteBlocks`: send them."""

    places: bytes
    """One byte a key: 1 = send it."""


class Written(Message, tag="written", frozen=True, kw_only=True):
    """The end of a `WriteBlocks`."""

    blocks: int = 0
    """How many became READY. Those that were there before do not count."""
    reason: str = ""
    """Why not all: no_room, no_parent, checksum, malformed, deadline."""


class Cleared(Message, tag="cleared", frozen=True, kw_only=True):
    blocks: int


class StatsReply(Message, tag="stats_reply", frozen=True, kw_only=True):
    pool: dict[str, int | str]
    counters: dict[str, int]
    namespaces: list[dict[str, int | str]]
    clients: list[dict[str, int | str]]


class Error(Message, tag="error", frozen=True, kw_only=True):
    """Codes: hello, version, malformed, too_large, deadline, lock, namespace, clients_full, forbidden,
    busy, internal."""

    code: str
    message: str


AnyRequest = (
    Hello
    | PrepareStore
    | CompleteStore
    | Touch
    | Drop
    | Pull
    | CancelPull
    | Prefetch
    | Clear
    | Stats
)
AnyReply = (
    Welcome
    | Prepared
    | Completed
    | Pulled
    | Cleared
    | StatsReply
    | Matched
    | Blocks
    | Wanted
    | Written
    | Error
)
AnyPeerRequest = Hello | MatchBlocks | ReadBlocks | CancelRead | WriteBlocks | Blocks

encode = msgspec.msgpack.Encoder().encode


def decoder(kind: Any) -> Callable[[bytes | memoryview], Any]:
    """msgspec.DecodeError for whatever is wrong with a message."""
    decode = msgspec.msgpack.Decoder(kind).decode

    def checked(raw: bytes | memoryview) -> Any:
        try:
            return decode(raw)
        except (UnicodeDecodeError, RecursionError) as error:  # not made so by msgspec
            raise msgspec.DecodeError(str(error)) from None

    return checked


decode_request = decoder(AnyRequest)
decode_peer_request = decoder(AnyPeerRequest)
decode_reply = decoder(AnyReply)
