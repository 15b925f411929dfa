"""Who may use an upstream, and how it is named."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
from helpers import keys_of, run_cli, store, until
from hosts.conftest import MakeHost, make_front, make_upstream
from hosts.fronts import COUNT, check_has, wait_pushed

from vllm_kvpool.host_keys import make_keys
from vllm_kvpool.types import num_refs


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Key folders of an upstream, of a host that it knows, and of a stranger."""
    made = {name: tmp_path / name for name in ("up", "front", "stranger")}
    public = {name: make_keys(folder, name)[0] for name, folder in made.items()}
    shutil.copy(public["front"], made["up"])
    for name in ("front", "stranger"):
        shutil.copy(public["up"], made[name] / "upstream.key")
    return made


def test_with_keys(make: MakeHost, folders: dict[str, Path]) -> None:
    upstream = make_upstream(make, "--keys", str(folders["up"]))
    front = make_front(make, upstream.port, "--keys", str(folders["front"]))
    keys = keys_of("chain", COUNT)
    store(front.client, keys)
    wait_pushed(front, COUNT)
    check_has(upstream, keys)
    front.client.drop(front.client.match_prefix(keys))
    until(lambda: num_refs(front.client.match_prefix(keys)) == 0, "the drop")
    assert front.pull(keys).blocks == COUNT
    check_has(front, keys)


@pytest.mark.parametrize("name", ["stranger", ""])
def test_an_unknown_key_writes_nothing(make: MakeHost, folders: dict[str, Path], name: str) -> None:
    upstream = make_upstream(make, "--keys", str(folders["up"]))
    options = ["--keys", str(folders[name])] if name else []
    front = make_front(make, upstream.port, *options)
    keys = keys_of("chain", 20)
    store(front.client, keys)
    assert front.pull(keys_of("other", 5), within_ms=1_000).blocks == 0
    until(lambda: front.counter("push_waiting") == 20, "the queue")
    counted = ("peer_requests", "written_blocks", "sent_blocks")
    assert [upstream.counter(name) for name in counted] == [0, 0, 0]
    check_has(front, keys)


def test_only_writers_write(make: MakeHost, folders: dict[str, Path]) -> None:
    """Where there is a list of them. Others read; who is added to it writes at once."""
    writers = folders["up"] / "writers"
    writers.mkdir()
    upstream = make_upstream(make, "--keys", str(folders["up"]))
    front = make_front(make, upstream.port, "--keys", str(folders["front"]))
    store(front.client, keys_of("first", 20))
    until(lambda: front.counter("push_refused") == 20, "the refusal")
    assert front.counter("peer_error_forbidden") == upstream.counter("error_forbidden") > 0
    assert upstream.counter("stored") == 0
    there = keys_of("there", 20)
    store(upstream.client, there)
    assert front.pull(there).blocks == 20
    check_has(front, there)
    (folders["up"] / "front.key").rename(writers / "front.key")

    def writes() -> bool:
        store(front.client, keys_of(f"at {time.monotonic()}", 2))
        time.sleep(0.1)
        return front.counter("pushed_blocks") > 0

    until(writes, "the right to write")


def test_a_key_that_comes_later_counts(make: MakeHost, folders: dict[str, Path]) -> None:
    upstream = make_upstream(make, "--keys", str(folders["up"]))
    stranger = make_front(make, upstream.port, "--keys", str(folders["stranger"]))
    store(stranger.client, keys_of("chain", 20))
    until(lambda: stranger.counter("push_waiting") == 20, "the queue")
    shutil.copy(folders["stranger"] / "stranger.key", folders["up"])
    wait_pushed(stranger, 20)
    check_has(upstream, keys_of("chain", 20))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--upstream", "10.0.0.1:7707"], "give tcp://host:port"),
        (["--upstream", "tcp://10.0.0.1"], "give tcp://host:port"),
        (["--upstream", "tcp://*:7707"], "give tcp://host:port"),
        (["--upstream", "tcp://10.0.0.1:0"], "give tcp://host:port"),
        (["--upstream", "tcp://10.0.0.1:70000"], "give tcp://host:port"),
        (["--upstream", "tcp://h:7", "--directory", "redis://h"], "leave one of them out"),
    ],
)
def test_refused_options(shm_dir: Path, options: list[str], says: str) -> None:
    common = ["--name", "test", "--size", "16MiB", "--shm-dir", str(shm_dir)]
    done = run_cli("serve", *common, *options)
    assert done.returncode == 2
    assert says in done.stderr


def test_keys_without_that_of_the_upstream(shm_dir: Path, folders: dict[str, Path]) -> None:
    common = ["--name", "test", "--size", "16MiB", "--shm-dir", str(shm_dir)]
    keys = ["--keys", str(folders["up"])]
    done = run_cli("serve", *common, "--upstream", "tcp://127.0.0.1:7", *keys)
    assert done.returncode == 2
    assert "copy the other side's public key to upstream.key" in done.stderr
