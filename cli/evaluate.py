"""``posae evaluate``: score a run on held-out contexts."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from ..pipeline.settings import EvaluateSettings, resolve_settings
from .display import LiveProgress, console
from .options import Cache, CacheSize, Config, with_settings
from .report import comparison


@with_settings(EvaluateSettings)
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    options: dict[str, Any],
    config: Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
    cache: Cache = None,
    cache_size: CacheSize = None,
) -> None:
    """Score a run on the held-out part of its store, and write evaluation.json into it.

    With --ce-loss the language model runs too; its scores then stay in evaluation.json.

    Example: posae evaluate runs/paper --ce-loss
    """
    settings = resolve_settings(EvaluateSettings, presets={}, config=config, options=options)
    from ..pipeline.device import keep_freed_memory
    from ..pipeline.evaluate.evaluate import evaluate as score
    from ..pipeline.evaluate.scoring.evaluation import parse_evaluation
    from .show_scores import show_scores

    keep_freed_memory()
    with LiveProgress() as progress:
        evaluation = score(run, settings, progress)
    if as_json:
        from ..pipeline.report.measured import Measured
        from ..pipeline.report.notes import notes

        on_run = [note.text for note in notes([Measured(str(run), evaluation=evaluation)])]
        typer.echo(json.dumps(evaluation | ({"notes": on_run} if on_run else {})))
    else:
        console.print(comparison([run]))
        show_scores(parse_evaluation(evaluation, run))
        if evaluation["probing"]:
            console.print(probing_table(evaluation["probing"]))


def probing_table(probing: dict[str, Any]) -> Table:
    """Accuracy of probes on k activations and on k features: one line per task, and the mean."""
    data: dict[str, Any] = probing.get("data") or {}
    is_seen = data.get("contexts") == "all"
    seen = "; rows include contexts that the run was trained on" if is_seen else ""
    about = "accuracy in %: chance is 50, ± one standard error"
    table = Table(
        title=f"sparse probing ({probing['source']}), {about}{seen}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("task", overflow="fold")
    table.add_column("of", no_wrap=True)
    for k in ("k = 1", "2", "5", "all"):
        table.add_column(k, justify="right", no_wrap=True)
    means = {name: task["mean"] for name, task in probing["tasks"].items()} | {"mean": probing["mean"]}
    for name, mean in means.items():
        if not mean:
            table.add_row(name, "too few rows")
            continue
        for i, (probed, by_k) in enumerate(mean.items()):
            scores = [f"{100 * s['accuracy']:.1f} ±{100 * s['standard_error']:.1f}" for s in by_k.values()]
            table.add_row("" if i else name, probed, *scores)
    return table
