"""One worker process: `python -m vllm_kvpool.router.worker FD`, started by the parent.

FD is its end of the control channel. When that closes, the parent is gone, and so is the worker.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import signal
import socket
import sys
import time

import uvloop

from vllm_kvpool.config import RouterConfig, parse_listen, parse_ports, parse_size
from vllm_kvpool.router import control
from vllm_kvpool.router.connections import Connections
from vllm_kvpool.router.context import Context
from vllm_kvpool.router.downstream import ClientConnection
from vllm_kvpool.router.event_feed import EventFeed
from vllm_kvpool.router.fleet import Fleet
from vllm_kvpool.router.kv_events import KvEvents
from vllm_kvpool.router.metrics import Metrics, Sample
from vllm_kvpool.router.mirror import Mirror
from vllm_kvpool.router.policies import make_policy
from vllm_kvpool.router.prediction_ledger import PredictionLedger, Totals
from vllm_kvpool.router.proxy import Proxy
from vllm_kvpool.router.retries import RetryBudget
from vllm_kvpool.router.tokens import Tokens

LOOK_S = 0.25
"""Between two looks for what waits too long, and for suspicions that are over."""
SUSPECT_S = 1.0
"""A replica that this worker could not reach is left alone until the parent knows. Less where
`RouterConfig.pause_scale` says so."""
BACKLOG = 1_024


class Worker:
    def __init__(self, channel: control.Channel, start: control.Configure) -> None:
        self._loop = asyncio.get_running_loop()
        self._channel = channel
        self._config: RouterConfig = start.config
        self._clients: set[ClientConnection] = set()
        self._asked: dict[int, asyncio.Future[str]] = {}
        self._numbers = itertools.count()
        config = start.config
        fleet = Fleet()
        policy = make_policy(config.policy)
        ledger = PredictionLedger()
        metrics = Metrics()
        self._mirror = Mirror(fleet, policy, ledger, metrics)
        self._mirror.apply(start.statuses, self._loop.time())
        self._feed: EventFeed | None = None
        if isinstance(policy, KvEvents) and config.kv_events:
            self._feed = EventFeed(policy.events, parse_ports("kv_events", config.kv_events))
            self._feed.sync(fleet)
        self._connections = Connections(self._loop, config.connect_timeout_s)
        budget = RetryBudget(config.retry_share)
        self._context = Context(
            fleet,
            policy,
            self._connections,
            budget,
            ledger,
            metrics,
            self._report,
            time.monotonic,
            Tokens(fleet, config.connect_timeout_s) if policy.needs_tokens else None,
        )
        self._proxy = Proxy(self._context, self._ask_metrics)

    async def run(self, port: int) -> None:
        """Until the parent says stop, or is gone."""
        host, _ = parse_listen("listen", self._config.listen)
        server = await self._loop.create_server(
            self._connection, host, port, reuse_port=True, backlog=BACKLOG
        )
        looking = self._loop.create_task(self._look())
        self._channel.send(control.Ready())
        async for message in self._channel:
            if isinstance(message, control.Stop):
                server.close()
                await self._finish()
                break
            self._obey(message)
        looking.cancel()
        if self._feed:
            await self._feed.close()
        if self._context.tokens:
            await self._context.tokens.close()

    def _connection(self) -> ClientConnection:
        limit = parse_size("max_body", self._config.max_body, 0)
        return ClientConnection(
            self._proxy.handle, self._clients, limit, self._loop, self._count_refusal
        )

    def _count_refusal(self, status: int) -> None:
        self._context.metrics.count("rejected_total", str(status))

    def _obey(self, message: control.Message) -> None:
        match message:
            case control.Statuses(statuses):
                self._mirror.apply(statuses, self._loop.time())
                if self._feed:
                    self._feed.sync(self._context.fleet)
            case control.Collect(number):
                self._channel.send(control.Samples(number, self._samples()))
            case control.MetricsText(number, text):
                if (future := self._asked.pop(number, None)) and not future.done():
                    future.set_result(text)

    def _samples(self) -> list[Sample]:
        samples = self._context.metrics.samples()
        samples.append(("client_connections", (), len(self._clients)))
        samples.append(("replica_connections", ("active",), len(self._connections.active)))
        samples.append(("replica_connections", ("idle",), self._connections.idle))
        samples.append(("retry_budget", (), self._context.budget.tokens))
        tables = self._context.policy.tables() | {"prompts": self._context.ledger.prompts}
        samples += [("table_entries", (table,), size) for table, size in tables.items()]
        for member in self._context.fleet:
            name = (member.replica.id,)
            samples.append(("in_flight_requests", name, member.requests))
            samples.append(("in_flight_tokens", name, member.tokens))
        for (policy, replica_id), totals in self._context.ledger.totals.items():
            samples += _ledger_samples(policy, replica_id, totals)
        return samples

    async def _ask_metrics(self) -> str:
        number = next(self._numbers)
        self._asked[number] = self._loop.create_future()
        self._channel.send(control.AskMetrics(number))
        return await self._asked[number]

    def _report(self, replica_id: str, error: str) -> None:
        pause_s = SUSPECT_S * self._config.pause_scale
        self._mirror.suspect(replica_id, self._loop.time() + pause_s)
        self._channel.send(control.Failed(replica_id, error))

    async def _look(self) -> None:
        config = self._config
        while True:
            await asyncio.sleep(LOOK_S)
            now = self._loop.time()
            for client in list(self._clients):
                client.check_time(now, config.client_timeout_s)
            self._connections.check_time(now, config.response_timeout_s)
            self._mirror.end_suspicions(now)

    async def _finish(self) -> None:
        """Answers that are under way get `drain_s` to end."""
        for client in list(self._clients):
            client.leave()
        give_up = self._loop.time() + self._config.drain_s
        while self._clients and self._loop.time() < give_up:
            await asyncio.sleep(0.05)


def _ledger_samples(policy: str, replica_id: str, totals: Totals) -> list[Sample]:
    labels = (policy, replica_id)
    return [
        ("answers_total", labels, totals.answers),
        ("answers_unreported_total", labels, totals.unreported),
        ("prompt_tokens_total", labels, totals.prompt),
        ("predicted_hit_tokens_total", (*labels, "stable"), totals.predicted_stable),
        ("predicted_hit_tokens_total", (*labels, "session"), totals.predicted_session),
        ("reported_hit_tokens_total", (*labels, "stable"), totals.reported_stable),
        ("reported_hit_tokens_total", (*labels, "session"), totals.reported_session),
    ]


async def _main(fd: int) -> None:
    channel = await control.Channel.over(socket.socket(fileno=fd))
    async for message in channel:
        assert isinstance(message, control.Configure)
        await Worker(channel, message).run(message.port)
        break


def main() -> None:
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s vllm-kvpool: %(message)s"
    )
    # A terminal's ^C goes to all processes: the parent says when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    uvloop.run(_main(int(sys.argv[1])))


if __name__ == "__main__":
    main()
