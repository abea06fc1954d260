"""What people see: tables, progress, small plots, errors."""

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
    """One line: that the command was interrupted, and what ``if_interrupted`` knew of it."""
    notes: list[str] = getattr(interrupt, "__notes__", [])
    if notes != [""]:
        errors.print(Text(": ".join(["interrupted", *notes])), soft_wrap=True)


def goes_on() -> str:
    """Of a command that may be interrupted at any time."""
    return "what is done is kept, and the same command goes on"


@contextmanager
def if_interrupted(told: Callable[[], str]) -> Generator[None]:
    """Say more where a Ctrl-C ends what is within: what is there, and whether the same command goes on.

    Args:
        told: asked once it is interrupted; "" where another process says all.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        with suppress(PosaeError, OSError, ValueError):
            interrupt.add_note(told())
        raise


def duration(seconds: float) -> str:
    """Seconds for people.

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
    """Units, and bytes where a unit has some, to the second of this session."""

    def render(self, task: Task) -> Text:
        """The rate so far; the unit stands beside it."""
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
    """A curve in one line, from its least to its greatest on a scale of logarithms; of numbers above 0.

    >>> sparkline([1, 0.1, 0.01]), sparkline([0.5])
    ('█▅▁', '▁')
    """
    logs = [math.log(value) for value in values if value > 0]
    if not logs:
        return ""
    low, span = min(logs), max(logs) - min(logs) or 1.0
    return plot([value - low + span / 7 for value in logs], width, 1, top=span * 8 / 7)[0]


class _Bars(Progress):
    """A bar, and below it what matters now."""

    note: Text | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        """Both, a line each."""
        yield self.make_tasks_table(self.tasks)
        if self.note:
            yield self.note


class LiveProgress:
    """Progress as a bar on a terminal, and as a plain line every ten seconds elsewhere."""

    def __init__(self, curve: str = "") -> None:
        """Draw on standard error, so that standard output stays for results.

        Args:
            curve: the word in notes whose number is drawn as a curve, as ``FVU`` in ``FVU 0.25``.
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
        """Leave the terminal as it was, whatever happened; a bar that did not reach its end is wiped off."""
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
            before = f" ({done:,} were there)" if done else ""
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
        found = self._number.search(note) if self._number else None
        if found:
            self._curve.append(float(found[1]))
        self._bars.note = Text(f"  {note}  ", no_wrap=True, overflow="ellipsis")
        self._bars.note.append(sparkline(self._curve), style="cyan")

    def say(self, line: str) -> None:
        """A line that stays."""
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
