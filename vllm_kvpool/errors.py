"""What goes wrong outside of our own code.

KVPoolError
|-- ConfigError            a field's value is wrong: names the field, the value and the fix
|-- PoolUnavailable        no daemon, or no pool file, under that name
|   `-- PoolTimeout        the daemon did not answer before the deadline
|-- ProtocolError          the daemon refused the request: `.code` says why
|-- RouterUnavailable      no router answers there
`-- RouterRefused          the router would not; the message says why
"""

from __future__ import annotations


class KVPoolError(Exception):
    """Root of all errors of this package."""


class ConfigError(KVPoolError):
    """A configuration field has an unusable value."""

    def __init__(self, field: str, value: object, fix: str) -> None:
        super().__init__(f"{field} = {value!r}: {fix}")
        self.field = field
        self.value = value
        self.fix = fix


class PoolUnavailable(KVPoolError):  # noqa: N818
    """The pool cannot be reached; the message says what to start."""


class PoolTimeout(PoolUnavailable):
    """The daemon did not answer before the deadline."""


class ProtocolError(KVPoolError):
    """The daemon answered with an error, or with what cannot be read."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


class RouterUnavailable(KVPoolError):  # noqa: N818
    """No router answers there."""


class RouterRefused(KVPoolError):  # noqa: N818
    """The router would not do it; the message says why."""
