"""Delay Ctrl-C and SIGTERM until a step is complete."""

import signal
from collections.abc import Generator
from contextlib import contextmanager
from threading import current_thread, main_thread
from types import FrameType

_USUAL = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
"""Ctrl-C, and the signal by which SLURM and torchrun end a process."""


class Interrupt:
    """Whether the process was asked to stop.

    Attributes:
        asked: whether it was.
        to_end: whether by SIGTERM.
    """

    def __init__(self) -> None:
        """Not asked yet."""
        self.asked = False
        self.to_end = False

    def stop(self) -> None:
        """End the process after a SIGTERM; otherwise raise the delayed KeyboardInterrupt."""
        if self.to_end:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
        raise KeyboardInterrupt


@contextmanager
def held_back(*, is_alone: bool = True) -> Generator[Interrupt]:
    """Delay Ctrl-C and SIGTERM until the caller reaches a safe point and calls ``stop``.

    A second Ctrl-C interrupts at once, except in one of several processes, which get each Ctrl-C twice: from
    the terminal and from torchrun. A second SIGTERM does not, as SLURM and torchrun each send one. Outside
    the main thread, and where the process ignores these signals, nothing changes.

    Args:
        is_alone: whether this process was not started together with others.
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
