"""A prompt's token ids: from the body where it holds them, else an engine's `/tokenize` tells."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp

from vllm_kvpool.router.bounds import lightest
from vllm_kvpool.router.fleet import Fleet
from vllm_kvpool.router.types import ReplicaState

FIELDS = ("model", "messages", "prompt", "tools", "chat_template_kwargs", "add_generation_prompt")
"""Of a chat or completion body: what `/tokenize` takes too."""
TIMEOUT_SHARE = 0.25
"""Of how long a replica may take to answer a probe: a prompt that takes longer is routed by its text."""
_logger = logging.getLogger(__name__)


class Tokens:
    """Belongs to one event loop."""

    def __init__(self, fleet: Fleet, probe_timeout_s: float) -> None:
        self._fleet = fleet
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_SHARE * probe_timeout_s)
        self._session = aiohttp.ClientSession(timeout=timeout)

    async def of(self, body: Mapping[str, Any]) -> Sequence[int] | None:
        """None: it has neither messages nor one prompt, or no engine told in time."""
        if "messages" not in body and not isinstance(body.get("prompt"), str):
            return None
        able = [member for member in self._fleet if member.state is ReplicaState.ACCEPTING]
        if not able:
            return None
        url = f"{lightest(able).replica.url}/tokenize"
        asked = {field: body[field] for field in FIELDS if field in body}
        try:
            async with self._session.post(url, json=asked) as response:
                answer = await response.json() if response.status == 200 else {}
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            _logger.debug("no tokens from %s: %s", url, error or "too late")
            return None
        tokens = answer.get("tokens") if isinstance(answer, dict) else None
        return tokens if isinstance(tokens, list) else None

    async def close(self) -> None:
        await self._session.close()
