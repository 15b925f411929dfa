"""Block keys: vLLM's chained block hashes, moved into a namespace.

    block key = vLLM block hash XOR SHA-256(namespace digest || group id || salt)

The hash already covers parents, tokens, LoRA adapter, multimodal ids and cache salt; the mask adds
what it lacks (model, layout, versions ...: see `connector.namespace`). XOR with a constant is a
bijection, so keys collide inside a namespace only where hashes do, and keys of two namespaces are
equal only where two SHA-256 values differ by exactly the XOR of two hashes. It costs microseconds
for thousands of blocks, which a hash a block would not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from vllm_kvpool._native import derive_keys
from vllm_kvpool.types import KEY_BYTES, BlockKeys


def namespace_digest(fields: Mapping[str, str]) -> bytes:
    """SHA-256 over names and values, each with its length, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(fields):
        for text in (name, fields[name]):
            raw = text.encode()
            digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.digest()


def differing_fields(ours: Mapping[str, str], others: Iterable[Mapping[str, str]]) -> list[str]:
    """Names of the fields in which the nearest of `others` differs from `ours`; empty when there is
    no other, or an equal one."""
    differences = [
        sorted(name for name in ours.keys() | other.keys() if ours.get(name) != other.get(name))
        for other in others
    ]
    return min(differences, key=len, default=[])


def key_mask(digest: bytes, group: int, salt: bytes = b"") -> bytes:
    """The constant that all keys of one KV cache group are masked with. Another `salt` hides all
    blocks stored before (see `SchedulerSide.reset_cache`)."""
    return hashlib.sha256(digest + group.to_bytes(8, "little") + salt).digest()


def block_keys(mask: bytes, hashes: Sequence[bytes]) -> BlockKeys:
    """Keys of `hashes` (a chain, at most 32 bytes each; shorter ones are padded with zeros)."""
    joined = b"".join(hashes)
    if len(joined) != len(hashes) * KEY_BYTES:
        joined = b"".join(block_hash.ljust(KEY_BYTES, b"\0") for block_hash in hashes)
    return BlockKeys(derive_keys(mask, joined))
