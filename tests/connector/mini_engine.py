"""vLLM's own scheduler and our connector around a model that takes no time.

Real: vLLM's configuration, scheduler (synchronous or asynchronous), block pool, requests and hashes; both
sides of the connector, its metadata through pickle, the pool and its daemon. Made up: the forward pass. It
writes into each token's place in the KV cache a number that stands for the token and everything before it,
and checks the numbers of all tokens before, so a wrong byte anywhere fails the step that would attend to it.
"""

from __future__ import annotations

import itertools
import pickle
import random
import time
import zlib
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from helpers import PATIENT_MS, until
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from vllm_kvpool.connector.compat import KVConnectorRole
from vllm_kvpool.connector.connector import KVPoolConnector
from vllm_kvpool.connector.metadata import KVPoolMetadata
from vllm_kvpool.connector.stats import KVPoolStats

BLOCK = 16
HEADS, HEAD_SIZE = 2, 8
LATENT_SIZE = 24
"""With MLA: of the one vector that a token has in each rank."""
LAYERS = [f"model.layers.{i}.self_attn.attn" for i in range(3)]
VOCABULARY = 256
ENGINE_MS = 1_000
"""For an answer of the daemon: what engines in earnest wait."""


def make_config(
    model: Path, extra: dict[str, Any], *, num_blocks: int, max_tokens: int, **options: Any
) -> VllmConfig:
    transfer = {
        "kv_connector": "KVPoolConnector",
        "kv_connector_module_path": "vllm_kvpool.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "min_load_tokens": BLOCK,
            "load_deadline_ms": PATIENT_MS,
            **extra,
        },
    }
    arguments = {
        "model": str(model),
        "dtype": "float32",
        "block_size": BLOCK,
        "max_model_len": min(2048, (num_blocks - 1) * BLOCK),
        "max_num_batched_tokens": max_tokens,
        "enforce_eager": True,
        "enable_prefix_caching": True,
        "kv_transfer_config": transfer,
        **options,
    }
    config = EngineArgs(**arguments).create_engine_config()
    cache = config.cache_config
    cache.num_gpu_blocks = cache.num_gpu_blocks_override = num_blocks
    if hasattr(cache, "kv_cache_layout"):
        cache.kv_cache_layout = "LBHNC"
    return config


def prefix_numbers(tokens: list[int]) -> list[float]:
    """For each token, a number that stands for it and all before it; exact as float32."""
    crcs = itertools.accumulate(
        tokens, lambda crc, token: (crc * 31 + token + 1) & 0xFFFFF, initial=1
    )
    return [float(crc) for crc in itertools.islice(crcs, 1, None)]


def next_token(tokens: list[int]) -> int:
    return zlib.crc32(bytes(tokens)) % VOCABULARY


def expected_output(prompt: list[int], max_tokens: int = 4) -> list[int]:
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def prompt_of(seed: int, length: int) -> list[int]:
    """Shorter prompts of the same seed are prefixes of longer ones."""
    draw = random.Random(seed)
    return [draw.randrange(VOCABULARY) for _ in range(length)]


class Span(NamedTuple):
    """What one request computes in a step: its tokens from `start` on."""

    request_id: str
    tokens: list[int]
    start: int
    table: list[int]


