"""Who may read blocks, and who may not."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq
from helpers import PATIENT_MS, check_bytes, keys_of, run_cli, store, until
from hosts.conftest import Host, wait_listed

from vllm_kvpool.host_keys import HostKeys, make_keys

MakeHost = Callable[..., Host]
QUIET_MS = 1_500


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Key folders of hosts a and b, which know each other, and of a stranger who knows them."""
    made = {name: tmp_path / name for name in ("a", "b", "stranger")}
    public = {name: make_keys(folder, name)[0] for name, folder in made.items()}
    for to, others in (("a", "b"), ("b", "a"), ("stranger", "ab")):
        for other in others:
            (made[to] / f"{other}.key").write_bytes(public[other].read_bytes())
    return made


@pytest.fixture
def dial() -> Iterator[Callable[..., zmq.Socket[bytes]]]:
    """Connections to a host's door, past all of our own code."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sockets = []

    def connect(port: int, server: HostKeys | None = None, own: HostKeys | None = None) -> Any:
        socket = context.socket(zmq.DEALER)
        if own is not None and server is not None:
            own.connect(socket, server.public)
        socket.connect(f"tcp://127.0.0.1:{port}")
        sockets.append(socket)
        return socket

    yield connect
    for socket in sockets:
        socket.close(linger=0)
    context.term()


def hears(socket: zmq.Socket[bytes], within_ms: int) -> bool:
    """Whether anything at all comes back for a hello."""
    socket.send(msgpack.packb({"type": "hello", "id": 1, "version": 1, "now_ms": 0, "pid": 1}))
    return bool(socket.poll(within_ms))


def check_silent(socket: zmq.Socket[bytes]) -> None:
    assert not hears(socket, QUIET_MS)


def check_welcome(socket: zmq.Socket[bytes]) -> None:
    assert hears(socket, PATIENT_MS)
    assert msgpack.unpackb(socket.recv())["type"] == "welcome"


def test_hosts_that_know_each_other_share(make_host: MakeHost, folders: dict[str, Path]) -> None:
    a, b = (make_host("--keys", str(folders[name])) for name in "ab")
    keys = keys_of("chain", 40)
    store(a.client, keys)
    wait_listed(a, keys)
    assert b.pull(keys).blocks == 40
    check_bytes(b.client, keys, b.client.match_prefix(keys))


def test_one_pair_for_all_hosts(make_host: MakeHost, tmp_path: Path) -> None:
    """As daemons have it that share one Secret: whoever holds the key is one of us."""
    make_keys(tmp_path / "keys", "pool")
    a, b = (make_host("--keys", str(tmp_path / "keys")) for _ in range(2))
    keys = keys_of("chain", 10)
    store(a.client, keys)
    wait_listed(a, keys)
    assert b.pull(keys).blocks == 10


def test_an_unknown_key_gets_nothing(
    make_host: MakeHost, folders: dict[str, Path], dial: Callable[..., Any]
) -> None:
    a = make_host("--keys", str(folders["a"]))
    server = HostKeys(folders["a"])
    check_silent(dial(a.port, server, HostKeys(folders["stranger"])))
    check_silent(dial(a.port))  # without any
    check_welcome(dial(a.port, server, HostKeys(folders["b"])))
    assert a.counter("peer_requests") == 1


def test_a_stranger_pulls_nothing(make_host: MakeHost, folders: dict[str, Path]) -> None:
    """It finds the entry in the directory, and there it ends."""
    a = make_host("--keys", str(folders["a"]))
    stranger = make_host("--keys", str(folders["stranger"]))
    keys = keys_of("chain", 10)
    store(a.client, keys)
    wait_listed(a, keys)
    pulled = stranger.pull(keys, within_ms=1_500)
    assert pulled.blocks == 0
    assert pulled.reason in {"lost", "deadline"}
    assert (a.counter("sent_blocks"), a.counter("peer_requests")) == (0, 0)


def test_a_host_whose_key_is_not_ours_is_not_asked(
    make_host: MakeHost, folders: dict[str, Path]
) -> None:
    """Whoever can write to the directory could send us to any address."""
    b, stranger = (make_host("--keys", str(folders[name])) for name in ("b", "stranger"))
    keys = keys_of("chain", 10)
    store(stranger.client, keys)
    wait_listed(stranger, keys)
    assert b.pull(keys).blocks == 0
    assert b.counter("peers_unknown_key") == 1


def test_a_key_that_comes_later_counts(
    make_host: MakeHost, folders: dict[str, Path], dial: Callable[..., Any]
) -> None:
    a = make_host("--keys", str(folders["a"]))
    server, stranger = HostKeys(folders["a"]), HostKeys(folders["stranger"])
    check_silent(dial(a.port, server, stranger))
    public = (folders["stranger"] / "stranger.key").read_bytes()
    (folders["a"] / "stranger.key").write_bytes(public)
    # Who is refused once more is not heard over that connection again.
    until(lambda: hears(dial(a.port, server, stranger), QUIET_MS), "the folder to be read again")
    check_welcome(dial(a.port, server, stranger))


def test_a_key_that_is_taken_away_counts_no_more(folders: dict[str, Path]) -> None:
    keys, other = HostKeys(folders["a"]), HostKeys(folders["b"])
    assert keys.allows(other.public)
    (folders["a"] / "b.key").unlink()
    until(lambda: not keys.allows(other.public), "the folder to be read again")


def test_a_half_written_key_file_is_passed_over(
    make_host: MakeHost, folders: dict[str, Path], dial: Callable[..., Any]
) -> None:
    a = make_host("--keys", str(folders["a"]))
    (folders["a"] / "half.key").write_text("metadata\ncurve\n    public-key")
    server = HostKeys(folders["a"])
    check_silent(dial(a.port, server, HostKeys(folders["stranger"])))
    check_welcome(dial(a.port, server, HostKeys(folders["b"])))


def test_keygen(tmp_path: Path) -> None:
    done = run_cli("keygen", tmp_path / "keys", "--name", "host1")
    assert done.returncode == 0, done.stderr
    secret = tmp_path / "keys/host1.key_secret"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    keys = HostKeys(tmp_path / "keys")
    assert keys.allows(keys.public)
    assert "secret" not in (tmp_path / "keys/host1.key").read_text().split("curve", 1)[1]
    again = run_cli("keygen", tmp_path / "keys", "--name", "host1")
    assert again.returncode == 2
    assert "exists already" in again.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--listen", "tcp://10.1.2.3:7707"], "--insecure"),
        (["--listen", "tcp://*:7707"], "--insecure"),
        (["--listen", "tcp://[::]:7707", "--insecure", "--directory", "redis://h"], "--advertise"),
        (["--listen", "udp://127.0.0.1:7707"], "tcp://address:port"),
        (["--listen", "tcp://127.0.0.1"], "tcp://address:port"),
        (["--listen", "tcp://127.0.0.1:7707", "--advertise", "tcp://*:7707"], "other hosts use"),
        (["--listen", "tcp://127.0.0.1:7707", "--keys", "/nowhere"], "keygen"),
        (["--directory", "http://h"], "redis://"),
        (["--listen", "tcp://192.0.2.1:7707", "--insecure"], "listen"),
    ],
)
def test_refused(shm_dir: Path, options: list[str], says: str) -> None:
    done = run_cli("serve", "--shm-dir", shm_dir, "--size", "16MiB", *options)
    assert done.returncode == 2
    assert says in done.stderr


def test_a_password_is_not_shown(shm_dir: Path) -> None:
    url = "http://user:secret@h"
    done = run_cli("serve", "--shm-dir", shm_dir, "--size", "16MiB", "--directory", url)
    assert "secret" not in done.stdout + done.stderr
