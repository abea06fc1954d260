"""What the threads that read a store share: work done once for all who ask, and locks that survive a fork.

A forked child has the memory of its parent and none of its threads: a lock that one of these held stays
locked there for ever, and a pool never does anything. Whatever has locks or pools is a ``Renewed``, and gets
fresh ones in the child.
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
    """Base of what has locks or pools: ``renew`` makes them, at first and in every forked child."""

    def __init__(self) -> None:
        """Make the locks."""
        self.renew()
        _renewed.add(self)

    def renew(self) -> None:
        """Replace locks and pools; what other threads were doing is not continued."""
        raise NotImplementedError


def _renew_all() -> None:
    for renewed in list(_renewed):
        renewed.renew()


os.register_at_fork(after_in_child=_renew_all)


class SharedWork(Renewed, Generic[Result]):
    """Work with a name: whoever asks for it while another thread does it waits for that thread's result."""

    def renew(self) -> None:
        """Forget what is being done."""
        self._lock = threading.Lock()
        self._running: dict[Hashable, Future[Result]] = {}

    def do(self, name: Hashable, work: Callable[[], Result]) -> Result:
        """The result of ``work``, or of the same work where it is being done; raises what that raises."""
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
    """Leave no thread that still reads a map, or writes into a buffer that others will use."""
    for future in running:
        future.cancel()
    wait(running)
