"""The policies by name."""

from __future__ import annotations

from vllm_kvpool.errors import ConfigError
from vllm_kvpool.router.cache_aware import CacheAware
from vllm_kvpool.router.kv_events import KvEvents
from vllm_kvpool.router.least_load import LeastLoad
from vllm_kvpool.router.policy import Policy
from vllm_kvpool.router.round_robin import RoundRobin
from vllm_kvpool.router.session import Session
from vllm_kvpool.router.task import Task

DEFAULT_POLICY = Task.name
POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (Task, KvEvents, CacheAware, Session, LeastLoad, RoundRobin)
}


def make_policy(name: str, seed: int = 0) -> Policy:
    """ConfigError: there is none of this name."""
    policy = POLICIES.get(name)
    if policy is None:
        raise ConfigError("policy", name, f"choose one of {', '.join(POLICIES)}")
    return policy(seed)
