"""Terminal output: progress, small plots, errors."""

import math
import re
import sys
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, suppress

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from ..store.errors import PosaeError
from ..store.plain_text import plot, quantity

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

_PLAIN_SECONDS = 10.0


def show_error(error: Exception) -> None:
    """One line in red."""
    text = " ".join(str(error).split())
    errors.print(Text(f"error: {text}", style="bold red"), soft_wrap=True)


def show_interrupt(interrupt: KeyboardInterrupt) -> None:
    """One line: that the command was interrupted, and what ``if_interrupted`` adds."""
    notes: list[str] = getattr(interrupt, "__notes__", [])
    if notes != [""]:
        errors.print(Text(": ".join(["interrupted", *notes])), soft_wrap=True)


def resumable() -> str:
    """The note for a command that may be interrupted at any time."""
    return "progress is saved; run the same command again to resume"


@contextmanager
def if_interrupted(note: Callable[[], str]) -> Generator[None]:
    """On Ctrl-C, add a note to the interrupt: what is saved, and whether the same command resumes.

    Args:
        note: called after the interrupt; "" where another process reports it.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        with suppress(PosaeError, OSError, ValueError):
            interrupt.add_note(note())
        raise


def duration(seconds: float) -> str:
    """Seconds in readable units.

    >>> duration(75), duration(90000)
    ('1 min 15 s', '25 h 0 min')
    """
    if not math.isfinite(seconds):
        return "unknown"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def is_short(names: Iterable[str]) -> bool:
    """Whether a column of these names leaves the other half of the terminal to the other columns."""
    return max(map(len, names), default=0) <= console.width // 2


def show_by_position(values: Sequence[float], digits: int = 1) -> None:
    """Draw a number for each position, from 0 up."""
    lines = plot(values, width=max(8, min(64, console.width - 22)))
    ends = {0: f"{max(values):8.{digits}f}", len(lines) - 1: f"{0:8.{digits}f}"}
    for number, line in enumerate(lines):
        console.print(f"{ends.get(number, ' ' * 8)} ┤[cyan]{line}[/]")
    end = f"{len(values) - 1}"
    console.print(f"{'':9} 0{end:>{max(1, len(lines[0]) - 1)}}  position")


class _Count(ProgressColumn):
    """Units done of all."""

    def render(self, task: Task) -> Text:
        """How many, with the unit."""
        unit = task.fields["unit"]
        if unit == "bytes":
            return Text(f"{quantity(task.completed)}/{quantity(task.total or 0)}", no_wrap=True)
        return Text(f"{task.completed:,.0f}/{task.total or 0:,.0f} {unit}", no_wrap=True)


class _Rate(ProgressColumn):
    """Units per second of this session, and bytes per second where a unit has a size."""

    def render(self, task: Task) -> Text:
        """The rate so far."""
        seconds = task.finished_time or task.elapsed or 0.0
        rate = _per_second(task.completed - task.fields["before"], seconds)
        text = f"{quantity(rate) if task.fields['unit'] == 'bytes' else f'{rate:,.0f}'}/s"
        if task.fields["unit_bytes"]:
            text += f", {quantity(rate * task.fields['unit_bytes'])}/s"
        return Text(text, style="cyan", no_wrap=True)


def _per_second(done: float, seconds: float) -> float:
    return done / seconds if seconds > 0 else 0.0


def _rate(done: float, seconds: float, task: Task) -> str:
    rate = _per_second(done, seconds)
    text = f"{rate:,.0f} {task.fields['unit']}/s"
    if task.fields["unit_bytes"]:
        text += f", {quantity(rate * task.fields['unit_bytes'])}/s"
    return text


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """A curve in one line, on a logarithmic scale from its minimum to its maximum; numbers above 0 only.

    >>> sparkline([1, 0.1, 0.01]), sparkline([0.5])
    ('█▅▁', '▁')
    """
    logs = [math.log(value) for value in values if value > 0]
    if not logs:
        return ""
    low, span = min(logs), max(logs) - min(logs) or 1.0
    return plot([value - low + span / 7 for value in logs], width, 1, top=span * 8 / 7)[0]


class _Bars(Progress):
    """A bar, and a note below it."""

    note: Text | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar and the note, one line each."""
        yield self.make_tasks_table(self.tasks)
        if self.note:
            yield self.note


class LiveProgress:
    """Progress as a bar on a terminal, and as a plain line every ten seconds elsewhere."""

    def __init__(self, curve: str = "") -> None:
        """Draw on standard error, so that standard output stays for results.

        Args:
            curve: the word in notes whose number is drawn as a curve, e.g. ``FVU`` in ``FVU 0.25``.
        """
        self._is_live = errors.is_terminal
        self._bars = _Bars(
            SpinnerColumn(),
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=max(6, min(28, errors.width - 64))),
            _Count(),
            _Rate(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=errors,
            disable=not self._is_live,
        )
        self._task = None
        self._said = 0.0
        self._number = re.compile(rf"\b{re.escape(curve)} ([\d.]+)") if curve else None
        self._curve: list[float] = []

    def __enter__(self) -> "LiveProgress":
        """Ready to draw."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Restore the terminal; an unfinished bar is erased."""
        self._bars.live.transient = kind is not None
        self._bars.stop()

    def begin(self, task: str, total: int, unit: str, done: int = 0, unit_bytes: int = 0) -> None:
        """Start a bar."""
        self._bars.start()
        self._task = self._bars.add_task(
            task, total=total, completed=done, unit=unit, note="", before=done, unit_bytes=unit_bytes
        )
        self._curve.clear()
        self._said = time.monotonic()
        if not self._is_live:
            before = f" ({done:,} already done)" if done else ""
            self.say(f"{task} {total:,} {unit}{before}")

    def advance(self, amount: int, note: str = "") -> None:
        """Move the bar."""
        assert self._task is not None
        self._bars.advance(self._task, amount)
        if note:
            self._bars.update(self._task, note=note)
            if self._is_live:
                self._draw(note)
        if not self._is_live and time.monotonic() - self._said > _PLAIN_SECONDS:
            self._said = time.monotonic()
            self._say_plainly()

    def end(self) -> None:
        """Stop the bar, at its end."""
        assert self._task is not None
        if not self._is_live:
            self._say_plainly()
        self._bars.note = None
        self._bars.update(self._task, note="", refresh=True)
        self._bars.stop()

    def _draw(self, note: str) -> None:
        match = self._number.search(note) if self._number else None
        if match:
            self._curve.append(float(match[1]))
        self._bars.note = Text(f"  {note}  ", no_wrap=True, overflow="ellipsis")
        self._bars.note.append(sparkline(self._curve), style="cyan")

    def say(self, line: str) -> None:
        """Print a line that stays above the bar."""
        sys.stderr.write(line + "\n")
        sys.stderr.flush()

    def _say_plainly(self) -> None:
        task = self._bars.tasks[-1]
        started = task.start_time or task.get_time()
        seconds = task.get_time() - started
        done = task.completed - task.fields["before"]
        left = (task.total or 0) - task.completed
        eta = duration(left * seconds / done) if done else "unknown"
        parts = [
            f"{task.description} {task.completed:,.0f}/{task.total or 0:,.0f} {task.fields['unit']}",
            _rate(done, seconds, task),
            f"{eta} left" if left > 0 else f"{duration(seconds)}",
        ]
        self.say("  ".join([*parts, task.fields["note"]]).rstrip())
