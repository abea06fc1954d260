"""What a terminal of 80 columns shows of a long task."""

import io
import re

import pytest
from rich.console import Console

from posae.cli import display
from posae.cli.display import LiveProgress

from .conftest import Posae


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=80, legacy_windows=False, _environ={})
    monkeypatch.setattr(display, "errors", console)
    return shown


def lines(terminal: io.StringIO) -> list[str]:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue().replace("\r", "\n")).splitlines()


def train(progress: LiveProgress) -> None:
    with progress:
        progress.begin("training", 20_480_000, "tokens", done=20_479_000)
        for step in range(1, 11):
            fvu = 2.0**-step
            progress.advance(100, f"loss {150 * fvu:.3f}  FVU {fvu:.4f}  L0 121.5  alpha {step / 10:.2f}")
            progress._bars.refresh()  # pyright: ignore[reportPrivateUsage]
        progress.end()


def test_a_training_shows_where_it_is_and_its_curve_within_the_width(terminal: io.StringIO) -> None:
    train(LiveProgress(curve="FVU"))
    shown = lines(terminal)
    assert max(map(len, shown)) <= 80
    assert not any("…" in line for line in shown)
    assert any(
        re.search(r"training ━+ 20,480,000/20,480,000 tokens [\d,]+/s \d:\d\d:\d\d", line) for line in shown
    )
    assert "  loss 0.146  FVU 0.0010  L0 121.5  alpha 1.00  █▇▆▆▅▄▃▃▂▁" in [line.rstrip() for line in shown]
    assert "FVU" not in shown[-1], "the last note does not stay"


def test_of_several_trainings_no_curve_is_drawn(terminal: io.StringIO) -> None:
    train(LiveProgress())
    assert "FVU 0.0010" in terminal.getvalue()
    assert not re.search("[▁▂▃▄▅▆▇█]", terminal.getvalue())


def test_nothing_stays_of_a_bar_that_was_interrupted(terminal: io.StringIO) -> None:
    def train_until_interrupted() -> None:
        with LiveProgress() as progress:
            progress.begin("training", 100, "tokens")
            progress.advance(1, "FVU 0.5")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_until_interrupted()
    _, after_the_note = terminal.getvalue().rsplit("FVU 0.5", 1)
    up_and_wiped = "\x1b[1A\x1b[2K"
    assert after_the_note.endswith(2 * up_and_wiped), "the bar and the note below it"


def test_bytes_are_shown_for_people(terminal: io.StringIO) -> None:
    with LiveProgress() as progress:
        progress.begin("verifying", 214_000_000_000, "bytes")
        progress.advance(214_000_000_000)
        progress.end()
    assert any("214.00 GB/214.00 GB" in line for line in lines(terminal))


def test_help_fills_the_width_that_there_is(posae: Posae, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert (
        "it resumes where it stopped; --layers may add layers. Several processes may share"
        in posae("harvest", "--help").out
    )
