"""``posae report``: how runs compare, whether position helped, and verdicts on the paper's claims."""

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
    from ..pipeline.report.tables import Table as TextTable

_ANY_WIDTH = 10_000
_N_FEATURES = 300

_SPARED = ("time", "seeds", "architecture", "features", "dead")
"""Columns left out on a narrow terminal, in this order."""


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of evaluated runs, or of sweeps.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            callback=on_this_machine,
            help="Write a page with figures (page.html), or tables (report.md), instead of printing.",
        ),
    ] = None,
    features: Annotated[
        int | None,
        typer.Option(
            min=0,
            help=f"Features that a page shows of each run, 0 for none; by default {_N_FEATURES}, none of "
            "a sweep. Of several seeds, the first is shown.",
            show_default=False,
        ),
    ] = None,
    contexts: Annotated[
        int, typer.Option(min=1, help="Maximum held-out contexts to scan for top activations.")
    ] = 1024,
    tokenizer: Annotated[
        str | None, typer.Option(help="Hub id or folder of the tokenizer, to show tokens as text.")
    ] = None,
    cache: Cache = None,
    cache_size: CacheSize = None,
) -> None:
    """Compare runs by their scores, and judge the claims that a sweep was made for.

    A page also shows features: where each one fires, and on what text. This reads the runs' stores.

    Example: posae report runs/paper runs/baseline --out page.html
    """
    if features and (out is None or out.suffix != ".html"):
        raise SettingsError("--features applies to pages only; add --out page.html, or leave --features out")
    from ..pipeline.report.report import as_json as in_json
    from ..pipeline.report.report import collect, write

    collected = collect(runs)
    if out is not None:
        n_features = (0 if collected.studies else _N_FEATURES) if features is None else features
        explored: list[Explored | Unexplored] = []
        if out.suffix == ".html" and n_features:
            from ..pipeline.report.explore import explore_runs

            with LiveProgress() as progress:
                explored = explore_runs(
                    collected.named(),
                    n_features=n_features,
                    n_contexts=contexts,
                    tokenizer=tokenizer,
                    progress=progress,
                )
        write(collected, out, explored)
    if as_json:
        typer.echo(json.dumps(in_json(collected)))
    elif out is None:
        console.print(_shown(collected))
    else:
        console.print(f"{out}: written", soft_wrap=True)


def comparison(runs: list[Path]) -> Group:
    """Scores of runs, then the same by position range."""
    from ..pipeline.report.report import collect

    return _shown(collect(runs))


def _shown(collected: "Report") -> Group:
    """Everything; the answers last, next to the prompt."""
    tables = (*collected.measurements(), *collected.answers())
    parts: list[Table | Text] = [_rich(part) for table in tables for part in _fitting(table)]
    if not collected.studies:
        parts.append(Text("\n".join(f"{Path(run.folder).name}: {run.folder}" for run in collected.runs)))
    parts += [Text(f"note: {note.text}") for note in collected.notes()]
    return Group(*parts)


def _fitting(table: "TextTable") -> "list[TextTable]":
    """The table in a form that fits the terminal with whole names of runs, as far as possible.

    Less important columns are left out first; a table that is still too wide becomes two with half the
    figures each.
    """
    left_out: list[str] = []
    for name in _SPARED:
        if name in table.columns and not _fits(table):
            table = table.without(name)
            left_out.append(name)
    if left_out:
        table = table._replace(title=f"{table.title} (no room for {', '.join(left_out)})")
    n_figures = len(table.columns) - table.n_left
    if n_figures < 2 or _fits(table):
        return [table]
    return [part for half in table.halves() for part in _fitting(half)]


def _fits(table: "TextTable") -> bool:
    if table.n_left == len(table.columns):
        return True  # sentences wrap
    return _width(_rich(table)) <= console.width


def _width(table: Table) -> int:
    return console.measure(table, options=console.options.update(max_width=_ANY_WIDTH)).maximum


def _rich(table: "TextTable") -> Table:
    grid = Table(
        title=table.title, title_justify="left", pad_edge=False, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    whole = {"architecture", "answer", "verdict"}
    if is_short(row[0] for row in table.rows):
        whole.add("run")
    for number, name in enumerate(table.columns):
        is_figure = number >= table.n_left
        grid.add_column(
            name,
            justify="right" if is_figure else "left",
            overflow="fold",
            no_wrap=is_figure or name in whole,
        )
    for row in table.rows:
        grid.add_row(*_cells(row, table.n_left))
    has_figures = table.n_left < len(table.columns)
    if has_figures and _width(grid) > console.width:
        # Narrower gaps before a run's name wraps.
        grid.padding = 0
        if _width(grid) > console.width:
            grid.columns[0].no_wrap = False  # wrapped rather than cut
    return grid


def _cells(row: Iterable[str], n_left: int) -> list[Text]:
    from ..pipeline.report.tables import COLOURS

    def style(number: int, cell: str) -> str:
        return f"bold {COLOURS[cell]}" if 0 < number < n_left and cell in COLOURS else ""

    return [Text(cell, style=style(number, cell)) for number, cell in enumerate(row)]
