"""How a stage tells whoever watches what it is doing; the command line draws it."""

from typing import Protocol


class Progress(Protocol):
    """One task after another, each with a total."""

    def begin(self, task: str, total: int, unit: str, done: int = 0, unit_bytes: int = 0) -> None:
        """A task of ``total`` units begins, ``done`` of which were there before."""

    def advance(self, amount: int, note: str = "") -> None:
        """``amount`` more units are done; ``note`` says what matters now."""

    def end(self) -> None:
        """The task is done."""

    def say(self, line: str) -> None:
        """A line that stays."""


class Silent:
    """Nobody watches."""

    def begin(self, task: str, total: int, unit: str, done: int = 0, unit_bytes: int = 0) -> None:
        """Nothing."""

    def advance(self, amount: int, note: str = "") -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""

    def say(self, line: str) -> None:
        """Nothing."""
