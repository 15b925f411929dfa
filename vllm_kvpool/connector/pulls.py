"""Blocks of other hosts, scheduler side: ask the daemon to bring them, and put the request off (not
the step) until they are here or are not worth waiting for.

A request that is put off can meet one that waits for its load in a way that neither survives: vLLM
(up to 0.29) may queue it ahead of the loaded one, whose blocks it then waits for, for ever. So

    who has been put off goes on only in a step that begins with no load on its way, and
    nobody begins a load while somebody is put off: it is put off, too.

Pulls end by their deadline and loads by theirs, so that step comes. Who could load at once, or has waited for longer
than a pull may take, stops new pulls from beginning until then (`_draining`).
"""

from __future__ import annotations

import time
from typing import Any

from vllm_kvpool.clock import now_ms
from vllm_kvpool.config import ConnectorConfig
from vllm_kvpool.connector.link import PoolLink
from vllm_kvpool.connector.records import Lookup, RequestRecord
from vllm_kvpool.connector.stats import KVPoolStats
from vllm_kvpool.connector.tradeoff import Tradeoff
from vllm_kvpool.types import KEY_BYTES, BlockKeys, num_refs

REPLY_GRACE_MS = 100
"""For the answer's way back: a daemon that hangs costs a request no more than that."""


class PullPlanner:
    def __init__(
        self, link: PoolLink, config: ConnectorConfig, stats: KVPoolStats, tradeoff: Tradeoff
    ) -> None:
        self._link = link
        self._min_tokens = max(1, config.min_remote_tokens)
        self._deadline_ms = config.pull_deadline_ms
        self._tokens_per_s = config.prefill_tokens_per_s
        self._stats = stats
        self._tradeoff = tradeoff
        self._pulling: dict[int, RequestRecord] = {}
        self._held: dict[str, int] = {}
        """Requests that are put off, and since when (ms)."""
        self._loading: set[str] = set()
        """Requests whose load has begun and that vLLM has not scheduled since."""
        self._loading_before = False
        """At the beginning of this step."""
        self._draining = False

    def puts_off(self, record: RequestRecord, lookup: Lookup, end: int) -> bool:
        """Whether the request is to be looked up again in the next step. `end`: blocks that it could
        load at most."""
        request_id = record.request.request_id
        if record.pull_due_ms and now_ms() < record.pull_due_ms:
            return True
        self._give_up(record)
        if not record.pull_asked and self._ask(record, lookup, end):
            return self._hold(request_id)
        if request_id in self._held and self._loading_before:
            return self._hold(request_id)
        others_held = bool(self._held.keys() - {request_id})
        unsettled = bool(self._pulling) or self._loading_before
        if lookup.num_load_blocks and others_held and unsettled:
            self._draining = True  # it could begin at once, but for the pulls
            return self._hold(request_id)
        self._held.pop(request_id, None)
        return False

    def _hold(self, request_id: str) -> bool:
        now = now_ms()
        since = self._held.setdefault(request_id, now)
        self._draining = self._draining or now - since > self._deadline_ms + REPLY_GRACE_MS
        return True

    def _ask(self, record: RequestRecord, lookup: Lookup, end: int) -> bool:
        """Begin a pull if one is worth it. It is asked once a request."""
        client = self._link.client
        if client is None or not client.pulls or not self._deadline_ms or self._draining:
            return False
        if lookup.miss not in {"", "absent", "short"}:
            return False
        here = max(num_refs(lookup.refs), lookup.first)
        tokens = (end - here) * self._link.block_tokens
        if tokens < self._min_tokens:
            return False
        record.pull_asked = True
        within_ms = min(self._deadline_ms, self._worth_ms(record, tokens, end))
        if within_ms <= 0:
            return False
        keys = record.keys(self._link.mask)
        missing = BlockKeys(keys[here * KEY_BYTES : end * KEY_BYTES])
        parent = keys[(here - 1) * KEY_BYTES : here * KEY_BYTES] if here else b""
        pull_id = client.pull(missing, parent, within_ms)
        if pull_id is None:
            return False
        self._pulling[pull_id] = record
        record.pull_id = pull_id
        record.pull_due_ms = now_ms() + within_ms + REPLY_GRACE_MS
        return True

    def _worth_ms(self, record: RequestRecord, tokens: int, end: int) -> int:
        """How much sooner the `tokens` before block `end` can be loaded than computed, once they are here."""
        rest = record.request.num_tokens - end * self._link.block_tokens
        compute_s = self._tradeoff.compute_s(tokens, rest, record.alone)
        if compute_s is None:
            compute_s = tokens / self._tokens_per_s
        load_s = self._tradeoff.load_s(tokens, time.monotonic()) or 0.0
        return int((compute_s - load_s) * 1_000)

    def take_answers(self) -> None:
        """After each `PoolLink.poll`."""
        client = self._link.client
        if client is None or not self._pulling:
            return
        for pulled in client.take_pulled():
            record = self._pulling.pop(pulled.id, None)
            if record is not None:
                record.pull_due_ms = 0
                tokens = pulled.blocks * self._link.block_tokens
                self._stats.count("pulled_tokens", tokens)
                if pulled.reason:
                    self._stats.count("pull_ends", reason=pulled.reason)

    def _give_up(self, record: RequestRecord) -> None:
        """No answer in time."""
        if record.pull_due_ms:
            record.pull_due_ms = 0
            if self._forget(record):
                self._stats.count("pull_ends", reason="no_answer")

    def _forget(self, record: RequestRecord) -> bool:
        """Nobody waits for its answer any more. False: it was not waited for."""
        if self._pulling.pop(record.pull_id, None) is None:
            return False
        if self._link.client is not None:
            self._link.client.cancel_pull(record.pull_id)
        return True

    # what vLLM does with requests -----------------------------------------------------------------

    def admitted(self, request: Any, num_external_tokens: int) -> None:
        """For loads a second time, with 0 tokens, when the loaded request is scheduled."""
        if num_external_tokens:
            self._loading.add(request.request_id)
        else:
            self._loading.discard(request.request_id)

    def finished(self, record: RequestRecord) -> None:
        """Aborted, too."""
        request_id = record.request.request_id
        self._loading.discard(request_id)
        self._held.pop(request_id, None)
        self._forget(record)

    def end_step(self) -> None:
        """The step is planned."""
        now = now_ms()
        for record in [r for r in self._pulling.values() if r.pull_due_ms <= now]:
            self._give_up(record)
        self._loading_before = bool(self._loading)
        self._draining = self._draining and bool(self._held)

    def check_integrity(self) -> None:
        assert all(record.pull_id == pull_id for pull_id, record in self._pulling.items())
        assert not self._draining or self._held
