"""Copies are copies as long as their source is in the directory."""

from __future__ import annotations

from types import SimpleNamespace

from vllm_kvpool.pool.sources import ABSENT_MS, Sources

A, B = bytes(16), b"b" * 16


class Owner:
    """Of a pool with copies of two hosts' blocks."""

    def __init__(self) -> None:
        self.known = [A, B]

    def copy_sources(self) -> list[bytes]:
        return self.known

    def forget_source(self, source: bytes) -> None:
        self.known = [known for known in self.known if known != source]


def test_forgotten_after_a_while_without_a_sign_of_life() -> None:
    owner, directory = Owner(), SimpleNamespace(living=frozenset({A, B}))
    sources = Sources(owner, directory)
    sources.review(0)
    directory.living = frozenset({A})
    sources.review(1_000)
    sources.review(1_000 + ABSENT_MS - 1)
    assert owner.known == [A, B]
    sources.review(1_000 + ABSENT_MS)
    assert owner.known == [A]


def test_a_short_absence_counts_for_nothing() -> None:
    """Redis was started anew; of the time before nothing is left when a host is missed again."""
    owner, directory = Owner(), SimpleNamespace(living=frozenset())
    sources = Sources(owner, directory)
    sources.review(0)
    directory.living = frozenset({A, B})
    sources.review(ABSENT_MS - 1)
    directory.living = frozenset()
    sources.review(ABSENT_MS)
    sources.review(2 * ABSENT_MS - 1)
    assert owner.known == [A, B]
    sources.review(2 * ABSENT_MS)
    assert owner.known == []


def test_without_a_directory_nobody_is_known() -> None:
    owner = Owner()
    sources = Sources(owner, None)
    sources.review(0)
    sources.review(ABSENT_MS)
    assert owner.known == []
