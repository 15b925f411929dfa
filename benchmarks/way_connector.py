"""KVPoolConnector whose GPU copies go one way, that which KVPOOL_WAY names, instead of what the calibration picks: the
arms `kvpool+way=staged` and `kvpool+way=driver`."""

from __future__ import annotations

import functools
import os
from typing import Any

from vllm_kvpool.connector import KVPoolConnector


class WayConnector(KVPoolConnector):
    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        if self._worker is not None:
            from vllm_kvpool.connector import worker

            worker.CopyEngine = functools.partial(worker.CopyEngine, way=os.environ["KVPOOL_WAY"])
