"""What the daemon answers: one request in, one reply (or none) out. No sockets here.

Nothing that comes in stops the daemon: what cannot be served is answered with an `Error` and
counted under the error's code (`error_<code>`).
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from vllm_kvpool import __version__, protocol
from vllm_kvpool._native import FORMAT_VERSION, PoolOwner
from vllm_kvpool.clock import now_ms, pool_time_ms, pool_time_s
from vllm_kvpool.liveness import is_held
from vllm_kvpool.pool.exchange import Exchange
from vllm_kvpool.pool.files import PoolFolder
from vllm_kvpool.pool.namespaces import describe, news
from vllm_kvpool.pool.prefault import Prefault
from vllm_kvpool.pool.requests import RefusedError, check_version, checked_keys, decode, id_of
from vllm_kvpool.pool.sessions import NO_NAMESPACE, Session, Sessions
from vllm_kvpool.protocol import (
    MAX_PULL_MS,
    MAX_TTL_S,
    NO_CLIENT,
    POOL_ID_BYTES,
    AnyReply,
    AnyRequest,
    CancelPull,
    Clear,
    Cleared,
    Completed,
    CompleteStore,
    Drop,
    Error,
    Hello,
    Namespace,
    Prefetch,
    Prepared,
    PrepareStore,
    Pull,
    Pulled,
    Stats,
    StatsReply,
    Touch,
    Welcome,
)
from vllm_kvpool.types import KEY_BYTES, REF_BYTES, num_keys

logger = logging.getLogger(__name__)

_CLIENT_ID = re.compile(r"[0-9a-f]{32}")


class PoolService:
    def __init__(
        self,
        owner: PoolOwner,
        folder: PoolFolder,
        prefault: Prefault,
        exchange: Exchange | None = None,
    ) -> None:
        self._owner = owner
        self._folder = folder
        self._prefault = prefault
        self._exchange = exchange
        self._started_ms = now_ms()
        self._sessions = Sessions()
        self.counters: Counter[str] = Counter()

    def handle(self, connection: bytes, payload: bytes) -> AnyReply | None:
        """The reply to one message. The only place where errors become replies."""
        self.counters["requests"] += 1
        request_id = 0
        try:
            request: AnyRequest = decode(payload, protocol.decode_request)
            request_id = request.id
            return self._answer(connection, request)
        except msgspec.DecodeError as error:
            return self._error(id_of(payload), "malformed", str(error))
        except RefusedError as error:
            return self._error(request_id or id_of(payload), error.code, str(error))
        except Exception as error:
            logger.exception("request failed")
            return self._error(request_id, "internal", f"{type(error).__name__}: {error}")

    def undelivered(self, connection: bytes, reply: AnyReply) -> None:
        """`reply` cannot reach its client: nobody will write to the slots it grants."""
        self.counters["replies_lost"] += 1
        session = self._sessions.get(connection)
        if session is not None and isinstance(reply, Prepared):
            self._owner.abort_store(session.client, reply.refs)

    def reap(self, grace_s: int) -> None:
        """Take back what dead clients held."""
        for client_id in self._owner.reap_clients(pool_time_s(), grace_s):
            logger.info("client %s is gone: its leases and unfinished stores are free", client_id)
            self._sessions.forget_client(client_id)

    def tidy(self) -> None:
        """Forget what has expired, and files of the dead."""
        self._owner.expire(pool_time_s())
        self._folder.sweep_locks()

    def _error(self, request_id: int, code: str, message: str) -> Error:
        self.counters[f"error_{code}"] += 1
        return Error(id=request_id, code=code, message=message)

    def _answer(self, connection: bytes, request: AnyRequest) -> AnyReply | None:
        if isinstance(request, Hello):
            return self._hello(connection, request)
        session = self._sessions.get(connection)
        if session is None:
            raise RefusedError("hello", "say hello first (the daemon may have been restarted)")
        if request.deadline_ms and now_ms() > request.deadline_ms + session.offset_ms:
            raise RefusedError("deadline", "too late: nothing was done")
        match request:
            case Stats():
                return self._stats(request)
            case Clear():
                blocks = self._owner.clear(self._namespace_index(request.namespace))
                return Cleared(id=request.id, blocks=blocks)
            case Prefetch():
                pull = Pull(id=request.id, keys=request.keys, within_ms=request.within_ms)
                return self._pull(connection, self._known(request.namespace), pull)
            case _:
                return self._answer_client(connection, session, request)

    def _answer_client(
        self,
        connection: bytes,
        session: Session,
        request: PrepareStore | CompleteStore | Touch | Drop | Pull | CancelPull,
    ) -> AnyReply | None:
        if session.client == NO_CLIENT:
            raise RefusedError("hello", "say hello with a client_id and a namespace for this")
        match request:
            case PrepareStore():
                return self._prepare(session, request)
            case CompleteStore():
                return self._complete(session.client, request)
            case Touch():
                self._owner.touch(_refs(request.refs))
            case Drop():
                self._owner.drop(_refs(request.refs))
            case Pull():
                return self._pull(connection, session.digest, request)
            case CancelPull() if self._exchange is not None:
                self._exchange.submit(connection, session.digest, 0, request)
        return None

    # hello --------------------------------------------------------------------------------------

    def _hello(self, connection: bytes, hello: Hello) -> Welcome:
        check_version(hello)
        if self._sessions.is_stale(hello.client_id, hello.now_ms):
            raise RefusedError("deadline", "a newer hello of this client was answered already")
        client, namespace = self._admit(hello) if hello.client_id else (NO_CLIENT, NO_NAMESPACE)
        offset_ms = now_ms() - hello.now_ms
        digest = hello.namespace.digest if hello.namespace is not None else b""
        session = Session(client, hello.client_id, hello.now_ms, offset_ms, namespace, digest)
        self._sessions.add(connection, session)
        return Welcome(
            id=hello.id,
            version=hello.version,
            pool_id=self._owner.pool_id,
            epoch=self._owner.epoch,
            client=client,
            pulls=self._exchange is not None and self._exchange.pulls,
        )

    def _admit(self, hello: Hello) -> tuple[int, int]:
        """Indices of the client and of its namespace, made when new."""
        if _CLIENT_ID.fullmatch(hello.client_id) is None or hello.namespace is None:
            raise RefusedError("malformed", "a client has an id of 32 hex digits and a namespace")
        if not 0 < hello.pid < 1 << 31:
            raise RefusedError("malformed", "pid is the number of a process")
        lock = self._folder.paths.client_lock(hello.client_id)
        _expect_held(lock)
        namespace = self._add_namespace(hello.namespace)
        try:
            client = self._owner.add_client(hello.client_id, str(lock), hello.pid, namespace)
        except (RuntimeError, OSError) as error:
            # No entry left in the table, or no memory left for a lease bitmap.
            raise RefusedError("clients_full", str(error)) from None
        self._owner.keep_writing(client, _refs(hello.writing))
        return client, namespace

    def _add_namespace(self, namespace: Namespace) -> int:
        if len(namespace.digest) != KEY_BYTES or not 0 < namespace.slot_bytes < 1 << 32:
            raise RefusedError("malformed", "a namespace has a digest of 32 bytes and a slot size")
        description = describe(namespace.fields)
        text = news(namespace.digest, description, self._owner.namespaces())
        try:
            index = self._owner.add_namespace(namespace.digest, namespace.slot_bytes, description)
        except ValueError as error:
            raise RefusedError("namespace", str(error)) from None
        if text:
            logger.info("%s", text)
        return index

    # verbs --------------------------------------------------------------------------------------

    def _prepare(self, session: Session, request: PrepareStore) -> Prepared:
        checked_keys(request.keys, request.parent)
        if not 0 <= request.ttl_s <= MAX_TTL_S:
            raise RefusedError("malformed", f"ttl_s lies between 0 and {MAX_TTL_S}")
        if request.source and len(request.source) != POOL_ID_BYTES:
            raise RefusedError("malformed", f"source has {POOL_ID_BYTES} bytes, or none")
        refs = self._owner.prepare_store(
            session.client,
            request.keys,
            request.parent,
            pool_time_s(),
            expiry_s=_expiry_s(request.ttl_s),
            pin=request.pin and self._may_pin(session.namespace, num_keys(request.keys)),
            source=request.source,
        )
        granted = refs.rstrip(b"\0")
        if granted and self._exchange is not None and self._exchange.offers is not None:
            blocks = -(-len(granted) // REF_BYTES)
            keys = request.keys[: blocks * KEY_BYTES]
            self._exchange.offers.stored(session.digest, request.parent, keys, request.source)
        return Prepared(id=request.id, refs=refs)

    def _may_pin(self, namespace: int, num_blocks: int) -> bool:
        """Whether half of the slots that the namespace has, or can still get, stay unpinned:
        requests ask for pins, and a pool of nothing else could store no more."""
        owner = self._owner
        spaces: list[dict[str, Any]] = owner.namespaces()
        entry = next(space for space in spaces if space["index"] == namespace)
        unassigned = owner.populated_slabs - sum(space["slabs"] for space in spaces)
        slot_bytes = max(entry["slot_bytes"], owner.min_slot_bytes)
        slots = (entry["slabs"] + max(0, unassigned)) * (owner.slab_bytes // slot_bytes)
        # Pins count once they are READY; what is being written may be pinned as well.
        if 2 * (entry["pinned"] + entry["writing"] + num_blocks) <= slots:
            return True
        self.counters["pin_refused"] += 1
        return False

    def _complete(self, client: int, request: CompleteStore) -> Completed:
        refs, aborted = _refs(request.refs), _refs(request.aborted)
        ready = self._owner.complete_store(client, refs)
        self._owner.abort_store(client, aborted)
        return Completed(id=request.id, ready=ready)

    def _known(self, digest: bytes) -> bytes:
        if not digest:
            raise RefusedError("malformed", "name the namespace that the keys are of")
        self._namespace_index(digest)
        return digest

    def _pull(self, connection: bytes, digest: bytes, request: Pull) -> Pulled | None:
        """None: the answer comes later, from the exchange."""
        checked_keys(request.keys, request.parent)
        if not 0 <= request.within_ms <= MAX_PULL_MS:
            raise RefusedError("malformed", f"within_ms lies between 0 and {MAX_PULL_MS}")
        if self._exchange is None:
            return Pulled(id=request.id, reason="off")
        due_ms = now_ms() + request.within_ms
        if not self._exchange.submit(connection, digest, due_ms, request):
            return Pulled(id=request.id, reason="busy")
        return None

    def _namespace_index(self, digest: bytes) -> int:
        if not digest:
            return -1
        for entry in self._owner.namespaces():
            if entry["digest"] == digest.hex():
                return int(str(entry["index"]))
        raise RefusedError("namespace", "no such namespace in this pool")

    def _counted(self) -> dict[str, int]:
        counted = self.counters.copy()
        if self._exchange is not None:
            counted.update(self._exchange.stats())  # and not `+`, which leaves zeros out
        return dict(counted)

    def _stats(self, request: Stats) -> StatsReply:
        owner = self._owner
        pool: dict[str, int | str] = {
            "name": self._folder.name,
            "pool_id": owner.pool_id,
            "epoch": owner.epoch,
            "size": owner.size,
            "slab_bytes": owner.slab_bytes,
            "num_slabs": owner.num_slabs,
            "populated_slabs": owner.populated_slabs,
            "prefault_error": self._prefault.failure,
            "min_slot_bytes": owner.min_slot_bytes,
            "pid": os.getpid(),
            "uptime_s": (now_ms() - self._started_ms) // 1_000,
            "package_version": __version__,
            "format_version": FORMAT_VERSION,
            "protocol_version": protocol.PROTOCOL_VERSION,
        }
        return StatsReply(
            id=request.id,
            pool=pool,
            counters=owner.stats() | self._counted(),
            namespaces=[_plain(entry) for entry in owner.namespaces()],
            clients=[_plain(entry) for entry in owner.clients()],
        )


def _expect_held(lock: Path) -> None:
    try:
        held = is_held(lock)
    except PermissionError:
        text = (
            f"the daemon may not open {lock.name} in clients/: run both as one user, or serve with "
            "--group-access and let the daemon's group read and write the file (mode 0660)"
        )
        raise RefusedError("lock", text) from None
    if not held:
        raise RefusedError("lock", f"hold a shared flock on {lock.name} in clients/ first")


def _expiry_s(ttl_s: int) -> int:
    """Never too early: the second that has begun does not count. 0: never."""
    return -(-pool_time_ms() // 1_000) + ttl_s if ttl_s else 0


def _refs(refs: bytes) -> bytes:
    if len(refs) % REF_BYTES:
        raise RefusedError("malformed", f"slot references have {REF_BYTES} bytes each")
    return refs


def _plain(entry: dict[str, Any]) -> dict[str, int | str]:
    return {key: value if isinstance(value, int) else str(value) for key, value in entry.items()}
