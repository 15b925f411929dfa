"""Per-request hints: `kv_transfer_params: {"kvpool": {"load": false, "store": false, ...}}`.

Strict, yet never fatal: an unknown key or a value of the wrong type is an error in the log, and the
request runs as if it had given no hint.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from vllm_kvpool.protocol import MAX_TTL_S

logger = logging.getLogger(__name__)

HINTS_KEY = "kvpool"


class Hints(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    load: bool = True
    """Whether the request may take blocks out of the pool."""
    store: bool = True
    """Whether its blocks go into the pool."""
    ttl_s: Annotated[int, msgspec.Meta(ge=1, le=MAX_TTL_S)] | None = None
    """Its blocks expire so many seconds after they were stored."""
    pin: bool = False
    """Its blocks are not evicted until they expire (never, without `ttl_s`)."""


NO_HINTS = Hints()


def parse_hints(request_id: str, kv_transfer_params: Mapping[str, Any] | None) -> Hints:
    if not kv_transfer_params or HINTS_KEY not in kv_transfer_params:
        return NO_HINTS
    try:
        return msgspec.convert(kv_transfer_params[HINTS_KEY], Hints)
    except msgspec.ValidationError as error:
        logger.error(
            "KV pool: hints of request %s are ignored: %s (known: load, store, pin: true or false; "
            "ttl_s: seconds)", request_id, error,
        )  # fmt: skip
        return NO_HINTS
