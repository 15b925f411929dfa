"""For HTTP/1.0 clients, which know no chunks: the body's bytes without their framing."""

from __future__ import annotations

from vllm_kvpool.router.upstream import UpstreamConnection


class UnchunkingConnection(UpstreamConnection):
    """Used for one request; the end of the client's connection ends the answer."""

    def on_body(self, part: bytes) -> None:
        super()._pass_on(part)

    def _pass_on(self, data: bytes) -> None:
        """The parser does, by `on_body`."""
