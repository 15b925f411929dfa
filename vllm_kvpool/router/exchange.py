"""One request and its answer: decide, send, pass the answer on; or the next replica.

    the replica cannot be reached, or ends before its answer's head   it is out, the next one
    it answers 429 or 503                                             the next one, if there is one
    it sends nothing for response_timeout_s                           504
    a byte of an answer has gone to the client                        no way back: an answer that
                                                                      breaks off does so for the client

Before the head of an answer nothing has reached the client, so nothing is lost by going on;
`retries.py` bounds it. Each load that is counted at a dispatch is released in `finally`, whatever ends it.
"""

from __future__ import annotations

import logging
from enum import Enum

from vllm_kvpool.router.connections import ConnectFailed
from vllm_kvpool.router.context import Context
from vllm_kvpool.router.downstream import ClientConnection
from vllm_kvpool.router.headers import for_rank, request_head, response_head
from vllm_kvpool.router.policy import NO_HITS
from vllm_kvpool.router.request import Request
from vllm_kvpool.router.retries import LOST_MOVES
from vllm_kvpool.router.types import Decision, Hits, Replica, ReplicaState
from vllm_kvpool.router.upstream import (
    ResponseHead,
    UpstreamConnection,
    UpstreamLost,
    UpstreamSilent,
)
from vllm_kvpool.router.usage import Usage, find_usage

logger = logging.getLogger(__name__)

GENERATING = frozenset((b"/v1/chat/completions", b"/v1/completions", b"/v1/responses"))
"""Their answers report the use of the cache."""
TRY_ELSEWHERE = frozenset((429, 503))
"""The engine is full, or not ready."""


class Outcome(Enum):
    """Of one attempt. The values are the causes in `retries_total`."""

    ANSWERED = "answered"
    UNREACHABLE = "unreachable"
    BUSY = "busy"


