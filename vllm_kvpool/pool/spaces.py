"""The pool as other hosts see it: one ordinary client for each namespace that blocks are sent from
or received into.

The exchange is a client like an engine: it finds and leases blocks in shared memory, and asks the
daemon's loop for slots over its socket. So one thread alone changes the pool, whatever dies is taken
back in the same way, and the next daemon finds nothing new.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_kvpool._native import MAX_NAMESPACES, PoolView
from vllm_kvpool.client import PoolClient
from vllm_kvpool.paths import PoolPaths
from vllm_kvpool.pool.anchors import grain_of
from vllm_kvpool.pool.namespaces import fields_of
from vllm_kvpool.pool.requests import RefusedError
from vllm_kvpool.protocol import Namespace

IDLE_MS = 30_000
"""A client keeps others from taking the slabs of its namespace: none stays for longer than this
without work."""
STORE_TIMEOUT_MS = 5_000


@dataclass(slots=True)
class Space:
    namespace: Namespace
    grain: int
    """Of the directory's entries: see `anchors`."""
    client: PoolClient
    made_ms: int
    used_ms: int

    @property
    def digest(self) -> bytes:
        return self.namespace.digest

    @property
    def slot_bytes(self) -> int:
        return self.namespace.slot_bytes


class Spaces:
    def __init__(self, paths: PoolPaths) -> None:
        self._paths = paths
        self._view = PoolView.open(str(paths.pool))
        self._spaces: dict[bytes, Space] = {}

    def get(self, digest: bytes, now_ms: int) -> Space | None:
        """None: the pool does not know that namespace."""
        space = self._spaces.get(digest) or self._make(digest, now_ms)
        if space is not None:
            space.used_ms = now_ms
        return space

    def open(self, namespace: Namespace, now_ms: int) -> Space:
        """The pool shall know it from now on. RefusedError: it knows another of that name, or has no
        place for it."""
        space = self.get(namespace.digest, now_ms)
        if space is None:
            self._check_new(namespace)
            space = self._add(namespace, now_ms)
        if space.slot_bytes != namespace.slot_bytes:
            text = f"blocks of this namespace have {space.slot_bytes} bytes here"
            raise RefusedError("namespace", text)
        return space

    def _check_new(self, namespace: Namespace) -> None:
        info: Any = self._view.info()
        if not 0 < namespace.slot_bytes <= info["slab_bytes"]:
            text = f"a block has {info['slab_bytes']} bytes here at most: use a larger pool"
            raise RefusedError("namespace", text)
        if len(self._spaces) >= MAX_NAMESPACES:
            raise RefusedError("busy", f"{MAX_NAMESPACES} namespaces are in use")

    def _make(self, digest: bytes, now_ms: int) -> Space | None:
        info: Any = self._view.info()
        for entry in info["namespaces"]:
            if entry["digest"] == digest.hex():
                fields = fields_of(entry["description"])
                slot_bytes = entry["slot_bytes"]
                namespace = Namespace(digest=digest, slot_bytes=slot_bytes, fields=fields)
                return self._add(namespace, now_ms)
        return None

    def _add(self, namespace: Namespace, now_ms: int) -> Space:
        client = PoolClient(self._paths.folder, namespace, timeout_ms=STORE_TIMEOUT_MS)
        space = Space(namespace, grain_of(namespace.fields), client, now_ms, now_ms)
        self._spaces[namespace.digest] = space
        return space

    def all(self) -> list[Space]:
        return list(self._spaces.values())

    def close_idle(self, now_ms: int) -> None:
        for space in self.all():
            client = space.client
            held = client.writing or (client.view is not None and client.view.leased_slots)
            if now_ms - space.used_ms > IDLE_MS and not held:
                client.close()
                del self._spaces[space.digest]

    def close(self) -> None:
        for space in self._spaces.values():
            space.client.close()
        self._spaces.clear()
