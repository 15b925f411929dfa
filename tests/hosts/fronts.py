"""What tests ask of pools in front of another host's, and of that one."""

from __future__ import annotations

from helpers import check_bytes, until
from hosts.conftest import Host

from vllm_kvpool.types import KEY_BYTES, BlockKeys, num_refs

COUNT = 200


def wait_pushed(front: Host, blocks: int) -> None:
    until(lambda: front.counter("pushed_blocks") >= blocks, "the push")


def check_has(host: Host, keys: BlockKeys) -> None:
    """All of the chain, byte by byte."""
    refs = host.client.match_prefix(keys)
    assert num_refs(refs) == len(keys) // KEY_BYTES
    check_bytes(host.client, keys, refs)


def check_nothing_half_done(host: Host) -> None:
    until(lambda: host.counter("writing") == 0, "unfinished slots to be free")


def wait_there(host: Host, keys: BlockKeys) -> None:
    """Until it has all of the chain, byte by byte."""
    count = len(keys) // KEY_BYTES
    until(lambda: num_refs(host.client.match_prefix(keys)) == count, "all blocks", timeout_s=60)
    check_has(host, keys)
