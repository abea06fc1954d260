"""``posae evaluate``: scores of a run on contexts that it never saw."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..pipeline.settings import EvaluateSettings, resolve_settings
from .display import LiveProgress, console
from .options import Config, with_settings
from .report import comparison


@with_settings(EvaluateSettings)
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    options: dict[str, Any],
    config: Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """Score a run on the held-out part of its store, and write evaluation.json into it.

    With --ce-loss the language model runs too; its scores then stay in evaluation.json.

    Example: posae evaluate runs/paper --ce-loss
    """
    settings = resolve_settings(EvaluateSettings, "evaluate", presets={}, config=config, options=options)
    from ..pipeline.evaluate import evaluate as score
    from ..pipeline.scoring.evaluation import parse_evaluation
    from .show_scores import show_scores

    with LiveProgress() as progress:
        found = score(run, settings, progress)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        console.print(comparison([run]))
        show_scores(parse_evaluation(found, run))
