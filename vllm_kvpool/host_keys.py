"""A host's CURVE keys: who it is, and which hosts it talks to.

A folder as `zmq.auth` writes them: one `<name>.key_secret` is our own, and every `<name>.key` beside
it is the public key of a host (or a client) that may read from us and from which we read. It may write, too,
unless there is a folder `writers` beside them: then only hosts whose keys lie in that one may. Files
that come later count at once; nothing has to be restarted.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from vllm_kvpool.errors import ConfigError

WRITERS = "writers"
_DOMAIN = "kvpool"
_READ_AGAIN_S = 1.0


def make_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """Draw a key pair: files of the public and of the secret key. ConfigError: there is one."""
    secret = folder / f"{name}.key_secret"
    if secret.exists():
        raise ConfigError("name", name, f"{secret} exists already; delete it to make another")
    before = os.umask(0o077)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        public_file, secret_file = zmq.auth.create_certificates(folder, name)
    finally:
        os.umask(before)
    return Path(public_file), Path(secret_file)


class HostKeys:
    """ConfigError: the folder holds no key pair of ours, or more than one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        secrets = sorted(folder.glob("*.key_secret"))
        if len(secrets) != 1:
            fix = f"it holds {len(secrets)} secret keys, not one: vllm-kvpool keygen {folder}"
            raise ConfigError("keys", str(folder), fix)
        self.public, self._secret = _read(secrets[0])
        self._allowed: frozenset[bytes] = frozenset()
        self._writers: frozenset[bytes] | None = None
        """None: all."""
        self._read_at_s = -_READ_AGAIN_S
        self._read_allowed()

    def allows(self, public_key: bytes) -> bool:
        """`public_key` in Z85."""
        self._read_allowed()
        return public_key in self._allowed

    def lets_write(self, public_key: bytes) -> bool:
        """`public_key` in Z85, of a host that may connect."""
        self._read_allowed()
        return self._writers is None or public_key in self._writers

    def named(self, name: str) -> bytes:
        """The public key in `<name>.key`, in Z85. ConfigError: there is none."""
        key = _public(self._folder / f"{name}.key")
        if key is None:
            fix = f"copy the other side's public key to {name}.key there"
            raise ConfigError("keys", str(self._folder), fix)
        return key

    def _read_allowed(self) -> None:
        now_s = time.monotonic()
        if now_s < self._read_at_s + _READ_AGAIN_S:
            return
        self._read_at_s = now_s
        folder = self._folder / WRITERS
        self._writers = _public_keys(folder) if folder.exists() else None
        self._allowed = _public_keys(self._folder) | (self._writers or frozenset())

    def callback(self, domain: str, key: bytes) -> bool:
        """What `zmq.auth` asks, on its own thread."""
        return self.allows(key)

    def serve(self, socket: zmq.Socket[bytes]) -> None:
        """Only those who hold an allowed key may connect to `socket`, and none when nobody checks."""
        socket.curve_publickey, socket.curve_secretkey = self.public, self._secret
        socket.curve_server = True
        socket.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN.encode())
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)

    def connect(self, socket: zmq.Socket[bytes], server_key: bytes) -> None:
        """`socket` talks to the holder of `server_key` and to nobody else."""
        socket.curve_publickey, socket.curve_secretkey = self.public, self._secret
        socket.curve_serverkey = server_key

    def authenticator(self, context: zmq.Context[zmq.Socket[bytes]]) -> ThreadAuthenticator:
        """Checks who connects to sockets of `context`. Started; its owner stops it."""
        checker: Any = ThreadAuthenticator(context)
        checker.start()
        checker.configure_curve_callback(_DOMAIN, credentials_provider=self)
        return checker  # type: ignore[no-any-return]


def _read(file: Path) -> tuple[bytes, bytes]:
    try:
        public, secret = zmq.auth.load_certificate(file)
    except (OSError, ValueError, IndexError) as error:
        raise ConfigError("keys", str(file), str(error)) from None
    if secret is None:
        raise ConfigError("keys", str(file), "it holds no secret key: vllm-kvpool keygen")
    return public, secret


def _public_keys(folder: Path) -> frozenset[bytes]:
    return frozenset(key for key in map(_public, folder.glob("*.key")) if key)


def _public(file: Path) -> bytes | None:
    """None: no key file after all, or one that is just being written."""
    try:
        return zmq.auth.load_certificate(file)[0]
    except (OSError, ValueError, IndexError):  # IndexError: a line without "="
        return None
