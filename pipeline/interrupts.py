"""A Ctrl-C, or a request to end, that waits until what must not be left half done is done."""

import signal
from collections.abc import Generator
from contextlib import contextmanager
from threading import current_thread, main_thread
from types import FrameType

_USUAL = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
"""Ctrl-C; and what SLURM and torchrun send to a process that is to end."""


class Interrupt:
    """Whether someone asked the process to stop since.

    Attributes:
        asked: whether someone did; whoever knows of another reason may set it.
        to_end: whether it was SIGTERM, by which the process is to end.
    """

    def __init__(self) -> None:
        """Nobody did."""
        self.asked = False
        self.to_end = False

    def check(self) -> None:
        """Raise the KeyboardInterrupt that was held back, if there is one; or end, if that was asked for."""
        if self.to_end:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
        if self.asked:
            raise KeyboardInterrupt


@contextmanager
def held_back() -> Generator[Interrupt]:
    """Hold the first Ctrl-C or SIGTERM back until ``check`` is called; a second one interrupts at once.

    Where signals cannot be caught, outside the main thread, or are not Python's to catch, as in a process
    that ignores them, everything is as it was.
    """
    interrupt = Interrupt()
    is_main = current_thread() is main_thread()
    ours = {
        number: usual for number, usual in _USUAL.items() if is_main and signal.getsignal(number) is usual
    }

    def ask(number: int, frame: FrameType | None) -> None:
        interrupt.asked = True
        interrupt.to_end |= number == signal.SIGTERM
        signal.signal(number, _USUAL[signal.Signals(number)])

    for number in ours:
        signal.signal(number, ask)
    try:
        yield interrupt
    finally:
        for number, usual in ours.items():
            signal.signal(number, usual)
