"""The parent process of a router: it knows the fleet, its workers carry the requests.

    fleet file, DNS, admin endpoint, probes, failures that workers report
        -> Roster -> every worker's Fleet
    every worker's counters -> one /metrics

So the workers share no memory and no lock: they agree because each is told the same, and decides by
the same hashes. A worker that dies is replaced; when the parent dies its workers end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from vllm_kvpool.config import RouterConfig, parse_listen
from vllm_kvpool.errors import ConfigError
from vllm_kvpool.router import control
from vllm_kvpool.router.address import DnsName
from vllm_kvpool.router.admin import Admin
from vllm_kvpool.router.health import Health
from vllm_kvpool.router.metrics import Sample, counters_of, metrics_text, replica_of
from vllm_kvpool.router.policies import make_policy
from vllm_kvpool.router.probes import Probes
from vllm_kvpool.router.roster import ReplicaStatus, Roster
from vllm_kvpool.router.sources import FleetFile, parse_addresses, resolve
from vllm_kvpool.router.worker_process import WorkerProcess

logger = logging.getLogger(__name__)

TELL_S = 0.2
"""Between two looks at what workers have to be told: ejections are told at once."""
RESPAWN_S = 0.5


class Supervisor:
    def __init__(self, config: RouterConfig) -> None:
        """ConfigError: something in it cannot be used."""
        make_policy(config.policy)
        self._config = config
        self._static = parse_addresses("replicas", config.replicas)
        self._file = FleetFile(Path(config.fleet)) if config.fleet else None
        self._file_names: list[DnsName] = []
        if not config.replicas and self._file is None:
            raise ConfigError("replicas", (), "name the replicas, or a fleet file with them")
        if self._file is not None:
            self._file.read()
        self._loop = asyncio.get_running_loop()
        self._started = False
        self._roster = Roster(self._make_health, config.drain_s)
        self._workers: list[WorkerProcess] = []
        self._restarts = 0
        self._retired: list[Sample] = []
        """The counters of workers that ended: a counter never falls."""
        self._told: tuple[ReplicaStatus, ...] = ()
        self._stopping = asyncio.Event()
        self._port = 0

    def _make_health(self) -> Health:
        config = self._config
        return Health(config.warmup_s, warm=not self._started, pause_scale=config.pause_scale)

    async def run(self) -> None:
        """Until SIGTERM or SIGINT."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stopping.set)
        with self._reserved_port() as reserved:
            self._port = reserved.getsockname()[1]
            # force_close: a probe is to find out whether the replica accepts connections
            connector = aiohttp.TCPConnector(force_close=True, limit=0)
            async with aiohttp.ClientSession(connector=connector) as session:
                probes = Probes(
                    self._roster, self._config.connect_timeout_s, self._loop.time, session
                )
                self._read_lists()
                names = self._loop.create_task(self._resolve_names())
                await asyncio.wait([names], timeout=self._config.connect_timeout_s)
                await probes.look()
                self._started = True
                await self._serve(probes, names)

    async def _serve(self, probes: Probes, names: asyncio.Task[None]) -> None:
        async with asyncio.TaskGroup() as group:
            keepers = [group.create_task(self._keep_worker()) for _ in range(self._config.workers)]
            others = [
                group.create_task(self._watch(probes)),
                group.create_task(self._watch_names(names)),
                group.create_task(self._tell_changes()),
            ]
            async with self._admin():
                await self._announce()
                await self._stopping.wait()
            logger.info("ending: answers under way get %g s", self._config.drain_s)
            for worker in self._workers:
                worker.send(control.Stop())
            await asyncio.wait(keepers)
            for task in others:
                task.cancel()

    def _reserved_port(self) -> socket.socket:
        """Holds the port without listening: workers that come and go keep it. Another router there
        would share our clients, so it is asked for alone first."""
        host, port = parse_listen("listen", self._config.listen)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as alone:
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind((host, port))
        holder = socket.socket(family, socket.SOCK_STREAM)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind((host, port))
        # Else a server of anybody could listen beside a socket that only holds the port.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        return holder

    # workers --------------------------------------------------------------------------------------

    async def _keep_worker(self) -> None:
        """One place for a worker, filled again when it dies."""
        while not self._stopping.is_set():
            start = control.Configure(self._config, self._port, self._statuses())
            worker = await WorkerProcess.spawn(start)
            self._workers.append(worker)
            worker.send(control.Statuses(self._statuses()))  # they may have changed meanwhile
            try:
                status = await worker.listen(self._obey)
            finally:
                self._workers.remove(worker)
                self._retired = counters_of([*self._retired, *worker.samples])
                worker.kill()
            if not self._stopping.is_set():
                self._restarts += 1
                logger.error("worker %d ended with status %d; another starts", worker.pid, status)
                await asyncio.sleep(RESPAWN_S)

    def _obey(self, worker: WorkerProcess, message: control.Message) -> None:
        match message:
            case control.Failed(replica_id, error):
                logger.warning("replica %s: %s", replica_id, error)
                self._roster.failed(replica_id, error, self._loop.time(), refused=True)
                self._tell()
            case control.AskMetrics(number):
                self._loop.create_task(self._answer_metrics(worker, number))

    async def _answer_metrics(self, worker: WorkerProcess, number: int) -> None:
        worker.send(control.MetricsText(number, await self._metrics()))

    def _statuses(self) -> tuple[ReplicaStatus, ...]:
        return self._roster.statuses(self._loop.time())

    def _tell(self) -> None:
        statuses = self._statuses()
        if statuses != self._told:
            self._told = statuses
            for worker in self._workers:
                worker.send(control.Statuses(statuses))

    async def _tell_changes(self) -> None:
        """Drains and warm-ups go on by the clock alone."""
        while True:
            self._tell()
            await asyncio.sleep(TELL_S)

    async def _announce(self) -> None:
        while len(self._workers) < self._config.workers:
            await asyncio.sleep(0.01)
        await asyncio.gather(*(worker.wait_ready() for worker in self._workers))
        host, _ = parse_listen("listen", self._config.listen)
        replicas = len(self._statuses())
        print(f"router ready: http://{host}:{self._port}, {replicas} replicas", flush=True)

    # the fleet ------------------------------------------------------------------------------------

    async def _watch(self, probes: Probes) -> None:
        while True:
            await asyncio.sleep(self._config.probe_interval_s)
            try:
                self._read_lists()
                await probes.look()
            except Exception:  # one look less is better than no router
                logger.exception("a look at the fleet failed")
            self._tell()

    def _read_lists(self) -> None:
        self._roster.update("static", self._static[0])
        if self._file is not None and (texts := self._file.changed()) is not None:
            replicas, self._file_names = parse_addresses("fleet", texts)
            self._roster.update("file", replicas)
            logger.info("fleet file: %d replicas", len(replicas))

    async def _watch_names(self, first: asyncio.Task[None]) -> None:
        """Beside the probes: a name server that does not answer takes its time, and delays nobody."""
        await first
        while True:
            await asyncio.sleep(self._config.probe_interval_s)
            try:
                await self._resolve_names()
            except Exception:  # one look less is better than no router
                logger.exception("a look at the names failed")
            self._tell()

    async def _resolve_names(self) -> None:
        names = [*self._static[1], *self._file_names]
        sources = {name.source for name in names}
        for entry in list(self._roster):
            for source in entry.sources - sources:
                if source.startswith("dns:"):
                    self._roster.update(source, ())
        await asyncio.gather(*map(self._resolve, names))

    async def _resolve(self, name: DnsName) -> None:
        if (replicas := await resolve(name)) is not None:
            self._roster.update(name.source, replicas)

    # operators ------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _admin(self) -> AsyncIterator[None]:
        if not self._config.admin:
            yield
            return
        admin = Admin(
            self._roster,
            self._config.drain_s,
            self._loop.time,
            self._changed,
            self._worker_gauges,
            self._metrics,
        )
        runner = web.AppRunner(admin.app(), access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, *parse_listen("admin", self._config.admin)).start()
            yield
        finally:
            await runner.cleanup()

    async def _changed(self) -> None:
        """The workers have been told: each has answered a message that came after it."""
        self._tell()
        await self._collect()

    async def _collect(self) -> None:
        await asyncio.gather(*(worker.collect() for worker in self._workers))

    async def _worker_gauges(self) -> list[dict[str, Any]]:
        await self._collect()
        return [{"pid": worker.pid, **worker.gauges()} for worker in self._workers]

    async def _metrics(self) -> str:
        """Of the fleet they say what every worker knows by now."""
        self._tell()
        told = self._told
        await self._collect()
        known = {None, *(entry.replica.id for entry in self._roster)}
        self._retired = [s for s in self._retired if replica_of(s[0], s[1]) in known]
        samples = list(self._retired)
        for worker in self._workers:
            samples += worker.samples
        samples.append(("worker_restarts_total", (), self._restarts))
        for status in told:
            samples += _replica_samples(status)
        for entry in self._roster:
            name = (entry.replica.id,)
            samples.append(("replica_ejections_total", name, entry.health.ejections))
        return metrics_text(samples)


def _replica_samples(status: ReplicaStatus) -> list[Sample]:
    name = status.replica.id
    samples: list[Sample] = [
        ("replica_state", (name, status.state.value), 1),
        ("replica_share", (name,), status.share),
    ]
    if status.gauges.waiting is not None:
        samples.append(("replica_waiting_requests", (name,), status.gauges.waiting))
    if status.gauges.cache_usage is not None:
        samples.append(("replica_cache_usage", (name,), status.gauges.cache_usage))
    return samples


def run_router(config: RouterConfig) -> None:
    """Until a signal ends it. ConfigError, OSError: it cannot start."""

    async def main() -> None:
        await Supervisor(config).run()

    try:
        asyncio.run(main())
    except ExceptionGroup as group:
        raise _first(group) from None


def _first(group: ExceptionGroup[Exception]) -> Exception:
    """All that a task group makes of one error."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, ExceptionGroup) else error
