"""Hosts, their router and their directory in simulated time: who has a prompt's blocks, and what moving them takes.

    router     the policy's own code; it knows the size of the engines' caches, as it learns it from vLLM
    engine     leading blocks in VRAM
    pool       leading blocks in DRAM: a real pool, with the real eviction
    pull       of what is missing, by the rules of `connector.pulls` and `pool.pulls`, from the host that has most
    compute    the rest

All of it happens when a request arrives; what it stores is there at once. No clock, and nothing is drawn at random but
by the seed.
"""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.counted_directory import REFRESH_S, CountedDirectory
from benchmarks.scaled_host import HostModel, SimulatedHost
from benchmarks.scaling_workload import BLOCK_TOKENS, Prompt
from vllm_kvpool.pool.exchange import PEER_IDLE_MS
from vllm_kvpool.router.fleet import Fleet, Load
from vllm_kvpool.router.policy import Policy
from vllm_kvpool.router.types import Replica
from vllm_kvpool.types import KEY_BYTES

PEER_IDLE_S = PEER_IDLE_MS / 1_000


@dataclass(slots=True)
class Tally:
    """`vram + pool + pulled + computed == prompt`, in tokens."""

    requests: int = 0
    prompt: int = 0
    vram: int = 0
    pool: int = 0
    """Loaded, and not pulled for this request."""
    pulled: int = 0
    """Pulled for this request, and loaded."""
    computed: int = 0
    pulls: int = 0
    """Asked of another host."""
    pulled_blocks: int = 0
    late_blocks: int = 0
    """The other host had them, the link would not have brought them in time."""
    peers: int = 0
    """Of the hosts that asked, how many others they have connections to: sum over `pulls`."""
    max_peers: int = 0
    ttft_s: list[float] = field(default_factory=list)
    decide_s: float = 0.0
    """Processor time of the policy. Measured: the only figure here that is not the same in every run."""


