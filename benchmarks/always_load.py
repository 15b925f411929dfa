"""KVPoolConnector that loads what it finds, however long that is predicted to take: the arm `kvpool+load=always`."""

from __future__ import annotations

import os
from typing import Any

from vllm_kvpool.connector import KVPoolConnector


class AlwaysLoadConnector(KVPoolConnector):
    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        assert os.environ["KVPOOL_LOAD"] == "always"
        if self._scheduler is not None:
            self._scheduler._tradeoff.predict = lambda *question: None
