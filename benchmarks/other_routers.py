"""Other routers as child processes, for `bench_router`: nginx, and vllm-router and SMG from PyPI."""

from __future__ import annotations

import shutil
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.processes import ChildProcess, free_port

ROOT = Path(__file__).parents[1]
PEERS = ROOT / ".venv-routers" / "bin"
ANSWERS_S = 30.0

NGINX = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/nginx.err;
events {{ worker_connections 4096; }}
http {{
    access_log off; client_body_buffer_size 64k; keepalive_requests 1000000;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
    upstream replicas {{ {servers} keepalive 512; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://replicas; proxy_http_version 1.1; proxy_set_header Connection "";
            proxy_buffering off;
        }}
    }}
}}
"""


class Peer(NamedTuple):
    name: str
    port: int
    process: ChildProcess


def nginx(ports: list[int], folder: Path, prefix: tuple[str, ...]) -> Peer | None:
    program = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
    if program is None:
        return None
    port = free_port()
    servers = " ".join(f"server 127.0.0.1:{replica};" for replica in ports)
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(folder=folder, servers=servers, port=port))
    command = [*prefix, program, "-e", str(folder / "nginx.err"), "-c", str(config)]
    return Peer("nginx", port, ChildProcess(command, folder / "nginx.log"))


def vllm_router(ports: list[int], folder: Path, prefix: tuple[str, ...]) -> Peer | None:
    return _from_pypi("vllm-router", (), "round_robin", ports, folder, prefix)


def vllm_router_cache_aware(ports: list[int], folder: Path, prefix: tuple[str, ...]) -> Peer | None:
    return _from_pypi("vllm-router", (), "cache_aware", ports, folder, prefix)


def smg(ports: list[int], folder: Path, prefix: tuple[str, ...]) -> Peer | None:
    return _from_pypi("smg", ("launch",), "cache_aware", ports, folder, prefix)


def _from_pypi(
    program: str,
    verb: tuple[str, ...],
    policy: str,
    ports: list[int],
    folder: Path,
    prefix: tuple[str, ...],
) -> Peer | None:
    if not (PEERS / program).exists():
        return None
    port = free_port()
    urls = [f"http://127.0.0.1:{replica}" for replica in ports]
    command = [*prefix, str(PEERS / program), *verb, "--worker-urls", *urls, "--policy", policy]
    command += ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())]
    command += ["--log-level", "error"]  # as ours: no line for each request
    return Peer(
        f"{program} {policy}", port, ChildProcess(command, folder / f"{program}-{policy}.log")
    )


PEER_MAKERS: tuple[Callable[[list[int], Path, tuple[str, ...]], Peer | None], ...] = (
    nginx,
    vllm_router,
    vllm_router_cache_aware,
    smg,
)


def answers(port: int) -> bool:
    """A chat request gets through."""
    body = b'{"model":"m","messages":[{"role":"user","content":"hello"}]}'
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", body, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False
