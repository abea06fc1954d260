"""Retrying what may pass: a connection that was cut, a server that is busy.

The wait doubles from try to try, with chance in it so that many threads do not come back at once: half a
minute in all, then one error. A server that says how long to wait is obeyed.
"""

import logging
import random
from collections.abc import Callable, Iterator
from time import sleep
from typing import TypeVar

from ..errors import StoreRemoteError

N_TRIES = 7
FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 600.0
"""However long the server asks for."""

LOGGED_SECONDS = 3.0
"""Longer waits are logged."""

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class RetryableError(Exception):
    """What may pass; only ``retry`` catches it.

    Attributes:
        problem: for the user, should it not pass.
        wait_seconds: what the server asks for, or None.
    """

    def __init__(self, problem: str, wait_seconds: float | None = None) -> None:
        """Keep both."""
        super().__init__(problem)
        self.problem, self.wait_seconds = problem, wait_seconds


def retry(action: Callable[[], _T], place: str) -> _T:
    """What ``action`` returns, in one of ``N_TRIES`` tries.

    Args:
        action: raises ``RetryableError`` where it should be tried again.
        place: where, for the error, as it may be shown.

    Raises:
        StoreRemoteError: the last try failed too.
    """
    n_failed = 0
    while True:
        try:
            return action()
        except RetryableError as error:
            _wait(n_failed, error, place)
            n_failed += 1


def resume(fetch: Callable[[int], Iterator[bytes]], place: str) -> Iterator[bytes]:
    """The pieces of a body; one that is cut resumes where it stopped, in ``N_TRIES`` tries for each MiB.

    Args:
        fetch: the body from a byte on, counted from 0; raises ``RetryableError`` where it is cut.
        place: as for ``retry``.

    Raises:
        StoreRemoteError: the last try failed too.
    """
    n_received = n_before = n_failed = 0
    while True:
        try:
            for piece in fetch(n_received):
                n_received += len(piece)
                yield piece
            return
        except RetryableError as error:
            if n_received - n_before >= 2**20:
                n_before, n_failed = n_received, 0
            _wait(n_failed, error, place)
            n_failed += 1


def _wait(n_failed: int, error: RetryableError, place: str) -> None:
    """Wait before the next try, or raise the error if there is none."""
    if n_failed == N_TRIES - 1:
        raise StoreRemoteError(
            f"{place}: {error.problem}, {N_TRIES} times; check the URL, or try again later"
        ) from None
    if error.wait_seconds is None:
        seconds = FIRST_WAIT_SECONDS * 2**n_failed * random.uniform(0.5, 1)
    else:
        seconds = min(error.wait_seconds, LONGEST_WAIT_SECONDS) + random.uniform(0, 1)
    if seconds > LOGGED_SECONDS:
        _log.warning("%s: %s; trying again in %.0f s", place, error.problem, seconds)
    sleep(seconds)
