"""A Ctrl-C that waits until what must not be left half done is done."""

import signal
from collections.abc import Generator
from contextlib import contextmanager
from threading import current_thread, main_thread
from types import FrameType


class Interrupt:
    """Whether someone pressed Ctrl-C since."""

    asked = False

    def check(self) -> None:
        """Raise the KeyboardInterrupt that was held back, if there is one."""
        if self.asked:
            raise KeyboardInterrupt


@contextmanager
def held_back() -> Generator[Interrupt]:
    """Hold the first Ctrl-C back until ``check`` is called; a second one interrupts at once.

    Where signals cannot be caught, outside the main thread, or are not Python's to catch, as in a process
    that ignores them, everything is as it was.
    """
    interrupt = Interrupt()
    usual = signal.getsignal(signal.SIGINT)
    if current_thread() is not main_thread() or usual is not signal.default_int_handler:
        yield interrupt
        return

    def ask(number: int, frame: FrameType | None) -> None:
        interrupt.asked = True
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, ask)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, usual)
