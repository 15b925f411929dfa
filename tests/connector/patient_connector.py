"""The connector of real engines in tests: their daemon may stand still for seconds before it answers."""

from __future__ import annotations

from typing import Any

from vllm_kvpool.connector import KVPoolConnector, link

PATIENT_MS = 10_000


class PatientClient(link.PoolClient):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments, timeout_ms=PATIENT_MS)


link.PoolClient = PatientClient  # type: ignore[misc]
link.FIRST_HELLO_S = link.ABSENT_S = PATIENT_MS / 1_000

__all__ = ["KVPoolConnector"]
