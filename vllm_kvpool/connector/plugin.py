"""Entry point `vllm.general_plugins`: makes "KVPoolConnector" known to vLLM by its bare name.

vLLM calls it once a process. Names that MultiConnector and `has_connector()` look up go through
the same registry.
"""

from __future__ import annotations


def register() -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    name = "KVPoolConnector"
    if name not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(name, "vllm_kvpool.connector", name)