class Exchange:
    def __init__(self, context: Context, request: Request, client: ClientConnection) -> None:
        self._context = context
        self._request = request
        self._client = client
        self._route, self._policy = context.route(request)
        self._began = context.clock()
        self._retries = 0
        self._lost = 0
        self._rest: list[Replica] = []
        """Whom the decision names and nobody has tried, best first."""

    async def run(self) -> None:
        """Returns when the client has its answer, or an error in its place."""
        context = self._context
        if self._policy.needs_tokens:
            self._route = await context.with_tokens(self._request, self._route)
        decision = context.decide(self._route, self._policy)
        if decision is None:
            context.reject_for_now(self._client, "no replica takes requests now")
            return
        context.metrics.count("decisions_total", decision.reason)
        context.budget.earn()
        replica: Replica | None = decision.replica
        self._rest = list(decision.fallbacks)
        while replica is not None:
            outcome = await self._attempt(decision, replica)
            if outcome is Outcome.ANSWERED:
                return
            replica = self._next(replica, outcome)
        context.reject(self._client, 502, "no replica could be reached")

    def _next(self, failed: Replica, outcome: Outcome) -> Replica | None:
        """The best replica that is left, if one is and it may be tried. Ranks of an engine that was lost come last:
        a few of them would use up all moves."""
        context = self._context
        if outcome is Outcome.UNREACHABLE:
            self._rest.sort(key=lambda replica: replica.url == failed.url)
        if not self._others_left():
            return None
        if not self._may_move(outcome):
            context.metrics.count("retries_refused_total")
            return None
        context.count("retries_total", failed, outcome.value)
        self._retries += 1
        return self._rest.pop(0)

    def _may_move(self, outcome: Outcome) -> bool:
        if outcome is Outcome.BUSY:
            return self._context.budget.spend()
        self._lost += 1
        return self._lost <= LOST_MOVES

    def _others_left(self) -> bool:
        """Leaves out those that have gone or are out by now."""
        fleet, rest = self._context.fleet, self._rest
        while rest:
            member = fleet.get(rest[0].id)
            if member is not None and member.state is not ReplicaState.OUT:
                return True
            rest.pop(0)
        return False

    # one attempt ----------------------------------------------------------------------------------

    async def _attempt(self, decision: Decision, replica: Replica) -> Outcome:
        fleet = self._context.fleet
        if replica.id not in fleet:  # gone while another replica was tried
            return Outcome.UNREACHABLE
        load = fleet.add_load(replica.id, decision.load_tokens)
        try:
            # before anything is awaited: requests that come in meanwhile have to know of this one
            self._policy.dispatched(self._route, replica.id, self._context.clock())
            return await self._send(decision, replica)
        except UpstreamSilent as error:
            self._give_up(replica, str(error))
        except (ConnectFailed, UpstreamLost) as error:
            self._context.report(replica.id, str(error))
            if not self._client.begun:
                return Outcome.UNREACHABLE
            self._break_off(replica)
        finally:
            fleet.release_load(load)
        return Outcome.ANSWERED

    async def _send(self, decision: Decision, replica: Replica) -> Outcome:
        connection = self._take(replica)
        if connection is not None:
            try:
                return await self._converse(connection, decision, replica)
            except UpstreamSilent:
                raise
            except UpstreamLost:
                if self._client.begun:
                    raise
                # It was idle, and its end had not come in yet: says nothing of the replica.
        connection = await self._open(replica)
        return await self._converse(connection, decision, replica)

    def _take(self, replica: Replica) -> UpstreamConnection | None:
        return None if self._request.http10 else self._context.connections.take(replica.url)

    async def _open(self, replica: Replica) -> UpstreamConnection:
        connections = self._context.connections
        return await connections.open(replica.url, unchunked=self._request.http10)

    async def _converse(
        self, connection: UpstreamConnection, decision: Decision, replica: Replica
    ) -> Outcome:
        context, request = self._context, self._request
        try:
            head = await connection.ask(self._head_for(replica), request.body)
            if head.status in TRY_ELSEWHERE and context.budget.available and self._others_left():
                return Outcome.BUSY
            self._count_head(head, replica)
            if request.method == b"HEAD":
                connection.skip_body()
            await connection.relay_to(self._client, self._answer_head(head, decision, replica))
            if head.status == 200 and request.path in GENERATING and replica.id in context.fleet:
                hits = decision.hits if replica.id == decision.replica.id else NO_HITS
                self._account(find_usage(connection.tail), replica, hits)
            return Outcome.ANSWERED
        finally:
            context.connections.give_back(replica.url, connection)

    def _count_head(self, head: ResponseHead, replica: Replica) -> None:
        context = self._context
        context.count("requests_total", replica, str(head.status))
        if replica.id in context.fleet:
            seconds = context.clock() - self._began
            context.metrics.observe(seconds, "first_byte_seconds", replica.id)

    def _head_for(self, replica: Replica) -> bytes:
        request = self._request
        host = replica.url.removeprefix("http://").encode()
        length = len(request.body) if request.has_body else None
        head = request_head(request.method, request.target, host, request.headers, length)
        return for_rank(head, request.headers, replica.dp_rank)

    def _answer_head(self, head: ResponseHead, decision: Decision, replica: Replica) -> bytes:
        if head.until_close or self._request.http10:
            self._client.close_after()
        chosen = replica.id == decision.replica.id
        receipt = b"x-kvpool-replica: %b\r\nx-kvpool-reason: %b\r\n" % (
            replica.id.encode(),
            decision.reason.encode() if chosen else b"retry",
        ) + b"x-kvpool-predicted-hit-tokens: %d\r\nx-kvpool-session-source: %b\r\n" % (
            decision.hits.total if chosen else 0,
            self._route.session_source.encode(),
        )
        if self._retries:
            receipt += b"x-kvpool-retries: %d\r\n" % self._retries
        if self._client.closes:
            receipt += b"connection: close\r\n"
        chunked = not self._request.http10
        return response_head(head.status, head.reason, head.headers, receipt, keep_chunked=chunked)

    def _account(self, usage: Usage, replica: Replica, hits: Hits) -> None:
        """What was cached, against what was predicted to be."""
        now = self._context.clock()
        self._policy.finished(self._route, replica.id, usage.cached_tokens, now)
        prompt, cached = usage
        warning = self._context.ledger.record(
            self._policy.name, self._route, replica.id, hits, prompt, cached, now
        )
        if warning is not None:
            logger.warning("%s", warning)

    # what went wrong ------------------------------------------------------------------------------

    def _give_up(self, replica: Replica, error: str) -> None:
        """A long generation that is not streamed is silent too: probes judge the replica."""
        if self._client.begun:
            self._break_off(replica)
        else:
            self._context.reject(self._client, 504, f"replica {replica.id}: {error}")

    def _break_off(self, replica: Replica) -> None:
        """The client sees that its answer is not whole."""
        self._context.count("lost_answers_total", replica)
        self._client.abort()
