"""Where replicas are listed beside the configuration: the fleet file and DNS."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import tomllib
from collections.abc import Iterable
from pathlib import Path

from vllm_kvpool.errors import ConfigError
from vllm_kvpool.router.address import DnsName, make_replica, parse_address
from vllm_kvpool.router.types import Replica

logger = logging.getLogger(__name__)


def parse_addresses(field: str, texts: Iterable[str]) -> tuple[list[Replica], list[DnsName]]:
    """ConfigError: one is wrong, or two have one name."""
    replicas: list[Replica] = []
    names: list[DnsName] = []
    for text in texts:
        address = parse_address(field, text)
        if isinstance(address, DnsName):
            names.append(address)
        elif address.id in {replica.id for replica in replicas}:
            raise ConfigError(field, text, f"there is another replica {address.id!r}")
        else:
            replicas.append(address)
    return replicas, names


class FleetFile:
    """A TOML file with one key, `replicas`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None

    def read(self) -> list[str]:
        """ConfigError: it cannot be read or is wrong."""
        name = str(self._path)
        try:
            values = tomllib.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError("fleet", name, str(error)) from None
        texts = values.pop("replicas", None)
        if values:
            raise ConfigError(f"{name}: {next(iter(values))}", "...", 'only "replicas" is known')
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ConfigError(f"{name}: replicas", texts, "give a list of addresses")
        parse_addresses(f"{name}: replicas", texts)
        return texts

    def changed(self) -> list[str] | None:
        """Its replicas, when it is another file than at the last look and can be used."""
        try:
            status = os.stat(self._path)
        except OSError:
            return None  # being replaced, or gone: the fleet stays as it is
        stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
        if stamp == self._seen:
            return None
        self._seen = stamp
        try:
            return self.read()
        except ConfigError as error:
            logger.error("the fleet stays as it is: %s", error)
            return None


async def resolve(name: DnsName) -> list[Replica] | None:
    """A replica for each address of a name. None: no answer, so nothing is known."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(name.host, name.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        logger.warning("%s: %s; its replicas stay as they are", name.host, error)
        return None
    hosts = sorted({str(address[0]) for *_, address in found})
    return [
        make_replica(f"[{host}]" if ":" in host else host, name.port, name.rank) for host in hosts
    ]
