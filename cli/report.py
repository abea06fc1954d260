"""``posae report``: how runs compare, whether position helped, and what became of the paper's claims."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..store.errors import SettingsError
from .display import LiveProgress, console, is_short
from .options import Cache, CacheSize, on_this_machine

if TYPE_CHECKING:
    from ..pipeline.report.page.explored import Explored, Unexplored
    from ..pipeline.report.report import Report
    from ..pipeline.report.tables import Table as Words

_ANY_WIDTH = 10_000
_N_FEATURES = 300

_SPARED = ("time", "seeds", "architecture", "features", "dead")
"""Columns that a narrow terminal goes without, the first ones first."""

_COLOURS = {
    **dict.fromkeys(("holds", "helped"), "bold green"),
    **dict.fromkeys(("does not hold", "did not help"), "bold red"),
    "cannot be told": "yellow",
}


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of evaluated runs, or of sweeps.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            callback=on_this_machine,
            help="Write a page with figures (page.html), or tables (report.md), instead.",
        ),
    ] = None,
    features: Annotated[
        int | None,
        typer.Option(
            min=0,
            help=f"Features of each run that a page shows, by default {_N_FEATURES}, 0 for none; of a sweep "
            "by default none, and else of the first seed of each run.",
            show_default=False,
        ),
    ] = None,
    contexts: Annotated[
        int, typer.Option(min=1, help="Held-out contexts that are looked through for them, at most.")
    ] = 1024,
    tokenizer: Annotated[
        str | None, typer.Option(help="Hub id or folder of the tokenizer that shows tokens as text.")
    ] = None,
    cache: Cache = None,
    cache_size: CacheSize = None,
) -> None:
    """Compare runs by their scores on the held-out part, and judge what a sweep was made for.

    A page also shows features: where each fires, and on what text. For that the runs' stores are read.

    Example: posae report runs/paper runs/baseline --out page.html
    """
    if features and (out is None or out.suffix != ".html"):
        raise SettingsError("--features shows features on a page; add --out page.html, or leave it out")
    from ..pipeline.report.report import as_json as in_json
    from ..pipeline.report.report import collect, write

    found = collect(runs)
    if out is not None:
        n_features = (0 if found.studies else _N_FEATURES) if features is None else features
        explored: list[Explored | Unexplored] = []
        if out.suffix == ".html" and n_features:
            from ..pipeline.report.explore import explore_runs

            with LiveProgress() as progress:
                explored = explore_runs(
                    found.named(),
                    n_features=n_features,
                    n_contexts=contexts,
                    tokenizer=tokenizer,
                    progress=progress,
                )
        write(found, out, explored)
    if as_json:
        typer.echo(json.dumps(in_json(found)))
    elif out is None:
        console.print(_shown(found))
    else:
        console.print(f"{out}: written", soft_wrap=True)


def comparison(runs: list[Path]) -> Group:
    """The scores of runs, a line each, and below them by position range."""
    from ..pipeline.report.report import collect

    return _shown(collect(runs))


def _shown(found: "Report") -> Group:
    """Everything, the answers last, where a terminal's reader looks first."""
    tables = (*found.measurements(), *found.answers())
    parts: list[Table | Text] = [_rich(words) for whole in tables for words in _fitting(whole)]
    if not found.studies:
        parts.append(Text("\n".join(f"{Path(run.folder).name}: {run.folder}" for run in found.runs)))
    parts += [Text(f"note: {note.words}") for note in found.notes()]
    return Group(*parts)


def _fitting(words: "Words") -> "list[Words]":
    """The table so that names of runs stay whole, as far as the terminal is wide enough.

    Columns that can be spared go first; what is still too wide becomes two tables of half the figures each.
    """
    left_out: list[str] = []
    for name in _SPARED:
        if name in words.columns and not _fits(words):
            words = words.without(name)
            left_out.append(name)
    if left_out:
        words = words._replace(title=f"{words.title} (no room for {', '.join(left_out)})")
    n_figures = len(words.columns) - words.n_left
    if n_figures < 2 or _fits(words):
        return [words]
    return [part for half in words.halves() for part in _fitting(half)]


def _fits(words: "Words") -> bool:
    if words.n_left == len(words.columns):
        return True  # sentences are folded
    table = _rich(words)
    return _width(table) <= console.width


def _width(table: Table) -> int:
    return console.measure(table, options=console.options.update(max_width=_ANY_WIDTH)).maximum


def _rich(words: "Words") -> Table:
    table = Table(
        title=words.title, title_justify="left", pad_edge=False, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    answers = _COLOURS.keys() & {cell for row in words.rows for cell in row}
    whole = {"architecture", "answer", "verdict"}
    if is_short(row[0] for row in words.rows):
        whole.add("run")
    for number, name in enumerate(words.columns):
        is_figure = number >= words.n_left
        table.add_column(
            name,
            justify="right" if is_figure else "left",
            overflow="fold",
            no_wrap=is_figure or name in whole,
        )
    for row in words.rows:
        table.add_row(*_cells(row, answers))
    has_figures = words.n_left < len(words.columns)
    if has_figures and _width(table) > console.width:
        # Closer together, before a run's name is cut in two.
        table.padding = 0
        if _width(table) > console.width:
            table.columns[0].no_wrap = False  # cut in two, not off
    return table


def _cells(row: Iterable[str], answers: Iterable[str]) -> list[Text]:
    return [Text(cell, style=_COLOURS[cell] if cell in answers else "") for cell in row]
