"""Per-request hints: `kv_transfer_params: {"kvpool": {"load": false, "store": false, ...}}`.

Strict, yet never fatal: an unknown hint, or one with a wrong value, is an error in the log and is
ignored; the others count.
"""

from __future__ import annotations

import logging
import reprlib
import time
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from vllm_kvpool.protocol import MAX_TTL_S

logger = logging.getLogger(__name__)

HINTS_KEY = "kvpool"
REPEAT_S = 60.0
"""The same mistake is in the log once in so long: clients repeat themselves with every request."""


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
_SWITCH = "give true or false"
WANTED = {
    "load": _SWITCH,
    "store": _SWITCH,
    "ttl_s": f"give whole seconds, at least 1 and at most {MAX_TTL_S}",
    "pin": _SWITCH,
}


class HintReader:
    def __init__(self) -> None:
        self._next_s: dict[str, float] = {}
        """When to speak of a mistake again; there is one kind a hint, and two more."""

    def read(self, request_id: str, kv_transfer_params: Mapping[str, Any] | None) -> Hints:
        if not kv_transfer_params or HINTS_KEY not in kv_transfer_params:
            return NO_HINTS
        given = kv_transfer_params[HINTS_KEY]
        try:
            return msgspec.convert(given, Hints)
        except msgspec.ValidationError:
            return self._read_what_is_right(request_id, given)

    def _read_what_is_right(self, request_id: str, given: Any) -> Hints:
        if not isinstance(given, Mapping):
            self._complain("", request_id, f"hints = {_short(given)}: give a mapping of hints")
            return NO_HINTS
        right = {name: value for name, value in given.items() if _is_right(name, value)}
        for name in [name for name in given if name not in right]:
            fix = WANTED.get(name) or f"unknown hint; known are {', '.join(WANTED)}"
            mistake = name if name in WANTED else "unknown"
            self._complain(mistake, request_id, f"{_short(name)} = {_short(given[name])}: {fix}")
        return msgspec.convert(right, Hints)

    def _complain(self, mistake: str, request_id: str, text: str) -> None:
        now = time.monotonic()
        if now >= self._next_s.get(mistake, 0.0):
            self._next_s[mistake] = now + REPEAT_S
            logger.error(
                "KV pool: ignored in request %s: %s. (Not said again for %d s, whoever does it.)",
                request_id, text, REPEAT_S,
            )  # fmt: skip


def _is_right(name: Any, value: Any) -> bool:
    try:
        msgspec.convert({name: value}, Hints)
    except msgspec.ValidationError:
        return False
    return True


def _short(value: object) -> str:
    """Requests come from anywhere: whatever they hold is one short line in the log."""
    return reprlib.repr(value)
