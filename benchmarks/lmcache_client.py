"""The client of lmcache_peer.py: LMCache's own worker and scheduler sides, without an engine.

    .venv-lmcache/bin/python benchmarks/lmcache_client.py SERVER_URL LOOKUPS

Stores a prefix of 2,048 blocks through LMCache's CPU path, looks it up LOOKUPS times and prints the
seconds of each as one line of JSON.
"""

import json
import random
import sys
import time

import torch
from lmcache.v1.multiprocess.custom_types import IPCCacheServerKey
from lmcache.v1.multiprocess.group_view import EngineGroupInfo
from lmcache.v1.multiprocess.transfer_context import create_transfer_context
from lmcache.v1.multiprocess.transport.base import RequestClient
from lmcache.v1.multiprocess.transport.factory import RequestClientFactory

PROMPT_BLOCKS, BLOCK_TOKENS, VOCABULARY = 2_048, 16, 128_256
WARMUP = 20
SEED = 7
TIMEOUT_S = 30.0
MODEL, WORLD_SIZE = "model", 1


def make_key(tokens: list[int], request_id: str, worker_id: int | None = None) -> IPCCacheServerKey:
    return IPCCacheServerKey(
        model_name=MODEL,
        world_size=WORLD_SIZE,
        worker_id=worker_id,
        token_ids=tuple(tokens),
        start=0,
        end=len(tokens),
        request_id=request_id,
        num_kv_readers=1,
    )


def store(server: RequestClient, tokens: list[int], blocks_in_chunk: int) -> None:
    """From a KV cache of one layer and one small head: how many bytes is not what is timed."""
    kv_caches = {"layer.0": torch.randn(2, PROMPT_BLOCKS + 1, BLOCK_TOKENS, 1, 8)}
    block_ids = [list(range(1, PROMPT_BLOCKS + 1))]  # 0 is LMCache's null block
    worker = create_transfer_context(kv_caches, instance_id=1, req_client=server)
    worker.register(
        kv_caches,
        MODEL,
        WORLD_SIZE,
        blocks_in_chunk,
        TIMEOUT_S,
        layout_hints={"kv_layout": "NHD"},
        engine_group_infos=[EngineGroupInfo(0, (0,), BLOCK_TOKENS)],
    )
    event = worker.create_recorded_event()
    key = make_key(tokens, "store", worker_id=0)
    stored = worker.submit_store("store", key, kv_caches, block_ids, event, blocks_in_chunk)
    if not stored.result(TIMEOUT_S):
        raise RuntimeError("LMCache did not store the prefix")
    server.end_session("store").result(TIMEOUT_S)


def lookup(server: RequestClient, tokens: list[int], request_id: str) -> tuple[int, float]:
    """How many chunks hit, and the seconds from a list of token ids to that number."""
    started = time.perf_counter()
    key = make_key(tokens, request_id)
    server.lookup(key, WORLD_SIZE).result(TIMEOUT_S)
    hit_chunks = None
    while hit_chunks is None:
        hit_chunks = server.query_prefetch_status(request_id).result(TIMEOUT_S)
    seconds = time.perf_counter() - started

    server.free_lookup_locks(key, WORLD_SIZE).result(TIMEOUT_S)
    server.end_session(request_id).result(TIMEOUT_S)
    return hit_chunks, seconds


def main() -> None:
    url, lookups = sys.argv[1], int(sys.argv[2])
    generator = random.Random(SEED)
    tokens = [generator.randrange(VOCABULARY) for _ in range(PROMPT_BLOCKS * BLOCK_TOKENS)]
    server = RequestClientFactory.create(url)
    chunk_tokens = server.get_chunk_size().result(TIMEOUT_S)

    store(server, tokens, chunk_tokens // BLOCK_TOKENS)
    results = [lookup(server, tokens, f"lookup-{i}") for i in range(WARMUP + lookups)]
    server.close()

    if any(hit_chunks * chunk_tokens != len(tokens) for hit_chunks, _ in results):
        raise RuntimeError("a lookup did not hit the whole prefix")
    print(json.dumps([seconds for _, seconds in results[WARMUP:]]))


if __name__ == "__main__":
    main()
