"""A fake engine in a process of its own: `fake_engine.py FOLDER NAMESPACE`, commands on stdin.

prepare SEED COUNT    get slots and leave them WRITING: how many
complete              complete what was prepared: how many
store SEED COUNT      both
match SEED COUNT      length of the hit
lease SEED COUNT      lease the hit and keep it: how many
release               release all
connected             whether stores are taken
churn SEED SECONDS    store and load chains that all engines share, at random; checks the bytes of
every hit
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

from helpers import check_bytes, connect, keys_of, prepare, store, write_blocks

from vllm_kvpool.ledger import StoreGrant
from vllm_kvpool.paths import PoolPaths
from vllm_kvpool.types import BlockKeys, SlotRefs, num_refs, pack_refs, unpack_refs, without_none


class FakeEngine:
    def __init__(self, folder: Path, namespace: str) -> None:
        self.client = connect(PoolPaths(folder), namespace)
        self.granted = StoreGrant(0, SlotRefs(b""))
        self.leased = SlotRefs(b"")

    def prepare(self, seed: str, count: int) -> int:
        keys = keys_of(seed, count)
        self.granted = prepare(self.client, keys)
        return num_refs(write_blocks(self.client, keys, self.granted.refs or b""))

    def complete(self, _seed: str, _count: int) -> int:
        self.client.complete_store(self.granted.request_id)
        return num_refs(without_none(self.granted.refs or b""))

    def store(self, seed: str, count: int) -> int:
        return num_refs(store(self.client, keys_of(seed, count)))

    def match(self, seed: str, count: int) -> int:
        return num_refs(self.client.match_prefix(keys_of(seed, count)))

    def lease(self, seed: str, count: int) -> int:
        keys = keys_of(seed, count)
        refs = self.client.match_prefix(keys)
        assert self.client.lease(refs) == refs
        check_bytes(self.client, keys, refs)
        self.leased = SlotRefs(self.leased + refs)
        return num_refs(refs)

    def release(self, _seed: str, _count: int) -> int:
        self.client.release(self.leased)
        self.leased = SlotRefs(b"")
        return 0

    def connected(self, _seed: str, _count: int) -> bool:
        self.client.poll()
        return self.client.connected

    def churn(self, seed: str, seconds: int) -> dict[str, int]:
        draw = random.Random(seed)
        done = Counter[str]()
        asked: dict[int, BlockKeys] = {}
        give_up = time.monotonic() + seconds
        while time.monotonic() < give_up:
            for grant in self.client.poll():
                self._finish(asked.pop(grant.request_id), grant, draw, done)
            keys = keys_of(f"shared {draw.randrange(30)}", draw.randint(1, 40))
            done["hits"] += self._load(keys)
            number = self.client.prepare_store(keys)
            if number is None:
                time.sleep(0.01)
            else:
                asked[number] = keys
        self.client.poll()
        return dict(done)

    def _load(self, keys: BlockKeys) -> int:
        refs = self.client.match_prefix(keys)
        leased = self.client.lease(refs)
        if leased == refs:
            check_bytes(self.client, keys, refs)
        self.client.touch(refs)
        if leased:
            self.client.release(leased)
        return num_refs(leased)

    def _finish(
        self, keys: BlockKeys, grant: StoreGrant, draw: random.Random, done: Counter[str]
    ) -> None:
        done[grant.reason or "granted"] += 1
        if grant.refs is None:
            return
        granted = unpack_refs(write_blocks(self.client, keys, grant.refs))
        cut = draw.randint(0, len(granted)) if draw.random() < 0.1 else len(granted)
        done["stored"] += cut
        self.client.complete_store(grant.request_id, aborted=pack_refs(granted[cut:]))


def main() -> None:
    engine = FakeEngine(Path(sys.argv[1]), sys.argv[2])
    print(json.dumps("connected"), flush=True)
    for line in sys.stdin:
        verb, *rest = line.split()
        seed, count = (rest[0], int(rest[1])) if len(rest) == 2 else ("", 0)
        print(json.dumps(getattr(engine, verb)(seed, count)), flush=True)


if __name__ == "__main__":
    main()
