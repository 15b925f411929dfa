"""Sizes, names and strictness of both configurations."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_kvpool.config import ConnectorConfig, PoolConfig, parse_size, pool_dir
from vllm_kvpool.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("64GiB", 64 << 30),
        ("1.5 MiB", 3 << 19),
        ("2GB", 2 * 10**9),
        ("4096", 4096),
        (4096, 4096),
        ("80%", 800),
        ("12.5%", 125),
        (" 1KiB ", 1024),
    ],
)
def test_size(text: str | int, expected: int) -> None:
    assert parse_size("size", text, 1_000) == expected


@pytest.mark.parametrize(
    "text", ["", "lots", "64 gigs", "64gib", "-1", "0", "0%", "101%", "1e9", "GiB", "1,5GiB"]
)
def test_wrong_size_names_the_field_and_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^size = ") as caught:
        parse_size("size", text, 1_000)
    assert caught.value.fix


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "x" * 65, "ä", "a\n"])
def test_wrong_pool_name(name: str) -> None:
    for make in (lambda: pool_dir(name), lambda: PoolConfig(name=name)):
        with pytest.raises(ConfigError, match="slash"):
            make()
    with pytest.raises(ConfigError, match="slash"):
        ConnectorConfig(pool=name)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"pol": "x"}, "extra: pol = 'x': unknown key; known are pool, size"),
        ({"store": "some"}, 'extra: store = \'some\': write "all" or "prompt"'),
        ({"checksum": "on"}, 'extra: checksum = \'on\': write "off", "sampled" or "all"'),
        ({"min_load_tokens": "many"}, "extra: min_load_tokens = 'many': write a whole number"),
        ({"epoch": 1}, 'extra: epoch = 1: write it in quotes: "1"'),
        ({"epoch": True}, 'extra: epoch = True: write it in quotes: "true"'),
        ({"epoch": None}, "extra: epoch = None: write text in quotes"),
        ({"min_load_tokens": -1}, "min_load_tokens = -1: give 0 or more"),
        ({"load_deadline_ms": 0}, "load_deadline_ms = 0"),
        ({"checksum": True}, "extra: checksum = True"),
        ({"size": True}, "extra: size = True: give a size like"),
        ({"size": "5 apples"}, "size = '5 apples'"),
    ],
)
def test_wrong_extra_config(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ConnectorConfig.from_dict(values, "extra")
    assert str(caught.value).startswith(expected)


def test_plain_bytes_are_a_size() -> None:
    config = PoolConfig.from_dict({"size": 104857600, "min_block": 4096}, "file")
    assert (config.size, config.min_block) == (104857600, 4096)
    assert ConnectorConfig.from_dict({"size": 104857600}, "extra").size == 104857600


def test_a_share_needs_a_whole() -> None:
    with pytest.raises(ConfigError, match=r"or plain bytes$"):
        parse_size("min_block", "1%")


def test_auto_is_no_name_of_a_pool() -> None:
    for make in (lambda: pool_dir("auto"), lambda: PoolConfig(name="auto")):
        with pytest.raises(ConfigError, match='mean pool "default"'):
            make()


def test_auto_is_the_default_pool() -> None:
    assert ConnectorConfig().pool_name == "default"
    assert ConnectorConfig(pool="auto").pool_name == "default"
    assert ConnectorConfig(pool="main").pool_name == "main"


@pytest.mark.parametrize(
    "address",
    [
        "tcp://", "tcp://host", "tcp://host:", "tcp://host:0", "tcp://host:65536", "tcp://*:7707",
        "tcp:/host:7707", "tcp//host:7707", "host:7707", "http://host:7707", "tcp://ho st:7707",
        "tcp://::1:7707", "tcp://host:7707/", "tcp://host:port",
    ],
)  # fmt: skip
def test_wrong_remote_pool(address: str) -> None:
    with pytest.raises(ConfigError, match=r"^pool = .*give tcp://host:port"):
        ConnectorConfig(pool=address)


def test_a_remote_pool_has_a_small_one_in_front() -> None:
    config = ConnectorConfig(pool="tcp://10.0.0.1:7707")
    assert (config.upstream, config.pool_name) == ("tcp://10.0.0.1:7707", "to-10.0.0.1-7707")
    assert (config.pool_size, config.starts_daemon) == ("2GiB", True)
    assert ConnectorConfig(pool="tcp://h:1", size="8GiB").pool_size == "8GiB"
    here = ConnectorConfig(pool="main")
    assert (here.upstream, here.pool_size, here.starts_daemon) == ("", "50%", False)


def test_other_addresses_are_other_pools() -> None:
    addresses = ["tcp://[::1]:77", "tcp://[1::]:77", "tcp://a:77", f"tcp://{'a' * 60}:1"]
    addresses.append(f"tcp://{'a' * 60}:2")
    names = [ConnectorConfig(pool=address).pool_name for address in addresses]
    assert len(set(names)) == len(addresses)
    assert all(pool_dir(name).name for name in names)


def test_keys_are_for_a_remote_pool() -> None:
    ConnectorConfig(pool="tcp://h:1", keys="/keys").check_keys()
    with pytest.raises(ConfigError, match="another host"):
        ConnectorConfig(pool="main", keys="/keys").check_keys()
