"""What a pool's namespaces are made of, for people. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_kvpool.keys import differing_fields
from vllm_kvpool.protocol import MAX_DESCRIPTION_BYTES


def describe(fields: Mapping[str, str]) -> str:
    """JSON for `doctor`; the longest values are cut until it fits."""
    longest = MAX_DESCRIPTION_BYTES
    while (
        len(text := json.dumps({k: v[:longest] for k, v in fields.items()}))
        >= MAX_DESCRIPTION_BYTES
    ):
        if longest == 0:
            return "{}"
        longest //= 2
    return text


def fields_of(description: str) -> dict[str, str]:
    """Back from `describe`; empty when it is none."""
    try:
        return dict(json.loads(description))
    except (TypeError, ValueError):
        return {}


def news(digest: bytes, description: str, known: Sequence[Mapping[str, Any]]) -> str:
    """What to log of a namespace beside those that `PoolOwner.namespaces` knows: empty when there
    is none yet, or it is one of them."""
    if not known or digest.hex() in {entry["digest"] for entry in known}:
        return ""
    others = [fields_of(str(entry["description"])) for entry in known]
    names = differing_fields(fields_of(description), others)
    what = ", ".join(map(ascii, names)) or "nothing that it tells"
    return (
        f"new namespace {digest.hex()[:16]}: its engine shares no block with the others here; it "
        f"differs from the closest of {len(known)} in {what}"
    )
