"""Trying again what may pass: a connection cut, a server that is busy.

The wait doubles from try to try, with chance in it so that many threads do not come back at once; a
server that says how long it wants is obeyed, up to a minute. The number of tries is bounded: half a
minute in all where the server names no time, then one error.
"""

import logging
import random
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from time import sleep
from typing import TypeVar

from ..errors import StoreRemoteError

N_TRIES = 7
FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 60.0
LONG_SECONDS = 3.0
"""Longer waits are told."""

BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP status codes that may pass."""

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class PassingError(Exception):
    """What may pass; only ``tried`` catches it.

    Attributes:
        problem: for the user, should it not pass.
        wait_seconds: what the server asks for, or None.
    """

    def __init__(self, problem: str, wait_seconds: float | None = None) -> None:
        """Say what is wrong."""
        super().__init__(problem)
        self.problem, self.wait_seconds = problem, wait_seconds


def tried(action: Callable[[], _T], place: str) -> _T:
    """What ``action`` returns, in one of ``N_TRIES`` tries.

    Args:
        action: raises ``PassingError`` where it should be tried again.
        place: where, for the error, as it may be shown.

    Raises:
        StoreRemoteError: the last try failed too.
    """
    i = 0
    while True:
        try:
            return action()
        except PassingError as error:
            i += 1
            if i == N_TRIES:
                raise StoreRemoteError(
                    f"{place}: {error.problem}, {N_TRIES} times; check the URL, or try again later"
                ) from None
            wait = _wait_seconds(i - 1, error.wait_seconds)
            if wait > LONG_SECONDS:
                _log.warning("%s: %s; trying again in %.0f s", place, error.problem, wait)
            sleep(wait)


def tried_once(action: Callable[[], object], done: Callable[[], bool], place: str) -> None:
    """As ``tried``, for what must not be done twice.

    Args:
        action: as for ``tried``.
        done: asked before each further try: whether the one before did it, and only its answer was lost.
        place: as for ``tried``.

    Raises:
        StoreRemoteError: the last try failed too.
    """
    tries = 0

    def once() -> None:
        nonlocal tries
        tries += 1
        if tries == 1 or not done():
            action()

    tried(once, place)


def _wait_seconds(i: int, asked: float | None) -> float:
    if asked is not None:
        return min(max(asked, 0.0), LONGEST_WAIT_SECONDS) + random.uniform(0, FIRST_WAIT_SECONDS)
    return FIRST_WAIT_SECONDS * 2**i * random.uniform(0.5, 1)


def retry_after_seconds(value: str | None) -> float | None:
    """A ``Retry-After`` header: seconds, or a date; None where there is none that can be read.

    >>> retry_after_seconds("120"), retry_after_seconds("soon"), retry_after_seconds(None)
    (120.0, None, None)
    """
    if value is None:
        return None
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return None
    # A date in -0000 comes without a zone; HTTP's dates are all in GMT.
    when = when.replace(tzinfo=UTC) if when.tzinfo is None else when
    return max(0.0, (when - datetime.now(UTC)).total_seconds())