class FleetSimulation:
    def __init__(
        self, policy: Policy, model: HostModel, num_hosts: int, folder: Path, seed: int = 0
    ) -> None:
        self.policy = policy
        self.model = model
        self.tally = Tally()
        self.hosts = [SimulatedHost(model, folder / str(i)) for i in range(num_hosts)]
        self.directory = CountedDirectory(num_hosts, BLOCK_TOKENS)
        self._names = [f"h{i:04}" for i in range(num_hosts)]
        self._numbers = {name: i for i, name in enumerate(self._names)}
        self._fleet = Fleet(tuple(Replica(name, f"http://{name}") for name in self._names))
        self._draw = random.Random(seed)
        self._ends: list[tuple[float, int, Load, Prompt, str, int]] = []
        self._renewals = [(self._draw.random() * REFRESH_S, i) for i in range(num_hosts)]
        heapq.heapify(self._renewals)
        for name in self._names:
            policy.resize(name, model.vram_tokens)

    def run(self, prompts: Iterable[Prompt], warm_up_s: float) -> None:
        """What comes before `warm_up_s` is not counted."""
        warm = False
        for prompt in prompts:
            if not warm and prompt.at_s >= warm_up_s:
                warm = True
                self._forget_counts()
            self._run_until(prompt.at_s)
            self._send(prompt)
        self._run_until(float("inf"), renewing=False)
        self.check_integrity()

    def _forget_counts(self) -> None:
        self.tally = Tally()
        self.directory.traffic = type(self.directory.traffic)()
        for host in self.hosts:
            host.out.busy_s = host.into.busy_s = 0.0

    def _run_until(self, time_s: float, renewing: bool = True) -> None:
        while self._ends and self._ends[0][0] <= time_s:
            at_s, _, load, prompt, name, cached = heapq.heappop(self._ends)
            self._fleet.release_load(load)
            self.policy.finished(prompt.request, name, cached, at_s)
        while renewing and self._renewals[0][0] <= time_s:
            at_s, number = self._renewals[0]
            self.directory.renew(self.hosts[number].pool.num_blocks)
            heapq.heapreplace(self._renewals, (at_s + REFRESH_S, number))

    def _send(self, prompt: Prompt) -> None:
        begun = time.thread_time()
        decision = self.policy.decide(prompt.request, self._fleet, prompt.at_s)
        assert decision is not None, "a fleet without a host"
        name = decision.replica.id
        self.policy.dispatched(prompt.request, name, prompt.at_s)
        self.tally.decide_s += time.thread_time() - begun
        load = self._fleet.add_load(name, decision.load_tokens)
        first_token_s, cached = self._serve(self._numbers[name], prompt)
        end_s = first_token_s + prompt.output_tokens / self.model.decode_tokens_per_s
        heapq.heappush(self._ends, (end_s, self.tally.requests, load, prompt, name, cached))

    # one request on its host ------------------------------------------------------------------------

    def _serve(self, number: int, prompt: Prompt) -> tuple[float, int]:
        """When its first token is there, and tokens that it found in VRAM."""
        host, chain = self.hosts[number], prompt.request.blocks
        prompt_tokens = prompt.request.prompt_tokens
        end = min(len(chain), (prompt_tokens - 1) // BLOCK_TOKENS)
        vram = min(host.engine.match(chain), end)
        pool = min(host.pool.match(prompt.keys), end)
        pulled, ready_s = 0, prompt.at_s
        if end > vram:  # else there is nothing to look for
            pulled, ready_s = self._pull(number, prompt, max(vram, pool), end)
        brought = max(vram, pool) + pulled if pulled else 0
        load = max(0, max(pool, brought) - vram)
        if not host.loads(load * BLOCK_TOKENS, prompt.at_s):
            load = 0
        if load:
            ready_s = host.load(load * BLOCK_TOKENS, ready_s)
        computed = prompt_tokens - (vram + load) * BLOCK_TOKENS
        first_s, taken_s = host.compute(computed, prompt.at_s, ready_s)
        self._store(number, prompt, brought, taken_s)
        self._count(prompt, vram, load, min(load, pulled), computed, first_s)
        return first_s, vram * BLOCK_TOKENS

    def _pull(self, number: int, prompt: Prompt, here: int, end: int) -> tuple[int, float]:
        """Blocks behind `here` that come from another host, and when the request goes on."""
        host, at_s = self.hosts[number], prompt.at_s
        within_s = host.pull_within_s((end - here) * BLOCK_TOKENS, at_s)
        if within_s <= 0 or len(self.hosts) == 1:
            return 0, at_s
        missing = prompt.keys[here * KEY_BYTES : end * KEY_BYTES]
        for bits, _ in self.directory.look_up(number, missing, at_s):
            sender = self._one_of(bits)
            held = self.hosts[sender].pool.match(missing)
            if held:
                return self._transfer(number, sender, held, at_s, at_s + within_s)
        return 0, at_s + self.model.pull_s

    def _transfer(
        self, number: int, sender: int, held: int, at_s: float, due_s: float
    ) -> tuple[int, float]:
        host, tally = self.hosts[number], self.tally
        begin_s = at_s + self.model.pull_s
        count, done_s = host.receive(sender, self.hosts[sender], held, due_s, begin_s)
        self._connect(host, sender, at_s)
        tally.pulls += 1
        tally.pulled_blocks += count
        tally.late_blocks += held - count
        return count, done_s

    def _one_of(self, bits: int) -> int:
        """Of several that hold as much, any."""
        for _ in range(self._draw.randrange(bits.bit_count())):
            bits &= bits - 1
        return (bits & -bits).bit_length() - 1

    def _connect(self, host: SimulatedHost, sender: int, at_s: float) -> None:
        host.peers[sender] = at_s
        if len(host.peers) > 1:
            host.peers = {p: s for p, s in host.peers.items() if s > at_s - PEER_IDLE_S}
        self.tally.peers += len(host.peers)
        self.tally.max_peers = max(self.tally.max_peers, len(host.peers))

    def _store(self, number: int, prompt: Prompt, brought: int, taken_s: float) -> None:
        """The first `brought` blocks, whose end came from elsewhere, then what was computed. Blocks that only VRAM had
        are stored, too."""
        host, keys = self.hosts[number], prompt.keys
        host.engine.store(prompt.request.blocks)
        host.pool.touch(keys)
        for end in (brought, len(keys) // KEY_BYTES):
            here = host.pool.match(keys)
            if here < end:
                host.pool.store(keys, here, end)
        ready, gone = host.pool.take_changes()
        self.directory.announce(number, ready, gone, taken_s)

    def _count(
        self, prompt: Prompt, vram: int, load: int, pulled: int, computed: int, first_s: float
    ) -> None:
        tally = self.tally
        tally.requests += 1
        tally.prompt += prompt.request.prompt_tokens
        tally.vram += vram * BLOCK_TOKENS
        tally.pool += (load - pulled) * BLOCK_TOKENS
        tally.pulled += pulled * BLOCK_TOKENS
        tally.computed += computed
        tally.ttft_s.append(first_s - prompt.at_s)

    def check_integrity(self) -> None:
        tally = self.tally
        assert tally.vram + tally.pool + tally.pulled + tally.computed == tally.prompt
        assert self._fleet.total_tokens == 0, "a load was not released"
        self._fleet.check_integrity()
        for host in self.hosts:
            host.engine.check_integrity()
            host.pool.owner.check_integrity()
        assert self.directory.copies == sum(host.pool.num_blocks for host in self.hosts)

    def close(self) -> None:
        for host in self.hosts:
            host.pool.close()
