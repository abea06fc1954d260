"""``posae report``: how runs compare."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from .display import console


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of evaluated runs.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """Compare runs by their scores on the held-out part.

    Example: posae report runs/paper runs/baseline
    """
    if as_json:
        typer.echo(json.dumps([{"run": str(run), **_scores(run)} for run in runs]))
    else:
        console.print(comparison(runs))


def comparison(runs: list[Path]) -> Group:
    """The scores of runs, a line each, and below them by position range."""
    scores = [_scores(run) for run in runs]
    layers = {found["layer"] for found in scores}
    one_layer = f", layer {layers.pop()}" if len(layers) == 1 else ""
    labels = [
        run.name if one_layer else f"{run.name}, layer {found['layer']}"
        for run, found in zip(runs, scores, strict=True)
    ]
    table = _table(f"scores on the held-out part{one_layer}")
    table.add_column("architecture", no_wrap=True)
    for name in ("features", "parameters", "L0", "FVU", "dead"):
        table.add_column(name, justify="right", no_wrap=True)
    for label, found in zip(labels, scores, strict=True):
        overhead = found["n_parameters"] / found["n_base_parameters"] - 1
        table.add_row(
            label,
            found["architecture"],
            f"{found['dictionary_size']:,}",
            f"{found['n_parameters']:,}" + (f" (+{overhead:.0%})" if overhead else ""),
            f"{found['l0']:.1f}",
            _number(found["fvu"]),
            f"{found['dead_fraction']:.1%}",
        )
    by_range = _table("FVU by position range")
    ranges = list(dict.fromkeys(name for found in scores for name in found["ranges"]))
    for name in ranges:
        by_range.add_column(name, justify="right")
    for label, found in zip(labels, scores, strict=True):
        values = dict(zip(found["ranges"], found["fvu_by_range"], strict=True))
        by_range.add_row(label, *(_number(values[name]) if name in values else "" for name in ranges))
    where = Text("\n".join(f"{run.name}: {run}" for run in runs))
    return Group(table, by_range, where)


def _table(title: str) -> Table:
    table = Table(
        title=title, title_justify="left", pad_edge=False, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("run", overflow="fold")
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _scores(run: Path) -> dict[str, Any]:
    from ..pipeline.runs import Run

    return Run(run).evaluation
