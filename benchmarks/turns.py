"""Children that live at the same time take turns: only one of them works at any moment.

A machine has phases of seconds in which all is slow. Children that run one after the other meet them by chance; those
that take turns meet them together, so what they did in the same round can be compared, pair by pair.

A child calls `play` with a generator. What that yields first says that the child is ready; from there on the code up
to each further `yield` is a turn, whose value the parent gets. None: the turn was an empty one. When all its turns are
over the child waits for its end, so that even its exit does not disturb the others.

The parent calls `rounds`. Each child gets one turn a round, in an order drawn anew for each, so that nobody always
follows the same other one.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import subprocess
import time
from collections.abc import Collection, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.processes import ChildProcess, print_failure

PAUSE_S = 0.1
"""After a turn: for what a child does in the background."""
LOOK_S = 0.5
"""How often a silent child is looked at: its own children may hold its end of the connection open."""
END_S = 10.0
"""For a child to end by itself."""


class PlayerError(Exception):
    """A child that ended before its turns did, or took too long."""


class Player:
    """A child and what its turns have given so far: `values`, the first one that of its start."""

    def __init__(
        self, name: str, command: list[str], log: Path, env: dict[str, str] | None = None
    ) -> None:
        """`command` gets two more arguments: `--turns` and what `play` is to be called with."""
        self.name = name
        self.values: list[Any] = []
        self._ours, self._theirs = Pipe()
        fd = self._theirs.fileno()
        command = [*command, "--turns", str(fd)]
        self._child = ChildProcess(command, log, env, inherited=(fd,))
        self._begun = 0.0

    def __enter__(self) -> Self:
        self._begun = time.monotonic()
        self._child.start()
        self._theirs.close()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """After an error at once, else with time to clean up."""
        self.let_go()
        if error is None:
            self._ended()
        self._child.stop()

    def let_go(self) -> None:
        """The child ends now."""
        self._ours.close()

    def take_turn(self, limit_s: float) -> bool:
        """Whether there was one left. PlayerError."""
        with contextlib.suppress(BrokenPipeError):  # `receive` says what became of it
            self._ours.send(None)
        return self.receive(time.monotonic() + limit_s)

    def receive(self, give_up: float) -> bool:
        """The value of its start, or of a turn; False: its turns are over. PlayerError."""
        while not self._ours.poll(LOOK_S):
            if not self._child.running and not self._ours.poll():
                raise PlayerError(self._ended())
            if time.monotonic() > give_up:
                raise PlayerError("timeout")
        try:
            yielded = self._ours.recv()
        except (EOFError, ConnectionResetError) as error:
            raise PlayerError(self._ended()) from error
        self.values += yielded
        return bool(yielded)

    def _ended(self) -> str:
        """What became of it, after some time to clean up: an engine has shared memory."""
        assert self._child.process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.process.wait(END_S)
        return f"exit status {self._child.stop()}"

    def drop(self, why: str) -> str:
        """Stops it; says so, with the end of its log. What to note of it."""
        self._child.stop()
        took = f"{time.monotonic() - self._begun:.0f} s"
        print_failure(self.name, why, took, self._child.log)
        when = f"in round {len(self.values)}" if self.values else "before it was ready"
        return f"ATTENTION: {self.name} was lost {when}, after {took}: {why}"


def play(fd: int, turns: Iterator[Any]) -> None:
    """In the child. Returns when the parent has gone."""
    parent = Connection(fd)
    for value in turns:
        parent.send([value])
        try:
            parent.recv()
        except EOFError:
            return
    parent.send([])
    with contextlib.suppress(EOFError):
        parent.recv()


def rounds(
    players: Collection[Player], limit_s: float, notes: list[str], pause_s: float = PAUSE_S
) -> Iterator[list[Player]]:
    """Those that play on: when all are ready, and after each round; then all end, together. `limit_s`: for getting
    ready, and for each turn. Who is lost is told and dropped, and `notes` get who, when and why."""
    give_up = time.monotonic() + limit_s
    playing = [player for player in players if _plays_on(player, Player.receive, give_up, notes)]
    for number in itertools.count():
        if not playing:
            break
        yield playing
        for player in random.Random(number).sample(playing, len(playing)):
            if not _plays_on(player, Player.take_turn, limit_s, notes):
                playing = [other for other in playing if other is not player]
            elif player.values[-1] is not None:
                time.sleep(pause_s)
    for player in players:
        player.let_go()


def _plays_on(player: Player, wait: Any, limit: float, notes: list[str]) -> bool:
    try:
        return bool(wait(player, limit))
    except PlayerError as lost:
        notes.append(player.drop(str(lost)))
        return False
