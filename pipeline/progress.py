"""The interface through which a stage reports progress; the command line draws it."""

from typing import Protocol


class Progress(Protocol):
    """One task after another, each with a total."""

    def begin(self, task: str, total: int, unit: str, done: int = 0, unit_bytes: int = 0) -> None:
        """Start a task of ``total`` units, ``done`` of which were done before."""

    def advance(self, amount: int, note: str = "") -> None:
        """Report ``amount`` more units done; ``note`` is shown beside them."""

    def end(self) -> None:
        """End the task."""

    def say(self, line: str) -> None:
        """Print a line that stays."""


class Silent:
    """Progress that shows nothing."""

    def begin(self, task: str, total: int, unit: str, done: int = 0, unit_bytes: int = 0) -> None:
        """Nothing."""

    def advance(self, amount: int, note: str = "") -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""

    def say(self, line: str) -> None:
        """Nothing."""
