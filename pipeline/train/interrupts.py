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
        asked: whether someone did.
        to_end: whether it was SIGTERM, by which the process is to end.
    """

    def __init__(self) -> None:
        """Nobody did."""
        self.asked = False
        self.to_end = False

    def stop(self) -> None:
        """End, if that was asked for; else raise the KeyboardInterrupt that was held back."""
        if self.to_end:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
        raise KeyboardInterrupt


@contextmanager
def held_back(*, is_alone: bool = True) -> Generator[Interrupt]:
    """Hold a Ctrl-C or SIGTERM back until the caller finds a good place to ``stop``.

    A second Ctrl-C interrupts at once, but for one of several processes: to those torchrun passes on what
    they have got from the terminal. A second SIGTERM never does: SLURM and torchrun each send one, and who
    cannot wait has SIGKILL. Where signals cannot be caught, outside the main thread, or are not Python's to
    catch, as in a process that ignores them, everything is as it was.

    Args:
        is_alone: whether this process was started by itself.
    """
    interrupt = Interrupt()
    is_main = current_thread() is main_thread()
    ours = {
        number: usual for number, usual in _USUAL.items() if is_main and signal.getsignal(number) is usual
    }

    def ask(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and interrupt.asked and is_alone:
            raise KeyboardInterrupt
        interrupt.asked = True
        interrupt.to_end |= number == signal.SIGTERM

    for number in ours:
        signal.signal(number, ask)
    try:
        yield interrupt
    finally:
        for number, usual in ours.items():
            signal.signal(number, usual)
