"""A Redis behind TLS and a password: it serves who may ask, and what does not fit is said in the log
while the host goes on alone."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import redis
from helpers import WAIT_S, keys_of, run_cli, store, until
from hosts.conftest import Host, wait_listed
from redis_server import RedisServer, redis_program

MakeHost = Callable[..., Host]
MakeServer = Callable[..., "TlsRedisServer"]
MakeCertificate = Callable[..., "Certificate"]
PASSWORD = "open sesame"  # with a blank, as a URL has to quote it
QUOTED = "open%20sesame"


class Certificate(NamedTuple):
    """Signed by itself, so it is its own authority."""

    file: Path
    key: Path


@pytest.fixture
def make_certificate(tmp_path: Path) -> MakeCertificate:
    if shutil.which("openssl") is None:
        pytest.skip("certificates are made with openssl: install it")

    def make(name: str, address: str = "IP:127.0.0.1") -> Certificate:
        made = Certificate(tmp_path / f"{name}.crt", tmp_path / f"{name}.key")
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
             "-subj", f"/CN={name}", "-addext", f"subjectAltName={address}",
             "-keyout", made.key, "-out", made.file],
            check=True, capture_output=True,
        )  # fmt: skip
        return made

    return make


class TlsRedisServer(RedisServer):
    """Answers over TLS only."""

    def __init__(self, folder: Path, certificate: Certificate, *options: str) -> None:
        super().__init__(folder, password=PASSWORD)
        self.certificate = certificate
        tls = ["--tls-cert-file", certificate.file, "--tls-key-file", certificate.key]
        tls += ["--tls-ca-cert-file", certificate.file, "--tls-auth-clients", "no"]
        self.options = (*self.options, "--port", "0", *map(str, tls), *options)
        self.options = (*self.options, "--tls-port", str(self.port))

    def url_with(self, authority: Path, *options: str) -> str:
        query = "&".join([f"ssl_ca_certs={authority}", *options])
        return f"rediss://:{QUOTED}@127.0.0.1:{self.port}?{query}"

    @property
    def client(self) -> redis.Redis:
        return redis.Redis(
            host=self.host, port=self.port, password=self.password, socket_timeout=WAIT_S, ssl=True,
            ssl_ca_certs=str(self.certificate.file), ssl_check_hostname=False,
            ssl_certfile=str(self.certificate.file), ssl_keyfile=str(self.certificate.key),
        )  # fmt: skip


@pytest.fixture
def make_server(tmp_path: Path) -> Iterator[MakeServer]:
    servers: list[TlsRedisServer] = []
    look = [redis_program(), "--port", "0", "--tls-port", "0"]
    found = subprocess.run(look, capture_output=True, text=True, timeout=30, check=False)
    if "tls-port" in found.stdout + found.stderr:
        pytest.skip(f"{look[0]} was built without TLS: install a redis-server that has it")

    def make(certificate: Certificate, *options: str) -> TlsRedisServer:
        server = TlsRedisServer(tmp_path, certificate, *options)
        server.start()
        servers.append(server)
        return server

    yield make
    for server in servers:
        server.kill()


def works_alone(host: Host) -> bool:
    keys = keys_of("own", 20)
    store(host.client, keys)
    return len(host.client.match_prefix(keys)) == 20 * 8


def refusal(host: Host) -> str:
    """The log's line about it; there is one, without a password in it."""
    until(lambda: host.counter("directory_errors") > 1, "several tries")
    errors = host.daemon.errors()
    assert "sesame" not in errors
    assert "Traceback" not in errors
    (line,) = (line for line in errors.splitlines() if "the directory is away" in line)
    assert works_alone(host)
    return line


def test_hosts_share_through_it(
    make_host: MakeHost, make_server: MakeServer, make_certificate: MakeCertificate
) -> None:
    server = make_server(make_certificate("redis"))
    url = server.url_with(server.certificate.file)
    a, b = (make_host(server=server, url=url) for _ in range(2))
    store(a.client, keys_of("chain", 20))
    wait_listed(a, keys_of("chain", 20))
    until(lambda: b.pull(keys_of("chain", 20)).blocks == 20, "the directory")
    assert a.counter("directory_errors") == 0


def test_a_clients_certificate(
    make_host: MakeHost, make_server: MakeServer, make_certificate: MakeCertificate
) -> None:
    """Where the server wants one, too."""
    server = make_server(make_certificate("redis"), "--tls-auth-clients", "yes")
    own = f"ssl_certfile={server.certificate.file}&ssl_keyfile={server.certificate.key}"
    a = make_host(server=server, url=server.url_with(server.certificate.file, own))
    store(a.client, keys_of("chain", 20))
    wait_listed(a, keys_of("chain", 20))
    without = make_host(url=server.url_with(server.certificate.file))
    assert refusal(without)


def test_another_authority(
    make_host: MakeHost, make_server: MakeServer, make_certificate: MakeCertificate
) -> None:
    server = make_server(make_certificate("redis"))
    host = make_host(url=server.url_with(make_certificate("other").file))
    assert "certificate verify failed" in refusal(host)
    assert server.client.keys("kvpool:*") == []


def test_a_certificate_of_another_name(
    make_host: MakeHost, make_server: MakeServer, make_certificate: MakeCertificate
) -> None:
    server = make_server(make_certificate("redis", "DNS:elsewhere.example"))
    host = make_host(url=server.url_with(server.certificate.file))
    assert "is not valid for '127.0.0.1'" in refusal(host)


def test_a_wrong_password(
    make_host: MakeHost, make_server: MakeServer, make_certificate: MakeCertificate
) -> None:
    server = make_server(make_certificate("redis"))
    url = server.url_with(server.certificate.file).replace(QUOTED, "sesame")
    assert "invalid username-password pair" in refusal(make_host(url=url))


def test_no_tls_at_the_server(make_host: MakeHost, redis_server: RedisServer) -> None:
    host = make_host(url=redis_server.url.replace("redis://", "rediss://"), tune=lambda d: d)
    assert refusal(host)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("ssl_ca_certs=/nowhere.crt", "ssl_ca_certs=/nowhere.crt: "),
        ("ssl_ca_certs=/proc/version", "ssl_ca_certs=/proc/version: "),
        ("ssl_certfile=/nowhere.crt", "ssl_certfile=/nowhere.crt, ssl_keyfile: "),
        ("ssl_cacerts=/etc/ca.crt", "ssl_cacerts"),
        ("socket_timeout=soon", "socket_timeout"),
    ],
)
def test_what_can_never_work_is_refused(shm_dir: Path, options: str, says: str) -> None:
    url = f"rediss://:{QUOTED}@127.0.0.1:6379?{options}"
    done = run_cli("serve", "--shm-dir", shm_dir, "--size", "16MiB", "--directory", url)
    assert done.returncode == 2
    assert says in done.stderr
    assert "sesame" not in done.stderr
