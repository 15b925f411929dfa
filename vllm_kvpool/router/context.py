"""What all requests of a worker share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from vllm_kvpool.router.connections import Connections
from vllm_kvpool.router.downstream import ClientConnection
from vllm_kvpool.router.fleet import Fleet
from vllm_kvpool.router.headers import RequestHeaders
from vllm_kvpool.router.keys import route_request
from vllm_kvpool.router.least_load import LeastLoad
from vllm_kvpool.router.metrics import Metrics
from vllm_kvpool.router.policy import Policy
from vllm_kvpool.router.prediction_ledger import PredictionLedger
from vllm_kvpool.router.request import Request
from vllm_kvpool.router.responses import error_body
from vllm_kvpool.router.retries import RetryBudget
from vllm_kvpool.router.tokens import Tokens
from vllm_kvpool.router.types import Decision, Replica, RouteRequest


@dataclass(slots=True, eq=False)
class Context:
    fleet: Fleet
    policy: Policy
    connections: Connections
    budget: RetryBudget
    ledger: PredictionLedger
    metrics: Metrics
    report: Callable[[str, str], None]
    """Replica and error: it could not be reached."""
    clock: Callable[[], float]
    tokens: Tokens | None = None
    """Where the policy needs them."""
    no_prompt: Policy = field(default_factory=LeastLoad)
    """For requests without a JSON body: nothing of them is cached anywhere."""

    def route(self, request: Request) -> tuple[RouteRequest, Policy]:
        """What the policy knows of a request, and which policy that is."""
        body = _parse(request.body) if request.body else None
        route = route_request(body, RequestHeaders(request.headers))
        return route, self.policy if isinstance(body, dict) else self.no_prompt

    async def with_tokens(self, request: Request, route: RouteRequest) -> RouteRequest:
        """For a policy that needs them, as far as somebody knows them."""
        if self.tokens is None:
            return route
        tokens = route.tokens or await self.tokens.of(_parse(request.body))
        try:
            return self.policy.with_tokens(route, tokens) if tokens else route
        except ValueError:  # not what an engine answers
            return route

    def decide(self, route: RouteRequest, policy: Policy) -> Decision | None:
        return policy.decide(route, self.fleet, self.clock())

    def count(self, name: str, replica: Replica, *labels: str) -> None:
        """Of one that has gone while it had this request nothing is counted: its series went with it."""
        if replica.id in self.fleet:
            self.metrics.count(name, replica.id, *labels)

    def reject(
        self, client: ClientConnection, status: int, message: str, added: bytes = b""
    ) -> None:
        """An error of the router's own."""
        self.metrics.count("rejected_total", str(status))
        client.answer(status, error_body(status, message), added=added)

    def reject_for_now(self, client: ClientConnection, message: str) -> None:
        self.reject(client, 503, message, b"retry-after: 1\r\n")


def _parse(body: bytes) -> Any:
    """What is no JSON (or an upload, or wrong) is the engine's to judge."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
