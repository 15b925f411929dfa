"""Blocks come before anybody asks for them."""

from __future__ import annotations

from collections.abc import Callable

from helpers import check_bytes, keys_of, namespace_of, run_cli, store
from hosts.conftest import Host, wait_listed

from vllm_kvpool.types import num_refs

MakeHost = Callable[..., Host]
DIGEST = namespace_of("a").digest.hex()


def prefetch(host: Host, *arguments: str, keys: str) -> tuple[int, str]:
    folder = host.daemon.shm_dir
    done = run_cli("prefetch", "--name", "test", "--shm-dir", folder, *arguments, input=keys)
    return done.returncode, done.stdout + done.stderr


def test_by_command(make_host: MakeHost) -> None:
    a, b = make_host(), make_host()
    keys = keys_of("chain", 30)
    store(a.client, keys)
    wait_listed(a, keys)
    assert b.client.connected  # an engine of the namespace has been there
    assert prefetch(b, DIGEST, keys=keys.hex()) == (0, "30 of 30 blocks are here\n")
    check_bytes(b.client, keys, b.client.match_prefix(keys))
    assert num_refs(b.client.match_prefix(keys)) == 30
    status, text = prefetch(b, DIGEST, keys=keys_of("other", 2).hex())
    assert (status, text) == (0, "0 of 2 blocks are here (absent)\n")


def test_refused(make_host: MakeHost) -> None:
    b = make_host()
    assert b.client.connected
    for arguments, keys, says in (
        (["ab" * 32], "ab" * 32, "no such namespace"),
        (["ab"], "ab" * 32, "64 hex digits"),
        ([DIGEST], "xyz", "64 hex digits"),
        ([DIGEST], "", "64 hex digits"),
    ):
        status, text = prefetch(b, *arguments, keys=keys)
        assert status != 0
        assert says in text
