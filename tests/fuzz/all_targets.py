"""Every target, by its name."""

from __future__ import annotations

from tests.fuzz.control import Control
from tests.fuzz.door import Door
from tests.fuzz.records import Records
from tests.fuzz.replies import Replies
from tests.fuzz.target import Target

TARGETS: dict[str, type[Target]] = {made.name: made for made in (Control, Door, Replies, Records)}
