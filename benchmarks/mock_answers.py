"""What a mock replica makes of bodies, and its answers: "tokens", chains of block hashes, shapes of OpenAI replies."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

TOKEN_BYTES = 4
WORD = "tok "
"""One token of an answer."""


# texts and tokens ---------------------------------------------------------------------------------


def prompt_of(body: dict[str, Any]) -> str | list[int]:
    """The text that the "chat template" makes, which grows at its end as a conversation does."""
    prompt = body.get("prompt", body.get("input", ""))
    messages = body.get("messages", prompt if _is_messages(prompt) else None)
    if messages is None:
        return prompt if isinstance(prompt, list) else f"{body.get('instructions') or ''}{prompt}"
    tools = msgspec.json.encode(body["tools"]).decode() if body.get("tools") else ""
    turns = "".join(f"<|{m.get('role')}|>{_content(m.get('content'))}" for m in messages)
    return f"{tools}{body.get('instructions') or ''}{turns}<|assistant|>"


def _is_messages(prompt: object) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)


def _content(content: object) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(content or "")


def tokens_of(prompt: str | list[Any]) -> list[int]:
    if isinstance(prompt, str):
        return tokens_of_bytes(prompt.encode("utf-8", "replace"))
    if all(isinstance(token, int) for token in prompt):
        return prompt
    return tokens_of_bytes("".join(map(str, prompt)).encode("utf-8", "replace"))


def with_answer(prompt: str | list[Any], output_tokens: int) -> list[int]:
    """What is cached in the end: all but the last token of the answer."""
    if isinstance(prompt, str):
        return tokens_of(prompt + WORD * (output_tokens - 1))
    return [*tokens_of(prompt), *tokens_of(WORD * (output_tokens - 1))]


def tokens_of_bytes(text: bytes) -> list[int]:
    padded = text + b" " * (-len(text) % TOKEN_BYTES)
    return list(memoryview(padded).cast("I"))


def chain_of(tokens: Sequence[int], block_tokens: int) -> list[int]:
    """Chained 64-bit hashes of the full blocks, as KV events carry them."""
    chain, parent = [], b"mock"
    for end in range(block_tokens, len(tokens) + 1, block_tokens):
        block = repr(tokens[end - block_tokens : end]).encode()
        parent = hashlib.blake2b(parent + block, digest_size=8).digest()
        chain.append(int.from_bytes(parent, "big"))
    return chain


def runs(positions: Iterable[int]) -> list[tuple[int, int]]:
    """Neighbours together, as (first, end)."""
    found: list[tuple[int, int]] = []
    for position in positions:
        if found and found[-1][1] == position:
            found[-1] = (found[-1][0], position + 1)
        else:
            found.append((position, position + 1))
    return found


# answers ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """One answer in the shape of its endpoint."""

    path: str
    model: str
    output_tokens: int
    usage: dict[str, Any]

    def whole(self) -> dict[str, Any]:
        text = WORD * self.output_tokens
        if self.path.endswith("/responses"):
            content = [{"type": "output_text", "text": text, "annotations": []}]
            message = {"type": "message", "role": "assistant", "id": "msg-0", "content": content}
            base = {"id": "resp-0", "object": "response", "status": "completed"}
            return {
                **base,
                "model": self.model,
                "output": [message],
                "usage": self._responses_usage(),
            }
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length"}
        if self.path.endswith("/chat/completions"):
            choice["message"] = {"role": "assistant", "content": text}
            kind = "chat.completion"
        else:
            choice["text"] = text
            kind = "text_completion"
        base = {"id": "mock-0", "object": kind, "created": 0, "model": self.model}
        return {**base, "choices": [choice], "usage": self.usage}

    def parts(self, with_usage: bool) -> list[bytes]:
        """Server-sent events, one a token."""
        if self.path.endswith("/responses"):
            delta = {"type": "response.output_text.delta", "delta": WORD}
            done = {"type": "response.completed", "response": self.whole()}
            return [
                *[_event(delta, delta["type"])] * self.output_tokens,
                _event(done, done["type"]),
            ]
        chat = self.path.endswith("/chat/completions")
        choice = {
            "index": 0,
            "finish_reason": None,
            **({"delta": {"content": WORD}} if chat else {"text": WORD}),
        }
        kind = "chat.completion.chunk" if chat else "text_completion"
        base = {"id": "mock-0", "object": kind, "created": 0, "model": self.model}
        parts = [_event({**base, "choices": [choice]})] * self.output_tokens
        if with_usage:
            parts.append(_event({**base, "choices": [], "usage": self.usage}))
        return [*parts, b"data: [DONE]\n\n"]

    def _responses_usage(self) -> dict[str, Any]:
        return {
            "input_tokens": self.usage["prompt_tokens"],
            "input_tokens_details": self.usage["prompt_tokens_details"],
            "output_tokens": self.usage["completion_tokens"],
            "total_tokens": self.usage["total_tokens"],
        }


def _event(data: dict[str, Any], name: str = "") -> bytes:
    head = f"event: {name}\n".encode() if name else b""
    return b"%bdata: %b\n\n" % (head, msgspec.json.encode(data))


def usage_of(prompt_tokens: int, output_tokens: int, cached_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def output_tokens_of(body: dict[str, Any]) -> int:
    for field_name in ("max_completion_tokens", "max_tokens", "max_output_tokens"):
        if isinstance(body.get(field_name), int):
            return max(1, int(body[field_name]))
    return 16
