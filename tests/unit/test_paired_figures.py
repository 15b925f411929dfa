"""What the scripts that take turns make of their turns: figures from pairs of the same round, not of medians."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from benchmarks import arms, bench_crossover, bench_multiturn, bench_overhead, bench_ttft
from vllm_kvpool.errors import ConfigError

REPEATS = 3
SLOW = (1.0, 1.0, 3.0, 1.0, 1.0)
"""By prompt or round: a phase in which all take three times as long."""


def ttft_turns(**ms: float) -> list[Any]:
    turns: list[Any] = [{"start_s": 1.0}]
    for number, factor in enumerate(SLOW):
        for kind in bench_ttft.KINDS:
            turn = {"tokens": 64, "prompt": number, "kind": kind, "cached": 48, "output": [number]}
            turns.append({**turn, "ms": ms[kind] * factor} if kind in ms else None)
    return turns


def test_prompts_are_counted_by_their_length() -> None:
    assert bench_ttft.repeats_of([512, 8_192, 65_536], None) == {512: 28, 8_192: 14, 65_536: 7}
    assert bench_ttft.repeats_of([512, 8_192], [2, 1]) == {512: 2, 8_192: 1}
    with pytest.raises(ConfigError, match="--repeats = '28,14,7': give a number for each of the 1"):
        bench_ttft.repeats_of([8_192], [28, 14, 7])


def test_engines_take_the_longest_prompt() -> None:
    args = argparse.Namespace(lengths=[512, 65_536], kv_gib=None, graphs=False, engine={})
    bench_ttft.fit_prompts(args, token_bytes=131_072)
    assert args.kv_gib == 16.5
    assert args.engine == {"enforce_eager": True, "max_model_len": 65_552}

    given = {"max_model_len": 70_000}
    args = argparse.Namespace(lengths=[65_536], kv_gib=9.0, graphs=True, engine=given)
    bench_ttft.fit_prompts(args, token_bytes=131_072)
    assert (args.kv_gib, args.engine) == (9.0, {"enforce_eager": False, **given})


def test_a_pool_hit_is_told_against_the_vram_hit_of_the_same_prompt() -> None:
    turns = {
        "kvpool": ttft_turns(recompute=100, vram=10, pool=14),
        "kvpool-other": ttft_turns(pool=16, vram=10),
    }
    own, other = bench_ttft.table(turns, {64: REPEATS}, tokens_per_ms=24.0)
    assert own["over_vram"] == 4
    assert own["x_link"] == 2  # 48 tokens take 2 ms
    assert own["as_vram"] == own["as_recompute"] == "5/5"
    assert other["over_vram"] == 6
    assert other["as_recompute"] == "5/5"
    assert "recompute" not in other


def test_only_loaded_prompts_are_told_against_the_link() -> None:
    turns = ttft_turns(recompute=100, vram=10, pool=14)
    hits = [turn for turn in turns[1:] if turn["kind"] == "pool"]
    hits[1] |= {"cached": 0, "ms": 100.0}
    (line,) = bench_ttft.table({"kvpool": turns}, {64: REPEATS}, tokens_per_ms=24.0)
    assert (line["prompts"], line["computed"], line["cached"]) == (3, 1, 48)
    assert line["over_vram"] == 8  # of 12, in the slow phase, and 4
    assert line["x_link"] == 4
    for hit in hits:
        hit["cached"] = 0
    (line,) = bench_ttft.table({"kvpool": turns}, {64: REPEATS}, tokens_per_ms=24.0)
    assert (line["computed"], line["pool"]) == (3, 42)
    assert not {"cached", "over_vram", "x_link"} & set(line)


def test_an_arm_that_was_lost_tells_how_many_prompts_it_has() -> None:
    turns = {"kvpool": ttft_turns(recompute=100, vram=10, pool=14), "simple": ttft_turns(pool=20)}
    turns["kvpool"] = turns["kvpool"][:9]  # in the middle of the third prompt
    own, peer = bench_ttft.table(turns, {64: REPEATS}, tokens_per_ms=24.0)
    assert (own["prompts"], own["recompute"], own["pool"]) == (1, 100, 14)
    assert peer["prompts"] == 3
    (line,) = bench_ttft.against_others(turns, {64: REPEATS})
    assert line["prompts"] == {"simple": 1}


def test_another_engines_blocks_are_told_against_its_own_hits() -> None:
    turns = {"kvpool": ttft_turns(pool=10), "kvpool-other": ttft_turns(pool=11)}
    own, other = bench_ttft.against_others(turns, {64: REPEATS})
    assert own["over"] == {}
    assert other["over"] == {"kvpool": 1.1}


def test_one_different_output_is_seen() -> None:
    turns = ttft_turns(recompute=100, vram=10, pool=14)
    turns[-1]["output"] = [99]
    (line,) = bench_ttft.table({"kvpool": turns}, {64: REPEATS}, 0.0)
    assert line["as_vram"] == line["as_recompute"] == "4/5"


def test_a_peer_is_compared_by_prompt() -> None:
    turns = {"kvpool": ttft_turns(pool=10), "simple": ttft_turns(pool=20), "none": ttft_turns()}
    (line,) = bench_ttft.against_others(turns, {64: REPEATS})
    assert line == {
        "tokens": 64,
        "arm": "kvpool",
        "over": {"simple": 0.5},
        "prompts": {"simple": 3},
    }


def overhead_turns(seconds: float, rounds: int = len(SLOW)) -> list[dict[str, float]]:
    figures = bench_overhead.FIGURES
    several = [dict.fromkeys(figures, seconds * factor) for factor in SLOW[:rounds]]
    return [{"start_s": 1.0}, dict.fromkeys(figures, 1e9), *several]


def test_a_round_is_told_against_the_same_round_without_a_connector() -> None:
    turns = {
        "none": overhead_turns(9.0),
        "kvpool": overhead_turns(11.0, rounds=4),  # the fifth was not reached
        "none-again": overhead_turns(11.0),
        "lost": overhead_turns(1.0, rounds=0),
    }
    by_arm = {line["arm"]: line for line in bench_overhead.table(turns)}
    assert list(by_arm) == ["none", "kvpool", "none-again"]
    assert by_arm["none"]["against_none"] == {}
    assert by_arm["kvpool"]["against_none"]["seconds"] == pytest.approx((1.1, 1.1, 1.1))
    assert by_arm["none-again"]["against_none"]["itl_p99"][1] == pytest.approx(11 / 9)
    counts = [bench_overhead.counts(line) for line in by_arm.values()]
    assert counts == ["5", "4", "5"]
    by_arm = {
        line["arm"]: line for line in bench_overhead.table({**turns, "none": turns["kvpool"]})
    }
    assert bench_overhead.counts(by_arm["none-again"]) == "5, 4 against none"


def test_slices_of_a_concurrency_are_added_up() -> None:
    figures = {"planned_turns": 2, "prompt_tokens": 100, "cached_tokens": 50}
    slices = [
        {"concurrency": 8, "turns": 2, "seconds": 1.0, "ttft_ms": [1.0, 2.0], **figures},
        {"concurrency": 8, "turns": 1, "seconds": 3.0, "ttft_ms": [9.0], **figures},
    ]
    turns = [{"start_s": 1.0}, {"concurrency": 8}, *slices]
    assert bench_multiturn.slices_of(turns, 8) == slices
    line = bench_multiturn.summary("kvpool", slices, planned_turns=6)  # a third one was not reached
    assert (line["turns"], line["planned_turns"], line["seconds"]) == (3, 6, 4.0)
    assert (line["ttft_p50"], line["ttft_p95"]) == (2.0, 9.0)


def test_what_a_user_says_does_not_depend_on_what_others_left_out() -> None:
    said = bench_multiturn.Said(user=3, round=2)
    assert said.tokens(16) == said.tokens(16)
    others = [bench_multiturn.Said(user=2, round=3), bench_multiturn.Said(user=3, round=3)]
    assert all(other.tokens(16) != said.tokens(16) for other in others)


def crossover_turns(decided: list[dict[str, float]]) -> dict[str, list[dict[str, Any]]]:
    """Computing takes 30 ms and a load 20, in the third of the counted rounds three times as much."""
    always: list[dict[str, Any]] = [{"start_s": 1.0}]
    decides: list[dict[str, Any]] = [{"start_s": 1.0}]
    for number, one in enumerate(decided, start=bench_crossover.LEARNING_ROUNDS):
        factor = SLOW[number - bench_crossover.LEARNING_ROUNDS]
        which = {"tokens": 64, "round": number}
        always.append({**which, "kind": "recompute", "ms": 30 * factor, "cached": 0})
        always.append({**which, "kind": "load", "ms": 20 * factor, "cached": 64})
        decides.append({**which, "kind": "teach", "ms": 30 * factor, "cached": 0})
        decides.append({**which, "kind": "decided", **one, "ms": one["ms"] * factor})
    return {bench_crossover.ALWAYS: always, bench_crossover.DECIDES: decides}


def test_a_decision_is_told_against_the_better_of_the_same_round() -> None:
    predicted = {"predicted load": 5.0, "predicted compute": 4.0}
    decided = [
        {"ms": 20.9, "cached": 64},
        {"ms": 30.0, "cached": 0, **predicted},
        {"ms": 20.0, "cached": 64, **predicted},
        {"ms": 22.0, "cached": 64, **predicted},
        {"ms": 30.0, "cached": 0},  # it was not in the pool
    ]
    turns = crossover_turns(decided)
    turns[bench_crossover.ALWAYS][1]["round"] = 0  # it learnt, then
    row = bench_crossover.row_of(bench_crossover.rounds_of(turns, 64))
    assert row["rounds"] == 3
    assert (row["recompute"], row["load"], row["decided"]) == (30, 20, 30)
    assert row["difference"] == (-20, -10, -10)
    assert (row["loads"], row["close"], row["close_choice"]) == (2, 1, 2)
    assert (row["predicted load"], row["predicted compute"]) == (5, 4)
    assert bench_crossover.row_of(bench_crossover.rounds_of(turns, 128)) == {}


def test_an_arm_with_two_connectors_of_its_own_is_refused(tmp_path: Path) -> None:
    args = argparse.Namespace(shm_dir="/dev/shm", checksum="off", trace=False)
    arm = arms.kvpool_arm("kvpool+way=driver", args, tmp_path)
    assert arm.transfer is not None
    assert arm.transfer["kv_connector"] == "WayConnector"
    assert arm.env == {"KVPOOL_WAY": "driver"}
    with pytest.raises(ConfigError, match="way and load need a connector each"):
        arms.kvpool_arm("kvpool+way=driver+load=always", args, tmp_path)
    args.trace = True
    arm = arms.kvpool_arm("kvpool+store=prompt", args, tmp_path)
    assert arm.env == {"KVPOOL_TRACE": str(tmp_path / "kvpool+store=prompt-trace.json")}
    with pytest.raises(ConfigError, match="way and trace need a connector each"):
        arms.kvpool_arm("kvpool+way=driver", args, tmp_path)
