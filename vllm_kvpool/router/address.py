"""How replicas are written: `[name=]http://host:port[@rank]`, or `dns://host:port[@rank]` for all
addresses of a name."""

from __future__ import annotations

import re
from typing import NamedTuple

from vllm_kvpool.errors import ConfigError
from vllm_kvpool.router.types import Replica

_WRITTEN = re.compile(
    r"(?:(?P<name>[A-Za-z0-9][A-Za-z0-9._:-]*)=)?(?P<scheme>http|dns)://"
    r"(?P<host>[A-Za-z0-9._-]{1,254}|\[[0-9A-Fa-f:.]+\]):(?P<port>\d{1,5})/?(?:@(?P<rank>\d{1,4}))?"
)


class DnsName(NamedTuple):
    """Each address that it has is a replica."""

    host: str
    port: int
    rank: int | None

    @property
    def source(self) -> str:
        """What the roster calls it."""
        place = f"dns:{self.host}:{self.port}"
        return place if self.rank is None else f"{place}@{self.rank}"


def parse_address(field: str, text: str) -> Replica | DnsName:
    """ConfigError: it is neither."""
    match = _WRITTEN.fullmatch(text.strip())
    if match is None or not 0 < int(match["port"]) < 65_536:
        fix = 'write "http://host:port", with "@0" behind it for a data-parallel rank, "name=" before '
        raise ConfigError(
            field, text, fix + 'it for a name, or "dns://host:port" for a name\'s addresses'
        )
    if any(not 0 < len(label) < 64 for label in match["host"].removesuffix(".").split(".")):
        raise ConfigError(field, text, "each part of a host name has 1 to 63 characters")
    rank = None if match["rank"] is None else int(match["rank"])
    if match["scheme"] == "dns":
        if match["name"]:
            raise ConfigError(field, text, "the addresses of a DNS name are named by themselves")
        return DnsName(match["host"].strip("[]"), int(match["port"]), rank)
    return make_replica(match["host"], int(match["port"]), rank, match["name"])


def make_replica(host: str, port: int, rank: int | None, name: str | None = None) -> Replica:
    place = f"{host}:{port}"
    default = place if rank is None else f"{place}@{rank}"
    return Replica(name or default, f"http://{place}", rank)
