"""Shared by reading threads: work that is done once for all callers, and locks that survive a fork.

A forked child has its parent's memory but none of its threads: a lock held by one of them stays locked for
ever, and a pool never runs. Objects with locks or pools are ``Renewed``, and get new ones in the child.
"""

import os
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, wait
from typing import Any, Generic, TypeVar
from weakref import WeakSet

Result = TypeVar("Result")

_renewed: "WeakSet[Renewed]" = WeakSet()


class Renewed:
    """Base of objects with locks or pools: ``renew`` makes them, at first and in every forked child."""

    def __init__(self) -> None:
        """Make the locks."""
        self.renew()
        _renewed.add(self)

    def renew(self) -> None:
        """Replace locks and pools; work of other threads is not continued."""
        raise NotImplementedError


def _renew_all() -> None:
    for renewed in list(_renewed):
        renewed.renew()


os.register_at_fork(after_in_child=_renew_all)


class SharedWork(Renewed, Generic[Result]):
    """Named work: a thread that requests work in progress waits for its result."""

    def renew(self) -> None:
        """Forget the work in progress."""
        self._lock = threading.Lock()
        self._running: dict[Hashable, Future[Result]] = {}

    def do(self, name: Hashable, work: Callable[[], Result]) -> Result:
        """The result of ``work``, or of the same work in progress in another thread; raises its error."""
        with self._lock:
            running = self._running.get(name)
            is_ours = running is None
            if running is None:
                running = self._running[name] = Future()
        if is_ours:
            try:
                running.set_result(work())
            except BaseException as error:  # raised below, in every thread that waits
                running.set_exception(error)
            finally:
                with self._lock:
                    self._running.pop(name, None)
        return running.result()


def stop(running: Sequence[Future[Any]]) -> None:
    """Wait until no thread reads a map or writes into a buffer that others will use."""
    for future in running:
        future.cancel()
    wait(running)
