"""The ledger counts by tier, and says once what is most likely wrong when hits stay away."""

from __future__ import annotations

import msgspec

from tests.unit.router.values import request_of
from vllm_kvpool.router.keys import TEXT_BLOCK_BYTES, TEXT_BLOCK_TOKENS
from vllm_kvpool.router.prediction_ledger import MIN_ANSWERS, QUIET_S, WINDOW, PredictionLedger
from vllm_kvpool.router.prompt_history import CAPACITY, PromptHistory
from vllm_kvpool.router.types import Hits, RouteRequest

TOKENS = TEXT_BLOCK_TOKENS
HITS = Hits(4 * TOKENS, 6 * TOKENS)


class Told:
    """Answers of one replica, a second apart."""

    def __init__(self) -> None:
        self.ledger = PredictionLedger()
        self.now = 0.0

    def answers(
        self, n: int, cached: int | None, hits: Hits = HITS, request: RouteRequest | None = None
    ) -> list[str]:
        """The warnings."""
        warnings = []
        for _ in range(n):
            self.now += 1
            asked = request or request_of(f"{self.now}", blocks=20)
            warning = self.ledger.record("task", asked, "a", hits, 20 * TOKENS, cached, self.now)
            self.ledger.check_integrity()
            warnings += [warning] if warning else []
        return warnings


def test_hits_are_counted_by_tier_in_the_engines_tokens() -> None:
    ledger = PredictionLedger()
    request = request_of("s", blocks=20, stable=4)
    # the engine counts half as many tokens as the estimate
    ledger.record("task", request, "a", HITS, 10 * TOKENS, 4 * TOKENS, 1.0)
    totals = ledger.totals["task", "a"]
    assert (totals.answers, totals.unreported, totals.prompt) == (1, 0, 10 * TOKENS)
    assert (totals.predicted_stable, totals.predicted_session) == (2 * TOKENS, 3 * TOKENS)
    assert (totals.reported_stable, totals.reported_session) == (2 * TOKENS, 2 * TOKENS)


def test_good_predictions_warn_of_nothing() -> None:
    assert not Told().answers(300, HITS.total)
    assert not Told().answers(300, 0, hits=Hits())


def test_no_hits_at_all_point_at_hashes() -> None:
    told = Told()
    (warning,) = told.answers(100, 0)
    assert "prefix caching is off" in warning
    assert "PYTHONHASHSEED" in warning
    assert not told.answers(int(QUIET_S) - 120, 0)
    assert told.answers(200, 0)


def test_few_hits_point_at_the_cache() -> None:
    (warning,) = Told().answers(100, TOKENS)
    assert "smaller than told" in warning


def test_an_event_of_the_fleet_explains_for_a_while() -> None:
    told = Told()
    told.ledger.noted("add", "b", 0.0)
    (warning,) = told.answers(100, 0)
    assert "add of b 16 s ago" in warning
    old = Told()
    old.now = 10_000.0
    old.ledger.noted("add", "b", 0.0)
    assert "add of b" not in old.answers(100, 0)[0]


def test_a_restart_begins_the_window_anew() -> None:
    told = Told()
    assert not told.answers(MIN_ANSWERS - 1, 0)
    told.ledger.noted("restart", "a", told.now)
    assert not told.answers(MIN_ANSWERS - 1, 0)
    (warning,) = told.answers(1, 0)
    assert "restart of a" in warning


def test_answers_without_the_field_point_at_the_flag() -> None:
    told = Told()
    assert not told.answers(WINDOW - 1, None)
    (warning,) = told.answers(1, None)
    assert "--enable-prompt-tokens-details" in warning
    assert told.ledger.totals["task", "a"].unreported == WINDOW


def test_prompts_that_change_are_told_with_the_place() -> None:
    told, warnings = Told(), []
    for number in range(MIN_ANSWERS + 1):
        request = request_of("s", blocks=20)
        changed = (*request.blocks[:3], number, *request.blocks[4:])
        request = msgspec.structs.replace(request, blocks=changed)
        warnings += told.answers(1, 0, hits=Hits(), request=request)
    (warning,) = warnings
    assert f"near byte {3 * TEXT_BLOCK_BYTES};" in warning


def test_a_replica_that_is_gone_leaves_nothing() -> None:
    told = Told()
    told.answers(5, 0)
    told.ledger.forget("a")
    assert not told.ledger.totals
    assert not told.ledger._recent


def test_a_prompt_that_grows_has_not_changed() -> None:
    history = PromptHistory()
    for blocks in (5, 5, 40, 300, 301):
        assert history.compare(request_of("s", blocks=blocks)) is None
    history.check_integrity()


def test_a_change_is_placed_to_a_thirty_second_part() -> None:
    history = PromptHistory()
    request = request_of("s", blocks=320)
    history.compare(request)
    other = msgspec.structs.replace(request, blocks=(*request.blocks[:100], *range(220)))
    found = history.compare(other)
    assert found is not None
    assert 90 * TEXT_BLOCK_BYTES <= found <= 100 * TEXT_BLOCK_BYTES


def test_no_more_sessions_are_remembered_than_told() -> None:
    history = PromptHistory()
    for number in range(CAPACITY + 100):
        history.compare(request_of(f"{number}", blocks=2))
    history.check_integrity()
