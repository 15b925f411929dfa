"""From the directory's URL to connections. What can never work is refused at the start; the rest
(an address, a password, a server's certificate) only the server can tell."""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable
from typing import Any

from vllm_kvpool.errors import ConfigError

TIMEOUT_S = 0.5
"""To connect, and for each answer."""


def connector(url: str) -> tuple[Callable[[], Any], tuple[type[Exception], ...]]:
    """What makes connections, and what these raise. ConfigError: no such URL, an option or a file in
    it that is none, or redis-py is missing."""
    try:
        import redis
        import redis.cluster
        from redis.exceptions import RedisClusterException, RedisError
    except ModuleNotFoundError:
        fix = "it needs redis-py: pip install 'vllm-kvpool[cluster]'"
        raise ConfigError("directory", _shown(url), fix) from None
    scheme, _, rest = url.partition("://")
    kind: Any = redis.cluster.RedisCluster if scheme.endswith("-cluster") else redis.Redis
    plain = f"{scheme.removesuffix('-cluster')}://{rest}"
    options: dict[str, Any] = {"socket_timeout": TIMEOUT_S, "socket_connect_timeout": TIMEOUT_S}
    secure = plain.startswith("rediss:")
    if secure:
        # What the URL says wins; without a word redis-py 5 checks no names.
        options["ssl_check_hostname"] = True
    try:
        pool = redis.ConnectionPool.from_url(plain, **options)
        pool.make_connection()  # without connecting: do its options exist?
        if secure:
            _check_files(pool.connection_kwargs)
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError("directory", _shown(url), str(error)) from None
    return lambda: kind.from_url(plain, **options), (RedisError, RedisClusterException, OSError)


def _shown(url: str) -> str:
    """A password is nothing for a log."""
    return re.sub(r"//.*@", "//***@", url)


def _check_files(options: dict[str, Any]) -> None:
    """ValueError: a certificate or a key cannot be read, which ssl says without a name."""
    authority, certificate = options.get("ssl_ca_certs"), options.get("ssl_certfile")
    try:
        context = ssl.create_default_context(cafile=authority)
    except OSError as error:
        raise ValueError(f"ssl_ca_certs={authority}: {error}") from None
    if certificate is None:
        return
    password = options.get("ssl_password") or ""  # without any, OpenSSL would ask the terminal
    try:
        context.load_cert_chain(certificate, options.get("ssl_keyfile"), password)
    except OSError as error:
        raise ValueError(f"ssl_certfile={certificate}, ssl_keyfile: {error}") from None
