"""What `vllm-kvpool fleet` asks of a running router, through its admin endpoint."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import quote

from vllm_kvpool.errors import RouterRefused, RouterUnavailable

TIMEOUT_S = 10.0


class FleetCommands:
    def __init__(self, admin: str) -> None:
        self._admin = admin

    def replicas(self) -> list[dict[str, Any]]:
        answer: list[dict[str, Any]] = self._ask("GET", "")
        return answer

    def add(self, address: str) -> str:
        return str(self._ask("POST", "", {"address": address})["id"])

    def drain(self, replica_id: str) -> None:
        self._ask("POST", f"/{quote(replica_id, safe='')}/drain")

    def remove(self, replica_id: str) -> None:
        self._ask("DELETE", f"/{quote(replica_id, safe='')}")

    def _ask(self, method: str, path: str, body: dict[str, str] | None = None) -> Any:
        """RouterUnavailable, RouterRefused."""
        url = f"http://{self._admin}/admin/replicas{path}"
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(url, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            with error:
                raise RouterRefused(_message(error.read())) from None
        except (OSError, ValueError) as error:
            text = f"no router answers at {self._admin} ({error}); name its `admin` by --admin"
            raise RouterUnavailable(text) from None


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return body.decode("utf-8", "replace")


def replicas_text(replicas: list[dict[str, Any]]) -> str:
    """A table for people."""
    rows: list[tuple[str, ...]] = [("replica", "state", "share", "waiting", "cache", "from", "")]
    rows += [_row(replica) for replica in replicas]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _row(replica: dict[str, Any]) -> tuple[str, ...]:
    waiting, usage = replica["waiting"], replica["cache_usage"]
    return (
        replica["id"],
        replica["state"],
        f"{replica['share']:.0%}",
        "-" if waiting is None else f"{waiting:g}",
        "-" if usage is None else f"{usage:.0%}",
        ",".join(replica["sources"]),
        replica["error"],
    )