class MiniWorker:
    """One rank: its connector and its part of the KV cache."""

    def __init__(self, config: VllmConfig, kv_config: Any, rank: int, kv_order: str) -> None:
        self.connector = KVPoolConnector(config, KVConnectorRole.WORKER, kv_config)
        mla = config.model_config.use_mla
        inner = (1, BLOCK, LATENT_SIZE) if mla else (HEADS, BLOCK, 2 * HEAD_SIZE)
        whole = torch.zeros((len(LAYERS), kv_config.num_blocks, *inner))
        if kv_order == "BLHNC":
            whole = whole.transpose(0, 1).contiguous().transpose(0, 1)
        self.kv_caches = dict(zip(LAYERS, whole, strict=True))
        self.connector.register_kv_caches(self.kv_caches)
        self.store_delay_steps = 0
        self.report_delay_steps = 0
        self._offset = 0 if mla else rank * 100
        """Of its numbers: each rank has other heads, but with MLA the same vectors."""
        self._stores_due: deque[KVPoolMetadata] = deque()
        self._step = 0

    def execute(self, output: Any, spans: list[Span]) -> KVConnectorOutput:
        """Hooks in vLLM's order (from 0.29 on: asynchronous loads start after the forward)."""
        self._step += 1
        connector = self.connector
        metadata = self._held_back(pickle.loads(pickle.dumps(output.kv_connector_metadata)))
        connector.handle_preemptions(metadata)
        connector.bind_connector_metadata(metadata)
        for span in spans:
            self._attend(span)
        connector.start_load_kv(None)
        connector.wait_for_save()
        result = KVConnectorOutput()
        if self._step % (self.report_delay_steps + 1) == 0:
            result.finished_recving = self._finished_recving(output.finished_req_ids)
            result.invalid_block_ids = connector.get_block_ids_with_load_errors()
            result.kv_connector_stats = connector.get_kv_connector_stats()
            result.kv_connector_worker_meta = connector.build_connector_worker_meta()
        connector.clear_connector_metadata()
        return result

    def _finished_recving(self, finished: set[str]) -> set[str] | None:
        if hasattr(self.connector, "get_transfer_results"):
            return self.connector.get_transfer_results(finished).finished_recving or None
        return self.connector.get_finished(finished)[1]

    def _held_back(self, metadata: KVPoolMetadata) -> KVPoolMetadata:
        """Copies start `store_delay_steps` after the workers were told."""
        self._stores_due.append(metadata)
        if len(self._stores_due) <= self.store_delay_steps:
            return replace(metadata, stores=())
        due = self._stores_due.popleft()
        attachment = metadata.attachment or due.attachment
        return replace(metadata, stores=due.stores, attachment=attachment)

    def _attend(self, span: Span) -> None:
        start, end = span.start, len(span.tokens)
        numbers = torch.tensor(prefix_numbers(span.tokens))
        rows = torch.tensor(span.table[: -(-end // BLOCK)])
        for layer, cache in enumerate(self.kv_caches.values(), self._offset):
            places = cache[rows].transpose(1, 2).flatten(0, 1)
            wrong = (places[:start] != (numbers[:start] + layer)[:, None, None]).nonzero()
            assert not len(wrong), (
                f"{span.request_id}: token {wrong[0][0]} of {start} is not in row {rows[wrong[0][0] // BLOCK]}"
            )
            for position in range(start, end):
                cache[rows[position // BLOCK], :, position % BLOCK] = numbers[position] + layer


class MiniEngine:
    def __init__(
        self,
        model: Path,
        *,
        num_blocks: int = 256,
        max_tokens: int = 512,
        asynchronous: bool = False,
        kv_order: str = "LBHNC",
        connect: bool = True,
        learn: bool = False,
        extra: dict[str, Any],
        **options: Any,
    ) -> None:
        torch.set_num_threads(1)  # tensors are tiny
        self.config = make_config(
            model, extra, num_blocks=num_blocks, max_tokens=max_tokens, **options
        )
        kv_config = self._kv_config()
        ranks = range(self.config.parallel_config.world_size)
        self.workers = [MiniWorker(self.config, kv_config, rank, kv_order) for rank in ranks]
        self._aggregator = KVOutputAggregator(len(self.workers))
        kind = AsyncScheduler if asynchronous else Scheduler
        block, hash_block = kv_cache_utils.resolve_kv_cache_block_sizes(kv_config, self.config)
        self.scheduler = kind(
            vllm_config=self.config,
            kv_cache_config=kv_config,
            structured_output_manager=StructuredOutputManager(self.config),
            block_size=block,
            hash_block_size=hash_block,
            log_stats=True,
        )
        self.connector: KVPoolConnector = self.scheduler.connector
        handshakes = (worker.connector.get_handshake_metadata() for worker in self.workers)
        layouts = {(0, rank): layout for rank, layout in enumerate(handshakes)}
        self.connector.set_xfer_handshake_metadata_pp_aware(layouts)
        hash_fn = get_hash_fn_by_name(self.config.cache_config.prefix_caching_hash_algo)
        kv_cache_utils.init_none_hash(hash_fn)
        self._hasher = kv_cache_utils.get_request_block_hasher(hash_block, hash_fn)
        self._depth = 2 if asynchronous else 1
        self.unhurried = False
        """Its steps end when what was under way has come, as it has come to an engine whose steps take time."""
        self._in_flight: deque[tuple[Any, ModelRunnerOutput]] = deque()
        self._tokens: dict[str, list[int]] = {}
        self._tables: dict[str, list[int]] = {}
        self._ids = itertools.count()
        self.outputs: dict[str, list[int]] = {}
        self.cached_tokens: dict[str, int] = {}
        if connect and self.connector._scheduler is not None:
            self.wait_connected()
        self._stats = KVPoolStats()
        if not learn and self.connector._scheduler is not None:
            # This model takes no time: every load would be found to be slower, and left.
            self.connector._scheduler._tradeoff.computed = lambda *prefill: None

    def wait_connected(self) -> None:
        """As an engine is some milliseconds after its first request, or after its daemon's return."""
        link = self.connector._scheduler._link
        link.start()
        until(lambda: (link.poll(), link.connected)[1], "connection")
        link.client.timeout_ms = PATIENT_MS  # a second's standstill costs no store

    def lose_patience(self) -> None:
        """For tests of daemons that do not answer."""
        self.connector._scheduler._link.client.timeout_ms = ENGINE_MS

    def _kv_config(self) -> Any:
        spec = FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=HEADS, head_size=HEAD_SIZE, dtype=torch.float32
        )
        if self.config.model_config.use_mla:
            spec = MLAAttentionSpec(
                block_size=BLOCK, num_kv_heads=1, head_size=LATENT_SIZE, dtype=torch.float32
            )
        specs = dict.fromkeys(LAYERS, spec)
        memory = 1 << 28
        return kv_cache_utils.get_kv_cache_configs(self.config, [specs], [memory])[0]

    @property
    def worker(self) -> KVPoolConnector:
        """The only worker's side."""
        (worker,) = self.workers
        return worker.connector

    def delay_stores(self, steps: int) -> None:
        for worker in self.workers:
            worker.store_delay_steps = steps

    @property
    def free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def reset_prefix_cache(self, *, connector: bool = False) -> None:
        assert self.scheduler.reset_prefix_cache(reset_connector=connector)

    # requests -----------------------------------------------------------------------------------------

    def add(
        self, prompt: list[int], max_tokens: int = 4, *, hints: Any = None, **options: Any
    ) -> str:
        request_id = options.pop("request_id", None) or f"r{next(self._ids)}"
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0)
        if hints is not None:
            params.extra_args = {"kv_transfer_params": {"kvpool": hints}}
        request = Request(
            request_id=request_id,
            prompt_token_ids=list(prompt),
            sampling_params=params,
            pooling_params=None,
            block_hasher=self._hasher,
            **options,
        )
        self.outputs.setdefault(request_id, [])
        self.scheduler.add_request(request)
        return request_id

    def abort(self, *request_ids: str) -> None:
        self.scheduler.finish_requests(request_ids, RequestStatus.FINISHED_ABORTED)

    def status(self, request_id: str) -> RequestStatus | None:
        request = self.scheduler.requests.get(request_id)
        return None if request is None else request.status

    @property
    def busy(self) -> bool:
        """Whether outputs are still on their way to the scheduler."""
        return bool(self._in_flight)

    def generate(
        self, prompt: list[int], max_tokens: int = 4, **options: Any
    ) -> tuple[list[int], int]:
        """Output tokens, and how many of the prompt's came from a cache."""
        request_id = self.add(prompt, max_tokens, **options)
        self.run()
        return self.outputs[request_id], self.cached_tokens[request_id]

    def run(self, timeout_s: float = 60) -> None:
        """Until there is nothing to do, and the daemon, if there is one, has made all blocks that
        were stored visible."""
        give_up = time.monotonic() + timeout_s
        while self.scheduler.has_requests() or self._in_flight:
            assert time.monotonic() < give_up, f"still busy: {self.scheduler.requests}"
            self.step()
        if self.connector._scheduler is not None:
            until(self._stores_are_acknowledged, "the end of all stores")

    def _stores_are_acknowledged(self) -> bool:
        link = self.connector._scheduler._link
        assert link.poll() == []
        return not link.connected or not link.client.writing

    # a step -------------------------------------------------------------------------------------------

    def step(self) -> None:
        output = self.scheduler.schedule()
        self._in_flight.append((output, self._execute(output)))
        idle = not output.total_num_scheduled_tokens
        while self._in_flight and (idle or len(self._in_flight) >= self._depth):
            self._process(*self._in_flight.popleft())
        if self.connector._scheduler is not None:
            self.connector._scheduler.check_integrity()
        if self.unhurried:
            self._wait_for_copies_and_daemon()

    def _wait_for_copies_and_daemon(self) -> None:
        for worker in self.workers:
            attached = worker.connector._worker._attached
            for number in attached.running if attached else ():
                assert attached.engine.wait(number, PATIENT_MS)
        client = self.connector._scheduler._link.client
        if client._ledger.outstanding:
            assert client.channel.socket.poll(PATIENT_MS), "the daemon does not answer"

    def _process(self, output: Any, result: ModelRunnerOutput) -> None:
        for outputs in self.scheduler.update_from_output(output, result).values():
            self._count(outputs.scheduler_stats)
            for one in outputs.outputs:
                self.outputs[one.request_id] += one.new_token_ids
                if one.prefill_stats is not None:
                    self.cached_tokens[one.request_id] = one.prefill_stats.num_cached_tokens

    def _count(self, stats: Any) -> None:
        if stats is not None and stats.kv_connector_stats is not None:
            self._stats.aggregate(KVPoolStats(stats.kv_connector_stats))

    @property
    def stats(self) -> dict[str, Any]:
        """All that the connector counted, as vLLM would export it."""
        return self._stats.data

    def _execute(self, output: Any) -> ModelRunnerOutput:
        sampled, spans = self._forward(output)
        ids = list(sampled)
        results = [
            ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
                sampled_token_ids=[sampled[request_id] for request_id in ids],
                kv_connector_output=worker.execute(output, spans),
            )
            for worker in self.workers
        ]
        return self._aggregator.aggregate(results)

    # the model ----------------------------------------------------------------------------------------

    def _forward(self, output: Any) -> tuple[dict[str, list[int]], list[Span]]:
        computed = self._update_tables(output)
        sampled, spans = {}, []
        for request_id, count in output.num_scheduled_tokens.items():
            tokens, start = self._tokens[request_id], computed[request_id]
            end = start + count
            assert end <= len(tokens), "vLLM scheduled tokens that nobody knows"
            spans.append(Span(request_id, tokens[:end], start, self._tables[request_id]))
            sampled[request_id] = []
            if end == len(tokens):
                tokens.append(next_token(tokens))
                sampled[request_id] = tokens[-1:]
        return sampled, spans

    def _update_tables(self, output: Any) -> dict[str, int]:
        computed = {}
        for new in output.scheduled_new_reqs:
            self._tables[new.req_id] = list(new.block_ids[0])
            self._tokens[new.req_id] = list(new.prefill_token_ids or new.prompt_token_ids)
            computed[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            ids = list(cached.new_block_ids[i][0]) if cached.new_block_ids[i] else []
            if request_id in cached.resumed_req_ids:
                self._tables[request_id] = ids
                self._tokens[request_id] = list(cached.all_token_ids[request_id])
            else:
                self._tables[request_id] += ids
            computed[request_id] = cached.num_computed_tokens[i]
        return computed

    def close(self) -> None:
        for worker in self.workers:
            worker.connector.shutdown()
        self.scheduler.shutdown()
