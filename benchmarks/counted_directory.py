"""The directory of many hosts in one process, and what Redis would have to do for it.

Which blocks are listed, and which of them are asked for, the real code says (`anchors`, `asked`), and the times and
sizes are its constants. Modelled here: everybody sees an entry at once, and none is lost or expires.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vllm_kvpool.pool.anchors import anchors, asked, grain_of
from vllm_kvpool.pool.announcer import REFRESH_MS
from vllm_kvpool.pool.daemon import HOUSEKEEPING_MS
from vllm_kvpool.pool.directory import BATCH, CACHE_S

REFRESH_S = REFRESH_MS / 1_000
TELL_S = HOUSEKEEPING_MS / 1_000
"""A daemon tells of changes so often."""


@dataclass(slots=True)
class Traffic:
    """Sums over all hosts. A write is SADD and EXPIRE, or SREM; a read is SMEMBERS."""

    lookups: int = 0
    lookup_trips: int = 0
    """Those that the local cache did not answer."""
    keys_read: int = 0
    ids_read: int = 0
    """Hosts in the answers."""
    added: int = 0
    removed: int = 0
    write_trips: int = 0
    renewed: int = 0
    """Entries that were there already: they would have expired."""
    renew_trips: int = 0


class CountedDirectory:
    def __init__(self, num_hosts: int, block_tokens: int) -> None:
        self.traffic = Traffic()
        self._grain = grain_of({"block_tokens": str(block_tokens)})
        self._holders: dict[bytes, int] = {}
        """Block to the bits of its holders; never 0."""
        self._known: list[dict[bytes, float]] = [{} for _ in range(num_hosts)]
        """Of each host, until when it believes what it has read last."""

    # writes ---------------------------------------------------------------------------------------

    def announce(self, host: int, ready: bytes, gone: bytes, spread_s: float) -> None:
        """Blocks that come and go in the course of `spread_s`."""
        bit = 1 << host
        here = [key for _, key in anchors(ready, self._grain)]
        left = [key for _, key in anchors(gone, self._grain)]
        for key in left:
            holders = self._holders.get(key, 0) & ~bit
            if holders:
                self._holders[key] = holders
            else:
                self._holders.pop(key, None)
        for key in here:
            self._holders[key] = self._holders.get(key, 0) | bit
        entries = len(here) + len(left)
        self.traffic.added += len(here)
        self.traffic.removed += len(left)
        self.traffic.write_trips += min(entries, max(-(-entries // BATCH), int(spread_s / TELL_S)))

    def renew(self, num_blocks: int) -> None:
        """A host tells of all its blocks again."""
        entries = num_blocks // self._grain
        self.traffic.renewed += entries
        self.traffic.renew_trips += -(-entries // BATCH)

    # reads ----------------------------------------------------------------------------------------

    def look_up(self, host: int, keys: bytes, now_s: float) -> Iterator[tuple[int, int]]:
        """(bits of hosts, blocks of `keys` up to the last entry that they have), the most first."""
        entries = asked(keys, self._grain)
        self._count(host, entries, now_s)
        rest = ~(1 << host)
        for place, key in reversed(entries):
            holders = self._holders.get(key, 0) & rest
            if holders:
                yield holders, place + 1
                rest &= ~holders

    def _count(self, host: int, entries: list[tuple[int, bytes]], now_s: float) -> None:
        known = self._known[host]
        if known and min(known.values()) <= now_s:
            known = {key: until_s for key, until_s in known.items() if until_s > now_s}
            self._known[host] = known
        fetched = [key for _, key in entries if key not in known]
        known.update(dict.fromkeys(fetched, now_s + CACHE_S))
        self.traffic.lookups += 1
        self.traffic.lookup_trips += bool(fetched)
        self.traffic.keys_read += len(fetched)
        self.traffic.ids_read += sum(self._holders.get(key, 0).bit_count() for key in fetched)

    # what there is --------------------------------------------------------------------------------

    @property
    def entries(self) -> int:
        """Keys in Redis."""
        return len(self._holders)

    @property
    def copies(self) -> int:
        """Hosts in all of them."""
        return sum(holders.bit_count() for holders in self._holders.values())
