"""Children take turns, one at a time; one that dies or takes too long costs the others nothing."""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.turns import Player, rounds

ROOT = Path(__file__).parents[2]
CHILD = """
import sys, time
from benchmarks.turns import play

def turns(kind):
    print("ready", flush=True)
    yield "ready"
    for number in range(3):
        if number == 1 and kind == "dies":
            raise ValueError("it wants no more")
        if number == 1 and kind == "dawdles":
            time.sleep(600)
        begun = time.monotonic()
        time.sleep(0.05)
        yield None if kind == "idles" else (number, begun, time.monotonic())

if sys.argv[1] == "never starts":
    raise SystemExit(3)
play(int(sys.argv[-1]), turns(sys.argv[1]))
"""


@contextlib.contextmanager
def players(folder: Path, *kinds: str) -> Iterator[dict[str, Player]]:
    """By name: "works 2" is of the kind "works"."""
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(
                Player(
                    name,
                    [sys.executable, "-c", CHILD, name.rstrip(" 0123456789")],
                    folder / f"{name}.log",
                    {"PYTHONPATH": str(ROOT)},
                )
            )
            for name in kinds
        }


def test_every_round_has_a_turn_of_each_and_no_two_at_once(tmp_path: Path) -> None:
    names = [f"works {number}" for number in range(4)]
    with players(tmp_path, *names) as by_name:
        for number, playing in enumerate(rounds(by_name.values(), 60, [], pause_s=0.0)):
            assert [len(player.values) for player in playing] == [1 + number] * 4
    orders = []
    for number in range(3):
        turns = sorted((*player.values[1 + number][1:], name) for name, player in by_name.items())
        assert {player.values[1 + number][0] for player in by_name.values()} == {number}
        assert all(ended <= begun for (_, ended, _), (begun, _, _) in itertools.pairwise(turns))
        orders.append([name for _, _, name in turns])
    assert all(len(player.values) == 4 for player in by_name.values())
    assert len({tuple(order) for order in orders}) > 1


def test_one_that_dies_is_told_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes: list[str] = []
    with players(tmp_path, "works", "dies", "never starts") as by_name:
        playing = rounds(by_name.values(), 60, notes)
        left = [[player.name for player in these] for these in playing]
    assert left == [["works", "dies"], ["works", "dies"], ["works"], ["works"]]
    assert [len(player.values) for player in by_name.values()] == [4, 2, 0]
    start, end = notes
    assert "never starts was lost before it was ready" in start
    assert start.endswith(": exit status 3")
    assert "dies was lost in round 2" in end
    assert end.endswith(": exit status 1")
    told = capsys.readouterr().out
    assert "dies: FAILED" in told
    assert "ValueError: it wants no more" in told
    assert "never starts: FAILED" in told
    assert "exit status 3" in told


def test_one_that_takes_too_long_is_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with players(tmp_path, "works", "dawdles") as by_name:
        while any("ready" not in log.read_text() for log in tmp_path.glob("*.log")):
            time.sleep(0.05)  # the limit is for a turn, not for the start of Python
        notes: list[str] = []
        playing = rounds(by_name.values(), 5, notes)
        next(playing)
        begun = time.monotonic()
        assert [[player.name for player in these] for these in playing][-1] == ["works"]
        assert time.monotonic() - begun < 60
    assert [len(player.values) for player in by_name.values()] == [4, 2]
    assert "dawdles: FAILED" in capsys.readouterr().out
    (note,) = notes
    assert "dawdles was lost in round 2" in note
    assert note.endswith(": timeout")


def test_an_empty_turn_has_no_pause(tmp_path: Path) -> None:
    with players(tmp_path, "idles") as by_name:
        begun = time.monotonic()
        assert len(list(rounds(by_name.values(), 60, [], pause_s=200.0))) == 4
        assert time.monotonic() - begun < 200
    assert by_name["idles"].values == ["ready", None, None, None]
