"""A client's stores in flight: one end each, and `writing` is exactly what the daemon must keep."""

from __future__ import annotations

import pytest

from vllm_kvpool.errors import ProtocolError
from vllm_kvpool.ledger import MAX_PREPARES, MAX_REFUSALS, MAX_WRITING, StoreGrant, StoreLedger
from vllm_kvpool.protocol import CompleteStore, Prepared, PrepareStore
from vllm_kvpool.types import NO_REFS, pack_refs


@pytest.fixture
def ledger() -> StoreLedger:
    return StoreLedger()


def ask(ledger: StoreLedger, request_id: int, blocks: int = 2, due_ms: int = 100) -> None:
    ledger.asked(PrepareStore(id=request_id, keys=bytes(32 * blocks)), due_ms)
    ledger.check_integrity()


def grant(ledger: StoreLedger, request_id: int, *refs: int) -> bytes:
    late = ledger.granted(Prepared(id=request_id, refs=pack_refs(refs)))
    ledger.check_integrity()
    return late


def test_a_store_from_request_to_acknowledgement(ledger: StoreLedger) -> None:
    ask(ledger, 1)
    assert grant(ledger, 1, 7, 8) == b""
    assert ledger.take_finished() == [StoreGrant(1, pack_refs([7, 8]))]
    assert ledger.take_finished() == []
    assert sorted(ledger.writing) == sorted(pack_refs([7, 8]))

    kept = ledger.completing(2, 1, pack_refs([8]))
    assert kept == CompleteStore(id=2, refs=pack_refs([7]), aborted=pack_refs([8]))
    assert ledger.unsent == [kept]
    assert sorted(ledger.writing) == sorted(pack_refs([7, 8]))
    ledger.check_integrity()
    ledger.sent(kept, due_ms=200)
    assert ledger.unsent == []
    ledger.completed(2)
    assert ledger.writing == b""
    ledger.check_integrity()


def test_no_room_leaves_nothing_to_write(ledger: StoreLedger) -> None:
    ask(ledger, 1)
    grant(ledger, 1, 0, 0)
    assert ledger.writing == b""


def test_late_grant_is_given_back(ledger: StoreLedger) -> None:
    ask(ledger, 1)
    assert ledger.lose_outstanding("timeout") == 1
    assert ledger.take_finished() == [StoreGrant(1, None, "timeout")]
    assert grant(ledger, 1, 7, 0, 8) == pack_refs([7, 8])
    assert ledger.writing == b""
    assert ledger.take_finished() == []


def test_completion_is_sent_again_after_a_loss(ledger: StoreLedger) -> None:
    ask(ledger, 1, blocks=1)
    grant(ledger, 1, 7)
    kept = ledger.completing(2, 1, NO_REFS)
    assert kept is not None
    ledger.sent(kept, due_ms=200)
    ledger.lose_outstanding("lost")
    assert ledger.unsent == [kept]
    assert ledger.writing == pack_refs([7])


def test_a_grant_ends_once(ledger: StoreLedger) -> None:
    assert ledger.completing(5, 1, NO_REFS) is None
    ask(ledger, 1, blocks=1)
    grant(ledger, 1, 7)
    assert ledger.completing(5, 1, NO_REFS) is not None
    assert ledger.completing(6, 1, NO_REFS) is None
    ledger.check_integrity()


def test_overdue(ledger: StoreLedger) -> None:
    assert not ledger.overdue(10**9)
    ask(ledger, 1, due_ms=100)
    ask(ledger, 2, due_ms=150)
    assert not ledger.overdue(99)
    assert ledger.overdue(100)
    grant(ledger, 1, 7, 8)
    assert not ledger.overdue(149)
    kept = ledger.completing(3, 1, NO_REFS)
    assert kept is not None
    assert not ledger.overdue(149)  # not sent yet: nobody owes an answer
    ledger.sent(kept, due_ms=120)
    assert ledger.overdue(120)


def test_refusals(ledger: StoreLedger) -> None:
    ask(ledger, 1)
    ledger.refused(1, "deadline")
    assert ledger.take_finished() == [StoreGrant(1, None, "deadline")]
    ask(ledger, 2, blocks=1)
    grant(ledger, 2, 7)
    ledger.completing(3, 2, NO_REFS)
    assert ledger.refused(3, "malformed")  # the daemon still has the slot: say hello
    assert ledger.writing == b""
    assert ledger.unsent == []
    assert not ledger.refused(99, "internal")


def test_refused_completion_is_sent_again_but_not_for_ever(ledger: StoreLedger) -> None:
    ask(ledger, 1, blocks=1)
    grant(ledger, 1, 7)
    kept = ledger.completing(2, 1, NO_REFS)
    assert kept is not None
    for refusal in range(MAX_REFUSALS):
        assert ledger.unsent == [kept], refusal
        assert ledger.writing == pack_refs([7])
        ledger.sent(kept, due_ms=200)
        assert ledger.refused(2, "internal")
        ledger.lose_outstanding("lost")
        ledger.check_integrity()
    assert ledger.unsent == []
    assert ledger.writing == b""


@pytest.mark.parametrize("refs", [b"", bytes(8), bytes(15), bytes(17), bytes(24)])
def test_grant_for_another_count_of_keys_is_refused(ledger: StoreLedger, refs: bytes) -> None:
    ask(ledger, 1, blocks=2)
    with pytest.raises(ProtocolError):
        ledger.granted(Prepared(id=1, refs=refs))
    ledger.check_integrity()
    assert ledger.writing == b""
    assert ledger.take_finished() == []


def test_late_grant_of_half_a_reference_is_refused(ledger: StoreLedger) -> None:
    with pytest.raises(ProtocolError):
        ledger.granted(Prepared(id=1, refs=bytes(12)))


def test_another_pool_forgets_all(ledger: StoreLedger) -> None:
    ask(ledger, 1, blocks=1)
    ask(ledger, 2)
    grant(ledger, 1, 7)
    ledger.completing(3, 1, NO_REFS)
    ledger.forget()
    assert ledger.writing == b""
    assert ledger.unsent == []
    # Also the grant that came just before the news of another pool: its slots are not there.
    assert {(done.refs, done.reason) for done in ledger.take_finished()} == {(None, "lost")}
    ledger.check_integrity()


def test_bounds(ledger: StoreLedger) -> None:
    assert ledger.has_room(MAX_WRITING)
    assert not ledger.has_room(MAX_WRITING + 1)
    for request_id in range(MAX_PREPARES):
        assert ledger.has_room(1)
        ask(ledger, request_id)
    assert not ledger.has_room(1)
