"""systemd's readiness protocol (sd_notify(3)): a datagram to the socket that NOTIFY_SOCKET
names."""

from __future__ import annotations

import contextlib
import os
import socket


def notify(state: str) -> None:
    """`READY=1` or `STOPPING=1`. Does nothing when no service manager asked for it, or it is
    gone."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in {"/", "@"}:
        return
    kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
    with socket.socket(socket.AF_UNIX, kind) as manager, contextlib.suppress(OSError):
        # A leading "@" stands for the zero byte of Linux's abstract names.
        manager.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)
